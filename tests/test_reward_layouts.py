"""The score of a finished answer is the one of its whole conversation, as its reward model's own recipe renders it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layouts
import pytest
import tiny
import torch
from conftest import Start
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cards_integrations import CardsLLM
from cards_integrations.decoding import BestOfN, Cards, FixedLength
from cards_integrations.engine import EngineSettings, Request
from cards_integrations.errors import ModelError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward

ANSWERS = [
    "the cat sat on the mat",
    " the dog",
    "and\n\n the mat\n",
    "\nthe cat. ",
    "a",
    "<think>\nthe dog ran\n</think>\n\nthe cat",
    "the mat.",
]
PROMPT = "the dog ran away. "
VOCABULARY = {text.lstrip("Ġ"): token for text, token in tiny.byte_pairs().get_vocab().items()}
LETTERS = tuple((token, 40.0) for text, token in VOCABULARY.items() if text.isascii() and text.isalpha())


def drafter(folder: Path, other: bool = False) -> str:
    tokenizer = tiny.byte_pairs() if other else layouts.tokenizer(layouts.CHATML)
    return tiny.save(folder, tiny.causal(vocab_size=layouts.SIZE), tokenizer)


def judge(folder: Path, template: str | None) -> str:
    return tiny.save(folder, tiny.classifier(vocab_size=layouts.SIZE), layouts.tokenizer(template))


class Recipe:
    """What a user of transformers would write."""

    def __init__(self, folder: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def __call__(self, prompt: str | list[dict[str, str]], answer: str) -> float:
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        whole = [*said, {"role": "assistant", "content": answer}]
        ids = self.tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=True)["input_ids"]
        return float(self.model(ids, attention_mask=torch.ones_like(ids)).logits[0, 0])


@pytest.mark.parametrize("template", layouts.TEMPLATES)
def test_scores_are_those_of_the_whole_conversation(tmp_path: Path, template: str) -> None:
    folder = judge(tmp_path / "judge", layouts.TEMPLATES[template])
    recipe = Recipe(folder)
    several = [("user", "the cat"), ("assistant", "the mat"), ("user", "the dog")]
    conversation = [{"role": role, "content": text} for role, text in several]
    machine = EngineSettings(dtype="float32")
    with CardsLLM(model=drafter(tmp_path / "llm"), engine=machine, reward=ClassifierReward(model=folder)) as llm:
        for prompt, given in ((PROMPT, PROMPT), (conversation, several)):
            expected = [recipe(prompt, answer) for answer in ANSWERS]
            assert len({round(each, 3) for each in expected}) > 4
            assert llm.score(given, ANSWERS) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("other", [False, True], ids=["same vocabulary", "another"])
@pytest.mark.parametrize("template", layouts.TEMPLATES)
def test_so_are_those_of_drafted_answers(tmp_path: Path, start: Start, template: str, other: bool) -> None:
    """One after another and eight at once: the rewards of whole answers, and their order."""
    folder = judge(tmp_path / "judge", layouts.TEMPLATES[template])
    recipe, reward = Recipe(folder), ClassifierReward(model=folder)
    guided = Cards(target_reward=9.0, acceptance="hard", max_rejections=2, boundary=FixedLength(length=5))
    engine = start(drafter(tmp_path / "llm", other), width=8)
    requests = [
        Request(PROMPT, method, reward, Sampler(temperature=1.0, logit_bias=LETTERS), 14, seed=seed)
        for seed in range(4)
        for method in (guided, BestOfN(n=3))
    ]
    answers = [*engine.run_many(requests), engine.run(requests[0])]
    assert len({answer.text for answer in answers}) > 4
    expected = [recipe(PROMPT, answer.text) for answer in answers]
    assert [answer.reward for answer in answers] == pytest.approx(expected, abs=1e-4)
    assert answers[-1].text == answers[0].text


CHANGED = {
    "in small letters": "{{ m.content | lower }}",
    "cut": "{{ m.content[:100] }}",
    "twice": "{{ m.content + '|' + m.content }}",
    "after its length": "{{ m.content | length ~ ' ' ~ m.content }}",
    "before its length": "{{ m.content ~ '<|im_end|>' ~ m.content | length }}",
    "escaped": "{{ m.content | e }}",
    "as JSON": "{{ m.content | tojson }}",
}


@pytest.mark.parametrize("written", CHANGED)
def test_a_template_that_changes_answers_is_refused(tmp_path: Path, start: Start, written: str) -> None:
    """Its scores of growing answers would be those of other texts than the whole conversation has."""
    template = layouts.CHATML.replace("m.content", CHANGED[written].strip("{} "))
    engine = start(drafter(tmp_path / "llm"))
    with pytest.raises(ModelError, match=r"chat template of .*changes the assistant's answers.*prompt_format"):
        engine.score(ClassifierReward(model=judge(tmp_path / "judge", template)), PROMPT, ANSWERS)
