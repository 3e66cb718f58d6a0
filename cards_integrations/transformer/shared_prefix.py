"""A prefix that several live rows have in common, such as a system prompt: it is held once, and all attend to it."""

from __future__ import annotations

from collections.abc import Sequence

from cards_integrations.transformer.kv_block import States


class SharedPrefix:
    """The first tokens of several texts, with their keys and values, (tokens, heads, head size) for each layer.

    `users` are the rows that begin with it; it is given up with the last of them. `long` is true if they are read with
    the rotary frequencies of long texts.
    """

    def __init__(self, ids: list[int], states: States, long: bool = False) -> None:
        self.ids = ids
        self.states = states
        self.long = long
        self.users: set[object] = set()

    def __len__(self) -> int:
        return len(self.ids)

    def begins(self, ids: Sequence[int], long: bool = False) -> bool:
        """True if a text with these tokens and this `long` begins with it."""
        return long == self.long and ids[: len(self.ids)] == self.ids
