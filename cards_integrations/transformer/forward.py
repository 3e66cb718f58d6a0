"""The forward of a transformers model over trees of candidates, which drafting and scoring share."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from cards_integrations.errors import CardsError, ModelError, OutOfMemory, as_cards_error
from cards_integrations.transformer.attention import CHUNKED, FULL, METADATA, NAME, SLIDING, AttentionMetadata
from cards_integrations.transformer.cache_layers import RECURRENT, TreeLayer, cache_argument, cache_layers
from cards_integrations.transformer.cuda_graphs import Computed, StaticSteps
from cards_integrations.transformer.flat_batch import FlatBatch, ForwardInput, Reach
from cards_integrations.transformer.kv_block import Layout
from cards_integrations.transformer.kv_cache import TreeCache
from cards_integrations.transformer.kv_memory import KVMemory
from cards_integrations.transformer.quantization import attention_dtype
from cards_integrations.transformer.recurrent import StateLayout
from cards_integrations.transformer.rope import LONG, use_tokenwise_rotary
from cards_integrations.transformer.step_times import least_seconds

SHARED = {"cpu": 256, "cuda": 2048}  # least tokens of a prefix that rows share; steps with one do not run as a graph
PATTERNS = {**dict.fromkeys(["moe", "mlp", *RECURRENT], FULL), "hybrid_sliding": SLIDING}  # by other names of layers
log = logging.getLogger("cards_integrations")
BEGUN_ANEW = {torch.float32: 5e-3}  # share of the norm: a larger difference is no rounding; 3e-2 in half precision
PREFILL_CHUNK = 2048  # the most tokens of one forward, unless they cannot be split
PIECE = 16  # tokens of each text in a measurement of times


class Output(NamedTuple):
    """The outputs of a forward for one input.

    Attributes:
        batch: The outputs of the whole forward, (n, ...).
        last: The row of the input's last output.
        outputs: How many rows, up to `last`, are the input's.
        states: The hidden states from which logits were computed, (n, hidden size), if they were asked for.
    """

    batch: torch.Tensor
    last: int
    outputs: int = 1
    states: torch.Tensor | None = None

    @property
    def value(self) -> torch.Tensor:
        """The last output, (...)."""
        return self.batch[self.last]

    @property
    def values(self) -> torch.Tensor:
        """All of its outputs, (outputs, ...)."""
        return self.batch[self.last + 1 - self.outputs : self.last + 1]

    @property
    def state(self) -> torch.Tensor:
        """The hidden state of the last output, (hidden size,)."""
        assert self.states is not None
        return self.states[self.last]

    def alone(self) -> Output:
        """Return a copy of the last output, without the batch."""
        return Output(self.value[None].clone(), 0, states=None if self.states is None else self.state[None].clone())


class Transformer:
    """A decoder with a `TreeCache`. The tokens of all inputs make one flat sequence (1, tokens).

    With recurrent layers each path is instead a row of a batch (paths, tokens), and goes on from a state; the attention
    layers of such a model still keep the trees.

    Whether this is exact for a model is only known after `check_exact`.

    Args:
        model: A transformers model; its attention is replaced.
        memory: The budget that its cache belongs to; unlimited by default.
        trial: Whether errors are expected, and so not logged.

    Attributes:
        cache: Its KV cache.
        switch: The number of tokens above which a text has the rotary frequencies of long texts; 0 if it never has.
        forwards: Forwards so far.
        tokens: Tokens that these have read.

    Raises:
        ModelError: The model cannot be run in this way.
    """

    def __init__(self, model: Any, memory: KVMemory | None = None, trial: bool = False) -> None:
        self.model = model
        self.trial = trial
        self.config = model.config.get_text_config()
        self.patterns = attention_patterns(self.config)
        self.reach = _reach(self.config)
        self.first_position = first_position(model)
        self.memory = memory or KVMemory(2**62, reuse=False)
        size = (8, 256) if model.device.type == "cuda" else (1, 64)  # graphs are lost when their block grows
        layers = cache_layers(self.config)
        alike = {*self.patterns} == {FULL} and all(type(layer) is TreeLayer for layer in layers)
        shares = SHARED.get(model.device.type, max(SHARED.values())) if alike else None
        self.dtype = attention_dtype(model)
        self.device: torch.device = model.device  # the property searches the weights: too slow for every step
        self.cache = TreeCache(layers, *_layouts(model), size, shares, self.dtype)
        self.memory.caches.append(self.cache)
        self._logits = StaticSteps(self._run_model, model.device)
        self._hidden = StaticSteps(self._run_body, model.device)
        self._logits_and_states = StaticSteps(self._run_model_for_states, model.device)
        use_tree_attention(model)
        self.switch = use_tokenwise_rotary(model)
        self._inputs = {cache_argument(body(model).forward): self.cache, "attention_mask": self._mask()}
        self.forwards = self.tokens = 0
        if not len(self.cache.layout) and not self.cache.bytes_per_state:
            self._learn_layout()

    def _learn_layout(self) -> None:
        """Read a few tokens to see what is kept of them, and whether recurrent layers can go on by several at once."""
        together = self._read_aside([0, 1], [2, 3])
        if self.cache.pool is not None:
            one_by_one, most = self._read_aside([0, 1], [2], [3]), BEGUN_ANEW.get(self.dtype, 3e-2)
            self.cache.pool.layout.stepwise = bool((together - one_by_one).norm() > most * one_by_one.norm())
        self.forwards = self.tokens = 0

    def _read_aside(self, *pieces: Sequence[int]) -> torch.Tensor:
        """Read a text in pieces, and return the last hidden state."""
        tree = self.cache.open()
        branch = tree.branch()
        outputs = [self.hidden([ForwardInput(branch, piece)])[0] for piece in pieces]
        self.cache.close(tree)
        for output in outputs:
            if isinstance(output, CardsError):
                raise cannot_run(self.model, output.__cause__ or output) from output.__cause__
        assert isinstance(outputs[-1], Output)
        return outputs[-1].value.float()

    def _mask(self) -> Any:
        """Return the mask of every forward. It masks nothing: what is masked comes with the attention metadata."""
        attends = any(isinstance(layer, TreeLayer) for layer in self.cache.layers)
        if not attends and getattr(self.config, "num_attention_heads", None) is None:
            return None  # no layer attends, and any mask would be taken for one of padding
        marker = torch.empty(1, 1, 1, 1, device=self.device)  # transformers passes a 4D mask on as it is
        if len({*self.patterns}) == 1:
            return marker
        return dict.fromkeys(self.patterns, marker) | (dict.fromkeys(RECURRENT) if self.recurrent else {})

    @property
    def recurrent(self) -> bool:
        """True if some layers are recurrent, so that each path is a row of a batch."""
        return self.cache.pool is not None

    @property
    def stepwise(self) -> bool:
        """True if recurrent layers can only go on by single tokens; given several they would begin anew."""
        return self.cache.pool is not None and self.cache.pool.layout.stepwise

    def is_long(self, tokens: int) -> bool:
        """True if a text of this many tokens is read with the rotary frequencies of long texts."""
        return 0 < self.switch < tokens

    def logits(self, inputs: Sequence[ForwardInput]) -> list[Output | CardsError]:
        """Run a causal model.

        Args:
            inputs: What to read; the tokens are appended to the branches.

        Returns:
            For each input the logits (vocabulary,) after its last tokens, or the error why it cannot be read.
        """
        return self._forward(inputs, self._logits)

    def logits_and_states(self, inputs: Sequence[ForwardInput]) -> list[Output | CardsError]:
        """Like `logits`, with the hidden states from which the logits are computed, as `hidden` returns them."""
        return self._forward(inputs, self._logits_and_states)

    def hidden(self, inputs: Sequence[ForwardInput]) -> list[Output | CardsError]:
        """Like `logits`, but run the body only, for the hidden states (hidden size,) of the last tokens."""
        return self._forward(inputs, self._hidden)

    def _forward(self, inputs: Sequence[ForwardInput], run: StaticSteps) -> list[Output | CardsError]:
        """Run one forward; with recurrent layers, one for each number of tokens, new texts apart from others."""
        if self.cache.pool is None:
            return self._forward_together(inputs, run)
        alike: dict[tuple[int, bool], list[int]] = {}
        for i, item in enumerate(inputs):
            alike.setdefault((len(item.ids), item.branch.length > 0), []).append(i)
        found: dict[int, Output | CardsError] = {}
        for (tokens, goes_on), indices in alike.items():
            read = self._forward_by_token if self.stepwise and goes_on and tokens > 1 else self._forward_together
            found |= zip(indices, read([inputs[i] for i in indices], run), strict=True)
        return [found[i] for i in range(len(inputs))]

    def _forward_by_token(self, inputs: Sequence[ForwardInput], run: StaticSteps) -> list[Output | CardsError]:
        """Run a forward for each token of inputs that have equally many tokens."""
        read: list[deque[Output | CardsError]] = [deque(maxlen=item.outputs) for item in inputs]
        for at in range(len(inputs[0].ids)):
            going = [i for i, outputs in enumerate(read) if not any(isinstance(each, CardsError) for each in outputs)]
            step = [ForwardInput(inputs[i].branch, inputs[i].ids[at : at + 1], inputs[i].owner) for i in going]
            for i, output in zip(going, self._forward_together(step, run) if step else [], strict=True):
                read[i].append(output)
        return [_joined(outputs) for outputs in read]

    def _forward_together(self, inputs: Sequence[ForwardInput], run: StaticSteps) -> list[Output | CardsError]:
        """Run one forward. If it fails, run two of half of the inputs each, down to the input that is the cause."""
        before = [len(item.branch.columns) for item in inputs]
        try:
            flat = FlatBatch(inputs, self.cache, run.rounding and not self.recurrent)
            self.memory.evict_for(0)  # the cache may have grown
            batch, states = run(*self._prepare(flat, inputs))
            n = len(flat.output_indices)
            batch, states = batch[:n], None if states is None else states[:n]
            if self.cache.pool is not None:
                self.cache.advance([item.branch for item in flat.inputs])
            ends = accumulate([item.outputs for item in inputs])
            return [Output(batch, end - 1, item.outputs, states) for item, end in zip(inputs, ends, strict=True)]
        except Exception as error:
            problem = error
        for item, columns in zip(inputs, before, strict=True):
            item.branch.retract(len(item.branch.columns) - columns)
        if _out_of_memory(problem) and self.memory.evict_all():
            return self._forward_together(inputs, run)
        if len(inputs) == 1:
            return [_error_of(inputs[0], problem, self.trial)]
        if not self.trial:
            log.warning("a forward of %d inputs failed, and is repeated in halves: %r", len(inputs), problem)
        half = len(inputs) // 2
        return self._forward_together(inputs[:half], run) + self._forward_together(inputs[half:], run)

    def _prepare(
        self, flat: FlatBatch, inputs: Sequence[ForwardInput]
    ) -> tuple[dict[str, torch.Tensor], AttentionMetadata]:
        """Return the tensors of the forward, and what attends to what."""
        metadata = flat.metadata(self.patterns, self.reach, self.dtype, self.device)
        self.cache.written = flat.sections
        if self.cache.pool is not None:
            inputs = flat.inputs
            metadata.rows = len(inputs)
            self.cache.go_on([(item.branch, len(item.ids)) for item in inputs])
        self.forwards += 1
        self.tokens += flat.read
        tensors = flat.tensors(self.device)
        if self.switch:
            tensors["long"] = flat.long(inputs, self.switch).to(self.device)
        return tensors, metadata

    def release(self) -> None:
        """Give the memory of the cache back; nothing can be read after this."""
        self.memory.forget(self.cache)
        del self._logits, self._hidden, self._logits_and_states  # they reference this object, and through it the model

    def time(self, tokens: int) -> float:
        """Return the seconds of a forward of the body with `tokens` tokens, as short branches of a short text."""
        aside = Transformer(self.model, trial=True)  # the engine may be closed meanwhile
        trunk = aside.cache.open().branch()
        aside.hidden([ForwardInput(trunk, [0] * 32)])

        def step() -> None:
            pieces = [min(PIECE, tokens - begun) for begun in range(0, tokens, PIECE)]
            checked(aside.hidden([ForwardInput(trunk.branch(), [0] * length) for length in pieces]))

        return least_seconds(step, self.model.device)

    def _run_model(self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> Computed:
        indices: Any = tensors["output_indices"]
        if metadata.rows > 1:  # as many last tokens of each row as include all with outputs
            tokens = len(tensors["ids"]) // metadata.rows
            indices = tokens - int((indices % tokens).min())
        logits: torch.Tensor = self._run(self.model, tensors, metadata, logits_to_keep=indices).logits
        return Computed(_with_outputs(logits, tensors, metadata))

    def _run_model_for_states(self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> Computed:
        with _inputs_of(self.model.get_output_embeddings()) as seen:
            logits = self._run_model(tensors, metadata).outputs
        [states] = seen
        return Computed(logits, _with_outputs(states, tensors, metadata))

    def _run_body(self, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> Computed:
        found = self._run(body(self.model), tensors, metadata)
        return Computed(found.last_hidden_state.flatten(0, 1)[tensors["output_indices"]])

    def _run(self, model: Any, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata, **options: Any) -> Any:
        self.cache.begin(tensors["write_indices"], tensors["positions"])
        token, long = METADATA.set(metadata), LONG.set(tensors.get("long"))
        try:
            with torch.inference_mode():
                return model(
                    input_ids=tensors["ids"].view(metadata.rows, -1),
                    position_ids=tensors["positions"].view(metadata.rows, -1) + self.first_position,
                    use_cache=True,
                    **self._inputs,
                    **options,
                )
        finally:
            METADATA.reset(token)
            LONG.reset(long)

    def batches(self, inputs: Sequence[ForwardInput]) -> Iterator[list[ForwardInput]]:
        """Split inputs into batches of at most `PREFILL_CHUNK` tokens, or of a single input."""
        batch: list[ForwardInput] = []
        for item in inputs:
            if batch and sum(len(each.ids) for each in batch) + len(item.ids) > PREFILL_CHUNK:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch


_LAYOUTS: WeakKeyDictionary[Any, tuple[Layout, StateLayout]] = WeakKeyDictionary()


def _layouts(model: Any) -> tuple[Layout, StateLayout]:
    """Return what a model keeps of a token and of a text, as its first forward shows it."""
    return _LAYOUTS.setdefault(model, (Layout(), StateLayout()))


def without_latents(model: Any) -> bool:
    """Keep all keys and values of a model from now on, not latents; False if that is so already."""
    layout, _ = _layouts(model)
    if not layout.latents:
        return False
    layout.forget()
    return True


def body(model: Any) -> Any:
    """Return the part of a model that returns hidden states."""
    return model.base_model if model.base_model is not model else model.model  # Llama 4 declares a wrong prefix


def scoring_head(model: Any) -> Any:
    """Return the layer of a classifier that makes scores of hidden states; None if it has none."""
    return getattr(model, "score", None) or getattr(model, "classifier", None)  # as GPT-2 and GPT-NeoX call it


def _with_outputs(values: torch.Tensor, tensors: dict[str, torch.Tensor], metadata: AttentionMetadata) -> torch.Tensor:
    """Select from the values of the last tokens, (rows, tokens, ...), those that are outputs, (outputs, ...)."""
    if metadata.rows == 1:
        return values[0]  # all are
    tokens = len(tensors["ids"]) // metadata.rows
    return values[tensors["output_indices"] // tokens, tensors["output_indices"] % tokens - tokens]


@contextmanager
def _inputs_of(module: Any) -> Iterator[list[torch.Tensor]]:
    """Yield a list to which each call of a module in this thread adds its input."""
    seen: list[torch.Tensor] = []
    thread = threading.get_ident()

    def note(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            seen.append(inputs[0])

    handle = module.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def use_tree_attention(model: Any) -> None:
    """Replace the attention of a model by that over trees.

    Raises:
        ModelError: The model does not let it be replaced.
    """
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, AttributeError) as error:
        raise cannot_run(model, str(error)) from error


def cannot_run(model: Any, found: str | BaseException) -> ModelError:
    """Return the error for a model that cannot read trees of candidates."""
    if isinstance(found, BaseException):
        found = f"its forward raises {type(found).__name__} ({found})."
    return ModelError(f"model type {model.config.model_type!r} cannot read trees of candidates here: {found}")


def attention_patterns(config: Any) -> list[str]:
    """Return the attention pattern of each layer.

    Raises:
        ModelError: There is no mask for one of them, or tokens attend to later ones.
    """
    if getattr(config, "use_bidirectional_attention", None) is True:  # "vision": tokens of images only
        raise ModelError(f"model type {config.model_type!r} lets tokens attend to later ones, not supported here.")
    layers: list[str] | None = getattr(config, "layer_types", None)
    pattern = FULL if getattr(config, "sliding_window", None) is None else SLIDING
    patterns = [PATTERNS.get(layer, layer) for layer in layers or [pattern] * config.num_hidden_layers]
    if strange := sorted({*patterns} - {FULL, SLIDING, CHUNKED}):
        raise ModelError(f"model type {config.model_type!r} has layers of {', '.join(strange)}, not supported here.")
    return patterns


def _reach(config: Any) -> Reach:
    """Return how far back layers see that do not see everything."""
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return Reach(window or 0, chunk or 0)


def first_position(model: Any) -> int:
    """Return the position of a text's first token: models like RoBERTa reserve the first ones for padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def checked(outputs: Iterable[Output | CardsError]) -> list[Output]:
    """Return the outputs of a forward, or raise the first error among them."""
    found = []
    for output in outputs:
        if isinstance(output, CardsError):
            raise output
        found.append(output)
    return found


def _joined(outputs: Iterable[Output | CardsError]) -> Output | CardsError:
    """Join the outputs of one input that was read in several forwards."""
    values, states = [], []
    for output in outputs:
        if isinstance(output, CardsError):
            return output
        values.append(output.value)
        states.append(None if output.states is None else output.state)
    known = [state for state in states if state is not None]
    return Output(torch.stack(values), len(values) - 1, len(values), torch.stack(known) if known else None)


def _error_of(item: ForwardInput, problem: Exception, expected: bool) -> CardsError:
    """Return the error with which the request of an input fails."""
    if _out_of_memory(problem):
        return OutOfMemory(f"No memory for {len(item.ids)} more tokens: use a shorter prompt, or a smaller max_rows.")
    if not expected:
        log.error("a forward failed for one input", exc_info=problem)
    return as_cards_error(problem, "The model failed")


def _out_of_memory(error: Exception) -> bool:
    """True if memory ran out; torch has an error class for that on a GPU only."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
