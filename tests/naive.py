"""What rewards should be, by plain forwards over whole texts: no cache, no batch, no package code."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import internals
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cards_integrations.engine import Engine, Request
from cards_integrations.errors import RewardError
from cards_integrations.trace import Alignment, DraftTrace

KINDS = ("causal", "classifier")
WORDS = tiny.words()


def ids(text: str, tokenizer: Any = WORDS) -> list[int]:
    """The tokens of a text."""
    return list(tokenizer(text)["input_ids"])


@cache
def causal(family: str = "llama", seed: int = 0, **sizes: int) -> Any:
    """A tiny model, made once."""
    return tiny.causal(family, seed, **sizes)


@torch.inference_mode()
def log_p(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """sum_t log p(answer_t | prompt, answer_<t) in nats."""
    if not answer:
        return 0.0
    found = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(found[range(len(answer)), list(answer)].double().sum())


@torch.inference_mode()
def margin(model: Any, ids: Sequence[int], yes: int, no: int) -> float:
    logits = model(torch.tensor([list(ids)])).logits[0, -1]
    return float(logits[yes] - logits[no])


def drafts(alignment: Alignment) -> Iterator[tuple[DraftTrace, list[int]]]:
    """Every draft with the ids of the whole answer so far."""
    ids: list[int] = []
    for segment in alignment.segments:
        for draft in segment.drafts:
            yield draft, [*ids, *draft.token_ids]
        ids += segment.token_ids


def said(tokenizer: Any, ids: Sequence[int], stop: Iterable[str] = ()) -> tuple[str, bool]:
    """The text of an answer, and whether a stop string has cut it (perhaps one that began in an earlier segment)."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ends = [text.find(one) for one in stop if one in text]
    return text[: min(ends)] if ends else text, bool(ends)


def lora(folder: Path, base: str, targets: Iterable[str], **options: Any) -> str:
    """A low-rank adapter on a causal model, far enough from zero to matter."""
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(targets), **options),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:  # zero at first
            torch.nn.init.normal_(weight, std=0.3)
        elif weight.requires_grad and "lora_" not in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    return str(folder)


def parameters(engine: Engine) -> int:
    """How many numbers the weights of all loaded models have, shared ones counted once."""
    cached: Any = internals.worker(engine).loader._cached
    loaded = [model for (key, *_), model in cached.items() if key[0] in KINDS]
    return sum({w.data_ptr(): w.numel() for model in loaded for w in model.parameters()}.values())


class Freed:
    """Ends requests in some way, and looks whether anything of them is still held."""

    ENDS = ("the end", "a cancellation", "error")

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def after(self, end: str, requests: list[Request]) -> None:
        await asyncio.to_thread(self.engine.loaded)
        tasks = [asyncio.create_task(self.engine.arun(request)) for request in requests]
        if end == "a cancellation":
            internals.at_steps(self.engine, {3 * (later + 1): task.cancel for later, task in enumerate(tasks)})
        found = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = {"the end": Alignment, "a cancellation": asyncio.CancelledError, "error": RewardError}
        assert {type(one) for one in found} == {kinds[end]}
        for _ in range(1000):
            if internals.is_idle(self.engine):
                return
            await asyncio.sleep(0.002)
        internals.assert_idle(self.engine)
