"""Decode steps of fixed shapes, captured as CUDA graphs: one launch for a step instead of thousands.

At small batches a step on a GPU is bound by the launches of its kernels. A graph replays them all at once, but only
with the shapes and addresses of its capture. So the tokens, rows and columns of a step are rounded up to a few sizes
(`FlatBatch`), and the inputs are copied to where the graph reads them. The cache's addresses are those of the blocks
that the step reads; when a block grows, only its graphs are lost.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cards_integrations.transformer.attention import AttentionMetadata

log = logging.getLogger("cards_integrations")
MOST = 256  # shapes that are remembered


class Computed(NamedTuple):
    """The outputs of a forward, (n, ...), and the hidden states that they come from, (n, hidden size), if asked for."""

    outputs: torch.Tensor
    states: torch.Tensor | None = None

    def clone(self) -> Computed:
        """Return a copy."""
        return Computed(self.outputs.clone(), None if self.states is None else self.states.clone())


Run = Callable[[dict[str, torch.Tensor], AttentionMetadata], Computed]
"""A forward, of the tensors of `FlatBatch.tensors` and the attention metadata."""

Shape = tuple[Any, ...]


@dataclass
class StaticStep:
    """Tensors at fixed addresses, and the output that the forward computed from them."""

    tensors: dict[str, torch.Tensor]
    metadata: AttentionMetadata
    output: Computed | None = None
    graph: Any = None

    def fill(self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> None:
        """Copy the tensors of a step of the same shape."""
        for name, value in tensors.items():
            self.tensors[name].copy_(value)
        for own, other in zip(self.metadata.groups, metadata.groups, strict=True):
            own.tokens.copy_(other.tokens)
            own.restore.copy_(other.restore)
            for pattern, mask in other.masks.items():
                own.masks[pattern].copy_(mask)
            own.repeated.clear()


class StaticSteps:
    """Forwards of a model, small ones with rounded shapes; on a GPU a shape that comes back is captured.

    Args:
        run: The forward.
        device: Where it runs.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self.run = run
        self.capture = self.rounding = device.type == "cuda"
        self.steps: OrderedDict[Shape, StaticStep | None] = OrderedDict()  # None: it has run once
        self.pool: Any = None

    def __call__(self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> Computed:
        """Return what one forward gives, padding included."""
        if not metadata.rounded or not all(group.block.ready for group in metadata.groups):
            return self.run(tensors, metadata)  # which makes what the cache now needs
        step = self._step(_shape(tensors, metadata), tensors, metadata)
        if step is None:
            return self.run(tensors, metadata)
        step.fill(tensors, metadata)
        if step.graph is None:  # not captured
            return self.run(step.tensors, step.metadata)
        step.graph.replay()
        assert step.output is not None
        return step.output.clone()  # the next replay overwrites it

    def _step(self, shape: Shape, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> StaticStep | None:
        """Return the step of a shape that has occurred before; None for a new one."""
        if shape not in self.steps:
            self.steps[shape] = None
            self._forget()
            return None
        self.steps.move_to_end(shape)
        step = self.steps[shape]
        if step is None:
            step = self.steps[shape] = self._new_step(tensors, metadata)
        return step

    def _forget(self) -> None:
        """Give up graphs of blocks whose tensors have moved, and the least recently used of too many."""
        moved = [shape for shape, step in self.steps.items() if step and _shape(step.tensors, step.metadata) != shape]
        for shape in moved:
            del self.steps[shape]
        while len(self.steps) > MOST:
            self.steps.popitem(last=False)

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
            for group in step.metadata.groups:
                group.repeated.clear()  # or the graph would not compute them
            with torch.cuda.graph(graph, pool=self.pool):
                step.output = self.run(step.tensors, step.metadata)
            self.pool, step.graph = graph.pool(), graph
        except RuntimeError as error:  # a model that looks at its data on the host
            log.warning("steps of this model are not captured as CUDA graphs: %s", error)
            self.capture = False
        return step


def _shape(tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> Shape:
    """Return what a graph depends on: numbers of tokens, rows and columns, and where keys and values are."""
    groups = ((g.block.serial, g.block.version, *g.tokens.shape, len(g.restore), g.width) for g in metadata.groups)
    return len(tensors["ids"]), len(tensors["output_indices"]), *groups
