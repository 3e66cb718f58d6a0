"""Prefill: which prompts are read next, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence

from cards_integrations.models.local.frontier import Frontier
from cards_integrations.transformer.kv_memory import MIN_PREFIX
from cards_integrations.transformer.prefix_tree import common


def reads_for(frontier: Frontier, other: Frontier) -> bool:
    """True if a prompt that is being read in pieces has yet to read what another one can then reuse."""
    read, ids = frontier.branch.tree.ids, other.unread
    if frontier.branch.long != other.branch.long:
        return False
    shared = common([*read, *frontier.unread], ids[:-1]) if ids[: len(read)] == read else 0
    return shared > max(len(read), MIN_PREFIX - 1)


def is_mixed(unread: Sequence[int], beside: int) -> bool:
    """True if there is a short prompt among long ones, which should not wait for these."""
    return bool(unread) and min(unread) <= beside < max(unread)


def prefill_shares(unread: Sequence[int], budget: int) -> list[int]:
    """Return how many tokens of each prompt are read next.

    The shortest come first, so that they do not wait for long ones. The oldest gets half of the budget, so that it is
    read however many others arrive.

    Args:
        unread: Tokens of each prompt that have not been read, in order of arrival.
        budget: Tokens that are read at most.
    """
    shares = [min(n, budget // 2) if i == 0 else 0 for i, n in enumerate(unread)]
    left = budget - sum(shares)
    for i in sorted(range(len(unread)), key=unread.__getitem__):
        more = min(unread[i] - shares[i], left)
        shares[i] += more
        left -= more
    return shares
