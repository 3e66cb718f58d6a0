"""The file of a trained value head: safetensors, whose metadata tells what it was trained on, and how good it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from cards_integrations.errors import RewardError, said

if TYPE_CHECKING:
    import torch

KEY = "cards_value_head"  # in the metadata of the file
PROBE = "The quick brown fox jumps over the lazy dog. In 1984, who said: 'A B C'?"
Target = Literal["value", "prefix"]


class ValueCard(BaseModel):
    """What a value head was trained on, and how good it is on prompts that it has not seen."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    version: Literal[1] = 1
    """The version of the file's layout."""
    model: str
    """The language model whose hidden states it reads."""
    revision: str | None = None
    """Its revision on the hub."""
    adapter: str | None = None
    """The adapter on it."""
    probe_ids: list[int]
    """The tokens of a probe text. The file has the model's hidden state after each, as a fingerprint of the model."""
    teacher: str
    """The name of the reward that it was trained on."""
    target: Target
    """"value" predicts the teacher's reward of the finished answer; "prefix" that of the answer so far."""
    max_tokens: int
    """Token limit of the answers that it was trained on."""
    scale: tuple[FiniteFloat, FiniteFloat]
    """Mean and standard deviation of its values over finished plain answers to prompts that it has not seen."""
    prompts: tuple[int, int]
    """How many prompts it was trained and tested on."""
    prefixes: tuple[int, int]
    """How many prefixes of answers these gave, for training and test."""
    pearson: FiniteFloat
    """Correlation of its values with the target on the prompts that it has not seen."""
    spearman: FiniteFloat
    """Rank correlation, likewise."""
    penalty: FiniteFloat
    """The ridge penalty, chosen by cross-validation over the training prompts."""

    @property
    def trained_on(self) -> str:
        """A description of the model whose hidden states it reads."""
        revision = f" at revision {self.revision}" if self.revision else ""
        adapter = f" with adapter {self.adapter!r}" if self.adapter else ""
        return f"{self.model!r}{revision}{adapter}"


def pooled(states: torch.Tensor) -> torch.Tensor:
    """Return what a head reads, (2, hidden size).

    Args:
        states: The states after the prompt and after each token of the answer, (1 + tokens, hidden size).
    """
    import torch

    mean = states[1:].mean(0) if len(states) > 1 else torch.zeros_like(states[0])
    return torch.stack([states[-1], mean])


@dataclass(frozen=True, eq=False)
class ValueHead:
    """value = weight[0] . last + weight[1] . mean + bias.

    `last` is the last hidden state after the answer, or after the prompt if the answer is empty; `mean` is the mean of
    the states after all tokens of the answer, or 0.

    Attributes:
        weight: (2, hidden size), float32.
        bias: In the teacher's units.
        probe: The model's hidden states after each of `card.probe_ids`, (tokens, hidden size), float32.
        card: What it was trained on.
    """

    weight: torch.Tensor
    bias: float
    probe: torch.Tensor
    card: ValueCard

    def save(self, path: str | Path) -> None:
        """Write the file."""
        import torch
        from safetensors.torch import save_file

        tensors = {"weight": self.weight, "bias": torch.tensor([self.bias]), "probe": self.probe}
        tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, {"format": "pt", KEY: self.card.model_dump_json()})

    @classmethod
    def load(cls, path: str | Path) -> ValueHead:
        """Read a file.

        Raises:
            RewardError: It cannot be read, or is no value head.
        """
        from safetensors.torch import load_file

        card = read_card(path)
        try:
            tensors = load_file(path)
            found = cls(tensors["weight"], float(tensors["bias"]), tensors["probe"], card)
        except Exception as error:
            raise _unreadable(path, error) from error
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise RewardError(f"The value head {str(path)!r} holds NaN or infinity: train it again.")
        if found.probe.shape[:1] != (len(card.probe_ids),) or found.weight.shape != (2, *found.probe.shape[1:]):
            raise RewardError(f"The value head {str(path)!r} has tensors of other shapes than its card says.")
        return found


def read_card(path: str | Path) -> ValueCard:
    """Read what a value head was trained on, without its tensors.

    Raises:
        RewardError: The file cannot be read, or is no value head.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return ValueCard.model_validate(json.loads((file.metadata() or {})[KEY]))
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> RewardError:
    if isinstance(error, FileNotFoundError):
        return RewardError(f"There is no value head {str(path)!r}: `cards train-value` writes one.")
    return RewardError(f"{str(path)!r} is no value head that `cards train-value` has written: {said(error)}")
