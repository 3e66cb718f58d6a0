"""Thinking models: thoughts are written first, apart from the answer, and no part of the product takes them for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from llama_index.core.base.llms.types import ChatMessage, ThinkingBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field
from scripted import ScriptedLanguageModel

from cards_integrations import CardsLLM, ChatCards
from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.chat.thinking import KNOWN
from cards_integrations.decoding import BestOfN, Cards, FixedLength, Sampling
from cards_integrations.engine import EngineSettings
from cards_integrations.errors import SettingsError
from cards_integrations.models.base import Candidate
from cards_integrations.models.local import language_model as local
from cards_integrations.rewards import FunctionReward

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
OFF = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
QWEN3 = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n" + OFF + "{% endif %}"
CHOICE = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
R1 = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    '{% for c in m.tool_calls %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n" + OFF + "{% endif %}"
)
THOUGHTS = 'Perhaps <tool_call>{"name": "get_weather"}</tool_call> or STOP or {"value": 1}. No: seven it is.'
ANSWER = "It is seven."
SEEN: list[tuple[Any, list[str]]] = []


def liking_sevens(prompt: Any, answers: list[str]) -> list[float]:
    """A reward that notes what it reads."""
    SEEN.append((prompt, answers))
    return [float(answer.count("seven")) for answer in answers]


REWARD = FunctionReward(function=liking_sevens)


def made(folder: Path, template: str, special: bool = False) -> str:
    """A tiny model with marks around thoughts among its tokens."""
    tokenizer = tiny.byte_pairs(THOUGHTS + ANSWER, 600)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template
    model = tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=4096)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    return tiny.save(folder, model, tokenizer)


class Thinks(ScriptedLanguageModel):
    """Opens its thoughts if they are not open, writes them, closes them, and answers."""

    thoughts, answers = THOUGHTS, [ANSWER]

    def _next(self, candidate: Candidate) -> int:
        prompt = self.chat._decode(candidate.context.prompt_ids)
        if "</think>" in prompt.rpartition("assistant")[2]:
            self.script = lambda _: self.answers
        elif prompt.rstrip().endswith("<think>"):
            self.script = lambda _: f"{self.thoughts}\n</think>\n\n{self.answers[0]}"
        else:
            self.script = lambda _: f"<think>\n{self.thoughts}\n</think>\n\n{self.answers[0]}"
        return super()._next(candidate)


@pytest.fixture
def thinks(monkeypatch: pytest.MonkeyPatch) -> type[Thinks]:
    kind = type("OneThinks", (Thinks,), {})
    monkeypatch.setattr(local, "LocalLanguageModel", kind)
    SEEN.clear()
    return kind


def options(model: str, **more: Any) -> dict[str, Any]:
    decoding = BestOfN(n=2)
    return {
        "model": model, "engine": EngineSettings(dtype="float32"), "reward": REWARD, "decoding": decoding,
        "max_tokens": 64, "seed": 1, **more,
    }  # fmt: skip


def opened(model: str, **more: Any) -> Any:
    return CardsLLM(**options(model, **more))


def read(llm: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included."""
    return str(llm._engine({}).loaded().chat.tokenizer.decode(ids))


@pytest.mark.parametrize("template", [QWEN3, R1], ids=["the model opens", "the template opens"])
@pytest.mark.parametrize("special", [False, True])
def test_thoughts_are_no_part_of_the_answer(thinks: Any, tmp_path: Path, template: str, special: bool) -> None:
    with opened(made(tmp_path, template, special), stop="STOP") as llm:
        answer = llm.align("How many?")
        before = read(llm, answer.prompt_ids)
        assert (answer.text, answer.thoughts) == (ANSWER, THOUGHTS)
        assert before.endswith(f"<|im_start|>assistant\n<think>\n{THOUGHTS}\n</think>\n\n")
    assert answer.finish_reason == answer.thinking.finish_reason == "stop"
    assert answer.usage.reasoning_tokens >= len(answer.thinking.token_ids) > 20
    assert answer.usage.output_tokens == answer.usage.reasoning_tokens + len(answer.token_ids)
    assert {text for _, texts in SEEN for text in texts} == {ANSWER}


