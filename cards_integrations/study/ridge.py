"""Ridge regression in closed form, with the penalty chosen by cross-validation over groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

PENALTIES = torch.logspace(-3, 2, 16, dtype=torch.float64)  # per sample, for standardized inputs
FOLDS = 5  # of the cross-validation


class Ridge(NamedTuple):
    """A linear function: weight . x + bias.

    Attributes:
        weight: (inputs,) float64.
        bias: The value for inputs of zero.
        penalty: The penalty that was chosen, one of `PENALTIES`.
    """

    weight: torch.Tensor
    bias: float
    penalty: float

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Predict the outputs of inputs: (n, inputs) -> (n,)."""
        return inputs.double() @ self.weight + self.bias


def fit_ridge(inputs: torch.Tensor, outputs: torch.Tensor, groups: torch.Tensor) -> Ridge:
    """Fit a ridge regression on standardized inputs.

    Args:
        inputs: (n, inputs).
        outputs: (n,).
        groups: The group of each sample, such as its prompt, (n,); no group is in two folds of the cross-validation.
    """
    inputs, outputs = inputs.double(), outputs.double()
    errors = sum(_squared_errors(*fold) for fold in _folds(inputs, outputs, groups))
    best = int(torch.as_tensor(errors).argmin())
    weights, biases = _path(inputs, outputs)
    return Ridge(weights[:, best], float(biases[best]), float(PENALTIES[best]))


def _folds(inputs: torch.Tensor, outputs: torch.Tensor, groups: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield, for each fold, the inputs and outputs to fit, and those to test."""
    places = {group: place for place, group in enumerate(dict.fromkeys(groups.tolist()))}
    number = torch.tensor([places[group] % FOLDS for group in groups.tolist()])
    for fold in range(min(FOLDS, len(places))):
        yield inputs[number != fold], outputs[number != fold], inputs[number == fold], outputs[number == fold]


def _squared_errors(
    inputs: torch.Tensor, outputs: torch.Tensor, new_inputs: torch.Tensor, new_outputs: torch.Tensor
) -> torch.Tensor:
    """Return the sum of squared errors on new samples with each penalty, (penalties,)."""
    weights, biases = _path(inputs, outputs)
    return (new_inputs @ weights + biases - new_outputs[:, None]).square().sum(0)


def _path(inputs: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights (inputs, penalties) and biases (penalties,) with each penalty, for unstandardized inputs."""
    mean, spread = inputs.mean(0), inputs.std(0, correction=0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    left, values, right = torch.linalg.svd((inputs - mean) / spread, full_matrices=False)
    shrunk = values[:, None] / (values[:, None].square() + len(inputs) * PENALTIES)
    weights = right.T @ (shrunk * (left.T @ (outputs - outputs.mean()))[:, None]) / spread[:, None]
    return weights, outputs.mean() - mean @ weights
