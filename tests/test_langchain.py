"""LangChain: `ChatCards` and `CardsLLM` as chat models, streams, batches, callbacks, cache, in chains."""

from __future__ import annotations

import pickle
import subprocess
import sys
from operator import add
from typing import Any

import faces
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import RunnableLambda, RunnableParallel
from pydantic import create_model

from cards_integrations import ChatCards
from cards_integrations.decoding import Cards, FixedLength, Sampling
from cards_integrations.engine import EngineSettings
from cards_integrations.errors import SettingsError
from cards_integrations.langchain.callbacks import current_run
from cards_integrations.rewards import ClassifierReward, FunctionReward, LengthReward, WeightedReward

PROMPTS = [f"Say number {i}" for i in range(16)]


@pytest.fixture(params=[faces.chat_cards, faces.cards_llm], ids=["ChatCards", "CardsLLM"])
def llm(request):
    return request.param()


def steps(llm):
    """Decode steps of the model so far."""
    return llm.inspect().steps


def total(chunks):
    chunks = list(chunks)
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = add(whole, chunk)
    return whole


# --- answers ---


async def test_every_way_gives_the_same_answer(llm):
    one = llm.invoke("Hello")
    assert isinstance(one, AIMessage)
    assert one.content
    ways = [
        await llm.ainvoke("Hello"),
        *llm.batch(["Hello", "Hello"]),
        *await llm.abatch(["Hello", "Hello"]),
        total(llm.stream("Hello")),
        total([chunk async for chunk in llm.astream("Hello")]),
        llm.invoke([HumanMessage("Hello")]),
        llm.invoke([("human", "Hello")]),
        llm.invoke([{"role": "user", "content": "Hello"}]),
        llm.invoke([HumanMessage([{"type": "text", "text": "Hello"}])]),
    ]
    for way in ways:
        assert way.content == one.content
        assert way.usage_metadata == one.usage_metadata
        told, expected = dict(way.response_metadata), dict(one.response_metadata)
        assert told.pop("cards")["reward"] == pytest.approx(expected.pop("cards")["reward"], abs=1e-4)
        assert told == expected


def test_the_answer_says_what_it_cost(llm):
    answer = llm.invoke("Hello")
    about = answer.response_metadata
    cards = about["cards"]
    assert (about["model_name"], about["model_provider"], about["finish_reason"]) == (
        faces.chat_model(),
        "cards",
        "length",
    )
    assert "".join(segment["text"] for segment in cards["segments"]) == answer.content
    assert cards["reward"] == cards["segments"][-1]["reward"]
    assert (cards["seed"], cards["method"]) == (7, "cards")
    assert cards["usage"]["drafts"] == sum(segment["drafts"] for segment in cards["segments"]) > len(cards["segments"])
    usage = answer.usage_metadata
    assert usage["input_tokens"] == cards["usage"]["prompt_tokens"] == len("Hello") + 19  # the rest is the template
    assert usage["output_tokens"] == cards["usage"]["completion_tokens"] == 20
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_reasoning_of_other_models_is_left_out(llm):
    thought: list[Any] = [{"type": "reasoning", "reasoning": "Hm."}, {"type": "text", "text": "Hi."}]
    chat = [HumanMessage("Hello"), AIMessage(thought), HumanMessage("And?")]
    assert llm.invoke(chat).content == llm.invoke([("user", "Hello"), ("ai", "Hi."), ("user", "And?")]).content


def test_no_two_answers_are_alike_without_a_seed():
    llm = faces.chat_cards(seed=None)
    one, two = llm.batch(["Hello", "Hello"])
    assert one.content != two.content
    again = llm.invoke("Hello", seed=one.response_metadata["cards"]["seed"])
    assert again.content == one.content


def test_the_real_pair_writes_a_story():
    llm = ChatCards(**faces.stories())
    answer: Any = llm.invoke("Once upon a time, there was a happy girl")
    plain = llm.invoke("Once upon a time, there was a happy girl", decoding="sampling")
    assert len(answer.content.split()) > 10
    assert answer.response_metadata["cards"]["reward"] > 0.3
    assert plain.response_metadata["cards"]["reward"] is None


# --- streams ---


def test_a_stream_has_one_chunk_for_each_kept_segment(llm):
    *chunks, last = llm.stream("Hello")
    assert [chunk.content for chunk in chunks] == [s["text"] for s in last.response_metadata["cards"]["segments"]]
    assert len(chunks) == 4
    assert all(chunk.usage_metadata is None and not chunk.response_metadata.get("cards") for chunk in chunks)
    assert (last.content, last.chunk_position) == ("", "last")