def test_the_prompt_is_read_once(thinks: Any, tmp_path: Path) -> None:
    with opened(made(tmp_path, QWEN3)) as llm:
        first = llm.align(prompt := "How many? " * 60)
        again = llm.align(prompt).usage
    usage = first.usage
    assert usage.cached_tokens == 0
    assert usage.prompt_tokens > 300
    assert usage.lm_tokens < usage.prompt_tokens + 2 * usage.output_tokens + 32
    assert again.cached_tokens == usage.prompt_tokens - 1


def test_the_reward_guides_the_thoughts_if_asked(thinks: Any, tmp_path: Path) -> None:
    decoding = Cards(boundary=FixedLength(length=8), target_reward=2.0, beta=0.5, max_rejections=2)
    with opened(made(tmp_path, QWEN3), thinking="aligned", decoding=decoding) as llm:
        answer = llm.align("How many?")
    assert (answer.text, answer.thoughts) == (ANSWER, THOUGHTS)
    assert answer.thinking.segments[-1].reward == 1.0
    assert len({draft.reward for segment in answer.thinking.segments for draft in segment.drafts}) == 2
    read = {text for _, texts in SEEN for text in texts}
    assert not any("think>" in text or (ANSWER in text and "Perhaps" in text) for text in read)


def test_free_thoughts_are_a_plain_sample(tmp_path: Path) -> None:
    """Whatever the method: they are those of plain sampling, and the answer is that to a prompt with them."""
    model = made(tmp_path, R1)
    with opened(model, max_thinking_tokens=12, thinking="free") as llm:
        guided = llm.align("How many?")
        plain = llm.align("How many?", decoding=Sampling(), reward=None)
        together = llm.align_batch(["How many?"] * 3, seeds=[1, 2, 1])
    assert guided.thinking.token_ids == plain.thinking.token_ids
    assert len(guided.thinking.token_ids) == 12
    assert guided.thinking.finish_reason == "length"
    assert [a.token_ids for a in together[::2]] == [guided.token_ids] * 2
    assert together[1].thinking.token_ids != guided.thinking.token_ids


def test_a_budget_closes_the_thoughts_as_the_template_does(thinks: Any, tmp_path: Path) -> None:
    with opened(made(tmp_path, QWEN3), max_thinking_tokens=5) as llm:
        answer = llm.align("How many?")
        before = read(llm, answer.prompt_ids)
    assert answer.thinking.finish_reason == "length"
    assert answer.usage.reasoning_tokens == 5
    assert THOUGHTS.startswith(answer.thoughts)
    assert before.endswith(f"<think>\n{answer.thoughts}\n</think>\n\n")
    assert answer.text == ANSWER


@pytest.mark.parametrize("template", [QWEN3, R1, CHOICE], ids=["a switch", "no switch", "the model's choice"])
@pytest.mark.parametrize("off", [{"thinking": "off"}, {"chat_template_kwargs": {"enable_thinking": False}}])
def test_off(thinks: Any, tmp_path: Path, template: str, off: dict[str, Any]) -> None:
    with opened(made(tmp_path, template)) as llm:
        answer = llm.align("How many?", **off)
        before = read(llm, answer.prompt_ids)
    if template is not QWEN3 and "thinking" not in off:
        assert answer.thoughts == THOUGHTS  # its template knows no such argument
        return
    assert answer.thinking is None
    assert answer.usage.reasoning_tokens == 0
    assert before.count("</think>") == 1
    assert answer.text == ANSWER


class Value(BaseModel):
    value: int = Field(ge=0, le=9)


