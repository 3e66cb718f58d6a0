"""What a user may get wrong, and input at the edge of what is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import tiny
from conftest import Start
from transformers import AutoTokenizer

from cards_integrations import CardsLLM
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.decoding import Cards, FixedLength, Sampling
from cards_integrations.engine import Engine, Request
from cards_integrations.errors import CardsError, ModelError, PromptError, SettingsError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, LengthReward, as_reward
from cards_integrations.trace import Alignment

CONTEXT = tiny.SIZES["max_position_embeddings"]
PLAIN = Sampling(chunk=3)
KINDS = ["byte fallback", "byte pairs"]


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that reads and writes any text."""
    return tiny.save(tmp_path_factory.mktemp("bytes"), tiny.causal(vocab_size=280), tiny.byte_pairs())


def judge(models: Callable[..., str], **settings: Any) -> ClassifierReward:
    return ClassifierReward(model=models("llama", classifier=True, **settings))


def taken_rows(engine: Engine) -> int:
    return engine.inspect().rows


# --- prompts ---


def test_an_empty_prompt(models: Callable[..., str], start: Start) -> None:
    with pytest.raises(PromptError, match="empty"):
        start(models("llama")).run(Request("", PLAIN))
    assert start(models("llama", chat_template=tiny.CHAT)).run(Request("", PLAIN, max_tokens=2)).prompt_ids


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.score("w7", "w8 w9"), r"pass \[text\]"),
        (lambda llm: llm.score("w7", ["w8", None]), r"list of strings"),
        (lambda llm: llm.align_batch("w7 w8"), r"pass \[prompt\]"),
        (lambda llm: llm.align_batch(["w7", "w8"], seeds=[1]), "seeds: 1 for 2 prompts"),
        (lambda llm: llm.align_batch(["w7"], contexts=["a", "b"]), "contexts: 2 for 1 prompts"),
    ],
)
def test_what_is_no_list_of_answers_or_prompts(
    models: Callable[..., str], call: Callable[[CardsLLM], Any], message: str
) -> None:
    """A string would be taken for its characters."""
    llm = CardsLLM(model=models("llama"), reward=LengthReward(target=3))
    with pytest.raises(CardsError, match=message):
        call(llm)


def test_a_prompt_and_an_answer_that_do_not_fit(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))
    with pytest.raises(PromptError, match=rf"{CONTEXT} tokens.*{CONTEXT}"):
        engine.run(Request("w9 " * CONTEXT, PLAIN))
    with pytest.raises(SettingsError, match=r"max_tokens=8.*the most that fits is 6"):
        engine.run(Request("w9 " * (CONTEXT - 6), PLAIN, max_tokens=8))
    assert engine.run(Request("w9 " * (CONTEXT - 6), PLAIN, max_tokens=6)).text


