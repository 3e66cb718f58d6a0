"""A beginning that several live rows have in common, such as a system prompt: held once, attended to by all of them."""

from __future__ import annotations

from collections.abc import Sequence

from cards_integrations.transformer.kv_block import States


class SharedPrefix:
    """The first tokens of several texts, with their keys and values, (tokens, heads, head size) for each layer.

    `users` are the rows that begin with it; it is given up with the last of them.
    """

    def __init__(self, ids: list[int], states: States) -> None:
        self.ids = ids
        self.states = states
        self.users: set[object] = set()

    def __len__(self) -> int:
        return len(self.ids)

    def begins(self, ids: Sequence[int]) -> bool:
        """True if a text begins with it."""
        return ids[: len(self.ids)] == self.ids
