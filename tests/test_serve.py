"""`cards serve`, asked by the clients that people have: openai, LangChain's, LlamaIndex's, curl."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import faces
import httpx
import openai
import pytest
import test_thinking
import typer
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, SecretStr
from scripted import scripted
from served import NAME, Served, served, until
from test_thinking import ANSWER, THOUGHTS

from cards_integrations import CardsLLM
from cards_integrations.cli import app
from cards_integrations.engine import EngineSettings
from cards_integrations.errors import CardsError, SettingsError
from cards_integrations.models.local import language_model as local
from cards_integrations.models.randomness import answer_seeds
from cards_integrations.rewards import LengthReward, Reward
from cards_integrations.server import ServerSettings, memory
from cards_integrations.server.call import CHAT_ONLY, IGNORED, NEUTRAL, PASSED_ON, Endpoint
from cards_integrations.server.errors import ApiError, as_api_error
from cards_integrations.server.settings import read_keys

KEY = "sk-not-to-be-seen"
QUESTION: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


class City(BaseModel):
    """A city."""

    city: str


def says(prompt: Any) -> str | list[str]:
    """What the scripted model writes: a call, JSON, or what the tool said."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    if not isinstance(prompt, str) and prompt[-1]["role"] == "tool":
        return f"It is {text}."
    return [CALL, CALL.replace("get_weather", "City"), '{"city": "Paris"}'] if "Paris" in text else "plain words"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A small random model, guided by a random classifier."""
    with served(faces.options(), rewards={"short": LengthReward(target=3, scale=(0.0, 1.0))}) as found:
        yield found


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model that writes what `says` says."""
    with scripted(tmp_path_factory.mktemp("script"), says, decoding="sampling", seed=1) as options:
        found = Served(options, {})
        found.service.load()  # what is loaded later is as it is
    yield found
    found.stop()


@pytest.fixture
def thinking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Served]:
    """A model that thinks before it answers."""
    monkeypatch.setattr(local, "LocalLanguageModel", test_thinking.Thinks)
    model = test_thinking.made(tmp_path, test_thinking.QWEN3)
    with served(test_thinking.options(model, reward=None, decoding="sampling")) as found:
        yield found


@pytest.fixture(scope="module")
def endless() -> Iterator[Served]:
    """A model that writes until it is stopped."""
    with served(faces.options(model=faces.endless_model(), max_tokens=4000), timeout=120) as found:
        yield found


def client(server: Served, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, **more)


def cards_of(choice: Any) -> dict[str, Any]:
    """What a choice has beside the fields of OpenAI's API."""
    found: dict[str, Any] = choice.model_extra["cards"]
    return found


def rows_return_to_zero(server: Served) -> None:
    until(lambda: server.service.inspect().idle)
    assert server.metric("cards_rows") == server.metric("cards_answers") == server.metric("cards_live_requests") == 0


# --- openai ---


def test_openai_gets_what_the_object_writes(server: Served) -> None:
    answer = client(server).chat.completions.create(model=NAME, messages=QUESTION, seed=3, max_tokens=12)
    with CardsLLM(**faces.options()) as llm:
        own = llm.align(QUESTION, seed=3, max_tokens=12)
    assert answer.choices[0].message.content == own.content
    assert answer.choices[0].finish_reason == own.finish_reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (own.usage.prompt_tokens, 12)
    assert answer.usage.total_tokens == own.usage.total_tokens


