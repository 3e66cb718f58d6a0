"""The states of recurrent and convolution layers: one for each path, copied where paths part.

A state is known only at the lengths where a forward has ended. A rejected segment gives its state back as a whole, and
nothing is ever rolled back; a path that parts earlier begins at the last length whose state is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cards_integrations.transformer.cache_layers import RecurrentLayer, StateName

States = list[torch.Tensor]
"""The states of all layers, (rows, ...) each, or (1, ...) of one text."""


class StateKind(NamedTuple):
    """One of the states of one layer; `like` is an example of it, (1, ...)."""

    layer: int
    name: StateName
    like: torch.Tensor


class StateLayout:
    """Which states the layers have; unknown until the first forward.

    `stepwise` is true if the layers can go on from them by single tokens only.
    """

    def __init__(self) -> None:
        self.kinds: list[StateKind] = []
        self.stepwise = False

    @property
    def bytes(self) -> int:
        """Bytes of the states of one text."""
        return sum(kind.like.numel() * kind.like.dtype.itemsize for kind in self.kinds)


class State:
    """The states after a text: a row of a pool, which several paths share until they go on."""

    def __init__(self, pool: StatePool, row: int) -> None:
        self.pool = pool
        self.row = row
        self.users = 1

    def shared(self) -> State:
        """Add a user, and return the state."""
        self.users += 1
        return self

    def release(self) -> None:
        """Remove a user; the last one gives the row back."""
        self.users -= 1
        if not self.users:
            self.pool.free(self)


class StatePool:
    """The states of all texts of a cache, and of the forward that runs.

    Args:
        layers: The layers of the cache that have states, by index.
        layout: What they keep of a text.
    """

    def __init__(self, layers: dict[int, RecurrentLayer], layout: StateLayout) -> None:
        self.layers = layers
        self.layout = layout
        self.tensors: States = []  # (rows, ...) each
        self.states: list[State | None] = []  # by row

    @property
    def bytes(self) -> int:
        """Bytes of the pool as it is now."""
        return len(self.states) * self.layout.bytes

    def growth(self, more: int) -> int:
        """Return by how many bytes the pool grows when `more` more texts have states."""
        return max(0, _rows_for(self._used + more) - len(self.states)) * self.layout.bytes

    @property
    def _used(self) -> int:
        return len(self.states) - self.states.count(None)

    def begin(self, sources: Sequence[State | None]) -> None:
        """Begin a forward from these states, one for each of its rows; all are None where texts begin."""
        rows = [state.row for state in sources if state is not None]
        held = [tensor[rows] for tensor in self.tensors] if rows else []
        for index, layer in self.layers.items():
            layer.hold({kind.name: s for kind, s in zip(self.layout.kinds, held) if kind.layer == index})  # noqa: B905

    def end(self, rows: int) -> list[State]:
        """Return the states after the forward, one for each of its rows."""
        held = {(index, name): s for index, layer in self.layers.items() for name, s in layer.held.items()}
        if not self.layout.kinds:
            self.layout.kinds = [StateKind(index, name, s[:1].clone()) for (index, name), s in held.items()]
        for layer in self.layers.values():
            layer.hold({})
        return self.write([held[kind.layer, kind.name] for kind in self.layout.kinds], rows)

    def write(self, states: States, rows: int = 1) -> list[State]:
        """Store the states (rows, ...) of `rows` texts."""
        self._make_room(rows)
        free = [row for row, state in enumerate(self.states) if state is None][:rows]
        made = [State(self, row) for row in free]
        for state in made:
            self.states[state.row] = state
        for stored, new in zip(self.tensors, states, strict=True):
            stored[free] = new
        return made

    def read(self, state: State) -> States:
        """Return a copy of the states of one text, (1, ...) each."""
        return [tensor[state.row : state.row + 1].clone() for tensor in self.tensors]

    def _make_room(self, more: int) -> None:
        if self._used + more > len(self.states):
            self._resize(_rows_for(self._used + more))

    def _resize(self, rows: int) -> None:
        """Change the number of rows, and move those in use to the front."""
        live = [state for state in self.states if state is not None]
        at = [state.row for state in live]
        tensors = self.tensors or [kind.like[:0] for kind in self.layout.kinds]
        made = [tensor.new_zeros(rows, *tensor.shape[1:]) for tensor in tensors]
        for new, old in zip(made, tensors, strict=True):
            new[: len(at)] = old[at]
        for row, state in enumerate(live):
            state.row = row
        self.tensors, self.states = made, [*live, *[None] * (rows - len(live))]

    def free(self, state: State) -> None:
        """Free the row of a state that has no users."""
        self.states[state.row] = None

    def give_back(self) -> None:
        """Shrink if over half of the rows are free."""
        if 2 * self._used < len(self.states):
            self._resize(_rows_for(self._used))

    def release(self) -> None:
        """Let go of all states."""
        self.tensors, self.states = [], []


def _rows_for(used: int) -> int:
    """Return how many rows a pool has when `used` are in use: a quarter more, so that it seldom grows."""
    return used + used // 4
