"""The interface of the language model that a study needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cards_integrations.engine.engine import Engine
from cards_integrations.rewards import AnyReward
from cards_integrations.settings import Options
from cards_integrations.trace import Alignment


class Aligner(Protocol):
    """A language model whose answers are aligned with a reward, such as `CardsLLM`."""

    def resolve_options(self, overrides: dict[str, Any]) -> Options:
        """Return the options of a call with these arguments."""

    def engine_for(self, overrides: dict[str, Any], owner: Any) -> Engine:
        """Return the engine that answers a call with these arguments."""

    def align_batch(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int] | None = None,
        contexts: Sequence[Any] | None = None,
        progress: bool | str = True,
        **options: Any,
    ) -> list[Alignment]:
        """Answer all prompts in one running batch."""

    def score(
        self, prompt: Any, texts: Sequence[str], reward: AnyReward | str | None = None, context: Any = None
    ) -> list[float]:
        """Return the rewards of whole answers to a prompt."""