def test_a_stream_has_a_chunk_for_each_segment_and_ends_with_the_usage(server: Served) -> None:
    ask = client(server).chat.completions
    whole = ask.create(model=NAME, messages=QUESTION, seed=3, extra_body={"cards": {"trace": True}})
    chunks = list(
        ask.create(model=NAME, messages=QUESTION, seed=3, stream=True, stream_options={"include_usage": True})
    )
    texts = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert texts[0] == ""
    assert texts[-1] is None
    assert texts[1:-1] == [segment["text"] for segment in cards_of(whole.choices[0])["segments"]]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_several_answers_are_drafted_together(server: Served) -> None:
    ask = client(server).chat.completions
    answer = ask.create(model=NAME, messages=QUESTION, seed=3, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    each = [ask.create(model=NAME, messages=QUESTION, seed=seed) for seed in answer_seeds(3, 3)]
    assert [c.message.content for c in answer.choices] == [one.choices[0].message.content for one in each]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == each[0].usage.prompt_tokens  # type: ignore[union-attr]
    streamed = ["", "", ""]
    for chunk in ask.create(model=NAME, messages=QUESTION, seed=3, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [choice.message.content for choice in answer.choices]


def test_completions_take_model_input_as_it_is(server: Served) -> None:
    ask = client(server).completions
    answer = ask.create(model=NAME, prompt=["One", "Two"], seed=3, max_tokens=10)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6  # characters, and no template around them
    pieces = [c.choices[0].text for c in ask.create(model=NAME, prompt="One", seed=3, max_tokens=10, stream=True)]
    assert "".join(pieces) == answer.choices[0].text
    assert len(pieces) == 3  # two segments and the end


def test_the_log_probabilities_are_those_of_the_tokens(server: Served) -> None:
    ask = client(server)
    answer = ask.chat.completions.create(model=NAME, messages=QUESTION, seed=3, logprobs=True, top_logprobs=2)
    with CardsLLM(**faces.options()) as llm:
        own = llm.align(QUESTION, seed=3)
    told = answer.choices[0].logprobs
    assert told is not None
    assert sum(token.logprob for token in told.content or []) == pytest.approx(own.log_likelihood)
    assert "".join(token.token for token in told.content or []) == own.text
    assert [len(token.top_logprobs) for token in told.content or []] == [2] * 20
    *_, last = ask.chat.completions.create(
        model=NAME, messages=QUESTION, seed=3, logprobs=True, top_logprobs=2, stream=True
    )
    assert last.choices[0].logprobs is not None
    assert last.choices[0].logprobs.content == told.content
    raw = ask.completions.create(model=NAME, prompt="One", seed=3, logprobs=1).choices[0]
    assert raw.logprobs is not None
    assert "".join(raw.logprobs.tokens or []).replace("<|im_start|>", "") == raw.text
    assert [len(top) for top in raw.logprobs.top_logprobs or []] == [1] * 20
    assert (raw.logprobs.text_offset or [])[:3] == [0, 1, 2]


def test_options_of_sampling_are_passed_on(server: Served) -> None:
    one = next(iter(server.service.engine.loaded().chat.encode("x")))
    options: dict[str, Any] = {"logit_bias": {str(one): 1000}, "top_p": 0.9, "presence_penalty": 0.1, "max_tokens": 5}
    answer = client(server).chat.completions.create(model=NAME, messages=QUESTION, **options)
    assert answer.choices[0].message.content == "xxxxx"
    assert server.chat(min_tokens=30).json()["error"]["param"] == "min_tokens"


def test_the_models(server: Served) -> None:
    models = client(server).models
    assert [model.id for model in models.list()] == [NAME]
    assert models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="send model=tiny"):
        models.retrieve("gpt-4o")


def test_method_reward_and_budget_are_the_requests(server: Served) -> None:
    def trace(headers: dict[str, str] | None = None, **cards: Any) -> dict[str, Any]:
        answer = client(server).chat.completions.create(
            model=NAME, messages=QUESTION, seed=3, extra_headers=headers, extra_body={"cards": {"trace": True, **cards}}
        )
        return cards_of(answer.choices[0])

    plain = trace()
    assert plain["method"] == "cards"
    verdicts = [draft["verdict"] for segment in plain["segments"] for draft in segment["drafts"]]
    assert "rejected" in verdicts
    assert trace(decoding={"max_rejections": 0})["usage"]["drafts"] == 4  # a draft for each segment
    assert trace(decoding="sampling")["reward"] is None
    assert trace({"X-Cards-Decoding": '{"method": "best_of_n", "n": 3}'})["usage"]["drafts"] == 3
    assert trace({"X-Cards-Reward": "short"})["reward"] != plain["reward"]
    assert trace({"X-Cards-Decoding": "sampling"}, decoding="best_of_n")["method"] == "best_of_n"
    both = {"kind": "min", "rewards": [{"kind": "length", "target": 2, "scale": [0, 1]}, "short"]}
    assert trace(decoding={"method": "best_of_n", "n": 2}, reward=both)["reward"] is not None


def test_a_stream_tells_rejected_drafts_on_request(server: Served) -> None:
    chunks = client(server).chat.completions.create(
        model=NAME, messages=QUESTION, seed=3, stream=True, extra_body={"cards": {"trace": True}}
    )
    told = [found["cards"] for chunk in chunks if "cards" in (found := chunk.choices[0].model_extra or {})]
    assert [each["number"] for each in told[:-1]] == [0, 1, 2, 3]
    assert any(draft["verdict"] == "rejected" for each in told[:-1] for draft in each["drafts"])
    assert told[-1]["reward"] == told[-2]["reward"]


# --- tools and schemas ---


def test_openai_calls_tools(script: Served) -> None:
    ask = client(script).chat.completions
    messages = [{"role": "user", "content": "Weather in Paris?"}]
    answer = ask.create(model=NAME, messages=messages, tools=TOOLS)  # type: ignore[arg-type]
    [call] = answer.choices[0].message.tool_calls or []
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})  # type: ignore[union-attr]
    turn = [*messages, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    final = ask.create(model=NAME, messages=turn, tools=TOOLS)  # type: ignore[arg-type]
    assert final.choices[0].message.content == "It is sunny."


def test_openai_streams_calls(script: Served) -> None:
    chunks = list(
        client(script).chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Paris"}],
            tools=TOOLS,
            tool_choice="required",
            stream=True,
        )
    )
    [call] = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert (call.index, call.function.name) == (0, "get_weather")  # type: ignore[union-attr]
    assert json.loads(call.function.arguments) == {"city": "Paris"}  # type: ignore[union-attr, arg-type]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_openai_parses_a_schema(script: Served) -> None:
    messages: list[Any] = [{"role": "user", "content": "Paris"}]
    answer = client(script).chat.completions.parse(model=NAME, messages=messages, response_format=City)
    assert answer.choices[0].message.parsed == City(city="Paris")


