"""Does a redesign change an answer? Some 260 requests of all kinds, recorded before it and compared after.

    python benchmarks/same_answers.py record benchmarks/results/same-answers.json
    python benchmarks/same_answers.py check benchmarks/results/same-answers.json [--models ../shared/models]

To run it on another checkout, put that one first: PYTHONPATH=/path/to/it. Only what users meet is imported, so
the same file runs on the code before and after. Everything is in float32 on one thread of the CPU, with a width
that is fixed and random models of a few kilobytes made on the spot; the tiny pair is used where it is there.

Texts, tokens, verdicts, chunks, calls, counts and finish reasons have to be equal, rewards and log-likelihoods within
1e-4. Exit code 1 and a line for each difference if they are not. The ids of tool calls are random, and are left out.

Where requests come from several threads or tasks, or a reward runs in a thread of its own, what is drafted
together depends on the clock. Of those ("concurrent: ..." and "rewards: sync function", see `Bench.loosely`) the counts
of drafts and forwards are left out; everything else is compared.
"""

from __future__ import annotations

import os

os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"})

import argparse
import asyncio
import hashlib
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import LLMResult
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

import cards_integrations
from cards_integrations import CardsCompletion, CardsLLM, CardsSettings, ChatCards, Grammar
from cards_integrations.decoding import (
    Args,
    BestOfN,
    Cards,
    Decoding,
    FixedLength,
    OptimalStopping,
    Particles,
    Punctuation,
    Rain,
    RejectionSampling,
    Sampling,
    SegmentBestOfN,
    SpeculativeRejection,
    TreeBoN,
    Uncertainty,
)
from cards_integrations.engine import EngineSettings
from cards_integrations.rewards import (
    ClassifierReward,
    FunctionReward,
    GateReward,
    GroundednessReward,
    ImplicitReward,
    JudgeReward,
    LengthReward,
    MinReward,
    PatternReward,
    Reward,
    WeightedReward,
)

RAIN_STOPS = "value_threshold" if "value_threshold" in Rain.model_fields else "enough"  # as it was called before

Row = dict[str, Any]
TOLERANCE = 1e-4
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "models"
COUNTS = (
    "prompt_tokens", "cached_tokens", "completion_tokens", "drafted_tokens", "drafts", "lm_forwards", "lm_tokens",
    "rm_forwards", "rm_tokens",
)  # fmt: skip
CERTAIN = ("prompt_tokens", "completion_tokens")  # whatever runs at the same time
PAIR = "pair"  # the group that needs ../shared

# --- the models ---

WRITTEN = (
    "The cat sat on the mat and the dog ran away. How was your day? It rained, so we stayed at home! "
    'What is the weather in Paris? {"name": "get_weather", "arguments": {"city": "Paris", "days": 3}} '
    "Answer with a JSON object that this JSON schema describes: the type of each of the properties, please.\n"
)
OTHERWISE = "Reward models may read other words than those that write: longer pieces, or shorter ones, of their own. "
ENDS = [f"<end{number}>" for number in range(6)]  # special tokens, with which some models end an answer
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_inner": 48},
    "gemma3_text": {
        "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "bert": {},
}  # fmt: skip
SHARPNESS = {"llama": 2.5, "gpt2": 2.5, "gemma3_text": 2.5}  # or random models are uncertain of every token alike


def words_of(text: str, size: int, template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with merges learned from `text`."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>", *ENDS], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator([text] * 8, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", model_max_length=2048
    )
    tokenizer.chat_template = template
    return tokenizer


def saved(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    """The directory that holds both."""
    model.float().eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config_of(family: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    """A tiny config of this family."""
    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], "vocab_size": len(tokenizer), **options})


def writer(folder: Path, family: str, seed: int, ends: Sequence[int] = (1,)) -> str:
    """A random causal model; any of `ends` ends its answers."""
    tokenizer = words_of(WRITTEN, 400)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, tokenizer))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(SHARPNESS[family])
    model.generation_config = GenerationConfig(eos_token_id=list(ends), pad_token_id=0)
    return saved(folder / f"{family}-{seed}", model, tokenizer)


def scorer(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast, seed: int, labels: int = 1) -> str:
    """A random sequence classifier."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config_of(family, tokenizer, num_labels=labels))
    return saved(folder / f"scorer-{family}-{seed}", model, tokenizer)


# --- what came of a request ---


@dataclass(frozen=True)
class Streamed:
    """The texts of a stream's chunks, and the answer that they add up to."""

    chunks: list[str]
    answer: Any


def described(answer: Any) -> Row:
    """All that should stay as it is, of an answer in any of its forms."""
    if isinstance(answer, dict):
        return answer
    if isinstance(answer, BaseModel) and type(answer).__module__ == __name__:
        return {"object": answer.model_dump(mode="json")}
    if isinstance(answer, Streamed):
        return {**described(answer.answer), "chunks": answer.chunks}
    if isinstance(answer, AIMessage):
        return of_message(answer)
    if hasattr(answer, "raw"):
        return of_response(answer)
    return of_alignment(answer)


