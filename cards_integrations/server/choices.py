"""The methods and rewards that a request may choose. Nothing here reads files, opens connections or imports code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cards_integrations.decoding import Decoding, as_decoding
from cards_integrations.errors import short_repr, unknown_name
from cards_integrations.registry import from_json
from cards_integrations.rewards import Reward, as_reward
from cards_integrations.server.errors import invalid
from cards_integrations.server.settings import ServerSettings

PARTS = {"length": (), "weighted": ("rewards",), "min": ("rewards",), "gate": ("gate", "reward")}
"""The fields of each kind of inline reward that contain further rewards."""
MAX_DEPTH, MAX_PARTS = 4, 8


class Choices:
    """Checks and builds the methods and rewards that requests choose.

    Args:
        settings: The allowed rewards and methods.
        own: The server's own method, whose settings a request may change.
    """

    def __init__(self, settings: ServerSettings, own: Decoding) -> None:
        self._settings = settings
        self._own = own

    def decoding(self, value: Any) -> Decoding:
        """Return the method that a request asks for.

        Args:
            value: A name, JSON, or settings; without a "method", they change the server's own method.

        Raises:
            ApiError, SettingsError: It is not allowed, or cannot be used as given.
        """
        value = from_json("cards.decoding", value)
        if isinstance(value, str):
            value = {"method": value}
        if not isinstance(value, Mapping):
            raise invalid(f"cards.decoding={short_repr(value)}: send a name or an object.", "cards.decoding")
        if "method" not in value:
            value = {**self._own.model_dump(), **value}
        if value["method"] not in self._settings.methods:
            raise unknown_name("cards.decoding.method", str(value["method"]), self._settings.methods)
        found: Decoding = as_decoding(dict(value))
        if (largest := max(_whole_numbers(found.model_dump()), default=0)) > self._settings.max_candidates:
            raise invalid(
                f"cards.decoding: {largest} is more than this server allows, {self._settings.max_candidates}.",
                "cards.decoding",
            )
        return found

    def reward(self, value: Any) -> Reward:
        """Return the reward that a request asks for.

        Args:
            value: A name that the server knows, or settings, also as JSON, of a kind that loads and runs nothing.

        Raises:
            ApiError, SettingsError: It is not allowed, or cannot be used as given.
        """
        found: Reward = as_reward(self._reward(from_json("cards.reward", value), 0))
        return found

    def _reward(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            if value not in self._settings.rewards:
                raise unknown_name("cards.reward", value, self._settings.rewards)
            return self._settings.rewards[value]
        if not isinstance(value, Mapping) or depth > MAX_DEPTH:
            raise invalid(f"cards.reward={short_repr(value)}: send a name, or an object with a kind.", "cards.reward")
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in self._settings.inline_rewards:
            names = ", ".join(self._settings.inline_rewards) or "none"
            raise invalid(
                f"cards.reward.kind={short_repr(kind)}: a request may bring settings of these kinds: {names}. "
                f"Or name one of {', '.join(sorted(self._settings.rewards))}.",
                "cards.reward",
            )
        return {**value, **{name: self._parts(value[name], depth) for name in PARTS[kind] if name in value}}

    def _parts(self, value: Any, depth: int) -> Any:
        if not isinstance(value, list):
            return self._reward(value, depth + 1)
        if len(value) > MAX_PARTS:
            raise invalid(f"cards.reward: {len(value)} parts, and at most {MAX_PARTS} are allowed.", "cards.reward")
        return [self._reward(part, depth + 1) for part in value]


def _whole_numbers(settings: Any) -> Iterator[int]:
    """Yield all whole numbers in settings, at any depth: numbers of candidates, of tokens, of tries."""
    if isinstance(settings, int):
        yield settings
    parts = settings.values() if isinstance(settings, Mapping) else settings
    for each in parts if isinstance(settings, (Mapping, list, tuple)) else ():
        yield from _whole_numbers(each)