def test_stop_strings_are_passed_on(script: Served) -> None:
    answer = client(script).chat.completions.create(model=NAME, messages=QUESTION, stop=["words"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("plain ", "stop")


# --- the frameworks' clients ---


def chat_openai(server: Served, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(model=NAME, base_url=server.url, api_key=SecretStr(KEY), max_retries=0, **more)


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def test_chat_openai(script: Served) -> None:
    llm = chat_openai(script, stream_usage=True)
    answer = llm.invoke("Hello")
    assert answer.content == "plain words"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(llm.stream("Hello"))
    assert "".join(str(chunk.content) for chunk in chunks) == "plain words"
    assert any(chunk.usage_metadata for chunk in chunks)
    asked = llm.bind_tools([get_weather]).invoke("Paris")
    assert [(call["name"], call["args"]) for call in asked.tool_calls] == [("get_weather", {"city": "Paris"})]
    told = llm.bind_tools([get_weather]).invoke([HumanMessage("Paris"), asked, get_weather.invoke(asked.tool_calls[0])])
    assert told.content == "It is sunny in Paris."
    assert llm.with_structured_output(City).invoke("Paris") == City(city="Paris")
    assert llm.with_structured_output(City, method="function_calling").invoke("Paris") == City(city="Paris")


async def test_chat_openai_async(server: Served) -> None:
    llm = chat_openai(server, seed=5, temperature=0.7, max_tokens=15, stop_sequences=["~"])
    whole = await llm.ainvoke("Hello")
    pieces = [str(chunk.content) async for chunk in llm.astream("Hello")]
    assert "".join(pieces) == whole.content


def openai_like(server: Served) -> OpenAILike:
    return OpenAILike(
        model=NAME, api_base=server.url, api_key=KEY, is_chat_model=True, is_function_calling_model=True, max_retries=0
    )


def test_openai_like(script: Served) -> None:
    llm = openai_like(script)
    assert llm.complete("Hello").text == "plain words"
    assert llm.chat([ChatMessage(content="Hello")]).message.content == "plain words"
    chunks = list(llm.stream_chat([ChatMessage(content="Hello")]))
    assert "".join(chunk.delta or "" for chunk in chunks) == chunks[-1].message.content == "plain words"
    answer = llm.chat([ChatMessage(content="Paris")], tools=TOOLS)
    [call] = llm.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})


def test_thoughts_are_no_part_of_the_content(thinking: Served) -> None:
    ask = client(thinking).chat.completions
    answer = ask.create(model=NAME, messages=QUESTION)
    message: Any = answer.choices[0].message
    assert (message.content, message.reasoning_content) == (ANSWER, THOUGHTS)
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    thoughts = answer.usage.completion_tokens_details.reasoning_tokens
    assert 0 < (thoughts or 0) < answer.usage.completion_tokens
    deltas: list[Any] = [c.choices[0].delta for c in ask.create(model=NAME, messages=QUESTION, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == message.content
    off = ask.create(model=NAME, messages=QUESTION, reasoning_effort="none")
    assert not hasattr(off.choices[0].message, "reasoning_content")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_curl(script: Served) -> None:
    body = json.dumps({"model": NAME, "messages": QUESTION, "stream": True})
    command = [
        "curl",
        "-sS",
        "-N",
        f"{script.url}/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == "plain words"


# --- what is refused ---


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"functions": [WEATHER]}, "functions"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1.5}, "logprobs"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": 1, "reasoning_effort": "low"}, "chat_template_kwargs"),
        ({"thinking": "aloud"}, "thinking"),
        ({"stop": [1]}, "stop.0"),
        ({"tools": [{"type": "x"}]}, "tools"),
        ({"engine": {"device": "cuda"}}, "engine"),
        ({"reward": "sentiment"}, "reward"),
        ({"cards": {"reward": {"kind": "function", "function": "os.system"}}}, "cards.reward"),
        ({"cards": {"reward": {"kind": "pattern", "wanted": ["(a+)+$"]}}}, "cards.reward"),
        ({"cards": {"reward": {"kind": "classifier", "model": "/etc"}}}, "cards.reward"),
        ({"cards": {"reward": {"kind": "remote", "url": "http://127.0.0.1:1"}}}, "cards.reward"),
        ({"cards": {"reward": {"kind": "min", "rewards": ["/etc"]}}}, None),
        ({"cards": {"reward": "/etc"}}, None),
        ({"cards": {"reward": "owner/model"}}, None),
        ({"cards": {"decoding": {"method": "best_of_n", "n": 129}}}, "cards.decoding"),
        ({"cards": {"decoding": {"boundary": {"kind": "fixed_length", "length": 1000}}}}, "cards.decoding"),
        ({"cards": {"decoding": "os.system"}}, None),
        ({"cards": {"context": [1]}}, "cards.context"),
        ({"cards": {"model": "x"}}, "cards"),
        ({"messages": []}, None),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
    ],
)
def test_a_field_that_cannot_be_used_is_named(server: Served, fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client(server).chat.completions.create(**{"model": NAME, "messages": QUESTION, "extra_body": fields})  # type: ignore[call-overload]
    body: Any = refused.value.body
    assert body["type"] == "invalid_request_error"
    assert body["param"] == param, body
    assert param is None or param.split(".")[0] in body["message"]


def test_fields_that_are_about_openai_itself_are_ignored(server: Served) -> None:
    fields: dict[str, Any] = {
        "user": "me",
        "store": False,
        "metadata": {},
        "service_tier": "auto",
        "logprobs": False,
        "echo": False,
    }
    assert server.chat(**fields, tools=None).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"n": NaN}', b"[" * 100_000, b"\xff", b'{"a":' * 100_000])
def test_a_body_that_is_no_object_is_refused(server: Served, body: bytes) -> None:
    answer = server.http.post("/v1/chat/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


FIELDS = {
    *("model", "messages", "prompt", "stream_options", "n", "logprobs", "top_logprobs", "cards", "max_tokens"),
    *("max_completion_tokens", "reasoning_effort", "audio", *PASSED_ON, *CHAT_ONLY, *IGNORED, *NEUTRAL),
}
STRANGE: list[Any] = [
    True,
    0,
    -1,
    1.5,
    10**30,
    "",
    "x",
    "\ud800",
    [],
    [1],
    ["x", None],
    {},
    {"x": 1},
    {"type": []},
    [{}],
]


def read(server: Served, endpoint: Endpoint, fields: dict[str, Any]) -> int:
    """The status of a request up to where the engine gets it; an error that nobody expected is raised."""
    base = {"model": NAME, "messages": QUESTION} if endpoint == "chat" else {"model": NAME, "prompt": "x"}
    try:
        server.service.read(endpoint, json.dumps({**base, **fields}).encode(), {})
    except (ApiError, CardsError) as error:
        return as_api_error(error).status
    return 200


def test_the_page_names_every_field_option_and_metric(server: Served) -> None:
    page = (Path(__file__).parents[1] / "docs/serve.md").read_text(encoding="utf-8")
    fields = FIELDS - {"audio", *NEUTRAL} | {"stream"}
    command = typer.main.get_group(app).commands["serve"]
    options = {name for each in command.params for name in each.opts}
    metrics = set(re.findall(r"^# TYPE (cards_\w+(?<!_created)) ", server.http.get("/metrics").text, re.MULTILINE))
    named = set(re.findall(r"(?:--)?[a-z_]+(?:-[a-z]+)*", page))
    assert len(metrics) > 10
    assert (fields | options | metrics) - named == set()


def test_no_value_of_a_field_is_an_error_of_the_server(server: Served) -> None:
    for field, value in product(sorted(FIELDS), STRANGE):
        assert read(server, "chat", {field: value}) in (200, 400, 404), (field, value)
        assert read(server, "completions", {field: value}) in (200, 400, 404), (field, value)
    kinds = [{name: value} for name in ("kind", "method") for value in STRANGE]
    parts = [{"kind": kind, name: value} for kind, name in (("min", "rewards"), ("gate", "gate")) for value in STRANGE]
    for field, value in product(["decoding", "reward", "context", "trace"], [*STRANGE, *kinds, *parts]):
        assert read(server, "chat", {"cards": {field: value}}) in (200, 400), (field, value)


def test_unknown_models_and_routes_are_not_found(server: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="send model=tiny"):
        client(server).chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert server.http.get("/v1/files").json()["error"]["type"] == "invalid_request_error"
    assert server.http.get("/v1/chat/completions").status_code == 405


def test_a_prompt_that_is_too_long_says_so(server: Served) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client(server).chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a" * 5000}])
    assert refused.value.code == "context_length_exceeded"
    before = server.service.inspect().forwards
    long = server.chat("a" * 200_000)  # which the engine never sees
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert server.service.inspect().forwards == before


class Fails(Reward):
    """Fails from the second segment on."""

    kind: str = "fails"

    def score(self, prompt: str, responses: list[str]) -> list[float]:
        if any(len(text) > 5 for text in responses):
            raise ZeroDivisionError("no idea")
        return [9.0] * len(responses)


def test_an_error_after_the_first_segment_ends_the_stream(server: Served) -> None:
    with served(faces.options(reward=Fails())) as failing:
        with pytest.raises(openai.InternalServerError, match="no idea"):
            client(failing).chat.completions.create(model=NAME, messages=QUESTION)
        with pytest.raises(openai.APIError, match="no idea"):
            list(client(failing).chat.completions.create(model=NAME, messages=QUESTION, stream=True))
        rows_return_to_zero(failing)
        assert failing.metric('cards_requests_total{endpoint="chat",outcome="failed"}') == 2


# --- who may ask, and how much ---


def test_the_api_key() -> None:
    with served(faces.options(), api_keys=("another", KEY)) as guarded:
        answer = client(guarded).chat.completions.create(model=NAME, messages=QUESTION)
        assert answer.choices[0].message.content
        for key in ("wrong", KEY[:-1]):
            headers = {"Authorization": f"Bearer {key}"}
            assert guarded.http.get("/v1/models", headers=headers).status_code == 401
        refused = guarded.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert KEY not in refused.text
        assert guarded.http.get("/health").json() == {"status": "ready"}
        assert guarded.metric('cards_requests_total{endpoint="chat",outcome="unauthorized"}') == 1
        assert KEY not in repr(guarded.service.settings)


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    assert [key.get_secret_value() for key in read_keys(file)] == ["one", "two"]
    assert read_keys(None) == ()
    monkeypatch.setenv("CARDS_SERVER_API_KEY", KEY)
    assert [key.get_secret_value() for key in read_keys(None)] == [KEY]
    file.write_text("\n")
    with pytest.raises(SettingsError, match="holds no key"):
        read_keys(file)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_keys(tmp_path / "none")
    with pytest.raises(SettingsError) as refused:
        ServerSettings(api_keys=(KEY,), port=-1)
    assert KEY not in str(refused.value)


def test_a_request_that_is_too_large() -> None:
    with served(faces.options(), max_body_bytes=1000) as small:
        with pytest.raises(openai.APIStatusError) as refused:
            client(small).chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a" * 1000}])
        assert refused.value.status_code == 413
        pieces = (b"a" * 100 for _ in range(100))  # of which nobody says how many they are
        assert small.http.post("/v1/completions", content=pieces).status_code == 413


def test_more_answers_than_allowed_are_refused(endless: Served) -> None:
    with served(faces.options(model=faces.endless_model(), max_tokens=4000), max_answers=2) as busy:
        with pytest.raises(openai.RateLimitError) as refused:
            client(busy).chat.completions.create(model=NAME, messages=QUESTION, n=3)
        assert refused.value.response.headers["Retry-After"] == "1"
        body = {"model": NAME, "prompt": "a", "n": 2, "stream": True}
        with busy.http.stream("POST", "/v1/completions", json=body) as two:
            lines = two.iter_lines()  # which closes the connection when it is forgotten
            assert next(lines)
            assert busy.chat(max_tokens=5).status_code == 429
        rows_return_to_zero(busy)


@pytest.mark.parametrize(("limit", "asked"), [(0.2, 60), (60, 0.2)])
def test_an_answer_that_takes_too_long_ends(endless: Served, limit: float, asked: float) -> None:
    with served(faces.options(model=faces.endless_model(), max_tokens=4000), timeout=limit) as slow:
        with pytest.raises(openai.InternalServerError, match=r"timeout=0\.2") as late:
            client(slow).chat.completions.create(model=NAME, messages=QUESTION, extra_body={"timeout": asked})
        assert late.value.status_code == 504
        rows_return_to_zero(slow)


# --- clients that go, and the end ---


def test_a_client_that_goes_stops_the_drafting(endless: Served) -> None:
    stream = client(endless).chat.completions.create(model=NAME, messages=QUESTION, stream=True, n=2)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    assert endless.service.inspect().requests == 2
    stream.close()
    rows_return_to_zero(endless)
    with pytest.raises(openai.APITimeoutError):
        client(endless, timeout=0.5).chat.completions.create(model=NAME, messages=QUESTION)
    rows_return_to_zero(endless)
    assert endless.metric('cards_requests_total{endpoint="chat",outcome="cancelled"}') == 2


def test_health_and_metrics(server: Served) -> None:
    server.chat()
    assert server.http.get("/health").json() == {"status": "ready"}
    kept, drafted = (server.metric(f'cards_tokens_total{{kind="{kind}"}}') for kind in ("kept", "drafted"))
    assert drafted >= kept >= 20
    assert server.metric("cards_segments_total") >= 4
    assert server.metric('cards_request_seconds_count{endpoint="chat"}') >= 1
    assert server.metric('cards_first_segment_seconds_count{endpoint="chat"}') >= 1


def test_what_a_server_keeps_stays_within_its_memory() -> None:
    """Texts that nobody asks for again make room for others, and are told apart from what requests use."""
    limit = 150_000
    engine = EngineSettings(device="cpu", dtype="float32", kv_memory=limit)
    with served(faces.options(max_tokens=1, decoding="sampling", reward=None, engine=engine)) as server:
        for number in range(9):
            server.chat(f"{number} " * 80)
            kept, used = server.metric("cards_prefix_bytes"), server.metric("cards_cache_bytes")
            assert 0 < kept <= server.metric("cards_memory_limit_bytes") - used
        assert server.metric("cards_memory_limit_bytes") == limit
        assert len(server.service.inspect().cached_prefixes) < 9


def test_memory_is_given_back_as_long_as_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.give_back_unused()
    calls: list[int] = []
    monkeypatch.setattr(memory, "give_back_unused", lambda: calls.append(threading.active_count()))
    with memory.giving_back(0.001):
        until(lambda: len(calls) > 2)
    until(lambda: not any(thread.name == "cards-memory" for thread in threading.enumerate()))


HEAPS = """
import ctypes, threading
from cards_integrations.server import memory
if {shared}:
    memory.share_one_heap()
libc = ctypes.CDLL(None)
threads = [threading.Thread(target=lambda: [bytes(1000) for _ in range(100)]) for _ in range(4)]
for each in threads:
    each.start()
for each in threads:
    each.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no heap for each thread")
def test_all_threads_of_a_server_allocate_from_one_heap() -> None:
    def heaps(shared: bool) -> int:
        command = [sys.executable, "-c", HEAPS.format(shared=shared)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("<heap")

    assert heaps(shared=True) == 1 < heaps(shared=False)


@pytest.mark.slow
def test_sigterm_lets_answers_end_within_the_grace_time(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-c", "from cards_integrations.cli import main; main()", "serve", "--port", "0"),
        *("--model", faces.endless_model(), "--decoding", "sampling", "--grace", "2", "--served-name", NAME),
    ]
    env = {**os.environ, "CARDS_ENGINE__DEVICE": "cpu"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "running on" in line)
        url = line.split("running on ")[1].split()[0]

        def ask(tokens: int) -> Any:
            body = {"model": NAME, "prompt": "a", "stream": True, "max_tokens": tokens}
            return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60)

        with ask(24) as short, ask(4000) as long:
            lines = short.iter_lines(), long.iter_lines()
            assert all(next(each) for each in lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines[0] if line][-1] == "data: [DONE]"
            try:
                cut = [line for line in lines[1] if line]
            except httpx.HTTPError:
                cut = []
            assert "data: [DONE]" not in cut
        process.wait(30)
        process.stderr.read()


@pytest.mark.soak
async def test_two_hundred_streams_of_which_half_are_left(endless: Served) -> None:
    """None hangs, the others get what they asked for, and nothing stays behind."""
    ask = openai.AsyncOpenAI(base_url=endless.url, api_key=KEY, max_retries=0, timeout=120)

    async def one(number: int) -> int:
        stays = number % 2 == 0
        stream = await ask.chat.completions.create(
            model=NAME, messages=QUESTION, seed=number, stream=True, max_tokens=20 if stays else 4000
        )
        segments = 0
        async for chunk in stream:
            segments += bool(chunk.choices[0].delta.content)
            if not stays and segments == 1 + number % 3:
                break
        await stream.close()
        return segments

    found = await asyncio.gather(*map(one, range(200)))
    assert found[::2] == [4] * 100
    rows_return_to_zero(endless)
    await ask.close()
