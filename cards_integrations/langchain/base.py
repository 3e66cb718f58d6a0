"""What the chat model and the text LLM have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from langchain_core.language_models.base import LangSmithParams

from cards_integrations.engine.engine import Engine
from cards_integrations.errors import SettingsError
from cards_integrations.langchain.cache_key import reward_key
from cards_integrations.langchain.convert import PROVIDER
from cards_integrations.settings import OptionsFromEnvironment

SAME_ANSWER = ("engine", "timeout", "progress")
"""Options that do not change an answer."""


class CardsLangChainBase(OptionsFromEnvironment):
    """A LangChain model on a shared engine."""

    def close(self) -> None:
        """Free the models, unless another object uses them; the next call loads them again."""
        Engine.release(self)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        found = {name: repr(value) for name, value in self.options().items() if name not in SAME_ANSWER}
        return {**found, "reward": reward_key(self.reward)}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """False: a local model is not in LangChain's serialization registry."""
        return False

    def get_token_ids(self, text: str) -> list[int]:
        """Encode a text with the model's tokenizer, or with `custom_get_token_ids`; loads the model."""
        custom: Callable[[str], list[int]] | None = getattr(self, "custom_get_token_ids", None)  # LangChain's field
        if custom is not None:
            return custom(text)
        return self._engine({}).loaded().chat.encode(text)

    def get_num_tokens(self, text: str) -> int:
        """Count the tokens of a text, without a chat template."""
        return len(self.get_token_ids(text))

    def _langsmith_params(
        self, model_type: Literal["chat", "llm"], stop: list[str] | None, overrides: dict[str, Any]
    ) -> LangSmithParams:
        # validated first: a mapping may contain a key, which traces must not show
        model = self.resolve_options({"model": overrides["model"]}).model if "model" in overrides else self.model
        params = LangSmithParams(
            ls_provider=PROVIDER,
            ls_model_type=model_type,
            ls_model_name=str(getattr(model, "model", model)),
            ls_temperature=overrides.get("temperature", self.temperature),
            ls_max_tokens=overrides.get("max_tokens", self.max_tokens),
        )
        if stop or self.stop:
            params["ls_stop"] = list(stop or self.stop)
        return params

    def _refuse_streaming_several(self, overrides: dict[str, Any]) -> None:
        if (n := overrides.get("n", self.n)) != 1:
            raise SettingsError(f"n={n}: a stream has one answer; use generate(), or a stream for each.")

    def _engine(self, overrides: dict[str, Any]) -> Engine:
        return self.engine_for(overrides, self)