def of_alignment(answer: Any) -> Row:
    """Of what `align` returns."""
    return {
        "text": answer.text,
        "content": answer.content,
        "ids": list(answer.token_ids),
        "prompt": digest(answer.prompt_ids),
        "reward": answer.reward,
        "prompt_reward": answer.prompt_reward,
        "parts": list(answer.rewards.values()),
        "log_likelihood": answer.log_likelihood,
        "finish": answer.finish_reason,
        "segments": [segment.reward for segment in answer.segments],
        "thresholds": [segment.threshold for segment in answer.segments],
        "lengths": [len(segment.token_ids) for segment in answer.segments],
        "verdicts": ["".join(draft.verdict[0] for draft in segment.drafts) for segment in answer.segments],
        "counts": {name: getattr(answer.usage, name) for name in COUNTS},
        "tools": [[call.name, call.arguments] for call in answer.tool_calls],
        "invalid": [[call.name, call.arguments] for call in answer.invalid_tool_calls],
    }


def of_summary(cards: dict[str, Any]) -> Row:
    """Of what both frameworks carry in their metadata."""
    return {
        "reward": cards["reward"],
        "log_likelihood": cards["log_likelihood"],
        "finish": cards["finish_reason"],
        "segments": [segment["reward"] for segment in cards["segments"]],
        "thresholds": [segment["threshold"] for segment in cards["segments"]],
        "pieces": [segment["text"] for segment in cards["segments"]],
        "counts": {name: cards["usage"][name] for name in COUNTS},
    }


def of_message(message: AIMessage) -> Row:
    """Of a message of LangChain."""
    return {
        "text": message.text,
        **of_summary(message.response_metadata["cards"]),
        "usage": [message.usage_metadata[name] for name in ("input_tokens", "output_tokens", "total_tokens")],  # type: ignore[index,literal-required]
        "tools": [[call["name"], call["args"]] for call in message.tool_calls],
        "invalid": [[call["name"], call["args"]] for call in message.invalid_tool_calls],
    }


def of_response(response: Any) -> Row:
    """Of a completion or a chat response of LlamaIndex."""
    row = {**of_summary(response.raw["cards"]), "usage": list(response.raw["usage"].values())}
    if not hasattr(response, "message"):
        return {"text": response.text, **row}
    calls = [block for block in response.message.blocks if block.block_type == "tool_call"]
    called = [[call.tool_name, call.tool_kwargs] for call in calls]
    return {"text": response.message.content or "", **row, "tools": called}


def of_generations(result: LLMResult) -> list[Row]:
    """Of what the text LLM of LangChain returns."""
    return [
        {"text": generation.text, **of_summary((generation.generation_info or {})["cards"])}
        for [generation] in result.generations
    ]


def digest(ids: Iterable[int]) -> str:
    """A prompt's tokens, in short."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16]


class Bench:
    """Where the models are, and what came of each request."""

    def __init__(self, folder: Path, pair: Path) -> None:
        self.folder = folder
        self.pair = pair
        self.rows: list[Row] = []
        self.open: list[CardsLLM] = []
        self.llama = writer(folder, "llama", 0)
        self.gemma = writer(folder, "gemma3_text", 1, ends=range(1, 2 + len(ENDS)))
        self.gpt2 = writer(folder, "gpt2", 2)
        self.judge = scorer(folder, "llama", words_of(WRITTEN, 400), 3)
        self.other = scorer(folder, "gpt2", words_of(OTHERWISE, 330, template=None), 4)
        self.encoder = scorer(folder, "bert", words_of(OTHERWISE, 330, template=None), 5, labels=3)

    def llm(self, model: Any, width: int, **options: Any) -> CardsLLM:
        """A model of its own engine, closed in the end."""
        own = {"max_tokens": 32, "temperature": 0.9, "reward": ClassifierReward(model=self.judge), **options}
        made = CardsLLM(model=model, engine=machine(width, **own.pop("machine", {})), **own)
        self.open.append(made)
        return made

    def note(self, name: str, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run a request, or several at once, and keep what came of each; the first."""
        return self._note(name, work, args, options, COUNTS)

    def loosely(self, name: str, work: Callable[..., Any], *args: Any, **options: Any) -> None:
        """The same, but for what depends on the clock: which forwards and drafts it took."""
        self._note(name, work, args, options, CERTAIN)

    def _note(self, name: str, work: Callable[..., Any], args: Any, options: Any, counts: Sequence[str]) -> Any:
        try:
            found = work(*args, **options)
        except Exception as error:
            self.rows.append({"name": name, "error": type(error).__name__})
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}", file=sys.stderr)
            return None
        several = found if isinstance(found, list) else [found]
        for number, answer in enumerate(several):
            row = {"name": f"{name} #{number}" if isinstance(found, list) else name, **described(answer)}
            if "counts" in row:
                row["counts"] = {each: row["counts"][each] for each in counts}
            self.rows.append(row)
        return several[0] if several else None

    def close(self) -> None:
        """Free all models."""
        for llm in self.open:
            llm.close()


def machine(width: int, **options: Any) -> EngineSettings:
    """Settings with which the same work is done everywhere."""
    fixed = {"device": "cpu", "dtype": "float32", "threads": 1, "kv_memory": 256 * 2**20, "width": width}
    return EngineSettings(**{**fixed, **options})


