"""A judge's margin between two words, from its new tokens only, is that of the whole rubric."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Start
from internals import assert_idle, language_model, reward_models
from naive import Freed, drafts, ids, margin, parameters, said

from cards_integrations.decoding import Cards, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.errors import CardsError, RewardError, SettingsError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import GroundednessReward, JudgeReward

PROMPT = "w9 w20 w31 w5"
RUBRIC = "w30 {prompt} w31 {response} w32 w33 ."
SUFFIX = 3
STOP = ("5 w1", "w45")
GUIDED = Cards(target_reward=4.0, beta=0.5, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=6))
WORDS, PIECES = tiny.words(), tiny.byte_pairs()
SELF = JudgeReward(rubric=RUBRIC, words=("w6", "w7"))
BEFORE, AFTER = f"w30 {PROMPT} w31 ", " w32 w33 ."
CHAT_BEFORE, CHAT_AFTER = f"<user> {BEFORE}", f"{AFTER} </user>\n<assistant> "


def requests(judge: JudgeReward, count: int = 8, **options: Any) -> list[Request]:
    settings = {"sampler": Sampler(temperature=1.0), "max_tokens": 24, "stop": STOP, **options}
    return [Request(PROMPT, GUIDED, judge, seed=seed, **settings) for seed in range(count)]


def assert_exact(alignments: list[Any], naive: Callable[[str, list[int] | None], float]) -> None:
    """All rewards in the traces are `naive(text, ids)`; ids are None where a stop string cut the text."""
    seen = cuts = 0
    for alignment in alignments:
        assert alignment.prompt_reward == pytest.approx(naive("", []), abs=1e-4)
        for draft, whole in drafts(alignment):
            text, cut = said(WORDS, whole, STOP)
            cuts += cut
            assert draft.reward == pytest.approx(naive(text, None if cut else whole), abs=1e-4)
            seen += 1
    assert seen > 40
    assert cuts
    assert any(len(segment.drafts) > 1 for a in alignments for segment in a.segments)


# --- the value ---


@pytest.mark.parametrize(
    ("family", "chat", "width"),
    [("llama", True, 1), ("gpt2", False, 8), ("gpt_neox", True, 8), ("gemma3_text", False, 1), ("mistral", True, 8)],
)
def test_the_language_model_judges_itself(
    models: Callable[..., str], start: Start, family: str, chat: bool, width: int
) -> None:
    engine, model = start(models(family, chat_template=tiny.CHAT if chat else None), width=width), tiny.causal(family)
    before, after = (CHAT_BEFORE, CHAT_AFTER) if chat else (BEFORE, AFTER)

    def naive(text: str, whole: list[int] | None) -> float:
        read = ids(before + text) if whole is None else ids(before) + whole
        return margin(model, read + ids(after), *ids("w6 w7"))

    assert_exact(engine.run_many(requests(SELF)), naive)
    texts = ["", "w7 w8", "w20 w21 w22 w23 w24 w25 w26 w27", "w7"]
    assert engine.score(SELF, PROMPT, texts) == pytest.approx([naive(text, None) for text in texts], abs=1e-4)
    assert_idle(engine)


@pytest.mark.parametrize(("chat", "width"), [(True, 8), (False, 1)])
def test_another_model_with_other_tokens(
    models: Callable[..., str], start: Start, tmp_path: Path, chat: bool, width: int
) -> None:
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template = tiny.CHAT if chat else None
    model = tiny.causal("mistral", 6, vocab_size=280, max_position_embeddings=1024)
    judge = JudgeReward(model=tiny.save(tmp_path, model, tokenizer), rubric=RUBRIC, words=("the", "dog"))
    before, after = (CHAT_BEFORE, CHAT_AFTER) if chat else (BEFORE, AFTER)
    yes, no = (ids(word if chat else " " + word, PIECES)[0] for word in judge.words)

    def naive(text: str, whole: list[int] | None) -> float:
        return margin(model, ids(before + text, PIECES) + ids(after, PIECES), yes, no)

    engine = start(models("llama"), width=width)
    assert_exact(engine.run_many(requests(judge, max_tokens=16)), naive)
    texts = ["w7 w8", "", "! w9 ."]
    assert engine.score(judge, PROMPT, texts) == pytest.approx([naive(text, None) for text in texts], abs=1e-4)


def test_another_model_with_the_same_tokens(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    """The candidates' ids are read as they are, even where the text would give others."""
    model = tiny.causal("gpt2", 5)
    judge = JudgeReward(model=tiny.save(tmp_path, model, tiny.words()), rubric=RUBRIC, words=("w6", "w7"))

    def naive(text: str, whole: list[int] | None) -> float:
        read = ids(BEFORE + text) if whole is None else ids(BEFORE) + whole
        return margin(model, read + ids(AFTER), *ids("w6 w7"))

    alignments = start(models("llama"), width=4).run_many(requests(judge))
    assert_exact(alignments, naive)
    assert any(ids(text) != whole for a in alignments for text, whole in ((said(WORDS, w)[0], w) for _, w in drafts(a)))


