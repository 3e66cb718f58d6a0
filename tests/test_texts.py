"""Text is what was written: after its prompt, up to a stop string of any kind, whoever speaks first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Start
from jinja2.exceptions import TemplateError
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from llama_index.core.prompts import PromptTemplate
from tokenizers.processors import TemplateProcessing

from cards_integrations import CardsLLM, ChatCards
from cards_integrations.chat.arrangements import arrangements, first_whole, says_all
from cards_integrations.chat.message import Message
from cards_integrations.chat.template import ChatTokenizer, FormattedPrompt
from cards_integrations.chat.tools import as_tools
from cards_integrations.decoding import BestOfN, Sampling
from cards_integrations.engine import Request
from cards_integrations.engine.request import Chunk
from cards_integrations.langchain.completion import CardsCompletion
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import FunctionReward
from cards_integrations.trace import Alignment

BRACKETS = (  # like Llama 2's: the space before an answer is the template's
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ ' ' + m.content }}</s>{% endif %}{% endfor %}"
)
PLAIN: dict[str, Any] = {"reward": None, "decoding": "sampling", "engine": {"dtype": "float32"}, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a chat template."""
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template = tiny.CHAT
    model = tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=512)
    return tiny.save(tmp_path_factory.mktemp("texts"), model, tokenizer)


# --- decoded after the prompt ---


def test_prompt_and_answer_are_what_was_written(start: Start, tmp_path: Path) -> None:
    """With a tokenizer that puts no space before the first word of a text."""
    read: list[str] = []
    reward = FunctionReward(function=lambda prompt, answers: [read.append(a) or 0.0 for a in answers])  # type: ignore[func-returns-value]
    engine = start(tiny.save(tmp_path, tiny.causal(), tiny.words()))
    decode = tiny.words().decode
    for prompt in ("w9 w20", FormattedPrompt("w9 w20")):
        request = Request(prompt, BestOfN(n=2), reward, Sampler(), 12, seed=1)
        *chunks, answer = engine.stream(request)
        assert isinstance(answer, Alignment)
        assert answer.text.startswith(" w")
        assert "w9 w20" + answer.text == decode([*answer.prompt_ids, *answer.token_ids], skip_special_tokens=True)
        assert "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)) == answer.text
        assert "".join(segment.text for segment in answer.segments) == answer.text
        assert answer.text in read


def test_the_templates_space_is_no_part_of_an_answer() -> None:
    chat = ChatTokenizer(tiny.words())
    ids = chat.encode("w6 w7")
    assert chat.decode(ids, chat.answer_start(FormattedPrompt("w8"), chat.encode("w8"))) == " w6 w7"
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template = BRACKETS
    chat = ChatTokenizer(tokenizer)
    _, prompt_ids = chat.prompt("the cat")
    start = chat.answer_start("the cat", prompt_ids)
    assert start.space == " "
    assert chat.decode(chat.encode(" the dog"), start) == "the dog"
    assert chat.decode(chat.encode("  the dog"), start) == " the dog"
    raw = chat.answer_start(FormattedPrompt("the cat"), prompt_ids)
    assert chat.decode(chat.encode(" the dog"), raw) == " the dog"


def test_a_stop_string_may_hold_special_tokens() -> None:
    tokenizer = tiny.byte_pairs()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|other|>"]})
    chat = ChatTokenizer(tokenizer)
    ids = chat.encode("the cat<|end|>\nsat<|other|>.")
    assert chat.decode(ids) == "the cat\nsat."
    for stop in ("<|end|>", "<|end|>\n", "cat<|end|>"):
        assert chat.decode(ids, chat.answer_start("x", [], ["dog", stop])) == "the cat<|end|>\nsat."