# --- the requests ---

PROMPTS = (
    "How was your day?", "What is the weather in Paris?", "Tell me about the cat on the mat.", "Why did the dog run?",
    "Write one sentence about rain.", "Say something nice.", "Where do we stay when it rains?", "Count to three.",
)  # fmt: skip
ENTROPY = Uncertainty(threshold=2.2, min_length=3, max_length=12)  # a fifth of the tokens are less certain
BOUNDARIES = {
    "entropy": ENTROPY,
    "max probability": Uncertainty(measure="max_probability", threshold=0.65, min_length=2, max_length=16),
    "evidential": Uncertainty(measure="evidential", threshold=0.39, min_length=2, max_length=16),
    "fixed length": FixedLength(length=7),
    "punctuation": Punctuation(min_length=2, max_length=14, marks=(".", "?", "!", ",", "e", " t")),
}
SOFT = Cards(target_reward=1.5, beta=0.5, max_rejections=8, boundary=ENTROPY)
METHODS: dict[str, Decoding] = {
    "sampling": Sampling(),
    "sampling, chunk 3": Sampling(chunk=3),
    "best of 5": BestOfN(n=5),
    "rejection": RejectionSampling(target_reward=1.5, beta=0.5, max_rejections=6),
    "rejection, hard": RejectionSampling(target_reward=1.0, acceptance="hard", max_rejections=4),
    "segment best of 3": SegmentBestOfN(n=3, boundary=ENTROPY),
    "cards, soft": SOFT,
    "cards, hard": Cards(target_reward=1.5, acceptance="hard", max_rejections=5, alpha=0.3, boundary=ENTROPY),
    "cards, stopping": Cards(acceptance=OptimalStopping(price=0.03), max_rejections=7, boundary=ENTROPY),
    "cards, stopping by 2": Cards(acceptance=OptimalStopping(price=0.03, batch=2), boundary=FixedLength(length=6)),
    "cards, paper": Cards.paper(target_reward=2.0),
    "args": Args(k=4, weight=1.0),
    "args, stochastic": Args(k=3, weight=0.7, stochastic=True),
    "speculative rejection": SpeculativeRejection(n=6, checkpoint=8),
    "tree": TreeBoN(n=6, children=2, boundary=FixedLength(length=8)),
    "particles": Particles(n=4, beta=0.5, boundary=ENTROPY),
    "particles, best": Particles(n=4, beta=0.5, threshold=1.0, keep="best", boundary=FixedLength(length=6)),
    "rain": Rain(width=2, searches=3, boundary=FixedLength(length=8)),
    "rain, enough": Rain(width=3, searches=4, boundary=FixedLength(length=10), **{RAIN_STOPS: 1.0}),
}


def methods(bench: Bench) -> None:
    """Every method, each with a prompt and a seed of its own."""
    llm = bench.llm(bench.llama, 4)
    for number, (name, method) in enumerate(METHODS.items()):
        prompt = PROMPTS[number % len(PROMPTS)]
        bench.note(f"methods: {name}", llm.align, prompt, decoding=method, seed=number)
    bench.note("methods: cards, auto", llm.align, PROMPTS[0], decoding="cards", seed=50, max_tokens=24)
    bench.note("methods: particles, auto", llm.align, PROMPTS[1], decoding=Particles(n=2), seed=51, max_tokens=24)
    for name, boundary in BOUNDARIES.items():
        cards = SOFT.model_copy(update={"boundary": boundary})
        bench.note(f"boundaries: {name}", llm.align, PROMPTS[3], decoding=cards, seed=60)
        bench.note(f"boundaries: {name}, best of 2", llm.align, PROMPTS[4],
                   decoding=SegmentBestOfN(n=2, boundary=boundary), seed=61)  # fmt: skip


def families(bench: Bench) -> None:
    """Other bodies: sliding windows and several ends, learned positions."""
    for family, model, width in (("gemma", bench.gemma, 2), ("gpt2", bench.gpt2, 1)):
        llm = bench.llm(model, width)
        for number, name in enumerate(
            ("sampling", "best of 5", "cards, soft", "cards, hard", "args", "speculative rejection", "tree",
             "particles", "rain")
        ):  # fmt: skip
            bench.note(f"{family}: {name}", llm.align, PROMPTS[number % 8], decoding=METHODS[name], seed=100 + number,
                       max_tokens=40)  # fmt: skip
        bench.note(f"{family}: several", llm.align_batch, PROMPTS[:5], seeds=range(5), decoding=SOFT)