def get_weather(city: str) -> str:
    """Weather."""
    return f"sunny in {city}"


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_json_calls_and_stops_begin_after_the_thoughts(thinks: Any, tmp_path: Path) -> None:
    thinks.answers = ['{"value": 7}', CALL]
    chat: Any = ChatCards(**options(made(tmp_path, TOOLS), stop=["STOP"]))
    assert chat.with_structured_output(Value).invoke("How many?") == Value(value=7)
    thinks.answers = [CALL]
    for choice in (None, "any"):
        message = chat.bind_tools([get_weather], tool_choice=choice).invoke("Weather?")
        assert [call["args"] for call in message.tool_calls] == [{"city": "Oslo"}]
        assert message.content == ""
        assert message.additional_kwargs["reasoning_content"] == THOUGHTS
    chat.close()


def test_langchain_messages(thinks: Any, tmp_path: Path) -> None:
    chat: Any = ChatCards(**options(made(tmp_path, QWEN3)))
    whole = chat.invoke("How many?")
    assert [block["type"] for block in whole.content_blocks] == ["reasoning", "text"]
    assert whole.content_blocks[0]["reasoning"] == THOUGHTS
    usage = whole.usage_metadata
    assert usage["output_token_details"]["reasoning"] > 20
    assert usage["output_tokens"] > usage["output_token_details"]["reasoning"]
    several = chat.generate([[HumanMessage("How many?")]], n=2).llm_output["token_usage"]
    assert several["prompt_tokens"] + several["completion_tokens"] == several["total_tokens"]
    assert several["completion_tokens"] == 2 * usage["output_tokens"]
    chunks = list(chat.stream("How many?"))
    assert len([c for c in chunks if c.additional_kwargs.get("reasoning_content")]) > 3
    assert not any(c.content and c.additional_kwargs.get("reasoning_content") for c in chunks)
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert (joined.content, joined.additional_kwargs["reasoning_content"]) == (ANSWER, THOUGHTS)
    assert joined.usage_metadata == usage
    assert [block["type"] for block in joined.content_blocks] == ["reasoning", "text"]
    chat.close()


def test_llama_index_messages(thinks: Any, tmp_path: Path) -> None:
    with opened(made(tmp_path, QWEN3)) as llm:
        message: Any = llm.chat([ChatMessage("How many?")]).message
        assert isinstance(message.blocks[0], ThinkingBlock)
        assert message.blocks[0].content == THOUGHTS
        assert (message.blocks[0].num_tokens or 0) > 20
        assert message.content == ANSWER
        responses = list(llm.stream_chat([ChatMessage("How many?")]))
        assert "".join(r.additional_kwargs.get("thinking_delta", "") for r in responses) == THOUGHTS
        assert "".join(r.delta for r in responses) == ANSWER
        thinking: list[Any] = [
            r.message.blocks[0].content for r in responses if isinstance(r.message.blocks[0], ThinkingBlock)
        ]
        assert all(later.startswith(earlier) for earlier, later in pairwise(thinking))
        assert thinking[-1] == THOUGHTS
        assert llm.complete("How many?").text == ANSWER
        assert [r.text for r in llm.stream_complete("How many?")][-1] == ANSWER


def test_an_agent_gets_its_thoughts_back(thinks: Any, tmp_path: Path) -> None:
    """A turn with a tool: what the model thought before the call is part of the next prompt."""
    prompts: list[str] = []

    class Watched(thinks):
        def open(self, context: Any) -> None:
            prompts.append(self.chat._decode(context.prompt_ids))
            self.answers = [ANSWER if "sunny" in prompts[-1] else CALL]
            super().open(context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "LocalLanguageModel", Watched)
        chat: Any = ChatCards(**options(made(tmp_path, TOOLS)))
        found = create_agent(chat, [get_weather]).invoke({"messages": [HumanMessage("Weather?")]})["messages"]
        chat.close()
    assert [type(message) for message in found] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert found[-1].content == ANSWER
    again = prompts[-1].partition("sunny")[0]
    assert f"<think>\n{THOUGHTS}\n</think>\n\n<tool_call>" in again


