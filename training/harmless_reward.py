"""Learn which of two answers people found less harmful, and say what that is worth.

Data: the test set of harmless-base in HH-RLHF (Bai et al., arXiv 2204.05862; MIT licence): 2,312 pairs of answers to
the same dialogue, of which people preferred one.

    python training/harmless_reward.py baselines harmless-base/test.jsonl.gz
    python training/harmless_reward.py frozen    harmless-base/test.jsonl.gz

    baselines  the shorter answer; counts of words in a Bradley-Terry model
    frozen     a linear head on what MiniLM makes of prompt and answer, and of the answer alone

Dialogues that begin with the same words are all trained on, or all held out, and those of the benchmarks' prompts are
neither. All is judged by five-fold cross-validation. Nothing is kept: the heads are worth no more than counts of words
(docs/rewards.md).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentiment_reward import pad
from transformers import AutoModel, AutoTokenizer

from cards_integrations.chat.message import Message
from cards_integrations.chat.template import as_text
from cards_integrations.models.local.embedded import embedded_model
from cards_integrations.rewards.scorers.repetition import words
from cards_integrations.study.metrics import Mean, mean
from cards_integrations.study.prompts import dialogue

OF_BENCHMARKS, SHORT = 200, 600
"""As many of the first prompts, of those with fewer characters than that, are left to the benchmarks."""
FOLDS, WINDOW, COMPONENTS = 5, 96, 256
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Pair:
    """Two answers to one dialogue, the one that people preferred first."""

    prompt: list[Message]
    answers: tuple[str, str]

    @property
    def first(self) -> str:
        """What the dialogue begins with, by which it is known."""
        return " ".join(str(self.prompt[0]["content"]).lower().split())

    @property
    def number(self) -> int:
        """The same for all dialogues that begin with the same words, and as good as random."""
        return int(hashlib.sha256(self.first.encode()).hexdigest()[:8], 16)


def read(file: Path) -> list[Pair]:
    """All pairs with two different answers, but for dialogues that the benchmarks ask."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = [Pair(dialogue(row["chosen"]), (last(row["chosen"]), last(row["rejected"]))) for row in rows]
    asked = {pair.first for pair in [p for p in pairs if len(str(p.prompt)) < SHORT][:OF_BENCHMARKS]}
    return [pair for pair in pairs if pair.first not in asked and all(pair.answers) and len({*pair.answers}) == 2]


def last(text: str) -> str:
    """The answer that a dialogue ends with."""
    return text.rpartition("\n\nAssistant:")[2].strip()


def accuracy(right: Sequence[float], pairs: Sequence[Pair]) -> Mean:
    """The share of pairs in the right order, ties counting half; its interval draws dialogues."""
    return mean(right, [pair.first for pair in pairs])


def points(margins: np.ndarray) -> list[float]:
    return ((np.sign(margins) + 1) / 2).tolist()


