"""A value head: does it know its teacher, does it guide, and what does it save?

    python benchmarks/value_head.py [--parts tiny smollm2] [--train 240] [--test 32] [--heads FOLDER]

For the tiny pair and for SmolLM2 with the sentiment reward:

    correlation  of a head with its teacher on the prefixes of prompts that it was not trained on, for either target:
                 the reward of the finished answer ("value"), or that of the answer so far ("prefix")
    guides       plain answers, those guided by either head, and those guided by the teacher, to other prompts with
                 the same seeds, all scored by the teacher; 95% bootstrap intervals of the paired differences
    time         seconds for each token of an answer with a head over those with the teacher, four requests at once, in
                 one process and in turns: the order of the arms changes from block to block. By the clock, and by the
                 process's own CPU time, which a busy machine changes less; with `width=4`, so that nothing depends on
                 measured step times. The method is CARDS, which goes by the scale of each reward and so drafts more or
                 less, and best-of-4 for each segment, which does not

Writes results/value_head.json, and the heads into FOLDER; heads that are there are not trained again.
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
from cards_integrations.rewards import ClassifierReward, ValueReward
from cards_integrations.rewards.value_head import Target, ValueHead
from cards_integrations.study.prefixes import Prefixes, ScoredPrefixes, collect_prefixes
from cards_integrations.study.train_value import fit_head
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
TARGETS: tuple[Target, ...] = ("prefix", "value")
METHODS: dict[str, Decoding] = {"cards": Cards(), "segment_best_of_n": SegmentBestOfN(n=4)}
SHOWN = {"prompts", "prefixes", "pearson", "spearman", "penalty", "scale", "max_tokens"}  # of a head's card
AT_ONCE = 4
SENTIMENT = ClassifierReward(  # as in `reward="sentiment"`, without its guard
    model="smollm2", adapter="sentiment-smollm2", prompt_format="chat", end_of_turn=False, scale=(0.75, 0.53)
)
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
            decoding="cards", max_tokens=48, temperature=0.9,
            engine=EngineSettings(dtype="float32", threads=1, width=4),
        )  # fmt: skip
        return cls(llm, [f"{each} {then}" for then in THEN for each in beginnings], beginnings)

    @classmethod
    def smollm2(cls) -> Pair:
        """The embedded model and its sentiment reward."""
        llm = CardsLLM(reward=SENTIMENT, decoding="cards", max_tokens=48, engine=EngineSettings(threads=1, width=4))
        return cls(llm, [form.format(subject) for subject in SUBJECTS for form in FORMS], PROMPTS)

    def judged(self, answers: Sequence[Alignment], prompts: Sequence[str]) -> np.ndarray:
        """What the teacher says of answers."""
        return np.array([self.llm.score(p, [a.text])[0] for p, a in zip(prompts, answers, strict=True)])


@dataclass(frozen=True)
class Run:
    """Answers that were written together, what the teacher says of each, and what they took."""

    answers: list[Alignment]
    rewards: np.ndarray
    seconds: float
    cpu: float

    def per_token(self, clock: str) -> float:
        """Seconds for each token that was kept."""
        return float(getattr(self, clock)) / sum(len(answer.token_ids) for answer in self.answers)

    def __str__(self) -> str:
        clocks = ", ".join(f"{1000 * self.per_token(clock):.0f} ms ({clock})" for clock in ("seconds", "cpu"))
        return f"{self.rewards.mean():.2f}, {clocks} a token"


def trained(pair: Pair, prompts: list[str], folder: Path) -> dict[Target, ValueHead]:
    """A head for either target, from the same answers."""
    files = {target: folder / f"{target}.safetensors" for target in TARGETS}
    if not all(file.exists() for file in files.values()):
        options: dict[str, Any] = {"decoding": ScoredPrefixes(boundary=Uncertainty())}
        engine = pair.llm.engine_for(options, pair.llm)
        found: Prefixes = collect_prefixes(pair.llm, engine, prompts, None, 0, True, options)
        for target, file in files.items():
            print(fit_head(engine, pair.llm.resolve_options({}), found, file, target, 0.25, 0), flush=True)
    return {target: ValueHead.load(file) for target, file in files.items()}


def run(pair: Pair, arms: dict[str, dict[str, Any]], prompts: list[str]) -> dict[str, list[Run]]:
    """Blocks of answers of all arms, in turns."""
    found: dict[str, list[Run]] = {name: [] for name in arms}
    pair.llm.align(prompts[0], max_tokens=8)
    for number in range(0, len(prompts), AT_ONCE):
        asked, turn = prompts[number : number + AT_ONCE], number // AT_ONCE % len(arms)
        for name in [*arms, *arms][turn : turn + len(arms)]:
            began, used = time.perf_counter(), time.process_time()
            answers = pair.llm.align_batch(asked, range(number, number + len(asked)), **arms[name])
            seconds, used = time.perf_counter() - began, time.process_time() - used
            found[name].append(Run(answers, pair.judged(answers, asked), seconds, used))
            print(name, number, found[name][-1], flush=True)
        print(summary(found), flush=True)
    return found


def summary(found: dict[str, list[Run]]) -> dict[str, Any]:
    """Rewards over those of plain answers, and times over those of the teacher."""
    rng, rows = np.random.default_rng(0), dict[str, Any]()
    rewards = {name: np.concatenate([run.rewards for run in runs]) for name, runs in found.items()}
    for name, runs in found.items():
        answers = [answer for run in runs for answer in run.answers]
        kept = sum(len(answer.token_ids) for answer in answers)
        row = rows[name] = {
            "reward": round(float(rewards[name].mean()), 3),
            "drafted per kept": round(sum(a.usage.drafted_tokens for a in answers) / kept, 2),
            "read for the reward per kept": round(sum(a.usage.rm_tokens for a in answers) / kept, 2),
            "milliseconds per token": round(1000 * sum(run.seconds for run in runs) / kept, 1),
        }
        if "plain" in found and name != "plain":
            row["over plain"] = interval(rewards[name] - rewards["plain"], rng)
        if name.startswith("head"):
            for clock in ("seconds", "cpu"):
                ratios = [
                    one.per_token(clock) / other.per_token(clock)
                    for one, other in zip(runs, found["teacher"], strict=True)
                ]
                row[f"{clock} over teacher"] = [round(float(f(ratios)), 3) for f in (np.median, min, max)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(__file__).parents[2] / "shared" / "models")
    parser.add_argument("--parts", nargs="+", default=["tiny", "smollm2"], choices=["tiny", "smollm2"])
    parser.add_argument("--train", type=int, default=240, help="Prompts to train and test the heads on.")
    parser.add_argument("--test", type=int, default=32, help="Prompts whose answers are guided.")
    parser.add_argument("--targets", nargs="+", default=["prefix", "value"], choices=TARGETS, help="Heads that guide.")
    parser.add_argument("--heads", type=Path, help="Where the heads are, or are written to.")
    parser.add_argument("--methods", nargs="+", default=["cards", "segment_best_of_n"], choices=METHODS)
    options = parser.parse_args()
    for part in options.parts:
        pair = Pair.tiny(options.models.resolve()) if part == "tiny" else Pair.smollm2()
        with tempfile.TemporaryDirectory() as aside, pair.llm:
            folder = Path(options.heads or aside) / part
            folder.mkdir(parents=True, exist_ok=True)
            heads = trained(pair, pair.train[: options.train], folder)
            found: dict[str, Any] = {
                "heads": {name: head.card.model_dump(mode="json", include=SHOWN) for name, head in heads.items()}
            }
            for name in options.methods:
                rewards = {
                    f"head, {each}": ValueReward(path=str(folder / f"{each}.safetensors")) for each in options.targets
                }
                arms: dict[str, dict[str, Any]] = {"plain": {"decoding": Sampling()}} if name == "cards" else {}
                arms |= {arm: {"decoding": METHODS[name], "reward": reward} for arm, reward in rewards.items()}
                arms["teacher"] = {"decoding": METHODS[name]}
                found[name] = summary(run(pair, arms, pair.test[: options.test]))
                print(json.dumps(found[name], indent=1), flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**results, part: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
