"""Loads transformers models and places them; weights that two models share are loaded once."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from cards_integrations.errors import ModelError
from cards_integrations.models.local.adapters import (
    add_adapter,
    brought_by,
    can_share_weights,
    label_options,
    merge_adapter,
)
from cards_integrations.models.local.checks import (
    check_biases,
    check_complete,
    check_encoding,
    check_finite,
    check_vocabulary,
    embedding_rows,
)
from cards_integrations.models.local.embedded import SMOLLM2, embedded_groups
from cards_integrations.models.local.load_lock import load_errors, load_lock
from cards_integrations.models.local.multimodal import drop_other_parts, text_family
from cards_integrations.models.local.resolve import load_config, read_config, resolve_adapter, resolve_model
from cards_integrations.models.local.reward_heads import check_kind, put_own_head
from cards_integrations.models.local.settings import Bits, DType, LocalModel, Placement
from cards_integrations.models.local.tensor_files import read_piece_by_piece
from cards_integrations.transformer.thread_tuner import ThreadTuner

if TYPE_CHECKING:
    import torch

    from cards_integrations.transformer.kv_memory import KVMemory

T = TypeVar("T")
NO_TOKEN = -1
TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # a remark of transformers


class ModelLoader:
    """Loads the models of one engine, each once. Models that are adapters on the language model share its weights.

    The language model stays; others stay as long as something, such as a reward model, references them.

    Args:
        placement: Where and how weights are held.
        budget: Creates the memory for the caches of all models, once the language model is loaded.

    Raises:
        ModelError: The device cannot be used.
    """

    def __init__(self, placement: Placement, budget: Callable[[torch.device], KVMemory] | None = None) -> None:
        import torch

        self.placement = placement
        device = placement.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"device={placement.device!r} cannot be used here: {error}") from error
        if isinstance(placement.threads, int):
            torch.set_num_threads(placement.threads)
        self.budget = budget
        self.language_model: tuple[LocalModel, Any, Any] | None = None
        self._cached: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
        self._tokenizers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by their model

    def thread_tuner(self) -> ThreadTuner | None:
        """Return a tuner of the number of threads of each step; None if the number should not change."""
        import torch

        if self.placement.threads != "auto" or self.device.type != "cpu" or torch.get_num_threads() == 1:
            return None
        return ThreadTuner(torch.get_num_threads(), torch.set_num_threads)

    @cached_property
    def memory(self) -> KVMemory | None:
        """The memory for the caches of all models; must not be read before the language model is loaded."""
        return self.budget and self.budget(self.device)

    def causal(self, spec: LocalModel) -> tuple[Any, Any]:
        """Return (model, tokenizer) for drafting or for reading log p; the first one loaded is the language model.

        Raises:
            ModelError: It cannot be loaded, or lacks weights.
        """
        return self._with_tokenizer(self.cached(("causal", spec), lambda: self._causal(spec)))

    def _causal(self, spec: LocalModel) -> Any:
        own, shared = self.language_model, self._on_language_model(spec)
        model = _copy_modules(own[1]) if own and shared else self._load(spec)
        model = self._adapted(spec, model, shared)
        self._tokenizers[model] = self._fitting_tokenizer(spec, model)
        self.language_model = own or (spec, model, self._tokenizers[model])
        return model

    def classifier(self, spec: LocalModel, of_steps: bool = False) -> tuple[Any, Any]:
        """Return (model, tokenizer) for scoring; `adapter` may bring the head that the checkpoint lacks.

        Args:
            spec: The model.
            of_steps: Whether it scores tokens, at which the steps of an answer end, instead of whole answers.

        Raises:
            ModelError: It cannot be loaded, is of the other kind, or lacks weights.
        """
        return self._with_tokenizer(
            self.cached(("classifier", spec, of_steps), lambda: self._classifier(spec, of_steps))
        )

    def _classifier(self, spec: LocalModel, of_steps: bool) -> Any:
        from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

        shared = self._on_language_model(spec) and not of_steps
        if shared:
            model = self._on_shared_body(spec)
        else:
            check_kind(spec, read_config(spec), of_steps)
            family = AutoModelForTokenClassification if of_steps else AutoModelForSequenceClassification
            model = self._load(spec, family, label_options(spec.adapter))
        model = self._adapted(spec, model, shared)
        self._tokenizers[model] = self._fitting_tokenizer(spec, model)
        config = model.config.get_text_config()
        if config.pad_token_id is None:  # by which a decoder finds the last token of a text: here it is any
            config.pad_token_id = NO_TOKEN
        return model

    def _with_tokenizer(self, model: Any) -> tuple[Any, Any]:
        return model, self._tokenizers[model]

    def _on_language_model(self, spec: LocalModel) -> bool:
        """True if it is an adapter on the language model that can share its weights."""
        base = spec.model_copy(update={"adapter": None})
        if spec.adapter is None or self.language_model is None or not self.language_model[0].same_weights(base):
            return False
        return can_share_weights(spec)

    def _adapted(self, spec: LocalModel, model: Any, shared: bool) -> Any:
        """Return the model on the device, with its adapter if it has one."""
        from cards_integrations.transformer.quantization import is_quantized

        if spec.adapter:
            model = add_adapter(spec, model) if is_quantized(model) else merge_adapter(spec, model, shared)
        check_finite(f"model={spec.model!r}", model.state_dict())
        return self._placed(model)

    def _fitting_tokenizer(self, spec: LocalModel, model: Any) -> Any:
        """Return a new tokenizer of the model, checked to have only ids that the model knows."""
        tokenizer = self.tokenizer(spec)
        check_vocabulary(f"model={spec.model!r}", tokenizer, embedding_rows(model))
        check_encoding(f"model={spec.model!r}", tokenizer, embedding_rows(model))
        return tokenizer

    def on_device(self, device: str | None, dtype: DType | None) -> ModelLoader:
        """Return a loader for another device or dtype, with the same memory for caches; itself if both are None."""
        if device is None and dtype is None:
            return self
        spread = None if device else self.placement.device_map
        where = device or str(self.device)
        other = ModelLoader(Placement(device=where, dtype=dtype or self.placement.dtype, device_map=spread))
        other.memory, other._cached, other._tokenizers = self.memory, self._cached, self._tokenizers
        return other

    def cached(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return what `build` makes for this key on this device: built once, and kept as long as it is referenced."""
        here = (key, self.device, self.placement.dtype)
        with load_lock():
            made: T | None = self._cached.get(here)
            if made is None:
                made = self._cached[here] = build()
            return made

    def release(self) -> None:
        """Free the memory of weights and caches, which reference cycles would hold until a garbage collection."""
        import torch

        from cards_integrations.transformer.quantization import Float16Linear

        for cache in self.memory.caches if self.memory is not None else ():
            cache.release()
        for made in list(self._cached.values()):
            if isinstance(made, torch.nn.Module):
                for tensor in chain(made.parameters(), made.buffers()):
                    tensor.data = tensor.data.new_empty(0)
                for module in made.modules():
                    if isinstance(module, Float16Linear):
                        module.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tokenizer(self, spec: LocalModel) -> Any:
        """Return a new tokenizer of the model, with a padding token.

        Raises:
            ModelError: It cannot be loaded.
        """
        from transformers import AutoTokenizer

        with load_errors(spec.model):
            tokenizer = AutoTokenizer.from_pretrained(
                resolve_model(spec.model), revision=spec.revision, trust_remote_code=spec.trust_remote_code
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.deprecation_warnings[TOO_LONG] = True  # no warning: a text that is too long is refused
        return tokenizer

    def padding(self, spec: LocalModel) -> int | None:
        """Return the id of the padding token in the model's config, if it names one."""
        return getattr(read_config(spec).get_text_config(), "pad_token_id", None)

    def _load(self, spec: LocalModel, family: Any = None, options: dict[str, Any] | None = None) -> Any:
        """Load a model onto the device, by the given auto class or by that of its language model."""
        if spec.adapter is not None:
            resolve_adapter(spec.adapter)  # before anything is read
        from cards_integrations.models.local.quantize import check_quantization, quantize

        bits = self._bits(spec)
        on_cpu = self.device.type == "cpu"
        with load_errors(spec.model):
            config = load_config(spec)
            check_quantization(spec, config)
            dtype = "auto" if bits and on_cpu else self._dtype(config)
            as_they_lie = on_cpu and not bits and dtype == getattr(config, "dtype", None)
            with nullcontext() if as_they_lie else read_piece_by_piece():
                model, report = (family or text_family(config)).from_pretrained(
                    resolve_model(spec.model),
                    revision=spec.revision,
                    trust_remote_code=spec.trust_remote_code,
                    **(options or {}),
                    **self._where(bits),
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        brought = brought_by(spec)
        if family is not None:
            brought |= put_own_head(spec, model, report["unexpected_keys"])
        # transformers would leave them random
        check_complete(f"model={spec.model!r}", report["missing_keys"], brought, type(model).__name__)
        check_biases(f"model={spec.model!r}", report["unexpected_keys"] - brought, model)  # and pass over these
        drop_other_parts(model.eval())
        if bits and on_cpu:
            quantize(model, bits, embedded_groups(spec.model) if bits == "int4" else {})
        return self._placed(model)

    def _where(self, bits: Bits | None) -> dict[str, Any]:
        """Return options of `from_pretrained` that place weights while they are read, and quantize them on a GPU."""
        from cards_integrations.models.local.quantize import gpu_options

        on_cpu, spread = self.device.type == "cpu", self.placement.device_map
        options = gpu_options(bits, self.device) if bits and not on_cpu else {}
        if importlib.util.find_spec("accelerate") is None:
            if spread is not None:
                raise ModelError(f"device_map={spread!r} needs a library: run `pip install accelerate`.")
            return options
        if spread is not None:
            return {**options, "device_map": spread}
        return options if on_cpu else {**options, "device_map": {"": self.device}}

    def _placed(self, model: Any) -> Any:
        """Return the model on the device, or where it was placed while it was loaded."""
        there = getattr(model, "hf_quantizer", None) is not None or getattr(model, "hf_device_map", None) is not None
        return (model if there else model.to(self.device)).eval()

    def _bits(self, spec: LocalModel) -> Bits | None:
        """Return the form in which weights are quantized at load; None if they are not.

        Raises:
            ModelError: `dtype` contradicts it.
        """
        from cards_integrations.transformer.quantization import fast_form

        dtype = self.placement.dtype
        if spec.quantization and dtype in ("float16", "bfloat16"):
            raise ModelError(
                f"quantization={spec.quantization!r} holds what is not quantized in float32 on a CPU and in bf16 on a "
                f"GPU: leave dtype={dtype!r} out."
            )
        own = spec.model == SMOLLM2 and dtype == "auto" and self.device.type == "cpu"
        merged = spec.adapter is not None and not can_share_weights(spec)  # into weights that are not quantized
        return spec.quantization or (fast_form() if own and not merged else None)

    def _dtype(self, config: Any) -> Any:
        import torch

        if self.placement.dtype != "auto":
            return getattr(torch, self.placement.dtype)
        if self.device.type != "cpu":
            return torch.bfloat16
        half = getattr(config, "dtype", None) in (torch.bfloat16, torch.float16)
        return torch.bfloat16 if half and fast_bfloat16() else torch.float32

    def _on_shared_body(self, spec: LocalModel) -> Any:
        """Return a classifier around the language model's body: new modules, the same tensors."""
        import torch
        from transformers import AutoModelForSequenceClassification

        assert self.language_model is not None
        causal = self.language_model[1]
        check_complete(f"adapter={spec.adapter!r}", {"score.weight"}, brought_by(spec), "a classifier")
        config = copy.deepcopy(causal.config)
        config.num_labels = label_options(spec.adapter)["num_labels"]
        with load_lock(), torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=causal.dtype)
        body = causal.base_model
        setattr(model, model.base_model_prefix, _copy_modules(body))
        head = model.score
        model.score = torch.nn.Linear(head.in_features, head.out_features, bias=False, dtype=causal.dtype)
        return model


def fast_bfloat16() -> bool:
    """Return True if this CPU multiplies bf16 in hardware."""
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def _copy_modules(model: Any) -> Any:
    """Return new modules with the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
