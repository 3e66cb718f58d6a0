"""LangChain's standard integration tests, on `ChatCards` and on `CardsLLM` itself."""

from __future__ import annotations

from typing import Any

import faces
import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests

from cards_integrations import CardsLLM, ChatCards


class TestChatCards(ChatModelIntegrationTests):
    # Off, and why:
    # - max_retries among the standard parameters: a local model makes no request that could be retried.
    # - has_tool_calling, has_structured_output (and with them tool_choice, agent loops, tool messages):
    #   bind_tools and with_structured_output exist to say that they are not supported yet.
    # - supports_json_mode, images, PDFs, audio, Anthropic content (the suite's defaults): the model
    #   reads and writes text only.
    # - enable_vcr_tests: there is no HTTP traffic to record.

    @property
    def chat_model_class(self) -> type[ChatCards]:
        return ChatCards

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return faces.options(temperature=0.7)

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {"temperature": 0, "max_tokens": 100, "timeout": 60, "stop": []}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return faces.chat_model(seed=1)


class TestCardsLLM(TestChatCards):
    """The same tests call the LlamaIndex LLM itself: it need not be a `BaseChatModel` to act like one.

    `output_version`, with which the suite also builds the model, is a field of LangChain's chat
    models; for it the model is the one that `as_langchain()` gives.
    """

    @pytest.fixture
    def model(self, request: Any) -> CardsLLM:
        llm = CardsLLM(**{**self.standard_chat_model_params, **self.chat_model_params})
        llm.as_langchain().output_version = getattr(request, "param", {}).get("output_version")
        return llm

    @property
    def chat_model_class(self) -> type[CardsLLM]:  # type: ignore[override]
        return CardsLLM