def sampling(bench: Bench) -> None:
    """Temperature, top-k, stop strings, prompts of several messages."""
    llm = bench.llm(bench.llama, 2, decoding=SOFT)
    for name in ("sampling", "best of 5", "cards, soft", "args", "tree"):
        bench.note(f"greedy: {name}", llm.align, PROMPTS[1], decoding=METHODS[name], temperature=0, seed=1)
    for top_k, temperature in ((0, 0.6), (1, 1.0), (5, 1.5)):
        bench.note(
            f"top-k {top_k} at {temperature}", llm.align, PROMPTS[2], top_k=top_k, temperature=temperature, seed=2
        )
    bench.note("as long as one token", llm.align, PROMPTS[2], max_tokens=1, seed=3)
    bench.note("a long answer", llm.align, PROMPTS[5], max_tokens=160, decoding=BestOfN(n=3), seed=4)
    for name in ("sampling", "cards, soft", "best of 5", "tree"):
        plain = bench.note(f"stop: {name}, without", llm.align, PROMPTS[0], decoding=METHODS[name], seed=5)
        stop = [inside(plain.text), "never said"]
        bench.note(f"stop: {name}", llm.align, PROMPTS[0], decoding=METHODS[name], seed=5, stop=stop)
    talk = [("system", "You are brief."), ("user", "Hello!"), ("assistant", "Hi."), ("user", "How was your day?")]
    bench.note("messages", llm.align, [{"role": role, "content": said} for role, said in talk], seed=6)
    bench.note("the same prompt again", llm.align, PROMPTS[0], seed=7)
    bench.note("emoji \N{GRINNING FACE}", llm.align, "¿Qué tal? \N{GRINNING FACE} 你好", seed=8)
    bench.note("again with another seed", llm.align, "¿Qué tal? \N{GRINNING FACE} 你好", seed=9)


def inside(text: str) -> str:
    """Some characters from amid a text, so that they begin and end within tokens."""
    windows = [text[start : start + 4] for start in range(len(text) // 2, len(text) - 4)]
    return next((window for window in windows if window.isascii()), text[-4:])


async def vowels(prompt: str, answers: list[str]) -> list[float]:
    """The share of vowels."""
    return [sum(letter in "aeiou" for letter in answer.lower()) / max(1, len(answer)) for answer in answers]


def many_letters(prompt: str, answers: list[str]) -> list[float]:
    """How many different letters there are, in tens."""
    return [len(set(answer)) / 10 for answer in answers]


async def angry(prompt: str, answers: list[str]) -> list[float]:
    """A reward that fails."""
    raise ValueError("no")


def rewards_of(bench: Bench) -> dict[str, Reward]:
    """Rewards of all kinds that need no server."""
    function, judge = FunctionReward(function=vowels), ClassifierReward(model=bench.judge)
    length, pattern = LengthReward(target=12), PatternReward(wanted=["the", "a t"], forbidden=["z", r"\d"])
    return {
        "function": function,
        "length": length,
        "length in characters": LengthReward(target=40, unit="characters"),
        "pattern": pattern,
        "classifier": judge,
        "classifier, formatted": ClassifierReward(model=bench.judge, prompt_format="Q: {prompt}\nA: {response}"),
        "classifier, other tokenizer": ClassifierReward(model=bench.other),
        "classifier, probability": ClassifierReward(
            model=bench.other, output="probability", prompt_format="{response}"
        ),
        "encoder, log-odds": ClassifierReward(model=bench.encoder, label=2, output="log_odds"),
        "sentences": ClassifierReward(model=bench.judge, granularity="sentence"),
        "weighted": WeightedReward(rewards=[judge, function, length], weights=[1.0, 0.5, -0.2]),
        "weighted, given scales": WeightedReward(
            rewards=[judge.model_copy(update={"scale": (0.0, 2.0)}), length.model_copy(update={"scale": (-0.2, 0.3)})]
        ),
        "min": MinReward(rewards=[judge, ClassifierReward(model=bench.other)]),
        "gate": GateReward(gate=pattern, reward=judge, threshold=0.0),
        "gate, nested": GateReward(gate=function, reward=MinReward(rewards=[judge, pattern]), threshold=0.1, closed=-9),
        "implicit": ImplicitReward(tuned=bench.gpt2),
        "implicit, two others": ImplicitReward(tuned=bench.gpt2, base=bench.gemma),
        "judge": JudgeReward(),
        "judge, another": JudgeReward(model=bench.gpt2, rubric="{prompt}|{response}|?", words=("good", "bad")),
    }


def rewards(bench: Bench) -> None:
    """Every reward, under CARDS and where branches are scored."""
    llm = bench.llm(bench.llama, 4, max_tokens=24)
    guided = Cards(target_reward=1.0, beta=0.3, max_rejections=5, boundary=FixedLength(length=8))
    particles = Particles(n=3, beta=0.5, boundary=FixedLength(length=8))
    kinds = rewards_of(bench)
    for number, (name, reward) in enumerate(kinds.items()):
        bench.note(f"rewards: {name}", llm.align, PROMPTS[number % 8], reward=reward, decoding=guided, seed=number)
    for name in ("classifier, other tokenizer", "encoder, log-odds", "weighted", "gate", "implicit", "judge"):
        bench.note(
            f"rewards: {name}, particles", llm.align, PROMPTS[1], reward=kinds[name], decoding=particles, seed=70
        )
    for name in ("classifier", "classifier, other tokenizer", "weighted", "implicit", "encoder, log-odds", "judge"):
        texts = ["The cat sat.", "", "It rained all day, so we stayed at home!"]
        bench.note(f"score: {name}", lambda r=kinds[name], t=texts: {"scores": llm.score(PROMPTS[0], t, reward=r)})
    bench.note("rewards: none", bench.llm(bench.llama, 1, reward=None, decoding="sampling").align, PROMPTS[0], seed=71)
    bench.note("rewards: groundedness", llm.align, PROMPTS[6], reward=GroundednessReward(), decoding=guided, seed=72,
               context=["We stay at home when it rains."])  # fmt: skip
    bench.note("rewards: a function as it is", llm.align, PROMPTS[7], reward=vowels, decoding=BestOfN(n=3), seed=73)
    bench.loosely("rewards: sync function", bench.llm(bench.llama, 4, machine={"prefix_reuse": False}).align,
                  PROMPTS[7], reward=many_letters, decoding=guided, seed=74)  # fmt: skip


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=99)
    happy: bool


SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["kind", "tags"], "additionalProperties": False,
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
}  # fmt: skip
WEATHER: dict[str, Any] = {
    "name": "get_weather", "description": "The weather in a city",
    "parameters": {
        "type": "object", "required": ["city", "days"], "additionalProperties": False,
        "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 2, 3]}},
    },
}  # fmt: skip
ADD: dict[str, Any] = {
    "name": "add", "description": "Add two digits",
    "parameters": {
        "type": "object", "required": ["a", "b"], "additionalProperties": False,
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": [0, 5]}},
    },
}  # fmt: skip
TOOLS = [{"type": "function", "function": each} for each in (WEATHER, ADD)]
STRICT = [{"type": "function", "function": {**each, "strict": True}} for each in (WEATHER, ADD)]


