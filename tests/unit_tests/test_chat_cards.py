"""LangChain's standard unit tests of chat models."""

from __future__ import annotations

from typing import Any

import faces
from langchain_tests.unit_tests import ChatModelUnitTests

from cards_integrations import ChatCards


class TestChatCards(ChatModelUnitTests):
    # Off, and why:
    # - max_retries, api_key among the standard parameters: a local model makes no request that could be
    #   retried or authorized, and unknown settings are refused.
    # - has_tool_calling, has_structured_output: bind_tools and with_structured_output exist to say that
    #   they are not supported yet.
    # - test_serdes skips itself: local weights are not lc-serializable.

    @property
    def chat_model_class(self) -> type[ChatCards]:
        return ChatCards

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": faces.chat_model()}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {"temperature": 0, "max_tokens": 100, "timeout": 60, "stop": []}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"CARDS_MAX_TOKENS": "9", "CARDS_SEED": "3"}, self.chat_model_params, {"max_tokens": 9, "seed": 3}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False
