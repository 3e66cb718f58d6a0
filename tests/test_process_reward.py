"""Process rewards are what their authors' recipes give, step by step, however an answer is drafted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import layouts
import pytest
import tiny
import torch
from conftest import Start
from tokenizers import AddedToken
from transformers import AutoModelForTokenClassification

from cards_integrations.decoding import BestOfN, Cards, FixedLength, Punctuation, TreeBoN
from cards_integrations.engine import Request
from cards_integrations.errors import CardsError, ModelError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, ProcessReward

PROMPT = "the dog ran away. "
TAG = "<extra_0>"
VOCABULARY = {text.lstrip("Ġ"): token for text, token in tiny.byte_pairs().get_vocab().items()}
LETTERS = tuple((token, 40.0) for text, token in VOCABULARY.items() if text.isascii() and text.isalpha())
STOPS = ((VOCABULARY["."], 44.0),)
SAMPLER = Sampler(temperature=1.0, logit_bias=LETTERS + STOPS)
Recipe = Callable[[str, Sequence[str]], list[float]]


def tagged_tokenizer(template: str | None) -> Any:
    tokenizer = layouts.tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(TAG, special=True)]})
    return tokenizer


def token_classifier(tokenizer: Any, family: str = "llama") -> Any:
    torch.manual_seed(4)
    config = tiny.config(family, vocab_size=len(tokenizer), num_labels=2)
    model = AutoModelForTokenClassification.from_config(config).float().eval()
    torch.nn.init.normal_((model.score if family == "llama" else model.classifier).bias, std=2.0)
    return model


@torch.inference_mode()
def good(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """How probable label 1 is at each token."""
    inputs = torch.tensor([list(ids)])
    return model(inputs, attention_mask=torch.ones_like(inputs)).logits[0].softmax(-1)[:, 1]


def qwen(folder: Path) -> tuple[dict[str, Any], Recipe]:
    """The tag, a token of its own, behind each step, in a chat."""
    tokenizer = tagged_tokenizer(layouts.CHATML)
    model = token_classifier(tokenizer)

    def recipe(prompt: str, steps: Sequence[str]) -> list[float]:
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": TAG.join(steps) + TAG}]
        ids = tokenizer.apply_chat_template(said, return_dict=False)
        return [float(p) for p, token in zip(good(model, ids), ids, strict=True) if token == len(tokenizer) - 1]

    return {"model": tiny.save(folder, model, tokenizer), "separator": "."}, recipe


def trl(folder: Path, family: str = "llama") -> tuple[dict[str, Any], Recipe]:
    """Steps that are encoded by themselves, a line feed behind each."""
    tokenizer = tagged_tokenizer(None)
    model = token_classifier(tokenizer, family)

    def recipe(prompt: str, steps: Sequence[str]) -> list[float]:
        ids, ends = tokenizer(prompt)["input_ids"], []
        for step in steps:
            ids = ids + tokenizer(step)["input_ids"] + tokenizer("\n")["input_ids"]
            ends.append(len(ids) - 1)
        return [float(good(model, ids)[end]) for end in ends]

    return {"model": tiny.save(folder, model, tokenizer), "separator": ".", "step_tag": "\n"}, recipe


def neox(folder: Path) -> tuple[dict[str, Any], Recipe]:
    """Of a type whose head has another name."""
    return trl(folder, "gpt_neox")


def shepherd(folder: Path) -> tuple[dict[str, Any], Recipe]:
    """A causal model that writes one word or another at the tag."""
    tokenizer = tagged_tokenizer(None)
    torch.manual_seed(5)
    model = tiny.causal(vocab_size=len(tokenizer))

    @torch.inference_mode()
    def recipe(prompt: str, steps: Sequence[str]) -> list[float]:
        text = f"{prompt} " + "\n".join(step + TAG for step in steps)
        ids = tokenizer(text)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0][:, words].softmax(-1)[:, 0]
        return [float(p) for p, token in zip(logits, ids, strict=True) if token == len(tokenizer) - 1]

    words = [tokenizer(" the")["input_ids"][0], tokenizer(" cat")["input_ids"][0]]
    settings = {
        "model": tiny.save(folder, model, tokenizer), "separator": ".", "after_tag": "\n", "words": ("the", "cat"),
        "prompt_format": "{prompt} {response}",
    }  # fmt: skip
    return settings, recipe


def steps(answer: str) -> list[str]:
    return [step for step in answer.split(".") if step.strip()] or [answer]


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("kind", [qwen, trl])
def test_scores_of_drafted_answers(tmp_path: Path, start: Start, kind: Any, width: int) -> None:
    """All that was scored, in eight requests at once: each step's probability, and the least of them."""
    settings, recipe = kind(tmp_path / "judge")
    reward = ProcessReward(**settings)
    guided = Cards(target_reward=9.0, acceptance="hard", max_rejections=2, boundary=FixedLength(length=5))
    by_step = Cards(target_reward=9.0, max_rejections=2, beta=1.0, boundary=Punctuation(marks=(".",), max_length=9))
    tree = TreeBoN(n=4, boundary=FixedLength(length=4))
    engine = start(tiny.save(tmp_path / "llm", tiny.causal(vocab_size=280), tiny.byte_pairs()), width=width)
    requests = [
        Request(PROMPT, method, reward, SAMPLER, 24, seed=seed)
        for seed in range(2)
        for method in (guided, by_step, tree, BestOfN(n=3))
    ]
    several = 0
    for answer in engine.run_many(requests):
        kept = ""
        for segment in answer.segments:
            for draft in segment.drafts:
                whole = steps(kept + draft.text)
                several += len(whole) > 2
                assert draft.reward == pytest.approx(min(recipe(PROMPT, whole)), abs=1e-4)
            kept += segment.text
        assert answer.reward == pytest.approx(min(recipe(PROMPT, steps(answer.text))), abs=1e-4)
    assert several > 10