def grammars(bench: Bench) -> None:
    """Answers that are held to a form."""
    llm = bench.llm(bench.llama, 4, max_tokens=80, decoding=SOFT)
    person = {"type": "json_schema", "json_schema": {"name": "Person", "schema": Person.model_json_schema()}}
    formats: dict[str, dict[str, Any]] = {
        "schema": {"response_format": SCHEMA},
        "class": {"response_format": Person},
        "as OpenAI writes it": {"response_format": person},
        "any object": {"response_format": {"type": "json_object"}, "max_tokens": 20},
        "regex": {"grammar": Grammar.regex(r"(yes|no), [a-z]{3,9}( [a-z]+)?[.!]")},
        "choice": {"grammar": Grammar.choice(["the cat", "the dog", "the catalogue"])},
        "schema as a grammar": {"grammar": SCHEMA},
    }
    for number, (name, options) in enumerate(formats.items()):
        bench.note(f"grammar: {name}", llm.align, PROMPTS[number], seed=number, **options)
    for name in ("sampling", "best of 5", "args", "tree", "particles"):
        bench.note(f"grammar: {name}", llm.align, PROMPTS[1], response_format=SCHEMA, decoding=METHODS[name], seed=9)
    bench.note("grammar: stop inside", llm.align, PROMPTS[1], response_format=Person, stop=['"'], seed=10)
    bench.note("grammar: greedy", llm.align, PROMPTS[1], response_format=SCHEMA, temperature=0, seed=11)
    bench.note("grammar: gemma", bench.llm(bench.gemma, 2, max_tokens=80, decoding=SOFT).align, PROMPTS[2],
               response_format=Person, seed=12)  # fmt: skip
    bench.note("grammar: several", llm.align_batch, PROMPTS[:3], seeds=[1, 2, 3], response_format=Person)


def tools(bench: Bench) -> None:
    """Calls, forced and not."""
    llm = bench.llm(bench.llama, 2, max_tokens=90, decoding=SOFT)
    choices: dict[str, dict[str, Any]] = {
        "named": {"tools": TOOLS, "tool_choice": "get_weather"},
        "any": {"tools": TOOLS, "tool_choice": "any"},
        "any, one at a time": {"tools": TOOLS, "tool_choice": "any", "parallel_tool_calls": False},
        "auto": {"tools": TOOLS, "tool_choice": "auto", "max_tokens": 24},
        "auto, strict": {"tools": STRICT, "max_tokens": 40},
        "auto, or an object": {"tools": TOOLS, "response_format": SCHEMA},
        "none": {"tools": TOOLS, "tool_choice": "none", "max_tokens": 24},
        "plain sampling": {"tools": TOOLS, "tool_choice": "add", "decoding": "sampling"},
    }
    for number, (name, options) in enumerate(choices.items()):
        bench.note(f"tools: {name}", llm.align, PROMPTS[1], seed=number, **options)
    for form in ("mistral", "llama3", "json"):
        other = bench.llm({"model": bench.llama, "tool_format": form}, 1, max_tokens=90, decoding=SOFT)
        bench.note(f"tools: {form}", other.align, PROMPTS[1], tools=TOOLS, tool_choice="any", seed=20)
    called = [{"name": "get_weather", "args": {"city": "Paris", "days": 1}, "id": "call00001"}]
    talk = [HumanMessage(PROMPTS[1]), AIMessage("", tool_calls=called), ToolMessage("Rain.", tool_call_id="call00001")]
    bench.note("tools: after a result", llm.bind_tools(TOOLS).invoke, talk, seed=21, max_tokens=20)
    forced = llm.bind_tools(TOOLS, tool_choice="any")
    bench.note("tools: LangChain", forced.invoke, PROMPTS[1], seed=22)
    bench.note("tools: LangChain, streamed", lambda: streamed_messages(forced.stream(PROMPTS[1], seed=23)))
    bench.note("tools: LlamaIndex", llm.chat_with_tools, [FunctionTool.from_defaults(fn=forecast)], user_msg=PROMPTS[1],
               tool_required=True, seed=24)  # fmt: skip


