"""A transformers model run over trees of candidates: the one forward that drafting and scoring share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from cards_integrations.errors import CardsError, ModelError, OutOfMemory, as_cards_error
from cards_integrations.transformer.attention import CHUNKED, FULL, METADATA, NAME, SLIDING, AttentionMetadata
from cards_integrations.transformer.cuda_graphs import StaticSteps
from cards_integrations.transformer.flat_batch import FlatBatch, ForwardInput, Reach
from cards_integrations.transformer.kv_block import Layout
from cards_integrations.transformer.kv_cache import TreeCache
from cards_integrations.transformer.kv_memory import KVMemory
from cards_integrations.transformer.quantization import attention_dtype
from cards_integrations.transformer.rope import LONG, use_tokenwise_rotary
from cards_integrations.transformer.step_times import least_seconds

SHARED = {"cpu": 256, "cuda": 2048}  # tokens from which on a common beginning is held once; then a graph is not used
log = logging.getLogger("cards_integrations")
PREFILL_CHUNK = 2048  # tokens that a forward reads at most, where they can be read in several


class Output(NamedTuple):
    """What a forward gave for one input: `outputs` rows of its `batch` (n, ...), the last of which is `last`."""

    batch: torch.Tensor
    last: int
    outputs: int = 1

    @property
    def value(self) -> torch.Tensor:
        """The last output, (...)."""
        return self.batch[self.last]

    @property
    def values(self) -> torch.Tensor:
        """All of its outputs, (outputs, ...)."""
        return self.batch[self.last + 1 - self.outputs : self.last + 1]


class Transformer:
    """A decoder with a `TreeCache`. The tokens of all inputs make one flat sequence (1, tokens).

    That this is exact for a model is not known before `check_exact` has tried it.

    Args:
        model: A transformers model, whose attention is replaced.
        memory: The budget that its cache belongs to; unlimited by default.

    Raises:
        ModelError: The model cannot be run so.
    """

    def __init__(self, model: Any, memory: KVMemory | None = None) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.patterns = attention_patterns(self.config)
        self.first_position = first_position(model)
        self.memory = memory or KVMemory(2**62, reuse=False)
        size = (8, 256) if model.device.type == "cuda" else (1, 64)  # graphs are lost when their block grows
        shares = None if {*self.patterns} - {FULL} else SHARED.get(model.device.type, max(SHARED.values()))
        self.dtype = attention_dtype(model)
        self.device: torch.device = model.device  # the model looks for it among its weights, at every step
        self.cache = TreeCache(self.config.num_hidden_layers, _layout(model), size, shares, self.dtype)
        self.memory.caches.append(self.cache)
        self._logits = StaticSteps(self._run_model, model.device)
        self._hidden = StaticSteps(self._run_body, model.device)
        use_tree_attention(model)
        self.switch = use_tokenwise_rotary(model)
        self.forwards = self.tokens = 0
        if not len(self.cache.layout):
            self._learn_layout()

    def _learn_layout(self) -> None:
        """Read one token, which shows what is kept of each."""
        tree = self.cache.open()
        [output] = self.hidden([ForwardInput(tree.branch(), [0])])
        self.cache.close(tree)
        self.forwards = self.tokens = 0
        if isinstance(output, CardsError):
            raise cannot_run(self.model, str(output)) from output.__cause__

    @property
    def reach(self) -> Reach:
        """How far back layers see that do not see all."""
        window, chunk = (getattr(self.config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return Reach(window or 0, chunk or 0)

    def is_long(self, tokens: int) -> bool:
        """True if a text of so many tokens is read with other rotary frequencies than a short one."""
        return 0 < self.switch < tokens

    def logits(self, inputs: Sequence[ForwardInput]) -> list[Output | CardsError]:
        """Run a causal model: logits (vocabulary,) after the last tokens of each input, or why it cannot be read."""
        return self._forward(inputs, self._logits)

    def hidden(self, inputs: Sequence[ForwardInput]) -> list[Output | CardsError]:
        """Run the body: hidden states (hidden size,) of the last tokens of each input, or why it cannot be read."""
        return self._forward(inputs, self._hidden)

    def _forward(self, inputs: Sequence[ForwardInput], run: StaticSteps) -> list[Output | CardsError]:
        """One forward; when it fails, two of one half each, down to the input that the error belongs to."""
        before = [len(item.branch.columns) for item in inputs]
        try:
            flat = FlatBatch(inputs, self.cache, run.rounding)
            self.memory.evict_for(0)  # the cache may have grown
            batch = run(*self._prepare(flat, inputs))[: len(flat.output_indices)]
            ends = accumulate([item.outputs for item in inputs])
            return [Output(batch, end - 1, item.outputs) for item, end in zip(inputs, ends, strict=True)]
        except Exception as error:
            problem = error
        for item, columns in zip(inputs, before, strict=True):
            item.branch.retract(len(item.branch.columns) - columns)
        if _out_of_memory(problem) and self.memory.evict_all():
            return self._forward(inputs, run)
        if len(inputs) == 1:
            return [_error_of(inputs[0], problem)]
        log.warning("a forward of %d inputs failed, and is repeated in halves: %r", len(inputs), problem)
        half = len(inputs) // 2
        return self._forward(inputs[:half], run) + self._forward(inputs[half:], run)

    def _prepare(
        self, flat: FlatBatch, inputs: Sequence[ForwardInput]
    ) -> tuple[dict[str, torch.Tensor], AttentionMetadata]:
        """The tensors of the forward, and who attends to what."""
        metadata = flat.metadata(self.patterns, self.reach, self.dtype, self.device)
        self.cache.written = flat.sections
        self.forwards += 1
        self.tokens += flat.read
        tensors = flat.tensors(self.device)
        if self.switch:
            tensors["long"] = flat.long(inputs, self.switch).to(self.device)
        return tensors, metadata

    def release(self) -> None:
        """Give the memory of the cache back; nothing is read any more."""
        self.memory.forget(self.cache)
        del self._logits, self._hidden  # they reference this object, and through it the model

    def time(self, tokens: int) -> float:
        """Return the seconds of a forward of the body with so many tokens, after a short text."""
        aside = Transformer(self.model)
        trunk = aside.cache.open().branch()
        aside.hidden([ForwardInput(trunk, [0] * 32)])

        def step() -> None:
            [output] = aside.hidden([ForwardInput(trunk.branch(), [0] * tokens)])
            if isinstance(output, CardsError):
                raise output

        return least_seconds(step, self.model.device)

    def _run_model(self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> torch.Tensor:
        indices = tensors["output_indices"]
        logits: torch.Tensor = self._run(self.model, tensors, metadata, logits_to_keep=indices).logits[0]
        return logits

    def _run_body(self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> torch.Tensor:
        found = self._run(body(self.model), tensors, metadata)
        hidden: torch.Tensor = found.last_hidden_state[0, tensors["output_indices"]]
        return hidden

    def _run(self, model: Any, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata, **options: Any) -> Any:
        self.cache.begin(tensors["write_indices"])
        marker = torch.empty(1, 1, 1, 1, device=tensors["ids"].device)  # a 4D mask is passed on as it is
        token, long = METADATA.set(metadata), LONG.set(tensors.get("long"))
        try:
            with torch.inference_mode():
                return model(
                    input_ids=tensors["ids"][None],
                    position_ids=tensors["positions"][None] + self.first_position,
                    attention_mask=dict.fromkeys(self.patterns, marker) if len(set(self.patterns)) > 1 else marker,
                    past_key_values=self.cache,
                    use_cache=True,
                    **options,
                )
        finally:
            METADATA.reset(token)
            LONG.reset(long)

    def batches(self, inputs: Sequence[ForwardInput]) -> Iterator[list[ForwardInput]]:
        """Split inputs into forwards of at most `PREFILL_CHUNK` tokens (or of one input)."""
        batch: list[ForwardInput] = []
        for item in inputs:
            if batch and sum(len(each.ids) for each in batch) + len(item.ids) > PREFILL_CHUNK:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch


_LAYOUTS: WeakKeyDictionary[Any, Layout] = WeakKeyDictionary()


def _layout(model: Any) -> Layout:
    """That of a model, which its first forward shows."""
    return _LAYOUTS.setdefault(model, Layout())


def body(model: Any) -> Any:
    """Return the part of a model that gives hidden states."""
    return model.base_model if model.base_model is not model else model.model  # Llama 4 names another one


def use_tree_attention(model: Any) -> None:
    """Replace a model's attention.

    Raises:
        ModelError: It has one of its own.
    """
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, AttributeError) as error:
        raise cannot_run(model, str(error)) from error


def cannot_run(model: Any, found: str) -> ModelError:
    """The error for a model that trees of candidates cannot be read with."""
    return ModelError(f"model type {model.config.model_type!r} cannot read trees of candidates here: {found}")


def attention_patterns(config: Any) -> list[str]:
    """Return the attention pattern of each layer.

    Raises:
        ModelError: There is no mask for one of them.
    """
    layers: list[str] | None = getattr(config, "layer_types", None)
    pattern = FULL if getattr(config, "sliding_window", None) is None else SLIDING
    patterns = list(layers) if layers else [pattern] * config.num_hidden_layers
    if strange := sorted({*patterns} - {FULL, SLIDING, CHUNKED}):
        raise ModelError(f"model type {config.model_type!r} has layers of {', '.join(strange)}, not supported here.")
    return patterns


def first_position(model: Any) -> int:
    """Return the position of a text's first token: models like RoBERTa leave one out that stands for padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def _error_of(item: ForwardInput, problem: Exception) -> CardsError:
    """Why an input cannot be read, for the request that it belongs to."""
    if _out_of_memory(problem):
        return OutOfMemory(f"No memory for {len(item.ids)} more tokens: use a shorter prompt, or a smaller max_rows.")
    log.error("a forward failed for one input", exc_info=problem)
    return as_cards_error(problem, "The model failed")


def _out_of_memory(error: Exception) -> bool:
    """True if memory ran out; torch has a class for that on a GPU only."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
