"""A reward model that weighs its objectives by the prompt scores as its authors' code does."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import layouts
import pytest
import tiny
import torch
from conftest import Start
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, relu
from transformers import AutoTokenizer, LlamaModel

from cards_integrations.decoding import BestOfN, Cards, Cascade, FixedLength
from cards_integrations.engine import Request
from cards_integrations.errors import CardsError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward

OBJECTIVES, WIDE, TEMPERATURE = 5, 16, 0.5
PROMPT, ANSWERS = "the dog ran away. ", ["the cat sat on the mat", " the dog", "a", "the mat."]
SEVERAL = [("user", "the cat"), ("assistant", "the mat"), ("user", "the dog")]
LETTERS = tuple((i, 40.0) for text, i in tiny.byte_pairs().get_vocab().items() if text.isascii() and text.isalpha())
SAMPLER = Sampler(temperature=1.0, logit_bias=LETTERS)


@pytest.fixture
def armo(tmp_path: Path) -> str:
    """A tiny llama with a gate of three layers."""
    torch.manual_seed(11)
    tokenizer = layouts.tokenizer(layouts.LLAMA3)
    labels = {i: f"objective {i}" for i in range(OBJECTIVES)}
    model = tiny.classifier(vocab_size=layouts.SIZE, num_labels=OBJECTIVES, id2label=labels)
    folder = Path(tiny.save(tmp_path / "armo", model, tokenizer))
    weights = load_file(folder / "model.safetensors")
    weights["regression_layer.weight"] = weights.pop("score.weight")
    sizes = [32, WIDE, WIDE, OBJECTIVES]
    for number, (before, after) in enumerate(pairwise(sizes)):
        weights[f"gating.layers.{number}.weight"] = torch.randn(after, before)
        weights[f"gating.layers.{number}.bias"] = torch.randn(after)
    weights["gating.logit_scale"] = torch.tensor([1.7])
    weights["reward_transform_matrix"] = torch.eye(OBJECTIVES) + 0.3 * torch.randn(OBJECTIVES, OBJECTIVES)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForRewardModelWithGating"], "gating_temperature": TEMPERATURE}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


class Recipe:
    """Prompt and answer in one forward: objectives at the last token, the gate where the answer's turn begins."""

    def __init__(self, folder: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.body = LlamaModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.weights = load_file(Path(folder) / "model.safetensors")
        turn = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        self.turn = self.tokenizer(turn, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def objectives(self, prompt: str | list[tuple[str, str]], answer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The objectives, and the weights that the gate gives them once they are free from verbosity."""
        said = [("user", prompt)] if isinstance(prompt, str) else prompt
        turns = [{"role": role, "content": text} for role, text in [*said, ("assistant", answer)]]
        ids = self.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        states = self.body(torch.tensor([ids])).last_hidden_state[0]
        begins = max(i for i in range(len(ids)) if ids[i : i + len(self.turn)] == self.turn)
        x, w = states[begins], self.weights
        for number in range(3):
            x = linear(x, w[f"gating.layers.{number}.weight"], w[f"gating.layers.{number}.bias"])
            x = relu(x) if number < 2 else x
        return states[-1] @ w["regression_layer.weight"].T, (x / TEMPERATURE).softmax(-1) * w["gating.logit_scale"]

    def __call__(self, prompt: str | list[tuple[str, str]], answer: str) -> float:
        rewards, gates = self.objectives(prompt, answer)
        return float((gates * (rewards @ self.weights["reward_transform_matrix"])).sum())


def drafter(folder: Path, same: bool) -> str:
    tokenizer = layouts.tokenizer(layouts.CHATML) if same else tiny.byte_pairs()
    return tiny.save(folder, tiny.causal(vocab_size=layouts.SIZE), tokenizer)


@pytest.mark.parametrize("same", [True, False], ids=["same vocabulary", "another"])
@pytest.mark.parametrize("width", [1, 8])
def test_scores_are_the_authors(tmp_path: Path, start: Start, armo: str, same: bool, width: int) -> None:
    recipe, reward = Recipe(armo), ClassifierReward(model=armo)
    engine = start(drafter(tmp_path / "llm", same), width=width)
    for prompt in (PROMPT, SEVERAL):
        given: Any = prompt if isinstance(prompt, str) else [{"role": role, "content": text} for role, text in prompt]
        expected = [recipe(prompt, answer) for answer in ANSWERS]
        assert len({round(each, 3) for each in expected}) == len(ANSWERS)
        assert engine.score(reward, given, ANSWERS) == pytest.approx(expected, abs=1e-4)
    hard = Cards(target_reward=9.0, acceptance="hard", max_rejections=2, boundary=FixedLength(length=5))
    asked = [(f"{PROMPT}{'the cat ' * n}", method) for n in range(3) for method in (hard, BestOfN(n=3), Cascade())]
    requests = [Request(prompt, method, reward, SAMPLER, 12, seed=i) for i, (prompt, method) in enumerate(asked)]
    answers = engine.run_many(requests)
    expected = [recipe(prompt, answer.text) for (prompt, _), answer in zip(asked, answers, strict=True)]
    assert [answer.reward for answer in answers] == pytest.approx(expected, abs=1e-4)
    assert [engine.run(request).text for request in requests[:3]] == [answer.text for answer in answers[:3]]


def test_objectives_are_in_the_trace_and_can_be_weighed_by_hand(tmp_path: Path, start: Start, armo: str) -> None:
    recipe, engine = Recipe(armo), start(drafter(tmp_path / "llm", True))
    answer = engine.run(Request(PROMPT, BestOfN(n=2), ClassifierReward(model=armo), SAMPLER, 8, seed=1))
    rewards, _ = recipe.objectives(PROMPT, answer.text)
    [segment] = answer.segments
    assert segment.parts == pytest.approx({f"objective {i}": float(rewards[i]) for i in range(OBJECTIVES)}, abs=1e-4)
    by_hand = ClassifierReward(model=armo, weights={"objective 1": 2.0, "objective 4": -1.0})
    expected = [float(r[1] * 2 - r[4]) for r in (recipe.objectives(PROMPT, answer)[0] for answer in ANSWERS)]
    assert engine.score(by_hand, PROMPT, ANSWERS) == pytest.approx(expected, abs=1e-4)


def test_a_prompt_without_turns_is_refused(tmp_path: Path, start: Start, armo: str) -> None:
    engine = start(drafter(tmp_path / "llm", True))
    reward = ClassifierReward(model=armo, prompt_format="{prompt}{response}")
    with pytest.raises(CardsError, match="weighs its objectives where the answer's turn begins"):
        engine.score(reward, PROMPT, ANSWERS)
    assert engine.score(ClassifierReward(model=armo), PROMPT, ANSWERS)