def forecast(days: int) -> str:
    """The weather of the next days."""
    return "rain" * days


# --- streams and frameworks ---


def streamed(items: Iterable[Any]) -> Streamed:
    """Of our own stream: chunks, and then the answer."""
    *chunks, answer = items
    return Streamed([chunk.text for chunk in chunks], answer)


def streamed_messages(items: Iterable[Any]) -> Streamed:
    """Of a stream of LangChain."""
    chunks = list(items)
    return Streamed([chunk.text for chunk in chunks], reduce(add, chunks))


def streamed_responses(items: Iterable[Any]) -> Streamed:
    """Of a stream of LlamaIndex."""
    responses = list(items)
    return Streamed([response.delta for response in responses], responses[-1])


def collected(items: AsyncIterator[Any]) -> list[Any]:
    """All items of an async stream."""

    async def collect() -> list[Any]:
        return [item async for item in items]

    return asyncio.run(collect())


def opened(stream: Any) -> list[Any]:
    """All items of a stream that has to be awaited first."""

    async def collect() -> list[Any]:
        return [item async for item in await stream]

    return asyncio.run(collect())


def streams(bench: Bench) -> None:
    """Chunks, of our own."""
    llm = bench.llm(bench.llama, 4, decoding=SOFT)
    for number, name in enumerate(("sampling", "best of 5", "cards, soft", "tree", "particles")):
        options: dict[str, Any] = {"decoding": METHODS[name], "seed": 30 + number}
        bench.note(f"stream: {name}", lambda o=options: streamed(llm.align_stream(PROMPTS[3], **o)))
        bench.note(f"async stream: {name}", lambda o=options: streamed(collected(llm.aalign_stream(PROMPTS[3], **o))))
    for name in ("sampling", "cards, soft"):
        options = {"decoding": METHODS[name], "seed": 36}
        stop = [inside(llm.align(PROMPTS[4], **options).text)]
        bench.note(
            f"stream: {name}, stop", lambda o=options, s=stop: streamed(llm.align_stream(PROMPTS[4], **o, stop=s))
        )
    bench.note("stream: closed", lambda: first_of(llm.align_stream(PROMPTS[5], seed=37)))
    bench.note("stream: object", lambda: streamed(llm.align_stream(PROMPTS[6], response_format=Person, max_tokens=80,
                                                                   seed=38)))  # fmt: skip


def first_of(stream: Iterator[Any]) -> Row:
    """The first chunk, after which the stream is closed."""
    text = next(stream).text
    stream.close()  # type: ignore[attr-defined]
    return {"text": text}


def langchain(bench: Bench) -> None:
    """As a Runnable and as a chat model."""
    llm = bench.llm(bench.llama, 2, decoding=SOFT, seed=40)
    chat = ChatCards(**{name: getattr(llm, name) for name in type(CardsSettings()).model_fields})
    bench.note("LangChain: invoke", llm.invoke, PROMPTS[0])
    bench.note("LangChain: messages", llm.invoke, [SystemMessage("Be brief."), HumanMessage(PROMPTS[1])], max_tokens=20)
    bench.note(
        "LangChain: chain", (ChatPromptTemplate.from_template("Tell me of {what}.") | llm).invoke, {"what": "a cat"}
    )
    bench.note("LangChain: ainvoke", lambda: asyncio.run(llm.ainvoke(PROMPTS[2])))
    bench.note("LangChain: stream", lambda: streamed_messages(llm.stream(PROMPTS[3])))
    bench.note("LangChain: astream", lambda: streamed_messages(collected(llm.astream(PROMPTS[3]))))
    bench.note("LangChain: bound", llm.bind(decoding="sampling", temperature=0.5).invoke, PROMPTS[4])
    bench.note("LangChain: ChatCards", chat.invoke, PROMPTS[5], stop=["e"])
    bench.note("LangChain: structured", llm.with_structured_output(Person).invoke, PROMPTS[6], max_tokens=80)
    bench.note("LangChain: structured by a call", llm.with_structured_output(Person, method="function_calling").invoke,
               PROMPTS[6], max_tokens=90)  # fmt: skip
    bench.note("LangChain: tokens", lambda: {"ids": llm.get_token_ids(PROMPTS[7])})
    text = CardsCompletion(
        model=bench.llama, reward=llm.reward, decoding=SOFT, engine=llm.engine, max_tokens=20, seed=41
    )
    bench.note("LangChain: text", lambda: of_generations(text.generate(list(PROMPTS[:3]))))