async def test_a_stream_does_not_show_half_a_stop_string(llm):
    plain = {"decoding": Sampling(chunk=1), "max_tokens": 40}
    text = llm.invoke("Hello", **plain).content
    stop = text[10:14]
    expected = text[: text.index(stop)]
    message = llm.invoke("Hello", stop=[stop], **plain)
    assert message.content == expected
    assert message.response_metadata["finish_reason"] == "stop"
    assert "".join(chunk.content for chunk in llm.stream("Hello", stop=[stop], **plain)) == expected
    assert "".join([chunk.content async for chunk in llm.astream("Hello", stop=[stop], **plain)]) == expected


def test_stop_strings_may_be_the_objects_own():
    plain = {"decoding": Sampling(), "max_tokens": 40}
    text: Any = faces.chat_cards(**plain).invoke("Hello").content
    llm = faces.chat_cards(**plain, stop=text[8:10])
    assert llm.invoke("Hello").content == text[: text.index(text[8:10])]
    assert llm.invoke("Hello", stop=[text[4:6]]).content == text[: text.index(text[4:6])]  # the call's go before
    assert llm.invoke("Hello", stop=[]).content == text


async def test_events_of_a_stream(llm):
    chain = ChatPromptTemplate.from_template("Say {word}") | llm | StrOutputParser()
    events = [event async for event in chain.astream_events({"word": "hi"}, version="v2")]
    kinds = [event["event"] for event in events]
    chunks = [e["data"]["chunk"].content for e in events if e["event"] == "on_chat_model_stream"]
    [end] = [e["data"]["output"] for e in events if e["event"] == "on_chat_model_end"]
    assert kinds.count("on_chat_model_start") == 1
    assert chunks[:-1] == [s["text"] for s in end.response_metadata["cards"]["segments"] if s["text"]]
    assert "".join(chunks) == end.content == chain.invoke({"word": "hi"})
    assert end.usage_metadata == llm.invoke("Say hi").usage_metadata


# --- batches ---


@pytest.mark.parametrize("way", ["batch", "abatch", "chain"])
async def test_a_batch_shares_decode_steps(llm, way):
    before = steps(llm)
    alone = [llm.invoke(prompt, max_tokens=10).content for prompt in PROMPTS]
    between = steps(llm)
    if way == "batch":
        together = [message.content for message in llm.batch(PROMPTS, max_tokens=10)]
    elif way == "abatch":
        together = [message.content for message in await llm.abatch(PROMPTS, max_tokens=10)]
    else:
        together = (RunnableLambda(str) | llm.bind(max_tokens=10) | StrOutputParser()).batch(PROMPTS)
    assert together == alone
    assert steps(llm) - between < (between - before) / 3


def test_a_batch_takes_no_more_threads_than_the_engine_has_rows():
    llm, live, most = faces.chat_cards(engine=EngineSettings(device="cpu", max_rows=3), max_tokens=5), [], []

    class Counting(BaseCallbackHandler):
        def on_chat_model_start(self, *args, run_id, **kwargs):
            live.append(run_id)
            most.append(len(live))

        def on_llm_end(self, *args, run_id, **kwargs):
            live.remove(run_id)

    assert len(llm.batch([*PROMPTS], {"callbacks": [Counting()]})) == len(PROMPTS)
    assert max(most) <= 3


def test_a_batch_takes_configs_and_exceptions(llm):
    good, bad = llm.batch(["Hello", ""], {"max_concurrency": 1, "tags": ["x"]}, return_exceptions=True)
    assert good.content
    assert isinstance(bad, ValueError)
    assert [index for index, _ in sorted(llm.batch_as_completed(["a", "b"]))] == [0, 1]
    assert llm.batch([]) == []


# --- callbacks and tracing ---


class Heard(BaseCallbackHandler):
    def __init__(self):
        self.tokens, self.ends, self.errors, self.starts = [], [], [], []

    def on_chat_model_start(self, serialized, messages, **kwargs):
        self.starts.append(kwargs)

    def on_llm_new_token(self, token, **kwargs):
        self.tokens.append(token)

    def on_llm_end(self, response, **kwargs):
        self.ends.append(response.generations[0][0].message)

    def on_llm_error(self, error, **kwargs):
        self.errors.append(error)


