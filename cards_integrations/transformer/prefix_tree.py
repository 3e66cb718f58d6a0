"""Finished texts in a radix tree: a common prefix is held once, and found in one pass over a text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cards_integrations.transformer.kv_block import States, joined, part
from cards_integrations.transformer.recurrent import States as RecurrentStates


class PrefixNode:
    """Tokens that follow those of the parent.

    Attributes:
        parent: The node before; None at the root.
        ids: The tokens.
        states: Their keys and values.
        children: The nodes that follow, by their first token.
        recurrent: The states of recurrent layers after the last token; empty if they are not known.
        end: The number of tokens from the root to the end of this node.
    """

    def __init__(self, parent: PrefixNode | None, ids: list[int], states: States) -> None:
        self.parent = parent
        self.ids = ids
        self.states = states
        self.children: dict[int, PrefixNode] = {}
        self.recurrent: RecurrentStates = []
        self.end: int = len(ids) + (parent.end if parent else 0)


class PrefixTree:
    """The finished texts of one cache.

    Args:
        bytes_per_token: Bytes of keys and values of one token.
        bytes_per_state: Bytes of the states of recurrent layers after a text.
        recent: All nodes of all trees of a memory, the least recently used first. A node is used whenever one of its
            descendants is, and after it, so that the first of all is always a leaf.
    """

    def __init__(self, bytes_per_token: int, bytes_per_state: int, recent: OrderedDict[PrefixNode, PrefixTree]) -> None:
        self.root = PrefixNode(None, [], [])
        self.bytes_per_token = bytes_per_token
        self.bytes_per_state = bytes_per_state
        self.recent = recent
        self.tokens = 0
        self.states = 0  # nodes with recurrent states

    @property
    def bytes(self) -> int:
        """Bytes of keys, values and recurrent states of all texts."""
        return self.tokens * self.bytes_per_token + self.states * self.bytes_per_state

    def match(self, ids: Sequence[int]) -> tuple[list[PrefixNode], int]:
        """Return the nodes that a text begins with (perhaps only a part of the last), and how many tokens match."""
        node, path, known = self.root, [], 0
        while known < len(ids) and (child := node.children.get(ids[known])) is not None:
            shared = common(child.ids, ids[known : known + len(child.ids)])
            path.append(child)
            known += shared
            if shared < len(child.ids):
                break
            node = child
        return path, known

    def size(self, path: Sequence[PrefixNode]) -> int:
        """Return the bytes of the nodes of a path."""
        tokens, states = sum(len(node.ids) for node in path), sum(bool(node.recurrent) for node in path)
        return tokens * self.bytes_per_token + states * self.bytes_per_state

    def use(self, path: Sequence[PrefixNode]) -> None:
        """Note that the nodes of a path from the root have been used."""
        for node in reversed(path):
            if node in self.recent:  # else it has been evicted meanwhile
                self.recent.move_to_end(node)

    def read(self, path: Sequence[PrefixNode], tokens: int, first: int = 0) -> States:
        """Return the keys and values of the tokens of a path from `first` up to `tokens`."""
        starts = [node.end - len(node.ids) for node in path]
        parts = [
            [(keys[max(0, first - start) : tokens - start], values[max(0, first - start) : tokens - start])
             for keys, values in node.states]
            for node, start in zip(path, starts, strict=True)
            if start < tokens and node.end > first
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else joined(parts)

    def cut(self, path: list[PrefixNode], tokens: int) -> list[PrefixNode]:
        """Shorten a path to `tokens` tokens, which may split its last node, and return it."""
        if path and (beyond := path[-1].end - tokens) > 0:
            path = [*path[:-1], self._split(path[-1], len(path[-1].ids) - beyond)]
            self.use(path)
        return path

    def insert(self, path: list[PrefixNode], ids: list[int], states: States) -> None:
        """Add the rest of a text.

        Args:
            path: The nodes that it begins with, each as a whole.
            ids: The tokens after these.
            states: Their keys and values.
        """
        leaf = PrefixNode(path[-1] if path else self.root, ids, states)
        (path[-1] if path else self.root).children[ids[0]] = leaf
        self.tokens += len(ids)
        self.recent[leaf] = self
        self.use([*path, leaf])

    def note_state(self, node: PrefixNode, recurrent: RecurrentStates) -> None:
        """Keep the recurrent states after a node."""
        self.states += not node.recurrent
        node.recurrent = recurrent

    def _split(self, node: PrefixNode, tokens: int) -> PrefixNode:
        """Split the first tokens of a node off, and return them as a node of their own."""
        parent = node.parent
        assert parent is not None
        upper = PrefixNode(parent, node.ids[:tokens], part(node.states, 0, tokens))
        node.parent, node.ids, node.states = upper, node.ids[tokens:], part(node.states, tokens, len(node.ids))
        self.recent[upper] = self
        upper.children[node.ids[0]], parent.children[upper.ids[0]] = node, upper
        return upper

    def remove(self, leaf: PrefixNode) -> None:
        """Remove a leaf."""
        assert leaf.parent is not None
        assert not leaf.children
        del leaf.parent.children[leaf.ids[0]], self.recent[leaf]
        self.tokens -= len(leaf.ids)
        self.states -= bool(leaf.recurrent)

    def nodes(self) -> Iterator[PrefixNode]:
        """Yield all nodes."""
        rest = [*self.root.children.values()]
        while rest:
            node = rest.pop()
            rest += node.children.values()
            yield node


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two texts, in tokens."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # all before `low` is equal, and something before `high` is not
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low
