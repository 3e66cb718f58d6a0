"""A judge that writes first: its critiques and the grades after them are those of a plain loop over the whole text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from internals import is_idle, wait_until
from naive import Freed, causal, drafts, ids, said
from reference import Reference

from cards_integrations.decoding import BestOfN, Cards, Decoding, FixedLength, SpeculativeRejection
from cards_integrations.engine import Request
from cards_integrations.errors import RewardError, SettingsError
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import CritiqueJudgeReward, GateReward, PatternReward

PROMPT = "w9 w20 w31 w5"
WORDS, PIECES = tiny.words(), tiny.byte_pairs()
GRADES = {"w6": 1.0, "w6 w7": 8.0, "w8": 3.0}
TEXTS = ["", "w20 w21 w22 w23 w24 w25", "w7"]
SELF = CritiqueJudgeReward(
    rubric="w30 {prompt} w31 {response} w32 {criterion} .", criteria=["w40 w41", "w42"], verdict=" w33 w34 ",
    grades=GRADES, max_critique_tokens=4,
)  # fmt: skip
SAMPLED = SELF.model_copy(update={"temperature": 1.5, "critiques": 2, "seed": 4})


@cache
@torch.inference_mode()
def logits(model: Any, text: tuple[int, ...]) -> torch.Tensor:
    return model(torch.tensor([text])).logits[0, -1]


@cache
def written(model: Any, before: tuple[int, ...], judge: CritiqueJudgeReward, question: int, number: int) -> list[int]:
    """A critique by a loop of whole forwards."""
    loop = Reference(lambda text: logits(model, tuple(text)), lambda _: 0.0, str, tiny.EOS, judge.temperature, top_k=0)
    uniforms, found = Uniforms(judge.seed, question, number), list[int]()
    while len(found) < judge.max_critique_tokens:
        after = logits(model, (*before, *found))
        token = loop.sample(after, uniforms[len(found)]) if judge.temperature else int(after.argmax())
        if token == tiny.EOS:
            break
        found.append(token)
    return found


def mean_grade(model: Any, before: Sequence[int], grades: dict[tuple[int, ...], float]) -> float:
    p = {
        grade: math.exp(
            sum(
                float(logits(model, (*before, *grade[:i])).double().log_softmax(-1)[token])
                for i, token in enumerate(grade)
            )
        )
        for grade in grades
    }
    for grade in sorted(grades, key=len):
        p[grade] -= sum(p[longer] for longer in grades if longer != grade and longer[: len(grade)] == grade)
    return sum(p[grade] * value for grade, value in grades.items()) / sum(p.values())


def naive(
    model: Any, before: list[int], judge: CritiqueJudgeReward, tokenizer: Any = WORDS, end: str = ""
) -> list[float]:
    """The score of each criterion, all of the rest being written by the loop above."""
    found = []
    grades = {tuple(ids(judge.verdict + word, tokenizer)): value for word, value in judge.grades}
    for number, criterion in enumerate(judge.criteria):
        asked = before + ids(f" w32 {criterion.question} .{end}", tokenizer)
        critiques = [written(model, (*asked,), judge, number, each) for each in range(judge.critiques)]
        found.append(sum(mean_grade(model, asked + each, grades) for each in critiques) / len(critiques))
    return found


def requests(judge: Any, count: int = 8, decoding: Decoding | None = None, **options: Any) -> list[Request]:
    settings = {"sampler": Sampler(temperature=1.0, logit_bias={tiny.EOS: 3.0}), "max_tokens": 5, **options}
    return [Request(PROMPT, decoding or BestOfN(n=2), judge, seed=seed, **settings) for seed in range(count)]


# --- the value ---


@pytest.mark.parametrize(
    ("judge", "chat", "width"), [(SELF, True, 1), (SELF, True, 8), (SAMPLED, False, 1), (SAMPLED, False, 8)]
)
def test_the_language_model_is_its_own_critic(
    models: Callable[..., str], start: Start, judge: CritiqueJudgeReward, chat: bool, width: int
) -> None:
    """Best-of-n: every answer is finished, and the one with the best grade is kept."""
    engine, model = start(models("llama", chat_template=tiny.CHAT if chat else None), width=width), causal()
    begun, end = ("<user> w30 ", " </user>\n<assistant> ") if chat else ("w30 ", "")
    lengths = set()
    for answer in engine.run_many(requests(judge)):
        for draft, whole in drafts(answer):
            found = naive(model, ids(f"{begun}{PROMPT} w31 ") + whole, judge, end=end)
            assert draft.parts == pytest.approx(dict(zip(("w40 w41", "w42"), found, strict=True)), abs=1e-4)
            assert draft.reward == pytest.approx(sum(found) / 2, abs=1e-4)
            lengths.add(len(whole))
        assert answer.reward == max(draft.reward or 0.0 for draft, _ in drafts(answer))
    assert len(lengths) > 1
    expected = [sum(naive(model, ids(f"{begun}{PROMPT} w31 {text}"), judge, end=end)) / 2 for text in TEXTS]
    assert engine.score(judge, PROMPT, TEXTS) == pytest.approx(expected, abs=1e-4)
    wait_until(lambda: is_idle(engine))


@pytest.mark.parametrize(("width", "count"), [(1, 2), (8, 8)])
def test_another_model_with_the_same_tokens(
    models: Callable[..., str], start: Start, tmp_path: Path, width: int, count: int
) -> None:
    model = causal("gpt2", 5)
    judge = SAMPLED.model_copy(update={"model": CritiqueJudgeReward(model=tiny.save(tmp_path, model, WORDS)).model})
    for answer in start(models("llama"), width=width).run_many(requests(judge, count)):
        for draft, whole in drafts(answer):
            found = naive(model, ids(f"w30 {PROMPT} w31 ") + whole, judge)
            assert draft.reward == pytest.approx(sum(found) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("width", "count", "grades"),
    [(1, 2, {"1": 1.0, "10": 10.0}), (8, 8, {"1": 1.0, "10": 10.0, "cat": 4.0, "car": 7.0})],
)
def test_another_model_with_other_tokens(
    models: Callable[..., str], start: Start, tmp_path: Path, width: int, count: int, grades: dict[str, float]
) -> None:
    model = causal("mistral", 6, vocab_size=280, max_position_embeddings=1024)
    judge = SAMPLED.model_copy(
        update={
            "model": CritiqueJudgeReward(model=tiny.save(tmp_path, model, tiny.byte_pairs())).model,
            "grades": tuple(grades.items()),
            "verdict": " Grade: ",
        }
    )
    engine = start(models("llama"), width=width)
    for answer in engine.run_many(requests(judge, count)):
        for draft, whole in drafts(answer):
            read = ids(f"w30 {PROMPT} w31 {said(WORDS, whole)[0]}", PIECES)
            assert draft.reward == pytest.approx(sum(naive(model, read, judge, PIECES)) / 2, abs=1e-4)
    texts = ["", "! w9 .", "s"]  # the last one merges with what is before it
    expected = [sum(naive(model, ids(f"w30 {PROMPT} w31 {text}", PIECES), judge, PIECES)) / 2 for text in texts]
    assert engine.score(judge, PROMPT, texts) == pytest.approx(expected, abs=1e-4)
    wait_until(lambda: is_idle(engine))


def test_a_judge_with_recurrent_layers(models: Callable[..., str], start: Start) -> None:
    engine = start(models("lfm2"), width=4)
    for answer in engine.run_many(requests(SAMPLED, 3)):
        for draft, whole in drafts(answer):
            found = naive(causal("lfm2"), ids(f"w30 {PROMPT} w31 ") + whole, SAMPLED)
            assert draft.reward == pytest.approx(sum(found) / 2, abs=1e-4)
    wait_until(lambda: is_idle(engine))


# --- the price ---


def test_what_a_critique_costs(models: Callable[..., str], start: Start) -> None:
    """What is before the answers is read once, each answer once, and then each question with its critique."""
    engine, before = start(models("llama")), ids(f"w30 {PROMPT} w31")
    [answer] = engine.run_many(requests(SELF, 1, BestOfN(n=1)))
    whole = list(answer.token_ids)
    asked = [before + whole + ids(f"w32 {each.question} .") for each in SELF.criteria]
    critiques = [written(causal(), (*each,), SELF, number, 0) for number, each in enumerate(asked)]
    own = sum(len(ids(f"{each.question} .")) for each in SELF.criteria) + sum(map(len, critiques))
    after = len(SELF.criteria) * len(ids("w33 w34 w6"))  # the beginning of a grade of two tokens is read, too
    assert answer.usage.rm_tokens == len(before) + len(whole) + len(ids("w32")) + own + after
    assert answer.usage.completion_tokens == len(whole)


# --- only finished answers ---


@pytest.mark.parametrize(
    "decoding", [Cards(target_reward=3.0, boundary=FixedLength(length=2)), SpeculativeRejection(n=4, checkpoint=2)]
)
def test_it_does_not_guide(models: Callable[..., str], start: Start, decoding: Decoding) -> None:
    engine = start(models("llama"))
    with pytest.raises(RewardError, match=r"'critique_judge self' writes critiques of finished answers.*BestOfN"):
        engine.run_many(requests(SELF, 2, decoding))
    wait_until(lambda: is_idle(engine))


def test_only_what_passes_a_gate_is_judged(models: Callable[..., str], start: Start) -> None:
    """A cheap reward in front saves the critiques of what is out of the question."""
    engine = start(models("llama"))
    gated = GateReward(gate=PatternReward(forbidden=["w2"]), reward=SELF, closed=-9.0)
    texts = ["w30 w31", "w20"]
    assert engine.score(gated, PROMPT, texts) == pytest.approx([engine.score(SELF, PROMPT, texts)[0], -9.0])


# --- edges ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"critiques": 2}, "temperature above 0"), ({"verdict": ""}, "at least 1"), ({"max_critique_tokens": 0}, "1")],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CritiqueJudgeReward(**settings)


def test_a_critique_that_does_not_fit(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))
    judge = SELF.model_copy(update={"max_critique_tokens": 250})
    with pytest.raises(RewardError, match=r"max_critique_tokens=250 take \d+ tokens, more than the 256"):
        engine.score(judge, PROMPT, ["w7"])
    wait_until(lambda: is_idle(engine))


@pytest.mark.parametrize("end", ["the end", "a cancellation"])
async def test_rows_are_free_after(models: Callable[..., str], start: Start, end: str) -> None:
    judge = SELF.model_copy(update={"max_critique_tokens": 100})
    await Freed(start(models("llama"), width=4)).after(end, requests(judge, 3, max_tokens=20))


def test_it_times_out(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))
    judge = SELF.model_copy(update={"max_critique_tokens": 200, "timeout": 1e-3})
    with pytest.raises(RewardError, match="no scores within timeout"):
        engine.score(judge, PROMPT, ["w7"])
    wait_until(lambda: is_idle(engine))
