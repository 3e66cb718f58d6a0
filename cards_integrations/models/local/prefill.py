"""Which prompts are read next, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence

from cards_integrations.models.local.frontier import Frontier
from cards_integrations.transformer.kv_memory import MIN_PREFIX
from cards_integrations.transformer.prefix_tree import common


def reads_for(frontier: Frontier, other: Frontier) -> bool:
    """True if a prompt that is read in pieces is still to read what another one can then reuse."""
    read, ids = frontier.branch.tree.ids, other.unread
    if frontier.branch.long != other.branch.long:
        return False
    shared = common([*read, *frontier.unread], ids[:-1]) if ids[: len(read)] == read else 0
    return shared > max(len(read), MIN_PREFIX - 1)


def is_mixed(unread: Sequence[int], beside: int) -> bool:
    """True for a short prompt among long ones, which is to wait no longer than a step of others would."""
    return bool(unread) and min(unread) <= beside < max(unread)


def prefill_shares(unread: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each prompt are read next.

    The shortest come first, so that they do not wait for long ones; the oldest has half of the budget, so that it is
    read, however many come after it.

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