class HeardAsync(Heard, AsyncCallbackHandler):
    async def on_chat_model_start(self, *args, **kwargs):
        Heard.on_chat_model_start(self, *args, **kwargs)

    async def on_llm_new_token(self, token, **kwargs):
        self.tokens.append(token)

    async def on_llm_end(self, response, **kwargs):
        Heard.on_llm_end(self, response)

    async def on_llm_error(self, error, **kwargs):
        self.errors.append(error)


async def test_callbacks_hear_every_chunk_once(llm):
    heard, heard_async = Heard(), HeardAsync()
    chunks = [chunk.content for chunk in llm.stream("Hello", {"callbacks": [heard]})]
    assert [chunk.content async for chunk in llm.astream("Hello", {"callbacks": [heard_async]})] == chunks
    for one in (heard, heard_async):
        assert one.tokens == chunks
        assert [len(one.starts), len(one.ends), len(one.errors)] == [1, 1, 0]
        assert one.ends[0].content == "".join(chunks)


def test_callbacks_hear_one_end_of_an_invoke(llm):
    heard = Heard()
    answer = llm.invoke("Hello", {"callbacks": [heard]})
    assert (heard.tokens, len(heard.starts), heard.ends) == ([], 1, [answer])


async def test_streaming_true_reports_segments_of_an_invoke():
    llm, heard, heard_async = faces.chat_cards(streaming=True), Heard(), HeardAsync()
    answer = llm.invoke("Hello", {"callbacks": [heard]})
    assert (await llm.ainvoke("Hello", {"callbacks": [heard_async]})).content == answer.content
    assert heard.tokens == heard_async.tokens == [chunk.content for chunk in llm.stream("Hello")]
    assert answer.content == faces.chat_cards().invoke("Hello").content


async def test_streaming_may_be_assigned_later():
    llm, counts = faces.cards_llm(), []
    for streaming in (False, True, False):
        llm.streaming = streaming
        heard = Heard()
        llm.invoke("Hello", {"callbacks": [heard]})
        counts.append(len(heard.tokens))
    assert counts[0] == counts[2] == 0
    assert counts[1] > 0


@pytest.mark.parametrize("stream", [True, False])
async def test_one_call_may_ask_for_a_stream(llm, stream):
    heard = Heard()
    assert llm.invoke("Hello", {"callbacks": [heard]}, stream=stream).content == llm.invoke("Hello").content
    assert bool(heard.tokens) == stream
    assert (await llm.ainvoke("Hello", stream=stream)).content == llm.invoke("Hello").content
    assert current_run.get() is None  # no run is kept


def test_callbacks_hear_an_error(llm):
    heard = Heard()
    with pytest.raises(SettingsError):
        llm.invoke("Hello", {"callbacks": [heard]}, model="nosuch")
    assert [type(error) for error in heard.errors] == [SettingsError]


def test_the_usage_handler_adds_up(llm):
    usage = UsageMetadataCallbackHandler()
    answers = llm.batch(["Hello", "Hey"], {"callbacks": [usage]})
    counted = usage.usage_metadata[faces.chat_model()]
    assert counted["output_tokens"] == sum(answer.usage_metadata["output_tokens"] for answer in answers)
    assert counted["input_tokens"] == sum(answer.usage_metadata["input_tokens"] for answer in answers)


def test_traces_name_the_model_and_the_options_of_the_call():
    heard = Heard()
    faces.chat_cards().invoke("Hello", {"callbacks": [heard]}, stop=["@"], temperature=0.25, max_tokens=3)
    [start] = heard.starts
    assert start["metadata"]["ls_provider"] == "cards"
    assert start["metadata"]["ls_model_name"] == faces.chat_model()
    assert (start["metadata"]["ls_temperature"], start["metadata"]["ls_max_tokens"]) == (0.25, 3)
    assert start["invocation_params"]["stop"] == ["@"]


# --- cache ---


@pytest.fixture
def cache():
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


async def test_the_cache_answers_an_equal_question(cache):
    llm = faces.chat_cards()
    answer = llm.invoke("Hello")
    before = steps(llm)
    assert faces.chat_cards().invoke("Hello").content == answer.content
    assert (await faces.cards_llm().ainvoke("Hello")).content == answer.content
    assert steps(llm) == before
    other = faces.chat_cards(seed=8).invoke("Hello")
    assert steps(llm) > before
    assert other.content != answer.content