def test_a_special_token_stops(start: Start, tmp_path: Path) -> None:
    tokenizer = tiny.words(additional_special_tokens=["w13", "w26"])  # type: ignore[arg-type]
    engine = start(tiny.save(tmp_path, tiny.causal(), tokenizer))
    plain = engine.run(Request("w9 w20", Sampling(), None, Sampler(), 40, seed=2))
    special = next(t for t in plain.token_ids if t in (13, 26))
    stop = f"w{special}"
    answer = engine.run(Request("w9 w20", Sampling(), None, Sampler(), 40, stop=(stop,), seed=2))
    assert answer.finish_reason == "stop"
    assert stop not in answer.text
    assert answer.token_ids == plain.token_ids[: plain.token_ids.index(special) + 1]


def test_no_end_after_a_prompt() -> None:
    tokenizer = tiny.words(bos_token="w6")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w6 $A </s> </s>", special_tokens=[("w6", 6), ("</s>", 1)]
    )
    chat = ChatTokenizer(tokenizer)
    assert chat.prompt("w9 w20")[1] == [6, 9, 20]
    assert chat.encode("w9", special=True) == [6, 9, 1, 1]
    assert ChatTokenizer(tiny.words()).appended == []


# --- whatever order people send ---

SYSTEM: Message = {"role": "system", "content": "Be kind."}
USER: Message = {"role": "user", "content": "Hi."}
MODEL: Message = {"role": "assistant", "content": "Hello."}
EMPTY: Message = {"role": "user", "content": ""}
ORDERS: list[list[Message]] = [
    [MODEL, USER], [SYSTEM, MODEL, USER], [USER, SYSTEM], [USER, MODEL, SYSTEM, USER], [USER, USER], [MODEL],
    [SYSTEM, SYSTEM, USER], [SYSTEM], [EMPTY, MODEL, USER], [USER, MODEL, MODEL, EMPTY, USER], [SYSTEM, EMPTY, USER],
]  # fmt: skip
ALTERNATING_ONLY = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}system: {{ messages[0].content }}\n"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('system first') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' or loop.first %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("template", [ALTERNATING_ONLY, SYSTEM_FIRST, DROPS_SYSTEM, tiny.CHAT])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: " ".join(m["role"][0] for m in order))
def test_every_order_is_rendered_whole(template: str, order: list[Message]) -> None:
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template = template
    text, _ = ChatTokenizer(tokenizer).prompt(order)
    places = [text.find(message["content"]) for message in order]
    assert -1 not in places
    assert says_all(text, order)


def test_an_order_that_a_template_takes_is_left_alone() -> None:
    assert next(arrangements([MODEL, SYSTEM, USER])) == [MODEL, SYSTEM, USER]
    assert len(list(arrangements([SYSTEM, USER, MODEL, USER]))) == 2  # the other one has no system message
    with pytest.raises(TemplateError, match="first"):
        first_whole([[USER], [MODEL]], lambda form: _refuse("first" if form == [USER] else "second"))


def _refuse(why: str) -> str:
    raise TemplateError(why)


CALLED: list[Message] = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [{"id": "x", "function": {"name": "add", "arguments": {}}}]},
    {"role": "tool", "content": "sun", "tool_call_id": "another", "name": "add"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TOOL_USE = (
    "{% for t in tools %}TOOL {{ t.function.name }}\n{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ '\n' }}{% endfor %}"
)


def test_named_templates() -> None:
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template = {"default": "DEFAULT " + tiny.CHAT, "tool_use": TOOL_USE}
    chat = ChatTokenizer(tokenizer)
    assert chat.prompt([USER])[0].startswith("DEFAULT")
    assert chat.prompt([USER], as_tools(TOOLS))[0] == "TOOL add\nuser: Hi.\n"
    assert chat.prompt(CALLED)[0] == 'user: Hi.\nassistant: {"name": "add", "arguments": {}}\ntool: sun\n'


def test_counting_never_raises(folder: str) -> None:
    chat = ChatCards(model=folder, **PLAIN)
    image = HumanMessage([{"type": "image", "url": "x"}, {"type": "text", "text": "Hi."}])
    for messages in (
        [], [HumanMessage("")], [SystemMessage("")], [AIMessage("Hi.")], [ToolMessage("sun", tool_call_id="x")],
        [image], [HumanMessage("\ud800")], [AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "x"}])],
    ):  # fmt: skip
        assert chat.get_num_tokens_from_messages(messages) >= 0  # type: ignore[arg-type]
    asked = [SystemMessage("Be kind."), HumanMessage("Hi.")]
    prompt_ids = CardsLLM(model=folder, **PLAIN).align(asked, max_tokens=1).prompt_ids
    assert chat.get_num_tokens_from_messages(asked) == len(prompt_ids)
    chat.close()


