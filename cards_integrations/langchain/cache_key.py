"""What LangChain's caches know an answer by: everything that may change it.

A key is text, and the text of an object that a reward holds, such as a function, need not be its own: two may look
alike, and an address is given to another object once the first is gone, in this process or the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4
from weakref import ref

from cards_integrations.langchain.convert import convert_options
from cards_integrations.rewards import as_reward
from cards_integrations.rewards.base import Reward

_names: dict[int, tuple[ref[Any], str]] = {}


def call_key(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, with schemas in place of its tools and classes: two may have one name."""
    found = convert_options(overrides)
    return {**found, "reward": reward_key(as_reward(found["reward"]))} if "reward" in found else found


def reward_key(reward: Reward | None) -> str:
    """Return the settings of a reward, and a name of each object of this process that it depends on."""
    if reward is None or reward.is_reproducible:
        return repr(reward)
    return " ".join([repr(reward), *map(_name, reward.held), *map(reward_key, reward.parts)])


def _name(held: Any) -> str:
    """Return a name that the object keeps as long as it lives, and that no other object ever has."""
    number = id(held)
    try:
        if number not in _names:
            _names[number] = ref(held, lambda _: _names.pop(number, None)), uuid4().hex
        return _names[number][1]
    except TypeError:  # nobody can tell how long it lives
        return uuid4().hex