OTHER: dict[str, Any] = {
    "model": "another/model",
    "reward": ClassifierReward(model="another/model"),
    "decoding": Cards(target_reward=1.0, beta=0.5, max_rejections=3, boundary=FixedLength(length=6)),
    "max_tokens": 21,
    "temperature": 0.71,
    "top_k": 41,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {5: 1.0},
    "thinking": "off",
    "max_thinking_tokens": 7,
    "chat_template_kwargs": {"enable_thinking": False},
    "min_tokens": 2,
    "seed": 8,
    "stop": ["@"],
    "stop_token_ids": [5],
    "finish_at": "sentence",
    "n": 2,
    "logprobs": True,
    "top_logprobs": 1,
}


@pytest.mark.parametrize("name", OTHER)
def test_the_cache_key_has_every_option(name):
    key = faces.chat_cards()._get_llm_string()
    assert faces.chat_cards(**{name: OTHER[name]})._get_llm_string() != key
    assert faces.chat_cards()._get_llm_string(**{name: OTHER[name]}) != key
    assert faces.chat_cards()._get_llm_string() == key


@pytest.mark.parametrize("name", ["response_format", "grammar"])
def test_the_cache_key_tells_classes_of_one_name_apart(name):
    llm = faces.chat_cards()
    fields: list[dict[str, Any]] = [{field: (bool, ...)} for field in "ab"]
    one, other = (create_model("Answer", **each) for each in fields)
    assert llm._get_llm_string(**{name: one}) == llm._get_llm_string(**{name: one.model_json_schema()})
    assert llm._get_llm_string(**{name: one}) != llm._get_llm_string(**{name: other})