@pytest.mark.parametrize("template", [None, tiny.CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize(
    "prompt", ["half \ud83d", [{"role": "user", "content": "half \ud83d"}]], ids=["text", "messages"]
)
def test_a_lone_surrogate(models: Callable[..., str], start: Start, template: str | None, prompt: Any) -> None:
    with pytest.raises(PromptError, match=r"surrogate at position 5.*replace"):
        start(models("llama", chat_template=template)).run(Request(prompt, PLAIN))


def test_characters_that_are_rare_but_right(readable: str, start: Start) -> None:
    engine, prompt = start(readable), "nul \0, \u202eright to left\u202c, \U0001f600, \ufeff"
    answer = engine.run(Request(prompt, PLAIN, max_tokens=5))
    assert engine.loaded().chat.decode(answer.prompt_ids) == prompt


# --- chat templates ---


def test_a_template_that_insists_on_turns(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama", chat_template=tiny.ALTERNATING))
    turns = [
        ("system", "w6"),
        ("user", "w7"),
        ("user", "w8"),
        ("assistant", "w9"),
        ("assistant", "w10"),
        ("user", "w11"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    before = engine.loaded().chat.around_answer(messages).before
    assert before == "user: w6\n\nw7\n\nw8\nassistant: w9\n\nw10\nuser: w11\nassistant: "
    assert engine.run(Request(messages, PLAIN, max_tokens=2)).text


def test_a_template_that_refuses(models: Callable[..., str], start: Start) -> None:
    refuses = "{{ raise_exception('nothing pleases me') }}"
    with pytest.raises(PromptError, match="nothing pleases me"):
        start(models("llama", chat_template=refuses)).run(Request("w6", PLAIN))

    engine = start(models("llama"))  # reads plain text, but its judge refuses
    request = Request("w6", Cards(target_reward=1.0, beta=0.7), judge(models, chat_template=refuses))
    with pytest.raises(PromptError, match="nothing pleases me"):
        engine.run(request)
    assert taken_rows(engine) == 0


def test_a_tokenizer_without_padding_or_template(tmp_path: Path, start: Start) -> None:
    folders = []
    for name, model in [("lm", tiny.causal(pad_token_id=None)), ("rm", tiny.classifier(pad_token_id=None))]:
        folders.append(tiny.save(tmp_path / name, model, tiny.words(pad_token=None)))
    request = Request("w6 w7", Cards(target_reward=1.0, beta=0.5), ClassifierReward(model=folders[1]), max_tokens=12)
    together = start(folders[0]).run_many([request] * 3)
    assert all(answer.reward is not None for answer in together)


# --- names and folders ---


@pytest.mark.parametrize(
    ("name", "near"), [("smolm2", "'smollm2'"), ("mini-lm", "'minilm'"), ("Smollm2-135m", "'smollm2'")]
)
def test_an_unknown_model(start: Start, name: str, near: str) -> None:
    with pytest.raises(SettingsError, match=rf"model.*'{name}'.*Did you mean {near}.*hub id.*directory"):
        start(name).run(Request("w6", PLAIN))


def test_an_unknown_reward() -> None:
    with pytest.raises(SettingsError, match=r"reward.*'sentimant'.*Did you mean 'sentiment'"):
        as_reward("sentimant")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))


def of_another_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0}))


DAMAGES = [break_config, break_weights, lose_weights, lose_tokenizer, other_shapes, of_another_type, None]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_not_a_model(
    models: Callable[..., str], start: Start, tmp_path: Path, damage: Callable[[Path], None] | None
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    if damage:
        tiny.save(folder, tiny.causal(), tiny.words())
        damage(folder)
    with pytest.raises(ModelError, match=r"broken.*shapes" if damage is other_shapes else "broken") as told:
        start(folder).run(Request("w6", PLAIN))
    assert "\n" not in str(told.value)

    if damage:
        tiny.save(folder, tiny.classifier(), tiny.words())
        damage(folder)
    engine = start(models("llama"))
    with pytest.raises(ModelError, match="broken"):
        engine.run(Request("w6", Cards(target_reward=1.0, beta=0.7), ClassifierReward(model=str(folder))))
    assert engine.run(Request("w6", PLAIN, max_tokens=2)).text


def test_an_adapter_that_is_not_there(models: Callable[..., str], start: Start) -> None:
    reward = ClassifierReward(model=models("llama"), adapter="no/such-adapter")
    with pytest.raises(ModelError, match="no/such-adapter"):
        start(models("llama")).run(Request("w6", Cards(target_reward=1.0, beta=0.7), reward))


def test_a_failed_load_is_tried_again(start: Start, tmp_path: Path) -> None:
    engine = start(tmp_path / "later/model")
    for _ in range(2):
        with pytest.raises(ModelError):
            engine.run(Request("w6", PLAIN))
    tiny.save(tmp_path / "later/model", tiny.causal(), tiny.words())
    assert engine.run(Request("w6", PLAIN, max_tokens=2)).text


# --- greedy ---


def test_temperature_zero_is_the_greedy_answer(models: Callable[..., str], start: Start) -> None:
    """One candidate a segment, for all would be the same; kept whatever its reward."""
    tokenizer = tiny.words()
    ids = tokenizer("w9 w20", return_tensors="pt")["input_ids"]
    plain = tiny.causal().generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    engine = start(models("llama"), width=4)
    decoding = Cards(target_reward=99.0, acceptance="hard", boundary=FixedLength(length=4))
    answer = engine.run(Request("w9 w20", decoding, judge(models), Sampler(temperature=0), 24))
    assert answer.text == " " + tokenizer.decode(plain, skip_special_tokens=True)
    assert {len(segment.drafts) for segment in answer.segments} == {1}


# --- stop strings and streams ---


def streamed(engine: Engine, request: Request) -> tuple[list[str], Alignment]:
    *chunks, answer = engine.stream(request)
    assert isinstance(answer, Alignment)
    return [chunk.text for chunk in chunks], answer


def test_stop_strings_that_span_tokens_and_segments(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))

    def request(seed: int, *stop: str) -> Request:
        return Request("w9 w20 w31 w5", PLAIN, None, Sampler(temperature=0.5), 60, stop, seed)

    spans = 0
    for seed in range(3):
        whole = engine.run(request(seed))
        ends = [*accumulate(len(segment.text) for segment in whole.segments)]
        stops = [whole.text[at : at + length] for at in range(0, len(whole.text) - 12, 11) for length in (1, 4, 12)]
        for stop in stops:
            at = whole.text.find(stop)
            chunks, answer = streamed(engine, request(seed, stop, "never written"))
            assert answer.text == whole.text[:at]
            assert "".join(chunks) == answer.text
            assert answer.finish_reason == "stop"
            assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
            spans += any(at < end < at + len(stop) for end in ends)
    assert spans > 5


