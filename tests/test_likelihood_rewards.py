"""An implicit reward is what two plain models say of the whole text, at the price of what is new in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from internals import assert_idle, language_model, worker
from naive import Freed, drafts, ids, log_p, lora, parameters, said
from peft import PeftModel
from transformers import AutoTokenizer

from cards_integrations.decoding import Cards, FixedLength, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.errors import RewardError
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import Conversation, ImplicitReward, Response, RewardLoader
from cards_integrations.trace import Alignment, Usage

PROMPT = "w9 w20 w31 w5"
LONG = " ".join(f"w{6 + at * 7 % 42}" for at in range(90))  # longer than what is looked up in finished texts
CHATTED = "<user> {} </user>\n<assistant> "
GUIDED = Cards(target_reward=1.0, beta=0.7, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=6))
WORDS = tiny.words()
STOP = ("5 w1", "w45")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tmp_path_factory.mktemp("tuned"), tiny.causal(seed=5), tiny.words())


@pytest.fixture(scope="module")
def other_words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokens are pieces of words, and merge across candidates."""
    model = tiny.causal("mistral", 6, vocab_size=280, max_position_embeddings=1024)
    return tiny.save(tmp_path_factory.mktemp("pieces"), model, tiny.byte_pairs())


def request(reward: ImplicitReward, seed: int, prompt: str = PROMPT, **options: Any) -> Request:
    settings = {"sampler": Sampler(temperature=1.0), "max_tokens": 24, "decoding": GUIDED, **options}
    return Request(prompt, reward=reward, seed=seed, **settings)


def assert_exact(
    alignments: list[Alignment],
    naive: Callable[[str, list[int] | None], float],
    stop: Sequence[str] = (),
    fewest: int = 40,
) -> None:
    """All rewards in the traces are `naive(text, ids)`; ids are None where a stop string cut the text."""
    seen = cuts = 0
    for alignment in alignments:
        for draft, whole in drafts(alignment):
            text, cut = said(WORDS, whole, stop)
            cuts += cut
            if text:  # see `test_an_answer_of_special_tokens`
                after = f" {text}"  # the prompt
                assert draft.reward == pytest.approx(naive(after, None if cut else whole), abs=1e-4)
                seen += 1
    assert seen > fewest
    assert bool(cuts) == bool(stop)
    assert any(len(segment.drafts) > 1 for a in alignments for segment in a.segments)


# --- the value ---


@pytest.mark.parametrize(
    ("family", "chat", "width"),
    [("llama", False, 1), ("gpt2", True, 8), ("gpt_neox", False, 8), ("gemma3_text", True, 1), ("mistral", False, 8)],
)
def test_another_model_with_the_same_tokens(
    models: Callable[..., str], start: Start, tmp_path: Path, family: str, chat: bool, width: int
) -> None:
    tokenizer, template = tiny.words(), tiny.CHAT if chat else None
    tokenizer.chat_template = template
    tuned = tiny.save(tmp_path, tiny.causal(family, 5), tokenizer)
    engine = start(models(family, chat_template=template), width=width)
    prompt = ids(CHATTED.format(PROMPT) if chat else PROMPT)
    own, other = tiny.causal(family), tiny.causal(family, 5)

    def naive(text: str, whole: list[int] | None) -> float:
        answer = ids(text) if whole is None else whole
        return 0.3 * (log_p(other, prompt, answer) - log_p(own, prompt, answer))

    reward = ImplicitReward(tuned=tuned, beta=0.3)
    assert_exact(engine.run_many([request(reward, seed, stop=STOP) for seed in range(8)]), naive, STOP)
    texts = ["w7", "", "w8 w9 w10 w11 w12 w13 w14 w15", "w7 w8"]
    assert engine.score(reward, PROMPT, texts) == pytest.approx([naive(t, None) for t in texts], abs=1e-4)
    assert engine.score(reward, PROMPT, [""]) == [0.0]
    assert_idle(engine)