class Alike:
    """A reward of which not even the text tells how long answers should be."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, prompt: str, answers: list[str]) -> list[float]:
        return [float(-abs(self.length - len(answer))) for answer in answers]

    def __repr__(self) -> str:
        return "Alike()"


@pytest.mark.parametrize("within", [lambda f: f, lambda f: WeightedReward(rewards=[LengthReward(target=9), f])])
def test_the_cache_key_tells_objects_apart_that_look_alike(within):
    llm = faces.chat_cards()
    one, other = Alike(3), Alike(30)
    assert (
        faces.chat_cards(reward=within(one))._get_llm_string()
        != faces.chat_cards(reward=within(other))._get_llm_string()
    )
    assert llm._get_llm_string(reward=within(one)) != llm._get_llm_string(reward=within(other))
    assert llm._get_llm_string(reward=within(one)) == llm._get_llm_string(reward=within(one))
    assert (
        faces.chat_cards(reward=within(one))._get_llm_string() == faces.chat_cards(reward=within(one))._get_llm_string()
    )


def test_the_cache_key_outlives_a_function_whose_address_is_used_again():
    def key(length: int) -> str:
        return faces.chat_cards(reward=lambda prompt, answers: [float(length)] * len(answers))._get_llm_string()

    assert len({key(length) for length in range(20)}) == 20


def test_the_cache_key_has_only_what_changes_the_answer():
    assert set(OTHER) == set(faces.chat_cards().options()) - {"engine", "timeout", "progress"}
    key = faces.chat_cards()._get_llm_string()
    other = {"timeout": 9, "progress": False, "engine": EngineSettings(device="cpu", width=1)}
    assert faces.chat_cards(**other)._get_llm_string() == key
    assert faces.chat_cards(stop=["@"])._get_llm_string() == faces.chat_cards()._get_llm_string(stop=["@"])


# --- in chains ---


def test_prompt_model_parser(llm):
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "Say {word}")])
    chain = prompt | llm | StrOutputParser()
    told = llm.invoke([SystemMessage("Be brief."), HumanMessage("Say hi")]).content
    assert chain.invoke({"word": "hi"}) == told
    assert "".join(chain.stream({"word": "hi"})) == told
    assert len(list(chain.stream({"word": "hi"}))) > 4  # it streams through
    assert chain.batch([{"word": "hi"}, {"word": "ho"}])[0] == told


def test_parallel_bind_and_config(llm):
    heard = Heard()
    both = RunnableParallel(short=llm.bind(max_tokens=3), long=llm).invoke("Hello", {"callbacks": [heard]})
    assert both["short"].usage_metadata["output_tokens"] == 3
    assert both["long"].content == llm.invoke("Hello").content
    assert len(heard.ends) == 2
    tagged = llm.with_config(tags=["mine"], run_name="writer", callbacks=[heard])
    tagged.invoke("Hello")
    assert "mine" in heard.starts[-1]["tags"]
    assert heard.starts[-1]["name"] == "writer"


def test_retry_calls_again():
    calls = []

    def first_fails(prompt, responses):
        calls.append(prompt)
        if len(calls) == 1:
            raise RuntimeError("not yet")
        return [0.0] * len(responses)

    for build in (faces.chat_cards, faces.cards_llm):
        calls.clear()
        llm = build(reward=FunctionReward(function=first_fails))
        assert llm.with_retry(stop_after_attempt=2, wait_exponential_jitter=False).invoke("Hello").content


def test_fallbacks_answer_instead(llm):
    for broken in (faces.chat_cards(model="nosuch"), faces.cards_llm(reward="nosuch/reward")):
        assert broken.with_fallbacks([llm]).invoke("Hello").content == llm.invoke("Hello").content


def test_call_arguments_are_honoured_or_refused(llm):
    assert llm.invoke("Hello", decoding="sampling").response_metadata["cards"]["method"] == "sampling"
    assert llm.bind(reward=lambda prompt, texts: [1.5] * len(texts)).invoke("Hello").response_metadata["cards"][
        "reward"
    ] == pytest.approx(1.5)
    with pytest.raises(SettingsError, match="Did you mean 'max_tokens'"):
        llm.invoke("Hello", max_token=3)
    with pytest.raises(SettingsError, match="'engine'"):
        next(llm.stream("Hello", engine=EngineSettings()))


def test_options_may_be_assigned(llm):
    llm.invoke("Hello")
    llm.decoding, llm.max_tokens, llm.model = "sampling", 3, faces.chat_model(seed=1)
    answer = llm.invoke("Hello")
    assert answer.response_metadata["cards"]["method"] == "sampling"
    assert answer.response_metadata["model_name"] == faces.chat_model(seed=1)
    assert answer.usage_metadata["output_tokens"] == 3
    with pytest.raises(ValueError, match="temprature"):
        llm.temprature = 0
    llm.max_tokens = 0
    with pytest.raises(ValueError, match="max_tokens"):
        llm.invoke("Hello")


def test_token_counts_are_the_models_own(llm):
    assert llm.get_num_tokens("Hello") == 5
    messages = [SystemMessage("Be brief."), HumanMessage("Hello")]
    assert llm.get_num_tokens_from_messages(messages) == llm.invoke(messages).usage_metadata["input_tokens"]


def test_token_counts_may_be_ones_own():
    llm = faces.chat_cards(custom_get_token_ids=lambda text: [len(text)])
    assert (llm.get_token_ids("Hello"), llm.get_num_tokens("Hello")) == ([5], 1)


def test_construction_and_traces_load_nothing():
    llm = faces.chat_cards(model="never/loaded")
    llm._get_ls_params()
    llm.bind(max_tokens=3)
    assert llm.inspect().status == "new"


def test_a_rate_limiter_is_obeyed():
    limiter = InMemoryRateLimiter(requests_per_second=1e-6, max_bucket_size=1)
    limiter.available_tokens = 1
    llm = faces.chat_cards(rate_limiter=limiter)
    llm.invoke("Hello")
    assert not limiter.acquire(blocking=False)


# --- pickling and closing ---


def test_pickling_keeps_every_option():
    llm = faces.chat_cards(stop=["\n\n"], streaming=True, tags=["mine"])
    llm.invoke("Hello")
    copy = pickle.loads(pickle.dumps(llm))
    assert copy == llm
    assert copy.invoke("Hello").content == llm.invoke("Hello").content
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(faces.chat_cards(reward=lambda prompt, texts: [0.0] * len(texts)))


def test_closing_frees_what_no_other_object_uses():
    only_here = EngineSettings(device="cpu", width=1, max_rows=5)
    one, two = faces.cards_llm(engine=only_here), faces.chat_cards(engine=only_here)
    text = one.invoke("Hello").content
    one.invoke("Hello", model=faces.chat_model(seed=1))
    two.invoke("Hello")
    engine, other = one._engine({}), one._engine({"model": faces.chat_model(seed=1)})
    one.close()
    assert (engine.inspect().status, other.inspect().status) == ("ready", "closed")
    two.close()
    assert engine.inspect().status == "closed"
    with one:
        assert one.invoke("Hello").content == text
    assert one.inspect().status == "new"


def test_decision_models_ask_for_a_newer_langchain_core() -> None:
    code = "import sys; sys.modules['langchain_core.decisions'] = None; import cards_integrations.langchain.decisions"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ImportError: Decision models need langchain-core 1.8 or later, and 1." in ran.stderr
    assert "pip install -U langchain-core" in ran.stderr
