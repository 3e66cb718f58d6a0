"""From the logits of a classification head to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from cards_integrations.errors import SettingsError
from cards_integrations.rewards.base import Response


class Head:
    """The score of one label, or a weighted sum of several.

    Args:
        label: Index or name of the label; None if there is only one.
        output: The raw logit, the probability (softmax, or sigmoid for labels that do not exclude each other), or its
            log-odds.
        id2label: The labels' names, as the model's config gives them.
        weights: Labels by index or name, and their weights; None for one label.
        exclusive: Whether exactly one of several labels is right: their probabilities sum to 1.

    Raises:
        SettingsError: There is no such label.
    """

    def __init__(
        self,
        label: int | str | None,
        output: Literal["logit", "probability", "log_odds"],
        id2label: dict[int, str] | None,
        weights: Mapping[str, float] | None = None,
        exclusive: bool = True,
    ) -> None:
        labels = id2label or {0: "LABEL_0"}
        self.output = output
        self.exclusive = exclusive and len(labels) > 1
        self.weights = list(weights.values()) if weights else [1.0]
        self.indices = [_index(each, labels) for each in weights or [label]]
        self.names = [labels[index] for index in self.indices] if weights else []

    def __call__(self, logits: torch.Tensor) -> list[float]:
        """Turn logits (n, labels) into n scores."""
        return self._weighted(self._values(logits))

    def score(self, responses: Sequence[Response], logits: torch.Tensor) -> list[float]:
        """Turn logits (n, labels) into the scores of n responses; add those of several labels to their parts."""
        values = self._values(logits)
        for response, each in zip(responses, values.tolist() if self.names else (), strict=bool(self.names)):
            response.parts.update(zip(self.names, each, strict=True))
        return self._weighted(values)

    def _weighted(self, values: torch.Tensor) -> list[float]:
        found: list[float] = (values @ values.new_tensor(self.weights)).tolist()
        return found

    def _values(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the values of the chosen labels, (n, chosen labels)."""
        logits = logits.float()
        if self.output == "logit" or not self.exclusive:
            chosen = logits[:, self.indices]
            return chosen.sigmoid() if self.output == "probability" else chosen
        log_p = logits.log_softmax(-1)[:, self.indices]
        return log_p.exp() if self.output == "probability" else log_p - (-log_p.expm1()).log()


def _index(label: int | str | None, labels: dict[int, str]) -> int:
    names = {name: index for index, name in labels.items()}
    if label is None and len(labels) == 1:
        return 0
    if isinstance(label, int) and label in labels:
        return label
    if isinstance(label, str) and label in names:
        return names[label]
    if isinstance(label, str) and label.isdecimal() and int(label) in labels:
        return int(label)
    raise SettingsError(f"reward.label={label!r}: choose one of {labels}.")
