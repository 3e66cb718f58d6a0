"""From the logits of a classification head to scores."""

from __future__ import annotations

from typing import Literal

import torch

from cards_integrations.errors import SettingsError


class Head:
    """The score of one label.

    Args:
        label: Index or name of the label; None if there is only one.
        output: The raw logit, the probability (softmax, or sigmoid for a single label), or its log-odds.
        id2label: The labels' names, as the model's config gives them.

    Raises:
        SettingsError: There is no such label.
    """

    def __init__(
        self,
        label: int | str | None,
        output: Literal["logit", "probability", "log_odds"],
        id2label: dict[int, str] | None,
    ) -> None:
        labels = id2label or {0: "LABEL_0"}
        self.output = output
        self.single = len(labels) == 1
        self.index = _index(label, labels)

    def __call__(self, logits: torch.Tensor) -> list[float]:
        """Turn logits (n, labels) into n scores."""
        logits = logits.float()
        if self.output == "logit":
            scores = logits[:, self.index]
        elif self.single:
            scores = logits[:, 0].sigmoid() if self.output == "probability" else logits[:, 0]
        else:
            log_p = logits.log_softmax(-1)[:, self.index]
            scores = log_p.exp() if self.output == "probability" else log_p - (-log_p.expm1()).log()
        found: list[float] = scores.tolist()
        return found


def _index(label: int | str | None, labels: dict[int, str]) -> int:
    names = {name: index for index, name in labels.items()}
    if label is None and len(labels) == 1:
        return 0
    if isinstance(label, int) and label in labels:
        return label
    if isinstance(label, str) and label in names:
        return names[label]
    raise SettingsError(f"reward.label={label!r}: choose one of {labels}.")