def llama_index(bench: Bench) -> None:
    """As a LlamaIndex LLM."""
    llm = bench.llm(bench.llama, 2, decoding=SOFT, seed=45)
    talk = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=PROMPTS[1])]
    template = PromptTemplate("Describe {what}.")
    bench.note("LlamaIndex: complete", llm.complete, PROMPTS[0])
    bench.note("LlamaIndex: formatted", llm.complete, "<user> Hello </user>\n<assistant> ", formatted=True)
    bench.note("LlamaIndex: acomplete", lambda: asyncio.run(llm.acomplete(PROMPTS[1])))
    bench.note("LlamaIndex: stream_complete", lambda: streamed_responses(llm.stream_complete(PROMPTS[2])))
    bench.note("LlamaIndex: chat", llm.chat, talk, max_tokens=20)
    bench.note("LlamaIndex: achat", lambda: asyncio.run(llm.achat(talk)))
    bench.note("LlamaIndex: stream_chat", lambda: streamed_responses(llm.stream_chat(talk)))
    bench.note("LlamaIndex: astream_chat", lambda: streamed_responses(opened(llm.astream_chat(talk, seed=46))))
    bench.note("LlamaIndex: predict", lambda: {"text": llm.predict(template, what="a cat")})
    bench.note("LlamaIndex: structured", llm.structured_predict, Person, template, llm_kwargs={"max_tokens": 80},
               what="a dog")  # fmt: skip


def together(bench: Bench) -> None:
    """Several requests in one batch, also more than run at once."""
    seeds = range(200, 208)
    llm = bench.llm(bench.llama, 2, decoding=SOFT)
    bench.note("together: cards", llm.align_batch, PROMPTS, seeds=seeds)
    bench.note("together: best of 5", llm.align_batch, PROMPTS[:4], seeds=seeds[:4], decoding=METHODS["best of 5"])
    bench.note("together: rain", llm.align_batch, PROMPTS[:3], seeds=seeds[:3], decoding=METHODS["rain"], max_tokens=16)
    waits = bench.llm(bench.llama, 1, decoding=SOFT, machine={"max_rows": 3})
    bench.note("together: three at once", waits.align_batch, PROMPTS[:7], seeds=seeds[:7])
    weighted = rewards_of(bench)["weighted"]
    bench.note("together: weighted", llm.align_batch, PROMPTS[:4], seeds=seeds[:4], reward=weighted, max_tokens=20)
    function = FunctionReward(function=vowels)
    bench.note("together: function", llm.align_batch, PROMPTS[:4], seeds=seeds[:4], reward=function, max_tokens=20)


def concurrent(bench: Bench) -> None:
    """Requests of several threads and tasks: what they share depends on the clock, and no answer does."""
    llm = bench.llm(bench.llama, 4, decoding=SOFT, machine={"prefix_reuse": False})

    def threads() -> list[Any]:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda each: llm.align(each[1], seed=300 + each[0]), enumerate(PROMPTS[:4])))

    async def tasks() -> list[Any]:
        several = [METHODS[name] for name in ("cards, soft", "best of 5", "particles", "sampling")]
        return await asyncio.gather(*(
            llm.aalign(prompt, seed=310 + number, decoding=several[number])
            for number, prompt in enumerate(PROMPTS[4:8])
        ))  # fmt: skip

    bench.loosely("concurrent: threads", threads)
    bench.loosely("concurrent: tasks", lambda: list(asyncio.run(tasks())))
    bench.loosely("concurrent: LangChain's batch", llm.batch, list(PROMPTS[:3]), seed=320)
    bench.loosely("concurrent: LangChain's abatch", lambda: asyncio.run(llm.abatch(list(PROMPTS[3:5]), seed=321)))


def settings(bench: Bench) -> None:
    """Options by settings and by YAML; and what is refused."""
    given = CardsSettings(
        model=bench.llama, reward=ClassifierReward(model=bench.judge), decoding=SOFT, max_tokens=24, seed=80,
        stop=["~"], engine=machine(2),
    )  # fmt: skip
    file = bench.folder / "cards.yaml"
    file.write_text(given.to_yaml(), encoding="utf-8")
    for name, source in (("settings: object", given), ("settings: YAML", file)):
        llm = CardsLLM.from_settings(source)
        bench.open.append(llm)
        bench.note(name, llm.align, PROMPTS[0])
    bench.note("refused: a prompt that is too long", llm.align, "word " * 3000)
    bench.note("refused: more tokens than fit", llm.align, PROMPTS[0], max_tokens=5000)
    bench.note("refused: an option that is none", llm.align, PROMPTS[0], max_token=5)
    bench.note("refused: a tool that is none", llm.align, PROMPTS[0], tools=TOOLS, tool_choice="fly")
    bench.note("refused: a reward that fails", llm.align, PROMPTS[0], reward=angry)
    bench.note("after what was refused", llm.align, PROMPTS[0], seed=81)