def test_llama_index_calls_and_objects(thinks: Any, tmp_path: Path) -> None:
    thinks.answers = ['{"value": 7}', CALL]
    with opened(made(tmp_path, TOOLS)) as llm:
        assert llm.structured_predict(Value, PromptTemplate("How many?")) == Value(value=7)
        assert [*llm.stream_structured_predict(Value, PromptTemplate("How many?"))][-1] == Value(value=7)
        thinks.answers = [CALL]
        tool = FunctionTool.from_defaults(get_weather)
        response = llm.chat_with_tools([tool], "Weather?", tool_required=True)
        assert [call.tool_kwargs for call in llm.get_tool_calls_from_response(response)] == [{"city": "Oslo"}]
        assert isinstance(response.message.blocks[0], ThinkingBlock)
        answer = llm.align([ChatMessage("Weather?"), response.message, ChatMessage("Well?")])
        assert read(llm, answer.prompt_ids).count(f"<think>\n{THOUGHTS}\n</think>") == 2


def histories() -> Iterator[tuple[str, Any]]:
    """Three ways in which a history tells what was thought."""
    yield "a dict", {"role": "assistant", "content": "Seven.", "reasoning_content": "Hm."}
    yield "blocks", AIMessage([{"type": "reasoning", "reasoning": "Hm."}, {"type": "text", "text": "Seven."}])
    yield "additional_kwargs", AIMessage("Seven.", additional_kwargs={"reasoning_content": "Hm."})
    yield "blocks of a provider", AIMessage([{"type": "thinking", "thinking": "Hm."}, "Seven."])
    blocks = [ThinkingBlock(content="Hm."), {"block_type": "text", "text": "Seven."}]
    yield "LlamaIndex", ChatMessage(role="assistant", blocks=blocks)


@pytest.mark.parametrize(("name", "message"), list(histories()), ids=[name for name, _ in histories()])
def test_history(name: str, message: Any, tmp_path: Path) -> None:
    from cards_integrations.llm import as_prompt

    tokenizer = tiny.byte_pairs()
    for key in ("reasoning_content", "thinking", "reasoning"):
        tokenizer.chat_template = TURNS.replace("reasoning_content", key)
        chat = ChatTokenizer(tokenizer)
        text, _ = chat.prompt(as_prompt([("user", "Hi"), message]))
        assert "<think>\nHm.\n</think>\n\nSeven.<|im_end|>" in text
        shown = chat.around_answer(as_prompt([("user", "Hi"), message])).before
        assert "Hm." not in shown  # to a reward


def test_formats_are_read_off_templates() -> None:
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template = QWEN3
    found: Any = ChatTokenizer(tokenizer).thinking
    assert (found.before, found.lead, found.after, found.key) == ("\n", "\n", "\n\n", "reasoning_content")
    tokenizer.chat_template = QWEN3.replace("</think>\n\n", "</think>").replace("<think>\n", "<think>")
    found = ChatTokenizer(tokenizer).thinking
    assert (found.before, found.lead, found.after) == ("", "\n", "")
    tokenizer.chat_template = tiny.CHAT
    assert ChatTokenizer(tokenizer).thinking is None
    for known in KNOWN:
        tokenizer.chat_template = tiny.CHAT + "{# " + known.opening + " #}"
        assert ChatTokenizer(tokenizer).thinking == known


@pytest.mark.parametrize("mode", [None, "off", "free"])
@pytest.mark.parametrize("template", [QWEN3, R1, CHOICE], ids=["a switch", "no switch", "the model's choice"])
def test_an_answer_opens_no_more_thoughts(thinks: Any, tmp_path: Path, template: str, mode: Any) -> None:
    thinks.answers = ["<think>Once more.</think> It is seven."]
    with opened(made(tmp_path, template), decoding=Sampling(), reward=None, temperature=0) as llm:
        answer = llm.align("How many?", thinking=mode)
        [mark] = llm._engine({}).loaded().chat.encode("<think>")
        before = read(llm, answer.prompt_ids)
    assert mark not in answer.token_ids
    assert before.count("<think>") == before.count("</think>") == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_does_not_want_to_think(seed: int, tmp_path: Path) -> None:
    """It decides at first; its answer then opens no thoughts, however often it would."""
    model = made(tmp_path, QWEN3)
    with opened(model, decoding=Sampling(), reward=None, temperature=5.0, top_k=0, seed=seed) as llm:
        answer = llm.align("How many?")
        [mark] = llm._engine({}).loaded().chat.encode("<think>")
    assert answer.thinking is None
    assert mark not in answer.token_ids


