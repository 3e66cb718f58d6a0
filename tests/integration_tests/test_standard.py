"""LangChain's standard integration tests, on `ChatCards` and on `CardsLLM` itself."""

from __future__ import annotations

from typing import Any

import faces
import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests

from cards_integrations import CardsLLM


class TestChatCards(faces.StandardSuite, ChatModelIntegrationTests):
    # Off besides what `StandardSuite` names, and why:
    # - supports_json_mode, images, PDFs, audio, Anthropic content (the suite's defaults): the model
    #   reads and writes text only.
    # - enable_vcr_tests: there is no HTTP traffic to record.

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return faces.options(temperature=0.7)

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
    def chat_model_class(self) -> type[CardsLLM]:
        return CardsLLM
