"""Decode steps of fixed shapes, captured as CUDA graphs: one launch for a step instead of thousands.

At small batches a step on a GPU is bound by the launches of its kernels. A graph replays them all at
once, but only with the shapes and addresses of its capture; so the tokens, rows and columns of a
step are rounded up to a few sizes, and the inputs are copied to where the graph reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from cards_integrations.transformer.attention import Group, Layout
from cards_integrations.transformer.kv_cache import TreeCache

log = logging.getLogger("cards_integrations")
COLUMNS = 256  # a step reads whole blocks of columns
LARGEST = 512  # tokens from which on launches do not matter

Run = Callable[[dict[str, torch.Tensor], Layout], torch.Tensor]
"""ids, positions, place (tokens,) and ends (n,), and the layout -> outputs (n, ...)."""


@dataclass
class Step:
    """Inputs where they stay, and what the forward made of them."""

    inputs: dict[str, torch.Tensor]
    layout: Layout
    output: torch.Tensor | None = None
    graph: Any = None

    def fill(self, inputs: dict[str, torch.Tensor], layout: Layout) -> None:
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        mine, [theirs] = self.layout.groups[0], layout.groups
        mine.tokens.copy_(theirs.tokens)
        mine.back.copy_(theirs.back)
        for pattern, mask in theirs.masks.items():
            mine.masks[pattern].copy_(mask)
        mine.repeated.clear()


class StaticSteps:
    """Forwards of a model, small ones with rounded shapes; on a GPU each shape is captured when it first comes."""

    def __init__(self, cache: TreeCache, run: Run, device: torch.device) -> None:
        self.cache = cache
        self.run = run
        self.capture = self.rounding = device.type == "cuda"
        self.steps: dict[tuple[int, ...], Step] = {}
        self.storage: int | None = None  # where the cache's keys lie; graphs have it built in
        self.pool: Any = None

    def __call__(self, inputs: dict[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        """Outputs (ends, ...) of one forward; a large one runs as it comes."""
        large = len(inputs["ids"]) > LARGEST or len(layout.groups) > 1
        [*_, group] = layout.groups
        if not self.rounding or large or group.columns is not None or not isinstance(group.slots, slice):
            return self.run(inputs, layout)
        ends = len(inputs["ends"])
        inputs, layout = self._rounded(inputs, layout)
        keys = self.cache.layers[0].keys
        if keys is None or keys.data_ptr() != self.storage:
            self.steps.clear()
            output = self.run(inputs, layout)  # allocates what the cache now needs
            self.storage = self.cache.layers[0].keys.data_ptr()
            return output[:ends]
        [group] = layout.groups
        shape = (len(inputs["ids"]), len(inputs["ends"]), *group.tokens.shape, group.width)
        step = self.steps.get(shape)
        if step is None:
            step = self.steps[shape] = self._new(inputs, layout)
        step.fill(inputs, layout)
        if step.graph is None:  # not captured
            return self.run(step.inputs, step.layout)[:ends]
        step.graph.replay()
        assert step.output is not None
        return step.output[:ends].clone()  # the next replay writes here again

    def _rounded(self, inputs: dict[str, torch.Tensor], layout: Layout) -> tuple[dict[str, torch.Tensor], Layout]:
        """Padded with tokens in the scratch column of the first row, which nobody sees."""
        [group] = layout.groups
        assert isinstance(group.slots, slice)
        masks, width = group.masks, group.width
        rows, length = group.tokens.shape
        first = group.slots.start
        total = min(_power(first + rows), self.cache.rows)
        wide, long = min(-(-width // COLUMNS) * COLUMNS, self.cache.columns), _power(length)
        padded = {name: pad(value, (0, _power(len(value)) - len(value))) for name, value in inputs.items()}
        around = (0, wide - width, 0, long - length, 0, 0, first, total - first - rows)
        hidden = {name: pad(mask, around, value=-torch.inf) for name, mask in masks.items()}
        for mask in hidden.values():  # what is padding sees the scratch column, or its softmax is NaN
            mask[:first, :, :, 0] = mask[first + rows :, :, :, 0] = mask[:, :, length:, 0] = 0
        tokens = pad(group.tokens, (0, long - length, first, total - first - rows))
        row, at = group.back // length + first, group.back % length
        back = pad(row * long + at, (0, len(padded["ids"]) - len(row)))
        return padded, Layout([Group(slice(0, total), None, tokens, back, None, hidden)], layout.patterns)

    def _new(self, inputs: dict[str, torch.Tensor], layout: Layout) -> Step:
        step = Step({name: value.clone() for name, value in inputs.items()}, layout)
        if not self.capture:
            return step
        try:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries set themselves up in the first run
                    self.run(step.inputs, step.layout)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            step.layout.groups[0].repeated.clear()  # or the graph would not compute them
            with torch.cuda.graph(graph, pool=self.pool):
                step.output = self.run(step.inputs, step.layout)
            self.pool, step.graph = graph.pool(), graph
        except RuntimeError as error:  # a model that looks at its data on the host
            log.warning("steps of this model are not captured as CUDA graphs: %s", error)
            self.capture = False
        return step


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
