"""Tiny random chat models for the tests of the faces: any ASCII text in, readable text out."""

from __future__ import annotations

import inspect
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
from llama_index.core.llms import ChatMessage
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cards_integrations import CardsLLM, ChatCards
from cards_integrations.decoding import Cards, FixedLength
from cards_integrations.engine import EngineSettings
from cards_integrations.rewards import ClassifierReward

_HOME = tempfile.TemporaryDirectory(prefix="cards-faces-")  # removed when the process ends
SHARED = Path(__file__).parents[2] / "shared" / "models"
SPECIAL = ["<pad>", "<|im_end|>", "<|im_start|>", "<unk>"]  # tiny.PAD, tiny.EOS, ...
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WINDOW = 4096


def characters() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, and a ChatML template."""
    names = [*SPECIAL, *string.printable[:95], "\n"]
    fast = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


@cache
def chat_model(seed: int = 0) -> str:
    """The directory of a random Llama with a chat template."""
    model = tiny.causal("llama", seed=seed, vocab_size=100, max_position_embeddings=WINDOW)
    return tiny.save(Path(_HOME.name) / f"chat-{seed}", model, characters())


@cache
def thinking_model() -> str:
    """The directory of a random Llama whose chat template opens thoughts."""
    tokenizer = characters()
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    model = tiny.causal("llama", vocab_size=100, max_position_embeddings=WINDOW)
    return tiny.save(Path(_HOME.name) / "thinking", model, tokenizer)


@cache
def endless_model() -> str:
    """The directory of a chat model that writes until it is stopped."""
    model = tiny.causal("llama", vocab_size=100, max_position_embeddings=WINDOW)
    model.generation_config.eos_token_id = [10**6]
    return tiny.save(Path(_HOME.name) / "endless", model, characters())


@cache
def reward_model() -> str:
    """The directory of a random classifier on the same tokenizer."""
    model = tiny.classifier("llama", vocab_size=100, max_position_embeddings=WINDOW)
    return tiny.save(Path(_HOME.name) / "reward", model, characters())


def options(**more: Any) -> dict[str, Any]:
    """A small CARDS run in segments of five tokens, with about one rejection a segment."""
    return {
        "model": chat_model(),
        "reward": ClassifierReward(model=reward_model()),
        "decoding": Cards(target_reward=1.0, beta=0.5, max_rejections=3, boundary=FixedLength(length=5)),
        "max_tokens": 20,
        "seed": 7,
        "engine": EngineSettings(device="cpu", width=2),
        **more,
    }


def cards_llm(**more: Any) -> CardsLLM:
    return CardsLLM(**options(**more))


def chat_cards(**more: Any) -> ChatCards:
    return ChatCards(**options(**more))


class StandardSuite:
    """What LangChain's unit and integration suites have in common here. Off in both, and why:

    - max_retries, api_key among the standard parameters: a local model makes no request that could be
      retried or authorized, and unknown settings are refused.
    - images, PDFs, audio, video, as input and as results of tools: the model reads text only.
    """

    @property
    def chat_model_class(self) -> type[Any]:
        return ChatCards

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {"temperature": 0, "max_tokens": 100, "timeout": 60, "stop": []}

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True  # the suite reads it off a signature, and that of `CardsLLM` only passes it on

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


LANGCHAIN = ["invoke", "ainvoke", "stream", "astream"]
LLAMA_INDEX = [
    *["complete", "acomplete", "stream_complete", "astream_complete"],
    *["chat", "achat", "stream_chat", "astream_chat"],
]


async def call(llm: Any, method: str, prompt: Any = "Hello", **more: Any) -> Any:
    """What one of the methods of either framework returns: an answer, or an iterator over its chunks."""
    found = getattr(llm, method)([ChatMessage(content=prompt)] if "chat" in method else prompt, **more)
    return await found if inspect.isawaitable(found) else found


async def finish(response: Any) -> Any:
    """An answer as it is; of an iterator, its last chunk."""
    if hasattr(response, "__aiter__"):
        return [chunk async for chunk in response][-1]
    return list(response)[-1] if hasattr(response, "__next__") else response


def stories() -> dict[str, Any]:
    """Options for the real tiny pair, or a skip where it is absent."""
    model, reward = SHARED / "stories260k", SHARED / "rm-sentiment-stories260k"
    if not (model.is_dir() and reward.is_dir()):
        pytest.skip("the tiny real models are not here (shared/models)")
    return {
        "model": str(model),
        "reward": ClassifierReward(model=str(reward), prompt_format="{prompt}{response}"),
        "decoding": Cards(target_reward=0.8, beta=0.1),
        "max_tokens": 48,
        "seed": 3,
        "engine": EngineSettings(device="cpu"),
    }
