"""LangChain's standard unit tests of chat models."""

from __future__ import annotations

from typing import Any

import faces
import pytest
from langchain_tests.unit_tests import ChatModelUnitTests

from cards_integrations import CardsLLM

pytestmark = pytest.mark.framework_suite


class TestChatCards(faces.StandardSuite, ChatModelUnitTests):
    # test_serdes skips itself: local weights are not lc-serializable.

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": faces.chat_model()}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"CARDS_MAX_TOKENS": "9", "CARDS_SEED": "3"}, self.chat_model_params, {"max_tokens": 9, "seed": 3}


class TestCardsLLM(TestChatCards):
    # The LlamaIndex LLM itself, as in the integration tests: it is a Runnable, and no `BaseChatModel`.

    @property
    def chat_model_class(self) -> type[Any]:
        return CardsLLM