# --- what the frameworks look up ---


def test_the_query_wrapper_prompt_wraps_what_is_completed(folder: str) -> None:
    wrapper = PromptTemplate("### {query_str} ###")
    llm = CardsLLM(model=folder, query_wrapper_prompt=wrapper, max_tokens=1, **PLAIN)
    bare = CardsLLM(model=folder, max_tokens=1, **PLAIN)
    for call in ("complete", "stream_complete"):
        wrapped, plain = (getattr(each, call) for each in (llm, bare))
        first, second = wrapped("Rain?"), plain("### Rain? ###")
        if call == "stream_complete":
            *_, first = first
            *_, second = second
        assert first.raw["usage"] == second.raw["usage"]
    assert llm.complete("Rain?", formatted=True).raw["usage"]["prompt_tokens"] == len(llm.tokenizer("Rain?"))
    llm.close()


def test_the_profile_says_what_is_known_without_loading(folder: str) -> None:
    profile = ChatCards(model=folder, max_tokens=9, **PLAIN).profile or {}
    assert (profile["max_input_tokens"], profile["max_output_tokens"]) == (512, 9)
    assert profile["tool_calling"]
    assert profile["structured_output"]
    assert not profile["image_inputs"]
    assert not profile["reasoning_output"]
    assert "max_input_tokens" not in (ChatCards(model="nobody/knows", **PLAIN).profile or {})
    thinker = Path(shutil.copytree(folder, Path(folder).parent / "thinker"))
    (thinker / "chat_template.jinja").write_text("{{ messages[0].content }}<think>\n")
    for mode, thinks in ((None, True), ("free", True), ("off", False)):
        shown = ChatCards(model=str(thinker), thinking=mode, **PLAIN).profile or {}
        assert shown["reasoning_output"] == thinks
    assert ChatCards(model=folder, profile={"max_input_tokens": 7}, **PLAIN).profile == {"max_input_tokens": 7}


def test_tags_metadata_callbacks_and_a_cache(folder: str) -> None:
    seen: list[tuple[Any, Any]] = []

    class Seen(BaseCallbackHandler):
        def on_chat_model_start(self, *_: Any, tags: Any = None, metadata: Any = None, **more: Any) -> None:
            seen.append((tags, metadata))

    arguments: dict[str, Any] = {"tags": ["mine"], "metadata": {"who": "me"}, "callbacks": [Seen()]}
    llm = CardsLLM(model=folder, max_tokens=2, cache=InMemoryCache(), **arguments, **PLAIN)
    first, second = llm.invoke("Hi."), llm.invoke("Hi.")
    assert first.response_metadata["cards"]["request_id"] == second.response_metadata["cards"]["request_id"]
    [(tags, metadata), _] = seen
    assert "mine" in tags
    assert metadata["who"] == "me"
    assert llm.metadata.num_output == 2
    llm.close()


@pytest.mark.parametrize("face", [CardsLLM, ChatCards, CardsCompletion])
def test_a_short_repr_without_keys(face: Any) -> None:
    model = {"kind": "vllm", "model": "owner/name", "base_url": "http://localhost:1", "api_key": "sk-secret"}
    shown = repr(face(model=model, reward=None, decoding="sampling", temperature=0.5, stop=["x"]))
    settings = "model='owner/name', reward=None, decoding='sampling', temperature=0.5, stop=('x',)"
    assert shown == f"{face.__name__}({settings})"
