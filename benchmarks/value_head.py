"""A value head: does it know its teacher, does it guide, and what does it save?

    python benchmarks/value_head.py [--parts tiny smollm2] [--train 240] [--test 32] [--pairs 6]

For the tiny pair and for SmolLM2 with the sentiment reward:

    correlation  of a head with its teacher on the prefixes of prompts that it was not trained on, for either target:
                 the reward of the finished answer ("value"), or that of the answer so far ("prefix")
    guides       plain answers, those guided by either head, and those guided by the teacher, to other prompts with
                 the same seeds, all scored by the teacher; 95% bootstrap intervals of the paired differences
    time         seconds for each token of an answer with the head over those with the teacher, in one process, in
                 turns; who begins changes from pair to pair

Writes results/value_head.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from frontier import DID, WHO
from quality import PROMPTS, interval

from cards_integrations import CardsLLM
from cards_integrations.decoding import Cards, Decoding, Sampling, SegmentBestOfN, Uncertainty
from cards_integrations.engine import EngineSettings
from cards_integrations.rewards import ClassifierReward, Reward, ValueReward
from cards_integrations.rewards.value_head import Target
from cards_integrations.study.prefixes import Prefixes, ScoredPrefixes, collect_prefixes
from cards_integrations.study.train_value import TrainedValue, fit_head
from cards_integrations.trace import Alignment

RESULTS = Path(__file__).parent / "results" / "value_head.json"
SUBJECTS = (
    "rainy days", "the sea", "a good friend", "an old house", "a long flight", "a dog", "the city at night", "bread",
    "the first snow", "a train", "a favourite book", "the garden", "a neighbour", "learning to cook", "a lost key",
    "the moon", "a hospital", "the war", "a birthday", "school", "a broken car", "the dentist", "winter", "a promise",
)  # fmt: skip
FORMS = (
    "Write one sentence about {}.", "What do you think of {}?", "Tell me something about {}.",
    "Describe {} in two sentences.", "Write a short review of {}.", "How did {} make you feel?",
    "Write the first lines of a story about {}.", "What is bad about {}?", "Write a short poem about {}.",
    "Give me your opinion on {}.",
)  # fmt: skip
TARGETS: tuple[Target, ...] = ("value", "prefix")
SHOWN = {"prompts", "prefixes", "pearson", "spearman", "penalty", "scale", "max_tokens"}  # of a head's card
THEN = ("and then", "because", "but", "so", "when it was dark", "with a friend", "after lunch", "the next day")


@dataclass(frozen=True)
class Pair:
    """A language model with a teacher, and what it is asked."""

    llm: CardsLLM
    train: list[str]
    test: list[str]

    @classmethod
    def tiny(cls, models: Path) -> Pair:
        """Stories of 260K parameters, and a sentiment reward on the same body."""
        beginnings = [f"{who} {did}" for did in DID for who in WHO]
        llm = CardsLLM(
            model=str(models / "stories260k"), reward=ClassifierReward(model=str(models / "rm-sentiment-stories260k")),
            max_tokens=48, temperature=0.9, engine=EngineSettings(dtype="float32", threads=1),
        )  # fmt: skip
        return cls(llm, [f"{each} {then}" for then in THEN for each in beginnings], beginnings)

    @classmethod
    def smollm2(cls) -> Pair:
        """The embedded model and its sentiment reward."""
        llm = CardsLLM(reward="sentiment", max_tokens=48, engine=EngineSettings(threads=1))
        return cls(llm, [form.format(subject) for subject in SUBJECTS for form in FORMS], PROMPTS)

    def answers(self, reward: Reward | None, decoding: Decoding, prompts: Sequence[str]) -> list[Alignment]:
        """One to each prompt, always with the same seeds."""
        options = {"decoding": decoding, **({"reward": reward} if reward is not None else {})}
        return self.llm.align_batch(prompts, range(len(prompts)), **options)

    def judged(self, answers: Sequence[Alignment], prompts: Sequence[str]) -> np.ndarray:
        """What the teacher says of answers."""
        return np.array([self.llm.score(p, [a.text])[0] for p, a in zip(prompts, answers, strict=True)])


def trained(pair: Pair, prompts: list[str], folder: Path) -> dict[str, TrainedValue]:
    """A head for either target, from the same answers."""
    options: dict[str, Any] = {"decoding": ScoredPrefixes(boundary=Uncertainty())}
    engine = pair.llm.engine_for(options, pair.llm)
    found: Prefixes = collect_prefixes(pair.llm, engine, prompts, None, 0, True, options)
    chosen, heads = pair.llm.resolve_options({}), dict[str, TrainedValue]()
    for target in TARGETS:
        heads[target] = fit_head(engine, chosen, found, folder / f"{target}.safetensors", target, 0.25, 0)
        print(heads[target], flush=True)
    return heads


def guides(pair: Pair, heads: dict[str, ValueReward], prompts: list[str]) -> dict[str, Any]:
    """The teacher's mean reward of each kind of answers, and what it has more than plain ones have."""
    rng, found = np.random.default_rng(0), dict[str, Any]()
    plain = pair.judged(pair.answers(None, Sampling(), prompts), prompts)
    found["plain"] = {"reward": round(float(plain.mean()), 3)}
    arms: dict[str, Reward | None] = {**{f"head, {name}": head for name, head in heads.items()}, "teacher": None}
    for name, reward in arms.items():
        answers = pair.answers(reward, Cards(), prompts)
        rewards = pair.judged(answers, prompts)
        kept = sum(len(answer.token_ids) for answer in answers)
        found[name] = {
            "reward": round(float(rewards.mean()), 3),
            "over plain": interval(rewards - plain, rng),
            "drafted per kept": round(sum(a.usage.drafted_tokens for a in answers) / kept, 2),
            "read for the reward per kept": round(sum(a.usage.rm_tokens for a in answers) / kept, 2),
        }
        print(name, found[name], flush=True)
    return found