@pytest.mark.parametrize("kind", [qwen, trl, neox, shepherd])
def test_how_the_scores_of_steps_become_one(tmp_path: Path, start: Start, kind: Any) -> None:
    settings, recipe = kind(tmp_path / "judge")
    engine = start(tiny.save(tmp_path / "llm", tiny.causal(vocab_size=280), tiny.byte_pairs()))
    texts = ["the cat.the dog", "a", "the mat.and.the dog ran.", "the cat sat on. the mat.\nthe dog"]
    expected = [recipe(PROMPT, steps(text)) for text in texts]
    assert any(len(each) > 2 for each in expected)
    hows: dict[str, Callable[[list[float]], float]] = {
        "last": lambda scores: scores[-1], "min": min, "product": math.prod, "mean": lambda s: sum(s) / len(s),
    }  # fmt: skip
    for how, together in hows.items():
        found = engine.score(ProcessReward(**settings, aggregate=how), PROMPT, texts)
        assert found == pytest.approx([together(each) for each in expected], abs=1e-4)


@pytest.mark.parametrize("text", [f"the cat.the {TAG} dog", f"{TAG}.the cat", f"the cat{TAG}", f"{TAG}{TAG}.{TAG}.the"])
def test_a_tag_that_the_answer_itself_contains_ends_no_step(tmp_path: Path, start: Start, text: str) -> None:
    """Otherwise a language model that writes it chooses where it is scored."""
    settings, recipe = qwen(tmp_path / "judge")
    engine = start(tiny.save(tmp_path / "llm", tiny.causal(vocab_size=280), tiny.byte_pairs()))
    scores, ends, at = recipe(PROMPT, steps(text)), [], -1
    for step in steps(text):
        at += step.count(TAG) + 1
        ends.append(scores[at])
    found = engine.score(ProcessReward(**settings, aggregate="mean"), PROMPT, [text])
    assert found == pytest.approx([sum(ends) / len(ends)], abs=1e-4)


def test_segments_that_are_steps(tmp_path: Path, start: Start) -> None:
    settings, recipe = qwen(tmp_path / "judge")
    reward = ProcessReward(**{**settings, "separator": None}, aggregate="product")
    method = Cards(target_reward=9.0, acceptance="hard", max_rejections=2, boundary=FixedLength(length=5))
    engine = start(tiny.save(tmp_path / "llm", tiny.causal(vocab_size=280), tiny.byte_pairs()), width=8)
    answer = engine.run(Request(PROMPT, method, reward, SAMPLER, 20, seed=1))
    kept: list[str] = []
    for segment in answer.segments:
        for draft in segment.drafts:
            assert draft.reward == pytest.approx(math.prod(recipe(PROMPT, [*kept, draft.text])), abs=1e-4)
        kept.append(segment.text)
    assert len(kept) == 4


def test_a_step_is_read_once(tmp_path: Path, start: Start) -> None:
    """A candidate costs its own tokens and its tag."""
    settings, _ = qwen(tmp_path / "judge")
    method = Cards(target_reward=9.0, acceptance="hard", max_rejections=3, boundary=FixedLength(length=6))
    engine = start(tiny.save(tmp_path / "llm", tiny.causal(vocab_size=280), tiny.byte_pairs()), width=8)
    usage = engine.run(Request(PROMPT, method, ProcessReward(**settings), SAMPLER, 48, seed=2)).usage
    prompt = 2 * len(tagged_tokenizer(None)(PROMPT)["input_ids"]) + 20
    assert usage.rm_tokens < prompt + usage.drafted_tokens + 3 * usage.drafts


def test_models_of_steps_and_models_of_answers(tmp_path: Path, start: Start) -> None:
    settings, _ = qwen(tmp_path / "steps")
    answers = tiny.save(tmp_path / "answers", tiny.classifier(vocab_size=280), tiny.byte_pairs())
    engine = start(tiny.save(tmp_path / "llm", tiny.causal(vocab_size=280), tiny.byte_pairs()))
    with pytest.raises(ModelError, match=r"LlamaForTokenClassification.*use ProcessReward"):
        engine.score(ClassifierReward(model=settings["model"], label=1), PROMPT, ["a"])
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification.*use ClassifierReward"):
        engine.score(ProcessReward(model=answers), PROMPT, ["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_format": "{prompt}"}, "must be 'chat' or contain"),
        ({"words": ("+", "+")}, "two different ones"),
        ({"words": ("+", "-"), "label": 1}, "leave label= out"),
        ({"words": ("+", "-"), "device": "cpu"}, "leave device= and dtype= out"),
        ({"aggregate": "most"}, "aggregate"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((CardsError, ValueError), match=message):
        ProcessReward(model="a/b", **settings)