def test_refusals(tmp_path: Path) -> None:
    with opened(made(tmp_path, tiny.CHAT)) as llm:
        with pytest.raises(SettingsError, match="thinking='free': the model's chat template shows no marks"):
            llm.align("Hi", thinking="free")
        assert llm.align("Hi", thinking="off", max_tokens=2).thinking is None
        with pytest.raises(SettingsError, match="'sampling' is not guided"):
            llm.align("Hi", thinking="aligned", decoding=Sampling())
        with pytest.raises(SettingsError, match="'tokenize' is set by this package"):
            llm.align("Hi", chat_template_kwargs={"tokenize": True})


def test_no_room_to_think(tmp_path: Path) -> None:
    llm = opened(made(tmp_path, R1), max_tokens=4070)
    with llm, pytest.raises(SettingsError, match="There is no room to think"):
        llm.align("Hi")


def test_raw_text_is_continued_as_it_is(thinks: Any, tmp_path: Path) -> None:
    with opened(made(tmp_path, R1)) as llm:
        answer = llm.complete("Hm. <think>\n", formatted=True)
    assert answer.text.startswith(THOUGHTS)


HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


class Harmonious(ScriptedLanguageModel):
    """Writes gpt-oss' channels."""

    directly = False

    def _next(self, candidate: Candidate) -> int:
        turn = self.chat.tokenizer.decode(candidate.context.prompt_ids).rpartition("<|start|>assistant")[2]
        final = f"<|channel|>final<|message|>{ANSWER}"
        thoughts = f"<|channel|>analysis<|message|>{THOUGHTS}<|end|>"
        rest = (final if self.directly else thoughts).removeprefix(turn)
        self.script = lambda _: ANSWER if "final" in turn else rest
        return super()._next(candidate)


@pytest.mark.parametrize("how", ["thinks", "answers at once", "off"])
def test_harmony(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = tiny.byte_pairs(THOUGHTS + ANSWER, 600)
    marks = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.eos_token = "<|return|>"
    tokenizer.chat_template = HARMONY
    model = tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=4096)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    kind = type("Harmony", (Harmonious,), {"directly": how == "answers at once"})
    monkeypatch.setattr(local, "LocalLanguageModel", kind)
    with opened(tiny.save(tmp_path, model, tokenizer)) as llm:
        answer = llm.align("How many?", **({"thinking": "off"} if how == "off" else {}))
        before = read(llm, answer.prompt_ids)
    assert answer.text == ANSWER
    assert answer.thoughts == (THOUGHTS if how == "thinks" else "")
    thoughts = f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant" if how == "thinks" else ""
    assert before.endswith(f"<|start|>assistant{thoughts}<|channel|>final<|message|>")


@pytest.mark.parametrize("family", ["lfm2", "gemma3_text"])
def test_thoughts_beside_others(family: str, tmp_path: Path) -> None:
    """Real draws: alone and beside others, thoughts and answers are the same; so they are with prefixes read anew."""
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template = R1
    path = tiny.save(tmp_path, tiny.causal(family, vocab_size=len(tokenizer)), tokenizer)
    prompts, more = ["the cat", "the mat and the dog " * 2, "a"], {"max_thinking_tokens": 9, "max_tokens": 12}
    found = []
    for reuse in (True, False):
        engine = EngineSettings(dtype="float32", prefix_reuse=reuse)
        with opened(path, **more, engine=engine) as llm:
            found += [[llm.align(prompt) for prompt in prompts], llm.align_batch(prompts)]
    each = [[(a.thinking.token_ids, a.token_ids) for a in answers] for answers in found]
    assert each == [each[0]] * 4
