"""Decode steps of fixed shapes, captured as CUDA graphs: one launch for a step instead of thousands.

At small batches a step on a GPU is bound by the launches of its kernels. A graph replays them all at
once, but only with the shapes and addresses of its capture. So the tokens, rows and columns of a
step are rounded up to a few sizes, and the inputs are copied to where the graph reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from cards_integrations.transformer.attention import AttentionMetadata, GroupMetadata
from cards_integrations.transformer.kv_cache import TreeCache

log = logging.getLogger("cards_integrations")
COLUMNS = 256  # a step reads whole blocks of so many columns
LARGEST = 512  # tokens; in larger steps the launches do not matter

Run = Callable[[dict[str, torch.Tensor], AttentionMetadata], torch.Tensor]
"""The tensors of `FlatBatch.tensors`, and the attention metadata -> outputs (n, ...)."""


@dataclass
class StaticStep:
    """Tensors at fixed addresses, and the output that the forward computed from them."""

    tensors: dict[str, torch.Tensor]
    metadata: AttentionMetadata
    output: torch.Tensor | None = None
    graph: Any = None

    def fill(self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> None:
        """Copy the tensors of a step of the same shape."""
        for name, value in tensors.items():
            self.tensors[name].copy_(value)
        [own], [other] = self.metadata.groups, metadata.groups
        own.tokens.copy_(other.tokens)
        own.restore.copy_(other.restore)
        for pattern, mask in other.masks.items():
            own.masks[pattern].copy_(mask)
        own.repeated.clear()


class StaticSteps:
    """Forwards of a model, small ones with rounded shapes; on a GPU each shape is captured when it first occurs.

    Args:
        cache: The cache that the forward reads and writes.
        run: The forward.
        device: Where it runs.
    """

    def __init__(self, cache: TreeCache, run: Run, device: torch.device) -> None:
        self.cache = cache
        self.run = run
        self.capture = self.rounding = device.type == "cuda"
        self.steps: dict[tuple[int, ...], StaticStep] = {}
        self.storage: int | None = None  # address of the cache's keys, which graphs have built in
        self.pool: Any = None

    def __call__(self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> torch.Tensor:
        """Return the outputs (n, ...) of one forward; a large one runs with its own shapes."""
        large = len(tensors["ids"]) > LARGEST or len(metadata.groups) > 1
        [*_, group] = metadata.groups
        if not self.rounding or large or group.columns is not None or not isinstance(group.rows, slice):
            return self.run(tensors, metadata)
        n = len(tensors["output_indices"])
        tensors, metadata = self._rounded(tensors, metadata)
        keys = self.cache.layers[0].keys
        if keys is None or keys.data_ptr() != self.storage:
            self.steps.clear()
            output = self.run(tensors, metadata)  # allocates what the cache now needs
            self.storage = self.cache.layers[0].keys.data_ptr()
            return output[:n]
        [group] = metadata.groups
        shape = (len(tensors["ids"]), len(tensors["output_indices"]), *group.tokens.shape, group.width)
        step = self.steps.get(shape)
        if step is None:
            step = self.steps[shape] = self._new_step(tensors, metadata)
        step.fill(tensors, metadata)
        if step.graph is None:  # not captured
            return self.run(step.tensors, step.metadata)[:n]
        step.graph.replay()
        assert step.output is not None
        return step.output[:n].clone()  # the next replay overwrites it

    def _rounded(
        self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata
    ) -> tuple[dict[str, torch.Tensor], AttentionMetadata]:
        """Padded with tokens in the scratch column of the first row, which no token sees."""
        [group] = metadata.groups
        assert isinstance(group.rows, slice)
        masks, width = group.masks, group.width
        rows, length = group.tokens.shape
        first = group.rows.start
        total = min(_next_power(first + rows), self.cache.rows)
        wide, long = min(-(-width // COLUMNS) * COLUMNS, self.cache.columns), _next_power(length)
        padded = {name: pad(value, (0, _next_power(len(value)) - len(value))) for name, value in tensors.items()}
        around = (0, wide - width, 0, long - length, 0, 0, first, total - first - rows)
        hidden = {name: pad(mask, around, value=-torch.inf) for name, mask in masks.items()}
        for mask in hidden.values():  # padding must see the scratch column, or its softmax is NaN
            mask[:first, :, :, 0] = mask[first + rows :, :, :, 0] = mask[:, :, length:, 0] = 0
        tokens = pad(group.tokens, (0, long - length, first, total - first - rows))
        row, at = group.restore // length + first, group.restore % length
        restore = pad(row * long + at, (0, len(padded["ids"]) - len(row)))
        rounded = GroupMetadata(slice(0, total), None, tokens, restore, None, hidden)
        return padded, AttentionMetadata([rounded], metadata.patterns)

    def _new_step(self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> StaticStep:
        step = StaticStep({name: value.clone() for name, value in tensors.items()}, metadata)
        if not self.capture:
            return step
        try:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries initialize themselves in the first run
                    self.run(step.tensors, step.metadata)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            step.metadata.groups[0].repeated.clear()  # or the graph would not compute them
            with torch.cuda.graph(graph, pool=self.pool):
                step.output = self.run(step.tensors, step.metadata)
            self.pool, step.graph = graph.pool(), graph
        except RuntimeError as error:  # a model that looks at its data on the host
            log.warning("steps of this model are not captured as CUDA graphs: %s", error)
            self.capture = False
        return step


def _next_power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