@pytest.mark.parametrize("width", [1, 8])
def test_a_long_prompt_that_all_requests_share(
    models: Callable[..., str], start: Start, tuned: str, width: int
) -> None:
    """It is looked up in what is live or finished; the log p of the answer are all there nevertheless."""
    engine, reward = start(models("llama"), width=width), ImplicitReward(tuned=tuned)
    own, other, prompt = tiny.causal(), tiny.causal(seed=5), ids(LONG)

    def naive(text: str, whole: list[int] | None) -> float:
        return 0.1 * (log_p(other, prompt, whole or ids(text)) - log_p(own, prompt, whole or ids(text)))

    for seeds in (range(3), range(3, 6)):
        alignments = engine.run_many([request(reward, seed, LONG, max_tokens=14) for seed in seeds])
        assert_exact(alignments, naive, fewest=10)
    assert alignments[0].usage.cached_tokens > 60
    assert engine.score(reward, LONG, ["w7 w8"]) == pytest.approx([naive("w7 w8", None)], abs=1e-4)


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("which", ["tuned", "base"])
def test_another_model_with_other_tokens(
    models: Callable[..., str], start: Start, other_words: str, which: str, width: int
) -> None:
    """`which` model is the other one; None as the other is the language model."""
    engine, reward = (
        start(models("llama"), width=width),
        ImplicitReward.model_validate({which: other_words, "beta": 1.0}),
    )
    own, other = tiny.causal(), tiny.causal("mistral", 6, vocab_size=280, max_position_embeddings=1024)
    tokenizer, sign = tiny.byte_pairs(), 1 if which == "tuned" else -1
    decoding = GUIDED if which == "tuned" else GUIDED.model_copy(update={"target_reward": 300.0, "beta": 10.0})

    def naive(text: str, whole: list[int] | None) -> float:
        read = log_p(other, tokenizer(PROMPT)["input_ids"], tokenizer(text)["input_ids"])
        return sign * (read - log_p(own, ids(PROMPT), ids(text) if whole is None else whole))

    alignments = engine.run_many(
        [request(reward, seed, max_tokens=16, stop=STOP, decoding=decoding) for seed in range(8)]
    )
    assert_exact(alignments, naive, STOP)
    assert engine.score(reward, PROMPT, ["w7 w8 .", "! w9"]) == pytest.approx(
        [naive("w7 w8 .", None), naive("! w9", None)], abs=1e-4
    )


def test_two_other_models(models: Callable[..., str], start: Start, tuned: str, other_words: str) -> None:
    engine, reward = start(models("gpt2"), width=4), ImplicitReward(tuned=tuned, base=other_words)
    one, pieces = tiny.causal(seed=5), tiny.byte_pairs()
    other = tiny.causal("mistral", 6, vocab_size=280, max_position_embeddings=1024)

    def naive(text: str, whole: list[int] | None) -> float:
        base = log_p(other, pieces(PROMPT)["input_ids"], pieces(text)["input_ids"])
        return 0.1 * (log_p(one, ids(PROMPT), ids(text) if whole is None else whole) - base)

    decoding = GUIDED.model_copy(update={"target_reward": 50.0})
    assert_exact(engine.run_many([request(reward, seed, decoding=decoding) for seed in range(4)]), naive, fewest=20)