def times(pair: Pair, head: ValueReward, pairs: int) -> dict[str, Any]:
    """Seconds for each token of an answer, with the head over with the teacher."""
    found: dict[str, Any] = {}
    for decoding in (Cards(), SegmentBestOfN(n=4)):
        for several in (1, 4):
            sides: dict[str, list[float]] = {"head": [], "teacher": []}
            for number in range(pairs + 1):
                at = number * several % len(pair.test)
                asked = (pair.test * 2)[at : at + several]
                for name in sorted(sides, reverse=number % 2 == 0):
                    began = time.perf_counter()
                    answers = pair.answers(head if name == "head" else None, decoding, asked)
                    seconds = time.perf_counter() - began
                    if number:  # the first is the warm-up
                        sides[name].append(seconds / sum(len(answer.token_ids) for answer in answers))
            ratios = np.array(sides["head"]) / np.array(sides["teacher"])
            found[f"{decoding.method}, {several} at once"] = {
                "ratio": [round(float(x), 3) for x in (np.median(ratios), ratios.min(), ratios.max())],
                "milliseconds per token": {name: round(1000 * float(np.median(s)), 1) for name, s in sides.items()},
            }
            print(decoding.method, several, found[f"{decoding.method}, {several} at once"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(__file__).parents[2] / "shared" / "models")
    parser.add_argument("--parts", nargs="+", default=["tiny", "smollm2"], choices=["tiny", "smollm2"])
    parser.add_argument("--train", type=int, default=240, help="Prompts to train and test the heads on.")
    parser.add_argument("--test", type=int, default=32, help="Prompts whose answers are guided.")
    parser.add_argument("--pairs", type=int, default=6, help="Runs of each side.")
    options = parser.parse_args()
    for part in options.parts:
        pair = Pair.tiny(options.models.resolve()) if part == "tiny" else Pair.smollm2()
        with tempfile.TemporaryDirectory() as folder, pair.llm:
            heads = trained(pair, pair.train[: options.train], Path(folder))
            rewards = {name: head.reward for name, head in heads.items()}
            found = {
                "prompts": {"train": options.train, "test": options.test},
                "heads": {name: head.card.model_dump(mode="json", include=SHOWN) for name, head in heads.items()},
                "guides": guides(pair, rewards, pair.test[: options.test]),
                "time, head over teacher": times(pair, rewards["value"], options.pairs),
            }
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**results, part: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
