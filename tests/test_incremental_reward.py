"""A candidate's score from its new tokens only is the score of the whole text."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from internals import assert_idle, worker
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.decoding import Cards, FixedLength, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.errors import RewardError
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, Conversation, RemoteReward, Response, RewardLoader
from cards_integrations.rewards.base import scores
from cards_integrations.rewards.scorers.head import Head
from cards_integrations.rewards.scorers.incremental import IncrementalClassifier
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.rewards.scorers.rescoring import RescoringClassifier
from cards_integrations.trace import Usage

WORDS = range(6, 48)
FLOAT32 = Placement(dtype="float32")
TURNS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}END{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@torch.inference_mode()
def full_score(model: Any, ids: Sequence[int]) -> float:
    inputs = torch.tensor([list(ids)])
    return float(model(inputs, attention_mask=torch.ones_like(inputs)).logits[0, 0])


def incremental(model: Any, tokenizer: Any, same_vocabulary: bool, **settings: Any) -> IncrementalClassifier:
    reward = ClassifierReward(model="tiny", **settings)
    form = InputFormat(ChatTokenizer(tokenizer), reward.prompt_format, reward.end_of_turn)
    head = Head(reward.label, reward.output, model.config.id2label)
    return IncrementalClassifier(reward.name, model, form, head, same_vocabulary)


@pytest.mark.parametrize("end", ["</assistant>", "</assistant>\n", "</s>", "</s>\n"])
async def test_a_score_is_the_one_of_the_whole_template(tmp_path: Path, end: str) -> None:
    """Where transformers reads it, though turns end with the token that also pads; a server reads the last token."""
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template = TURNS.replace("END", end.replace("\n", "{{ '\n' }}"))
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny.classifier(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the mat"}]
    whole = tokenizer.apply_chat_template(said, return_dict=False)
    expected = full_score(model, whole)

    talk = Conversation("the cat", Usage())
    response = Response(talk, "the mat", finished=True)
    reward = incremental(model, tokenizer, True)
    reward.open(talk)
    assert await scores(reward, [response]) == [pytest.approx(expected, abs=1e-5)]

    remote = RemoteReward(url="http://judge", protocol="classify", tokenizer=tiny.save(tmp_path, model, tokenizer))
    body = remote.build(RewardLoader(ModelLoader(FLOAT32))).body([response])  # type: ignore[attr-defined]
    [ids] = body["input"]
    model.config.pad_token_id = None
    assert full_score(model, ids) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("padding", [None, "</s>"])
def test_an_end_of_turn_is_read_where_the_model_knows_no_padding(
    tmp_path: Path, models: Callable[..., str], start: Start, padding: str | None
) -> None:
    """Whatever the tokenizer pads with, transformers then reads the score at the last token."""
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template, tokenizer.pad_token = TURNS.replace("END", "</s>"), padding
    model = tiny.classifier(vocab_size=len(tokenizer), pad_token_id=None)
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the mat"}]
    expected = full_score(model, tokenizer.apply_chat_template(said, return_dict=False))
    reward = ClassifierReward(model=tiny.save(tmp_path, model, tokenizer))
    assert start(models("llama")).score(reward, "the cat", ["the mat"]) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize(("family", "rounded"), tiny.SCORED_RUNS)
async def test_scores_of_growing_answers(family: str, rounded: bool) -> None:
    model, tokenizer = tiny.classifier(family), tiny.words()
    reward, dice = incremental(model, tokenizer, True), random.Random(0)
    reward.transformer._hidden.rounding = rounded
    prompts = ["w7 w8 w9", "w10", "w11 w12 w13 w14 w15 w16 w17"]
    talks = [Conversation(prompt, Usage()) for prompt in prompts]
    kept: dict[Conversation, list[int]] = {talk: [] for talk in talks}
    for talk in talks:
        reward.open(talk)
        reward.keep(await scored(reward, model, tokenizer, [Response(talk, "", [])]))
    for turn in range(6):
        if turn == 3:
            reward.close(talks.pop(0))
        candidates = [
            Response(talk, "", kept[talk] + dice.choices(WORDS, k=k))
            for talk in talks
            for k in dice.choices(range(5), k=3)
        ]
        await scored(reward, model, tokenizer, candidates)
        for talk in talks:
            mine = [c for c in candidates if c.conversation is talk]
            best = dice.choice(mine)
            for other in mine:
                if other is not best:
                    reward.drop(other)
            reward.keep(best)
            kept[talk] = best.ids or []


async def scored(reward: IncrementalClassifier, model: Any, tokenizer: Any, responses: list[Response]) -> Response:
    """The last response, after all of them were scored right."""
    whole = [tokenizer(r.conversation.prompt)["input_ids"] + (r.ids or []) for r in responses]
    assert await reward.score(responses) == pytest.approx([full_score(model, ids) for ids in whole], abs=1e-4)
    return responses[-1]


@pytest.mark.parametrize("template", [None, tiny.CHAT], ids=["plain", "chat"])
async def test_another_tokenizer_whose_tokens_merge_across_candidates(template: str | None) -> None:
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template = template
    model = tiny.classifier(vocab_size=280)
    reward = incremental(model, tokenizer, False)
    talk = Conversation("the dog sat on the mat and the cat ran away. " * 4, Usage())
    reward.open(talk)
    frame = reward.input_format.around(talk)
    start, end = frame.before, frame.after
    suffix = tokenizer(end)["input_ids"]
    assert bool(suffix) == bool(template)

    kept, whole_tokens, shifted = "", 0, 0
    for pieces in [
        ["the c", "th", "a d"],
        ["at sa", "og r", "x"],
        ["t on th", "an a", "\u00e9"],
        ["e mat.", "way", ""],
    ]:
        texts = [kept + piece for piece in pieces]
        ids = [tokenizer(start + text)["input_ids"] + suffix for text in texts]
        responses = [Response(talk, text) for text in texts]
        assert await reward.score(responses) == pytest.approx([full_score(model, i) for i in ids], abs=1e-4)
        before = tokenizer(start + kept)["input_ids"]
        shifted += sum(i[: len(before)] != before for i in ids)
        whole_tokens += sum(map(len, ids))
        reward.keep(responses[0])
        reward.drop(responses[1])
        reward.drop(responses[2])
        kept = texts[0]
    assert shifted > 0
    assert talk.usage.rm_tokens < whole_tokens / 2.5
    assert reward.transformer.tokens == talk.usage.rm_tokens
    reward.close(talk)
    assert not reward.transformer.cache.trees


@pytest.mark.parametrize("template", [None, tiny.CHAT], ids=["plain", "chat"])
def test_every_reward_in_the_trace_is_the_whole_text_s(
    models: Callable[..., str], start: Start, tmp_path: Path, template: str | None
) -> None:
    """The engine with a reward model that has another tokenizer, and answers that end in several ways."""
    tokenizer, model = tiny.byte_pairs(), tiny.classifier(vocab_size=280, max_position_embeddings=1024)
    tokenizer.chat_template = template
    judge = ClassifierReward(model=tiny.save(tmp_path, model, tokenizer))
    decoding = Cards(target_reward=2.0, beta=0.5, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=6))
    prompt = "w7 w8 w9 w10 w11"
    requests = [
        Request(prompt, decoding, judge, Sampler(temperature=1.0), 30, stop=("w4", "0 w1"), seed=seed)
        for seed in range(8)
    ]
    form = InputFormat(ChatTokenizer(tokenizer), judge.prompt_format, judge.end_of_turn)
    frame = form.around(Conversation(prompt, Usage()))
    before, after = frame.before, frame.after

    def whole(text: str) -> list[int]:
        return tokenizer(before + text)["input_ids"] + tokenizer(after)["input_ids"]

    read = whole_tokens = 0
    for alignment in start(models("llama"), width=1).run_many(requests):
        kept = ""
        for segment in alignment.segments:
            for draft in segment.drafts:
                if draft.token_ids and not draft.text:
                    continue  # its stop string begins in what was kept, and that is cut, too
                ids = whole(kept + draft.text)
                assert draft.reward == pytest.approx(full_score(model, ids), abs=1e-4)
                whole_tokens += len(ids)
            kept += segment.text
        assert alignment.reward == pytest.approx(full_score(model, whole(alignment.text)), abs=1e-4)
        read += alignment.usage.rm_tokens
    assert read < whole_tokens / 2


async def test_padding_at_the_end_is_not_where_the_score_is_read() -> None:
    """Transformers reads the score at the last token that is not padding; so do we."""
    model, tokenizer = tiny.classifier(), tiny.words()
    reward, talk = incremental(model, tokenizer, True), Conversation("w7 w8", Usage())
    reward.open(talk)
    for ids in [[20, tiny.PAD], [20, tiny.PAD, 21], [tiny.PAD, tiny.PAD]]:
        response = Response(talk, "", ids)
        whole = tokenizer(talk.prompt)["input_ids"] + ids
        assert await reward.score([response]) == pytest.approx([full_score(model, whole)], abs=1e-4)
        reward.keep(response)


def within(whole: list[int], prompt: int, window: int) -> list[int]:
    """What is read of a text: its beginning is left out in quarters of the window, but never all of the prompt."""
    surplus, step = max(0, len(whole) - window), window // 4
    return whole[min(math.ceil(surplus / step) * step, prompt - 1) if surplus else 0 :]


@pytest.mark.parametrize("template", [None, tiny.CHAT], ids=["plain", "chat"])
def test_a_full_window_is_not_read_again_for_each_candidate(
    models: Callable[..., str], start: Start, tmp_path: Path, template: str | None
) -> None:
    """The window moves in steps, and between two of them a candidate costs its own tokens."""
    window, prompt, length, room = 128, " ".join(f"w{7 + i % 40}" for i in range(150)), 4, 80
    tokenizer = tiny.words(eos_token=None)
    tokenizer.chat_template = template
    model = tiny.classifier(max_position_embeddings=window)
    judge = ClassifierReward(model=tiny.save(tmp_path / "judge", model, tokenizer))
    drafter = tiny.save(tmp_path / "model", tiny.causal(eos_token_id=None), tiny.words(eos_token=None))
    engine = start(drafter, width=4)
    method = Cards(target_reward=9.0, acceptance="hard", max_rejections=6, boundary=FixedLength(length=length))
    answer = engine.run(Request(prompt, method, judge, max_tokens=room, seed=1))
    drafts = sum(len(segment.drafts) for segment in answer.segments)
    suffix, moves = 1 if template else 0, room // (window // 4) + 2
    assert drafts == 7 * room // length
    assert answer.usage.rm_tokens <= drafts * (length + suffix) + (moves + 1) * window
    before, after = (f"<user> {prompt} </user> <assistant> ", " </assistant>") if template else (prompt, "")
    before_ids, kept = tokenizer(before)["input_ids"], list[int]()
    for segment in answer.segments:
        for draft in segment.drafts[::3]:
            whole = [*before_ids, *kept, *draft.token_ids, *tokenizer(after)["input_ids"]]
            while whole[-1] == tiny.PAD:  # is not where the score is read
                whole.pop()
            fitting = within(whole, len(before_ids), window)
            assert draft.reward == pytest.approx(full_score(model, fitting), abs=1e-4)
        kept += segment.token_ids
    assert_idle(engine)


@pytest.mark.parametrize("template", [None, tiny.CHAT], ids=["plain", "chat"])
def test_a_prompt_loses_its_beginning_where_the_window_is_full(
    models: Callable[..., str], start: Start, tmp_path: Path, template: str | None
) -> None:
    """Of the answer, and of what the template writes after it, nothing is lost; if that alone is too long, it fails."""
    tokenizer, model, window = tiny.words(), tiny.classifier(max_position_embeddings=12), 12
    tokenizer.chat_template = template
    judge = ClassifierReward(model=tiny.save(tmp_path, model, tokenizer))
    prompt, engine = "w7 w8 w9 w10 w11 w12 w13", start(models("llama"), width=4)
    before, after = ("<user> " + prompt + " </user> <assistant> ", " </assistant>") if template else (prompt + " ", "")
    decoding = Cards(target_reward=3.0, beta=0.5, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=4))
    alignments = engine.run_many([Request(prompt, decoding, judge, max_tokens=10, seed=seed) for seed in range(4)])
    cut = 0
    for alignment in alignments:
        kept: list[int] = []
        for segment in alignment.segments:
            for draft in segment.drafts:
                whole = tokenizer(before)["input_ids"] + kept + [*draft.token_ids] + tokenizer(after)["input_ids"]
                while whole[-1] == tiny.PAD:  # is not where the score is read
                    whole.pop()
                fitting = within(whole, len(tokenizer(before)["input_ids"]), window)
                assert draft.reward == pytest.approx(full_score(model, fitting), abs=1e-4)
                cut += len(whole) > window
            kept += segment.token_ids
    assert cut > 5
    longest = window - 1 - bool(template)
    texts = [" " + tokenizer.decode([*range(20, 20 + n)]) for n in (longest, longest + 1)]
    whole = tokenizer(before + texts[0] + after)["input_ids"]
    fitting = within(whole, len(tokenizer(before)["input_ids"]), window)
    assert engine.score(judge, prompt, texts[:1]) == pytest.approx([full_score(model, fitting)], abs=1e-4)
    with pytest.raises(RewardError, match=rf"the answer takes {window} tokens.*{window} of its window.*max_tokens"):
        engine.score(judge, prompt, texts[1:])


@pytest.mark.parametrize("family", ["bert", "bloom"])
def test_a_classifier_without_a_tree_cache_rescores(tmp_path: Path, start: Start, models: Any, family: str) -> None:
    model, tokenizer = tiny.classifier(family, num_labels=2), tiny.words()
    folder = tiny.save(tmp_path, model, tokenizer)
    texts = ["", "w7", "w9 w8 w7 w6 w20 w21 w30", "w40 w41"]
    engine = start(models("llama"))
    inputs = [torch.tensor([tokenizer("w7 w8 " + text)["input_ids"]]) for text in texts]
    logits = torch.cat([model(ids, attention_mask=torch.ones_like(ids)).logits for ids in inputs]).detach()
    log_odds = logits[:, 1] - logits[:, 0]
    for output, expected in [("logit", logits[:, 1]), ("probability", log_odds.sigmoid()), ("log_odds", log_odds)]:
        reward = ClassifierReward(model=folder, label="LABEL_1", output=output, prompt_format="{prompt} {response}")
        assert engine.score(reward, "w7 w8", texts) == pytest.approx(expected.tolist(), abs=1e-4)
        assert isinstance(worker(engine).rewards.built[reward], RescoringClassifier)


@pytest.fixture(scope="module")
def adapter(models: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A low-rank adapter with a head, on the language model's own body."""
    torch.manual_seed(0)
    body = AutoModelForSequenceClassification.from_pretrained(models("llama"), num_labels=1)
    settings = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    model = get_peft_model(body, settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return str(folder)


def test_a_classifier_on_the_language_model_s_body_shares_its_weights(models: Callable[..., str], adapter: str) -> None:
    spec = LocalModel(model=models("llama"))
    judge = spec.model_copy(update={"adapter": adapter})
    loader = ModelLoader(FLOAT32)
    causal, tokenizer = loader.causal(spec)
    ids = tokenizer("w7 w8 w9 w10", return_tensors="pt")["input_ids"]
    before = causal(ids).logits
    shared, _ = loader.classifier(judge)
    unshared, _ = ModelLoader(FLOAT32).classifier(judge)

    mine = {weight.data_ptr() for weight in causal.parameters()}
    own = [name for name, weight in shared.named_parameters() if weight.data_ptr() not in mine]
    assert own
    assert all(name.endswith(("q_proj.weight", "v_proj.weight", "score.weight")) for name in own)
    body = len([*causal.base_model.parameters()])
    assert sum(weight.data_ptr() in mine for weight in shared.parameters()) == body - len(own) + 1
    assert full_score(shared, ids[0].tolist()) == pytest.approx(full_score(unshared, ids[0].tolist()), abs=1e-4)
    assert torch.equal(causal(ids).logits, before)


def test_the_shared_body_guides(models: Callable[..., str], adapter: str, start: Start) -> None:
    judge = ClassifierReward(model=models("llama"), adapter=adapter)
    decoding = Cards(target_reward=1.0, beta=0.5, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=6))
    engine = start(models("llama"), width=4)
    requests = [Request("w7 w8 w9", decoding, judge, max_tokens=16, seed=seed) for seed in range(4)]
    model, _ = ModelLoader(FLOAT32).classifier(LocalModel(model=models("llama"), adapter=adapter))
    tokenizer = AutoTokenizer.from_pretrained(models("llama"))
    for alignment in engine.run_many(requests):
        whole = tokenizer("w7 w8 w9")["input_ids"] + list(alignment.token_ids)
        assert alignment.reward == pytest.approx(full_score(model, whole), abs=1e-4)
