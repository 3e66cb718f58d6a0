"""The gate of a reward model that weighs its objectives by the prompt (ArmoRM, arXiv 2406.12845)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

TURNS = ("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<end_of_turn>\n<start_of_turn>model\n")
"""How a prompt ends in the templates of models with a gate. It is read at the first token of the last of these."""


class Gate(nn.Module):
    """Weights of the objectives, from the hidden state at the end of the prompt.

    With h that state, f layers with a ReLU between them, tau the temperature and T the matrix that frees the objectives
    from verbosity, the score of objectives r is g . (r T) for g = scale * softmax(f(h) / tau), and so r . (T g).

    Args:
        weights: Those of the files: `gating.layers.<n>.weight` and `.bias`, `gating.logit_scale` and
            `reward_transform_matrix`.
        config: The model's, with `gating_temperature`.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], config: Any) -> None:
        super().__init__()
        self.layers = numbered_layers(weights, "gating.layers.")
        self.temperature = float(getattr(config, "gating_temperature", 10))
        self.scale = nn.Parameter(weights["gating.logit_scale"].float())
        self.transform = nn.Parameter(weights["reward_transform_matrix"].float())

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Return the weights of the objectives (n, objectives) after hidden states (n, hidden size)."""
        chosen = (self.layers(state.float()) / self.temperature).softmax(-1) * self.scale
        found: torch.Tensor = chosen @ self.transform.T
        return found


def linear_layer(weights: Mapping[str, torch.Tensor], start: str) -> nn.Module:
    """Return the linear layer of the weights whose names begin with `start`."""
    weight, bias = weights[f"{start}weight"], weights.get(f"{start}bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def numbered_layers(weights: Mapping[str, torch.Tensor], start: str) -> nn.Module:
    """Return the linear layers that are numbered after `start`, with a ReLU between them."""
    numbers = sorted({int(name.removeprefix(start).split(".")[0]) for name in weights if name.startswith(start)})
    layers: list[nn.Module] = []
    for number in numbers:
        layers += [*([nn.ReLU()] if layers else []), linear_layer(weights, f"{start}{number}.")]
    return nn.Sequential(*layers)