@pytest.mark.parametrize(("family", "targets"), [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"])])
def test_an_adapter_on_the_language_model(
    models: Callable[..., str], start: Start, tmp_path: Path, family: str, targets: list[str]
) -> None:
    spec = LocalModel(
        model=models(family), adapter=lora(tmp_path, models(family), targets, fan_in_fan_out=family == "gpt2")
    )
    own, engine = tiny.causal(family), start(models(family), width=2)
    merged, _ = ModelLoader(Placement(dtype="float32")).causal(spec)

    def naive(text: str, whole: list[int] | None) -> float:
        answer = ids(text) if whole is None else whole
        return log_p(merged, ids(PROMPT), answer) - log_p(own, ids(PROMPT), answer)

    reward = ImplicitReward(tuned=spec, beta=1.0)
    assert_exact(engine.run_many([request(reward, seed) for seed in range(6)]), naive)
    assert abs(naive("w7 w8 w9", None)) > 0.1


def test_width_changes_no_reward(models: Callable[..., str], start: Start, tuned: str) -> None:
    asked = [request(ImplicitReward(tuned=tuned), seed) for seed in range(4)]
    one, eight = (start(models("mistral"), width=width).run_many(asked) for width in (1, 8))
    for a, b in zip(one, eight, strict=True):
        assert a.token_ids == b.token_ids
        found = [[d.reward for d, _ in drafts(x)] for x in (a, b)]
        assert found[0] == pytest.approx(found[1], abs=1e-4)


# --- the price ---


def test_counts(models: Callable[..., str], start: Start, tuned: str) -> None:
    """The language model's own log p costs nothing; the other model reads the prompt once, for r(x), and of each draft
    the new tokens and one before them."""
    engine, reward = start(models("llama"), width=1), ImplicitReward(tuned=tuned)
    for seed in range(5):
        alignment = engine.run(request(reward, seed))
        new = [max(1, len(draft.token_ids)) + 1 for draft, _ in drafts(alignment)]
        assert len(new) > 8
        assert alignment.usage.rm_tokens == len(ids(PROMPT)) + sum(new)
        assert alignment.usage.rm_forwards == 1 + len(new)
    built = worker(engine).rewards.built[reward]
    assert built.models[1].transformer.tokens == 0  # type: ignore[attr-defined]
    assert built.models[0].transformer.tokens > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [1, 8])
def test_the_prompt_is_read_once(models: Callable[..., str], start: Start, tuned: str, width: int) -> None:
    """However many candidates there are before the first segment is kept."""
    unreachable = Cards(target_reward=1e3, acceptance="hard", max_rejections=7, boundary=GUIDED.boundary)
    asked = Request(LONG, unreachable, ImplicitReward(tuned=tuned), Sampler(temperature=1.0), 4, seed=1)
    alignment = start(models("llama"), width=width).run(asked)
    read = sum(len(draft.token_ids) + 1 for draft, _ in drafts(alignment))
    assert len(alignment.segments[0].drafts) == 8
    assert alignment.usage.rm_tokens <= len(ids(LONG)) + read


# --- weights ---


def test_one_adapter_of_two_rewards_is_loaded_once_and_shares_what_it_does_not_change(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    spec = LocalModel(model=models("llama"), adapter=lora(tmp_path, models("llama"), ["q_proj", "v_proj"]))
    engine = start(models("llama"), width=2)
    for reward in (ImplicitReward(tuned=spec), ImplicitReward(tuned=spec, beta=2.0)):
        engine.run(request(reward, 0, max_tokens=4))
    own = language_model(engine).model
    adapted, _ = worker(engine).loader.causal(spec)
    mine = {weight.data_ptr() for weight in own.parameters()}
    new = {name for name, weight in adapted.named_parameters() if weight.data_ptr() not in mine}
    assert new == {f"model.layers.{n}.self_attn.{which}_proj.weight" for n in (0, 1) for which in "qv"}
    assert parameters(engine) == sum(w.numel() for w in own.parameters()) + sum(
        w.numel() for name, w in adapted.named_parameters() if name in new
    )


@pytest.mark.parametrize(
    "bias",
    [
        "none",
        "all",
        "lora_only",
    ],
)
def test_an_adapter_leaves_the_language_model_as_it_was(tmp_path: Path, bias: str) -> None:
    model = tiny.save(tmp_path / "model", tiny.causal(attention_bias=True), tiny.words())
    spec = LocalModel(model=model)
    loader, words = ModelLoader(Placement(dtype="float32")), torch.tensor([ids(PROMPT)])
    own, _ = loader.causal(spec)
    before = own(words).logits
    adapter = lora(tmp_path, model, ["q_proj"], bias=bias)
    adapted, _ = loader.causal(spec.model_copy(update={"adapter": adapter}))
    assert float((adapted(words).logits - before).detach().abs().max()) > 0.1
    assert torch.equal(own(words).logits, before)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_layers_leaves_the_other(tmp_path: Path, target: str) -> None:
    """peft would merge it into the weights of both."""
    folder, words = tiny.save(tmp_path / "model", tiny.causal(tie_word_embeddings=True), tiny.words()), [ids(PROMPT)]
    adapter = lora(tmp_path, folder, [target])
    beside = PeftModel.from_pretrained(tiny.causal(tie_word_embeddings=True), adapter).eval()
    merged, _ = ModelLoader(Placement(dtype="float32")).causal(LocalModel(model=folder, adapter=adapter))
    with torch.inference_mode():
        found, expected = (model(input_ids=torch.tensor(words)).logits for model in (merged, beside))
        plain = tiny.causal(tie_word_embeddings=True)(torch.tensor(words)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float((found - plain).abs().max()) > 0.1


# --- edges ---


def within(prompt: list[int], answer: int, window: int) -> list[int]:
    """What is read of a prompt before so many tokens: quarters of the window are left out, but never all of it."""
    surplus, step = max(0, len(prompt) + answer - window), window // 4
    return prompt[min(-(-surplus // step) * step, len(prompt) - 1) :]


def test_drafts_beyond_the_window(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    """While it moves, and between two moves."""
    small, own = tiny.causal(seed=6, max_position_embeddings=32, eos_token_id=None), tiny.causal(eos_token_id=None)
    reward = ImplicitReward(tuned=tiny.save(tmp_path / "tuned", small, tiny.words(eos_token=None)), beta=1.0)
    engine = start(tiny.save(tmp_path / "model", own, tiny.words(eos_token=None)), width=4)
    text = " ".join(f"w{7 + i % 40}" for i in range(40))
    method = Cards(target_reward=0.5, beta=0.3, max_rejections=5, boundary=FixedLength(length=3))
    answer = engine.run(Request(text, method, reward, max_tokens=24, seed=2))
    prompt, kept, cuts = ids(text), list[int](), set()
    for segment in answer.segments:
        for draft in segment.drafts:
            whole = [*kept, *draft.token_ids]
            read = within(prompt, len(whole), 32)
            cuts.add(len(read))
            assert draft.reward == pytest.approx(log_p(small, read, whole) - log_p(own, prompt, whole), abs=1e-4)
        kept += segment.token_ids
    assert len(cuts) > 2
    assert_idle(engine)


def test_a_prompt_that_does_not_fit_loses_its_beginning(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    small = tiny.causal(seed=6, max_position_embeddings=12)
    reward = ImplicitReward(tuned=tiny.save(tmp_path, small, tiny.words()), beta=1.0)
    engine, prompt, own = start(models("llama")), ids("w7 w8 w9 w10 w11 w12 w13 w14"), tiny.causal()
    for n in (3, 4, 5, 8, 11):
        answer = [*range(20, 20 + n)]
        naive = log_p(small, within(prompt, n, 12), answer) - log_p(own, prompt, answer)
        found = engine.score(reward, "w7 w8 w9 w10 w11 w12 w13 w14", [WORDS.decode(answer)])
        assert found == pytest.approx([naive], abs=1e-4)


def test_an_answer_that_does_not_fit(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    small = tiny.save(tmp_path, tiny.causal(seed=6, max_position_embeddings=12), tiny.words())
    engine = start(models("llama"))
    with pytest.raises(RewardError, match=r"log p tuned.*12.*max_tokens"):
        engine.score(ImplicitReward(tuned=small), PROMPT, [WORDS.decode([*range(20, 32)])])
    with pytest.raises(RewardError, match=r"log p tuned.*12.*max_tokens"):
        engine.run(request(ImplicitReward(tuned=small), 0))
    assert_idle(engine)


async def test_an_answer_of_special_tokens(models: Callable[..., str], tuned: str) -> None:
    """It has no text, but the tokens have a probability; both models must read it alike."""
    loader = ModelLoader(Placement(dtype="float32"))
    loader.causal(LocalModel(model=models("llama")))
    model = RewardLoader(loader)[ImplicitReward(tuned=tuned, beta=1.0)]
    talk, own, other, prompt = Conversation(PROMPT, Usage()), tiny.causal(), tiny.causal(seed=5), ids(PROMPT)
    model.open(talk)
    own_log_p = log_p(own, prompt, [tiny.PAD])
    [found] = await model.score([Response(talk, "", [tiny.PAD], own_log_p)])
    assert found == pytest.approx(log_p(other, prompt, [tiny.PAD]) - own_log_p, abs=1e-4)


def test_a_text_of_no_tokens(models: Callable[..., str], start: Start, tuned: str) -> None:
    assert start(models("llama")).score(ImplicitReward(tuned=tuned), PROMPT, [" "]) == [0.0]


def test_special_tokens_in_the_prompt(models: Callable[..., str], start: Start, tuned: str) -> None:
    prompt, own, other = "w7 </s> <pad> w8 </s>", tiny.causal(), tiny.causal(seed=5)
    assert tiny.EOS in ids(prompt)
    [alignment] = start(models("llama"), width=2).run_many([request(ImplicitReward(tuned=tuned), 0, prompt)])
    for draft, whole in drafts(alignment):
        naive = 0.1 * (log_p(other, ids(prompt), whole) - log_p(own, ids(prompt), whole))
        assert draft.reward == pytest.approx(naive, abs=1e-4)


def test_one_model_is_no_reward() -> None:
    for same in (None, "some/model"):
        with pytest.raises(ValueError, match="always 0"):
            ImplicitReward(tuned=same, base=same)


# --- rows ---


@pytest.mark.parametrize("end", Freed.ENDS)
async def test_rows_are_free_after(
    models: Callable[..., str], start: Start, tuned: str, tmp_path: Path, end: str
) -> None:
    small = tiny.save(tmp_path, tiny.causal(seed=6, max_position_embeddings=12), tiny.words())
    reward = ImplicitReward(tuned=tuned, base=small if end == "error" else None)
    await Freed(start(models("llama"), width=4)).after(end, [request(reward, seed, max_tokens=60) for seed in range(4)])


async def test_a_request_given_up_while_it_is_scored_opens_no_row(models: Callable[..., str], tuned: str) -> None:
    """A stop string cut the answer, so that the language model's own log p has to be read; some `turns` of the loop
    later the request is cancelled."""
    loader = ModelLoader(Placement(dtype="float32"))
    loader.causal(LocalModel(model=models("llama")))
    model: Any = RewardLoader(loader)[ImplicitReward(tuned=tuned)]
    for turns in range(6):
        talk = Conversation(PROMPT, Usage())
        model.open(talk)
        task = asyncio.ensure_future(model.score([Response(talk, "w7 w8")]))
        for _ in range(turns):
            await asyncio.sleep(0)
        model.close(talk)
        await asyncio.gather(task, return_exceptions=True)
        assert not any(part.transformer.cache.trees for part in model.models)


def test_the_tokenizer_of_the_tuned_model_brings_its_template(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    """The same vocabulary, but another template: each model reads the prompt in its own."""
    tokenizer = tiny.words()
    tokenizer.chat_template = tiny.CHAT
    reward = ImplicitReward(tuned=tiny.save(tmp_path, tiny.causal(seed=5), tokenizer), beta=1.0)
    own, other = tiny.causal(), tiny.causal(seed=5)
    assert AutoTokenizer.from_pretrained(models("llama")).chat_template is None

    def naive(text: str, whole: list[int] | None) -> float:
        answer = ids(text) if whole is None else whole
        return log_p(other, ids(CHATTED.format(PROMPT)), answer) - log_p(own, ids(PROMPT), answer)

    assert_exact(start(models("llama"), width=2).run_many([request(reward, s) for s in range(4)]), naive, fewest=20)