@pytest.mark.parametrize("tokenizer", [tiny.fallback(ascii_letters), tiny.byte_pairs()], ids=KINDS)
def test_streamed_text_is_the_text(tmp_path: Path, tokenizer: Any, start: Start) -> None:
    """Whatever the bytes: characters come whole, and nothing is taken back. So do segments, which make the text."""
    engine, halves = start(tiny.save(tmp_path, tiny.causal(vocab_size=len(tokenizer)), tokenizer)), 0
    for seed in range(10):
        chunks, answer = streamed(
            engine, Request("the", Sampling(chunk=1), None, Sampler(temperature=1.5, top_k=0), 40, seed=seed)
        )
        assert "".join(chunks) == answer.text == engine.loaded().chat.decode(answer.token_ids)
        assert [segment.text for segment in answer.segments] == chunks
        halves += "\ufffd" in answer.text
    assert halves


@pytest.mark.parametrize("tokenizer", [tiny.fallback(), tiny.byte_pairs()], ids=KINDS)
def test_half_a_character_spoils_no_other(tokenizer: Any) -> None:
    chat, text = ChatTokenizer(tokenizer), "\u00e9\U0001f600\u65e5\u672c\U0001f600"
    ids = chat.encode(text)
    shown = [chat.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert shown[-1] == text
    assert all(after.startswith(before.rstrip("\ufffd")) for before, after in pairwise(shown))


def test_a_byte_alone_spoils_no_other() -> None:
    """Sentencepiece's byte fallback decodes a whole run of bytes to U+FFFD for one that is wrong."""
    tokenizer = tiny.fallback("ab")
    chat, [a, b] = ChatTokenizer(tokenizer), tokenizer.convert_tokens_to_ids(["a", "b"])
    emoji, alone = chat.encode("\U0001f600"), tokenizer.convert_tokens_to_ids("<0xF0>")
    ids = [a, *emoji, alone, a, *emoji[:3], b, alone, *emoji]
    assert chat.decode(ids) == "a\U0001f600\ufffda\ufffdb\ufffd\U0001f600"
    shown = [chat.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert all(after.startswith(before.rstrip("\ufffd")) for before, after in pairwise(shown))


@pytest.mark.parametrize("text", ["The cat sat.", " two  spaces ", "\u00e9 \U0001f600\u65e5", "\ufffd!", "\n\n", ""])
def test_a_whole_text_is_decoded_as_the_tokenizer_does(shared_models: Path, text: str) -> None:
    told = AutoTokenizer.from_pretrained(shared_models / "stories260k")
    for tokenizer in (told, tiny.fallback("Theca "), tiny.byte_pairs()):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ChatTokenizer(tokenizer).decode(ids) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert ChatTokenizer(told)._byte_tokens