def pair(bench: Bench) -> None:
    """A trained language model and a trained reward."""
    writes, judges = bench.pair / "stories260k", bench.pair / "rm-sentiment-stories260k"
    if not (writes.is_dir() and judges.is_dir()):
        print(f"{bench.pair} does not hold the tiny pair: its requests are skipped.", file=sys.stderr)
        return
    reward = ClassifierReward(model=str(judges), scale=(-0.15, 0.48))
    boundary = Uncertainty(threshold=2.9)
    llm = bench.llm(str(writes), 4, reward=reward, max_tokens=48, decoding=Cards(boundary=boundary))
    prompts = ["Tom went to the park", "Lily was very sad", "The big dog saw a cat", "Mom made a cake"]
    several: dict[str, dict[str, Any]] = {
        "cards": {},
        "plain": {"decoding": "sampling"},
        "best of 6": {"decoding": BestOfN(n=6)},
        "hard": {"decoding": Cards(acceptance="hard", max_rejections=8, boundary=boundary)},
        "stopping": {"decoding": Cards(acceptance=OptimalStopping(price=0.003), boundary=boundary)},
        "punctuation": {"decoding": Cards(boundary=Punctuation(max_length=32))},
        "tree": {"decoding": TreeBoN(n=6, children=3, boundary=FixedLength(length=12))},
        "particles": {"decoding": Particles(n=4, boundary=boundary)},
        "rain": {"decoding": Rain(width=3, searches=3)},
        "speculative rejection": {"decoding": SpeculativeRejection(n=6, checkpoint=12)},
        "args": {"decoding": Args(k=5, weight=1.0), "max_tokens": 24},
        "greedy": {"temperature": 0},
        "stop": {"stop": [". ", "\n", "!"]},
        "weighted": {"reward": WeightedReward(rewards=[reward, LengthReward(target=30)], weights=[1, 0.3])},
        "min": {"reward": MinReward(rewards=[reward, PatternReward(wanted=["happy", "friend"])])},
        "gate": {"reward": GateReward(gate=PatternReward(forbidden=["sad", "cry"]), reward=reward)},
        "other tokenizer": {"reward": ClassifierReward(model=bench.judge)},
        "object": {"response_format": SCHEMA, "max_tokens": 60},
    }
    for number, (name, options) in enumerate(several.items()):
        bench.note(f"{PAIR}: {name}", llm.align, prompts[number % 4], seed=number, **options)
    bench.note(f"{PAIR}: together", llm.align_batch, prompts, seeds=range(4))
    bench.note(f"{PAIR}: stream", lambda: streamed(llm.align_stream(prompts[1], seed=30)))
    bench.note(f"{PAIR}: invoke", llm.invoke, prompts[2], seed=31)
    bench.note(f"{PAIR}: complete", llm.complete, prompts[3], seed=32)


GROUPS = (
    methods, families, sampling, rewards, grammars, tools, streams, langchain, llama_index, together, concurrent,
    settings, pair,
)  # fmt: skip


def answers(pair: Path) -> list[Row]:
    """The rows of all requests, with models, caches and remembered scales that are theirs alone."""
    torch.set_num_threads(1)
    disable_progress_bar()
    logging.getLogger("cards_integrations").setLevel(logging.ERROR)
    for name in [name for name in os.environ if name.startswith("CARDS_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CARDS_CACHE_DIR"] = str(Path(folder) / "cache")
        bench = Bench(Path(folder), pair)
        for group in GROUPS:
            began, before = time.perf_counter(), len(bench.rows)
            group(bench)
            seconds = time.perf_counter() - began
            print(f"{group.__name__:<12}{len(bench.rows) - before:4d} answers {seconds:6.1f} s", file=sys.stderr)
        bench.close()
    found: list[Row] = json.loads(json.dumps(bench.rows))
    return found


# --- comparing ---


def differences(where: str, before: Any, after: Any) -> Iterator[str]:
    """What is not as it was, each in a line."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            yield from differences(f"{where}, {name}", before.get(name), after.get(name))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(f"{where}[{number}]", old, new)
    elif not same(before, after):
        yield f"{where}: {before!r} -> {after!r}"


def same(before: Any, after: Any) -> bool:
    """Equal, or, where one of two numbers is no integer, near enough."""
    kinds = {type(before), type(after)}
    if float in kinds and kinds <= {int, float}:
        return math.isclose(before, after, rel_tol=0, abs_tol=TOLERANCE)
    return bool(before == after)


def record(file: Path, rows: list[Row]) -> None:
    """Write one row a line, so that a change shows in a diff."""
    file.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n", encoding="utf-8")
    print(f"{len(rows)} answers written to {file}")


def check(file: Path, rows: list[Row]) -> None:
    """Print what differs from the recording."""
    recorded = {row["name"]: row for row in json.loads(file.read_text(encoding="utf-8"))}
    now = {row["name"]: row for row in rows}
    if not any(name.startswith(PAIR) for name in now):
        recorded = {name: row for name, row in recorded.items() if not name.startswith(PAIR)}
    changed = 0
    for name in {**recorded, **now}:
        if name not in recorded or name not in now:
            found = [f"{name}: only in {'this run' if name in now else 'the recording'}"]
        else:
            found = list(differences(name, recorded[name], now[name]))
        changed += bool(found)
        print("".join(f"{line}\n" for line in found), end="")
    print(f"{len(now)} answers, {changed} of them not as recorded")
    if changed:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--models", type=Path, default=SHARED, help="Where the tiny pair is.")
    options = parser.parse_args()
    print(f"cards_integrations in {Path(cards_integrations.__file__).parent}", file=sys.stderr)
    rows = answers(options.models)
    (record if options.what == "record" else check)(options.file, rows)


if __name__ == "__main__":
    main()