def test_several_messages_and_a_prompt_after_the_answer(models: Callable[..., str], start: Start) -> None:
    talk = [
        {"role": "user", "content": "w7"},
        {"role": "assistant", "content": "w8"},
        {"role": "user", "content": "w9"},
    ]
    judge = JudgeReward(rubric="w30 {response} w31 {prompt} w32", words=("w6", "w7"))
    read = ids("w30 w20 w21 w31 User: w7 Assistant: w8 User: w9 Assistant: w32")
    naive = margin(tiny.causal(), read, *ids("w6 w7"))
    assert start(models("llama")).score(judge, talk, ["w20 w21"]) == pytest.approx([naive], abs=1e-4)


def test_what_looks_like_a_slot_in_the_prompt_is_text(models: Callable[..., str], start: Start) -> None:
    naive = margin(tiny.causal(), ids("w30 w9 {response} {prompt} w31 w20 w32 w33 ."), *ids("w6 w7"))
    assert start(models("llama")).score(SELF, "w9 {response} {prompt}", ["w20"]) == pytest.approx([naive], abs=1e-4)


def test_special_tokens_in_the_prompt(models: Callable[..., str], start: Start) -> None:
    naive = margin(tiny.causal(), ids("w30 w9 </s> <pad> w31 w20 w32 w33 ."), *ids("w6 w7"))
    assert start(models("llama")).score(SELF, "w9 </s> <pad>", ["w20"]) == pytest.approx([naive], abs=1e-4)


# --- the price, and the weights ---


@pytest.mark.parametrize("chat", [True, False])
def test_counts(models: Callable[..., str], start: Start, chat: bool) -> None:
    """A candidate costs its tokens and the rubric's suffix, and the rubric's beginning is read once."""
    template = tiny.CHAT if chat else None
    before, suffix = (ids(CHAT_BEFORE), 5) if chat else (ids(BEFORE), SUFFIX)
    assert suffix == len(ids(CHAT_AFTER if chat else AFTER))
    engine = start(models("llama", chat_template=template), width=1)
    for asked in requests(SELF, 3, stop=()):
        alignment = engine.run(asked)
        new = [len(draft.token_ids) + suffix for draft, _ in drafts(alignment)]
        assert len(new) > len(alignment.segments) > 1
        assert alignment.usage.rm_tokens == len(before) + suffix + sum(new)
        assert alignment.usage.rm_forwards == 1 + len(new)