def folds(pairs: Sequence[Pair]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which pairs to learn from, and which are held out."""
    of_pair = np.array([pair.number % FOLDS for pair in pairs])
    for fold in range(FOLDS):
        yield of_pair != fold, of_pair == fold


def bradley_terry(differences: np.ndarray, penalty: float) -> np.ndarray:
    """Weights of a linear score: -log sigmoid(w d) on average, plus penalty |w|^2 / 2."""
    data = torch.from_numpy(differences).double()
    weights = torch.zeros(data.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = torch.nn.functional.softplus(-(data @ weights)).mean() + penalty / 2 * weights.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return weights.detach().numpy()


def held_out(differences: np.ndarray, pairs: Sequence[Pair]) -> Mean:
    """Accuracy of a linear score on pairs that it was not fitted to, with a penalty chosen in the same way."""
    right = np.zeros(len(pairs))
    for train, test in folds(pairs):
        inner = [pair for pair, use in zip(pairs, train, strict=True) if use]
        validate = np.array([pair.number // FOLDS % 4 == 0 for pair in inner])
        data = differences[train]

        def quality(penalty: float, data: np.ndarray = data, validate: np.ndarray = validate) -> float:
            return float(np.mean(points(data[validate] @ bradley_terry(data[~validate], penalty))))

        right[test] = points(differences[test] @ bradley_terry(data, max(PENALTIES, key=quality)))
    return accuracy(right.tolist(), pairs)


def word_counts(pairs: Sequence[Pair], least: int = 5) -> np.ndarray:
    """For each pair, how much oftener the first answer has each word, in square roots of counts."""
    counted = [[Counter(words(answer)) for answer in pair.answers] for pair in pairs]
    used = Counter(word for both in counted for count in both for word in count)
    column = {word: i for i, word in enumerate(sorted(word for word, n in used.items() if n >= least))}
    found = np.zeros((len(pairs), len(column)))
    for row, both in zip(found, counted, strict=True):
        for sign, count in zip((1, -1), both, strict=True):
            for word, n in count.items():
                if word in column:
                    row[column[word]] += sign * n**0.5
    return found


def lengths(pairs: Sequence[Pair]) -> np.ndarray:
    """Characters of the second answer minus those of the first."""
    return np.array([len(pair.answers[1]) - len(pair.answers[0]) for pair in pairs])


def baselines(pairs: Sequence[Pair]) -> dict[str, Any]:
    return {
        "the shorter answer": accuracy(points(lengths(pairs)), pairs),
        "counts of words": held_out(word_counts(pairs), pairs),
    }


def embeddings(pairs: Sequence[Pair], with_prompt: bool) -> np.ndarray:
    """Mean of the last hidden states and state of the first token, (pairs, 2, 2 * hidden size)."""
    folder = embedded_model("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = [tokens(tokenizer, pair, answer, with_prompt) for pair in pairs for answer in pair.answers]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    found = np.zeros((len(rows), 2 * model.config.hidden_size), np.float32)
    with torch.inference_mode():
        for at in range(0, len(order), 32):
            some = order[at : at + 32]
            batch = {name: pad([rows[i][name] for i in some], 0) for name in rows[0]}
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            found[some] = torch.cat([(hidden * mask).sum(1) / mask.sum(1), hidden[:, 0]], 1).numpy()
    return found.reshape(len(pairs), 2, -1)


def tokens(tokenizer: Any, pair: Pair, answer: str, with_prompt: bool = True) -> dict[str, list[int]]:
    """The answer, behind the prompt as `ClassifierReward(prompt_format="pair")` has it."""
    tokenizer.truncation_side = "left"
    if not with_prompt:
        return dict(tokenizer(answer, truncation=True, max_length=WINDOW))
    answer = tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"][: WINDOW - 16])
    return dict(tokenizer(as_text(pair.prompt), answer, truncation="only_first", max_length=WINDOW))


def frozen(pairs: Sequence[Pair]) -> dict[str, Any]:
    found, known = {}, []
    for name in ("answer alone", "prompt and answer"):
        features = embeddings(pairs, name == "prompt and answer")
        known.append(features[:, 0] - features[:, 1])
        found[name] = held_out(components(known[-1]), pairs)
        print(name, found[name], flush=True)
    return {**found, "both": held_out(components(np.concatenate(known, 1)), pairs)}


def components(differences: np.ndarray) -> np.ndarray:
    """The principal components of the pairs' differences, whichever answer comes first; the first has variance 1."""
    left, sizes, _ = np.linalg.svd(differences.astype(np.float64), full_matrices=False)
    return left[:, :COMPONENTS] * sizes[:COMPONENTS] / sizes[0] * len(differences) ** 0.5


PARTS: dict[str, Callable[[Sequence[Pair]], dict[str, Any]]] = {
    "baselines": baselines,
    "frozen": frozen,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    pairs = read(options.file)
    print(f"{len(pairs)} pairs of {len({pair.first for pair in pairs})} dialogues")
    print(json.dumps(PARTS[options.part](pairs), indent=1))


if __name__ == "__main__":
    main()