def test_weights_are_the_language_model_s(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"), width=2)
    engine.loaded()
    alone = parameters(engine)
    assert alone == sum(weight.numel() for weight in tiny.causal().parameters())
    named = JudgeReward(model=models("llama"), rubric=RUBRIC, words=("w6", "w8"))
    for reward in (SELF, named, GroundednessReward()):
        engine.score(reward, "Context: w7\nQuestion: w8", ["w9"])
    own = {name: weight.data_ptr() for name, weight in language_model(engine).model.named_parameters()}
    for built in reward_models(engine):
        for part in getattr(built, "models", [built]):
            model = part.transformer.model
            assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == own
    assert parameters(engine) == alone


def test_a_judge_of_two_rewards_is_loaded_once(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    engine, judge = start(models("llama")), tiny.save(tmp_path, tiny.causal("gpt2", 5), tiny.words())
    for words in (("w6", "w7"), ("w8", "w9")):
        engine.score(JudgeReward(model=judge, rubric=RUBRIC, words=words), PROMPT, ["w9"])
    both = [tiny.causal(), tiny.causal("gpt2", 5)]
    assert parameters(engine) == sum(weight.numel() for model in both for weight in model.parameters())


# --- edges ---


def test_words_that_begin_alike(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))
    with pytest.raises(
        SettingsError, match=r"reward\.words=\('w7 w8', 'w7 w9'\) do not begin with two different tokens"
    ):
        engine.score(JudgeReward(words=("w7 w8", "w7 w9")), PROMPT, ["w9"])
    with pytest.raises(SettingsError, match=r"reward\.words"):  # unknown to this tokenizer, both
        engine.run(Request(PROMPT, GUIDED, JudgeReward(), max_tokens=4))
    assert_idle(engine)


def test_a_word_of_no_tokens(models: Callable[..., str], start: Start) -> None:
    with pytest.raises(CardsError, match="words"):
        start(models("llama")).score(JudgeReward(words=(" ", "w7")), PROMPT, ["w9"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rubric": "Is {prompt} good?"}, "must contain {response}"),
        ({"words": ("Yes", "Yes")}, "the same"),
        ({"words": ("", "No")}, "at least 1"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        JudgeReward(**settings)


def fitted(whole: list[int], window: int = 12, prompt: int = 6) -> list[int]:
    """What is read: the prompt loses quarters of the window, but not its last token."""
    surplus, step = max(0, len(whole) - window), window // 4
    return whole[min(-(-surplus // step) * step, prompt - 1) :]


def test_a_window_that_is_too_small(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    """The rubric's beginning is dropped; an answer that does not fit with what follows it is refused."""
    model = tiny.causal(seed=6, max_position_embeddings=12)
    judge = SELF.model_copy(update={"model": JudgeReward(model=tiny.save(tmp_path, model, tiny.words())).model})
    engine = start(models("llama"), width=4)
    for n in (4, 5, 8):  # of 6 + n + 3 tokens
        text = WORDS.decode([*range(20, 20 + n)])
        whole = fitted(ids(BEFORE + text + AFTER))
        assert engine.score(judge, PROMPT, [text]) == pytest.approx([margin(model, whole, *ids("w6 w7"))], abs=1e-4)
    with pytest.raises(RewardError, match=r"judge.*12.*max_tokens"):
        engine.score(judge, PROMPT, [WORDS.decode([*range(20, 29)])])
    for alignment in engine.run_many(requests(judge, 4, max_tokens=8, stop=())):
        for draft, answer in drafts(alignment):
            whole = fitted([*ids(BEFORE), *answer, *ids(AFTER)])
            assert draft.reward == pytest.approx(margin(model, whole, *ids("w6 w7")), abs=1e-4)
    assert_idle(engine)


@pytest.mark.parametrize("end", Freed.ENDS)
async def test_rows_are_free_after(models: Callable[..., str], start: Start, tmp_path: Path, end: str) -> None:
    judge = SELF
    if end == "error":
        small = tiny.save(tmp_path, tiny.causal(seed=6, max_position_embeddings=12), tiny.words())
        judge = JudgeReward(model=small, rubric=RUBRIC, words=("w6", "w7"))
    await Freed(start(models("llama"), width=4)).after(end, requests(judge, 4, max_tokens=60, stop=()))
