"""Finding, placing and loading transformers models; weights that two models share are loaded once."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cards_integrations.chat.tools import FormatName
from cards_integrations.errors import CardsError, ModelError, unknown_name
from cards_integrations.models.local.embedded import MINILM, SMOLLM2, embedded_model

if TYPE_CHECKING:
    import torch

    from cards_integrations.transformer.kv_memory import KVMemory

T = TypeVar("T")


class LocalModel(BaseModel):
    """A transformers model: an embedded name ("smollm2"), a hub id or a local directory.

    Weights are read from safetensors files only. `adapter` is a peft adapter on top of it.
    `tool_format` is how it was taught to write a call of a tool, if its chat template does not show it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["local"] = "local"
    model: Annotated[str, Field(min_length=1)] = SMOLLM2
    revision: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False
    tool_format: FormatName | None = None

    def same_weights(self, other: LocalModel) -> bool:
        """Is it the same model, whichever way it writes calls?"""
        return self == other.model_copy(update={"tool_format": self.tool_format})


DType = Literal["auto", "float32", "bfloat16", "float16"]


class Placement(BaseModel):
    """Where and how weights are held.

    `dtype="auto"` is bf16 on a GPU, and on a CPU that computes bf16 fast if the checkpoint is in
    half precision; float32 otherwise. `threads` is for torch on a CPU, which has one number for the
    whole process: it is set when the engine loads (None leaves it as it is).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "auto"
    dtype: DType = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None


def as_local_model(value: Any) -> Any:
    """A model from a name, a path, JSON, or itself."""
    if isinstance(value, str) and value.startswith("{"):
        return LocalModel.model_validate_json(value)
    return LocalModel(model=str(value)) if isinstance(value, (str, Path)) else value


AnyLocalModel = Annotated[LocalModel, BeforeValidator(as_local_model)]


class ModelLoader:
    """Loads the models of one engine. A classifier on the language model's own weights shares them.

    `budget` makes the memory for the caches of all of them, once the language model is loaded.
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
        if placement.threads is not None:
            torch.set_num_threads(placement.threads)
        self.budget = budget
        self.language_model: tuple[LocalModel, Any, Any] | None = None
        self._cached: dict[Hashable, Any] = {}

    @cached_property
    def memory(self) -> KVMemory | None:
        """For the caches of all models; first asked for when the language model is there."""
        return self.budget and self.budget(self.device)

    def causal(self, spec: LocalModel) -> tuple[Any, Any]:
        """(model, tokenizer) for drafting, or for reading log p. The first is the language model."""
        return self.cached(("causal", spec), lambda: self._causal(spec))

    def _causal(self, spec: LocalModel) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM

        own, shared = self.language_model, self._on_language_model(spec)
        model = copy.deepcopy(own[1], _same(own[1])) if own and shared else self._load(spec, AutoModelForCausalLM)
        model = self._adapted(spec, model, shared)
        tokenizer = self.tokenizer(spec)
        self.language_model = own or (spec, model, tokenizer)
        return model, tokenizer

    def classifier(self, spec: LocalModel) -> tuple[Any, Any]:
        """(model, tokenizer) for scoring; `adapter` may bring the head that the checkpoint lacks."""
        return self.cached(("classifier", spec), lambda: self._classifier(spec))

    def _classifier(self, spec: LocalModel) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification

        shared = self._on_language_model(spec)
        if shared:
            model = self._on_shared_body(spec)
        else:
            model = self._load(spec, AutoModelForSequenceClassification, _labels(spec.adapter))
        return self._adapted(spec, model, shared), self.tokenizer(spec)

    def _on_language_model(self, spec: LocalModel) -> bool:
        """Is it an adapter on the language model's own weights?"""
        base = spec.model_copy(update={"adapter": None})
        if spec.adapter is None or self.language_model is None or not self.language_model[0].same_weights(base):
            return False
        from peft import PeftConfig

        with _explained(spec):
            config = PeftConfig.from_pretrained(spec.adapter)
        # others are loaded, or begin, by writing into the base model's own weights
        begins = getattr(config, "init_lora_weights", None) in (True, False, "gaussian")
        return config.peft_type == "LORA" and config.bias == "none" and begins

    def _adapted(self, spec: LocalModel, model: Any, shared: bool) -> Any:
        """With the adapter merged into the weights, or into copies of those that it changes."""
        if spec.adapter:
            from peft import PeftModel

            with _explained(spec), warnings.catch_warnings():
                # peft asks for what transformers calls otherwise by now
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                adapted = PeftModel.from_pretrained(model, _without_pickle(spec.adapter), autocast_adapter_dtype=False)
            if shared:
                _own_adapted_weights(adapted)
            model = adapted.merge_and_unload()
        return model.to(self.device).eval()

    def on_device(self, device: str | None, dtype: DType | None) -> ModelLoader:
        """A loader for another device or dtype, with the same budget for caches; itself if both are None."""
        if device is None and dtype is None:
            return self
        placement = Placement(device=device or str(self.device), dtype=dtype or self.placement.dtype)

        def build() -> ModelLoader:
            other = ModelLoader(placement)
            other.memory = self.memory
            return other

        return self.cached(("at", placement), build)

    def cached(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` makes, the same for all who ask with this key."""
        if key not in self._cached:
            self._cached[key] = build()
        made: T = self._cached[key]
        return made

    def release(self) -> None:
        """Give back the memory of weights and caches, which cycles would keep until some garbage collection."""
        import torch

        for cache in self.memory.caches if self.memory is not None else ():
            cache.layers.clear()
        for made in self._cached.values():
            if isinstance(made, ModelLoader):
                made.release()
            for part in made if isinstance(made, tuple) else (made,):
                if isinstance(part, torch.nn.Module):
                    for tensor in chain(part.parameters(), part.buffers()):
                        tensor.data = tensor.data.new_empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tokenizer(self, spec: LocalModel) -> Any:
        from transformers import AutoTokenizer

        with _explained(spec):
            tokenizer = AutoTokenizer.from_pretrained(
                resolve_model(spec.model), revision=spec.revision, trust_remote_code=spec.trust_remote_code
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer

    def padding(self, spec: LocalModel) -> int | None:
        """The token that the model's config calls padding."""
        return getattr(_config(spec), "pad_token_id", None)

    def _load(self, spec: LocalModel, family: Any, options: dict[str, Any] | None = None) -> Any:
        from transformers import AutoConfig

        where = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
        with _explained(spec):
            found = resolve_model(spec.model)
            config = AutoConfig.from_pretrained(found, **where)
            with quiet_transformers():  # what is missing is looked at below
                model, report = family.from_pretrained(
                    found,
                    **where,
                    **(options or {}),
                    dtype=self._dtype(config),
                    use_safetensors=True,
                    output_loading_info=True,
                )
        if report["missing_keys"] and not spec.adapter:  # transformers would go on with random numbers
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise ModelError(f"model={spec.model!r} has no weights for {missing} of {type(model).__name__}.")
        return model.to(self.device).eval()

    def _dtype(self, config: Any) -> Any:
        import torch

        if self.placement.dtype != "auto":
            return getattr(torch, self.placement.dtype)
        if self.device.type != "cpu":
            return torch.bfloat16
        half = getattr(config, "dtype", None) in (torch.bfloat16, torch.float16)
        return torch.bfloat16 if half and fast_bfloat16() else torch.float32

    def _on_shared_body(self, spec: LocalModel) -> Any:
        """A classifier around the language model's body: new modules, the same tensors."""
        import torch
        from transformers import AutoModelForSequenceClassification

        assert self.language_model is not None
        causal = self.language_model[1]
        config = copy.deepcopy(causal.config)
        config.num_labels = _labels(spec.adapter)["num_labels"]
        with LoadLock(), torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=causal.dtype)
        body = causal.base_model
        setattr(model, model.base_model_prefix, copy.deepcopy(body, _same(body)))
        head = model.score
        model.score = torch.nn.Linear(head.in_features, head.out_features, bias=False, dtype=causal.dtype)
        return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its report of missing weights, which an adapter brings."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def is_directory(name: str) -> bool:
    """Is there one? Not of a name that no file system takes."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def resolve_model(name: str) -> str:
    """The directory or hub id that transformers can load."""
    embedded = embedded_model(name)
    if embedded is not None:
        return str(embedded)
    if is_directory(name) or "/" in name:
        return name
    raise unknown_name("model", name, [SMOLLM2, MINILM], " Or pass a hub id (owner/name) or a local directory.")


@lru_cache
def _config(spec: LocalModel) -> Any:
    from transformers import AutoConfig

    with _explained(spec):
        return AutoConfig.from_pretrained(
            resolve_model(spec.model), revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )


def local_context_window(spec: LocalModel) -> int:
    """Tokens of prompt and answer together, from the model's config alone; no weights are loaded."""
    return max_positions(_config(spec))


def max_positions(config: Any) -> int:
    """Positions that a model's config allows; practically unlimited where it names no number."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def fast_bfloat16() -> bool:
    """Does this CPU multiply bf16 in hardware?"""
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def _without_pickle(adapter: str) -> str:
    """peft would read `adapter_model.bin` where there is nothing else."""
    if is_directory(adapter):
        if not (Path(adapter) / "adapter_model.safetensors").is_file():
            raise ModelError(
                f"adapter={adapter!r} has no adapter_model.safetensors; weights are not read from pickles."
            )
        return adapter
    from huggingface_hub import hf_hub_download

    hf_hub_download(adapter, "adapter_model.safetensors")
    return adapter


def _labels(adapter: str | None) -> dict[str, Any]:
    """An adapter that brings a classification head decides the number of labels."""
    if adapter is None:
        return {}
    from safetensors import safe_open

    file = Path(adapter) / "adapter_model.safetensors"
    if not file.is_file():
        return {"num_labels": 1}
    with safe_open(file, "pt") as tensors:
        heads = [k for k in tensors.keys() if k.endswith(("score.weight", "classifier.weight"))]  # noqa: SIM118
        return {"num_labels": tensors.get_slice(heads[0]).get_shape()[0]} if heads else {"num_labels": 1}


def _same(model: Any) -> dict[int, Any]:
    """For `deepcopy`: new modules, the same tensors."""
    return {id(t): t for t in [*model.parameters(), *model.buffers()]}


def _own_adapted_weights(adapted: Any) -> None:
    """Copy the weights that an adapter will be merged into; the others stay shared."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            for name, weight in base.named_parameters(recurse=False):
                setattr(base, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))


class LoadLock:
    """One load at a time: transformers replaces methods of its classes meanwhile, and two would leave them so."""

    lock = RLock()

    def __enter__(self) -> None:
        self.held = LoadLock.lock
        self.held.acquire()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.held.release()

    @classmethod
    def after_fork(cls) -> None:
        """Whoever had the turn is not in the child."""
        cls.lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LoadLock.after_fork)


class _explained(LoadLock):
    """A turn that makes what transformers raises into a `ModelError` that names the model."""

    def __init__(self, spec: LocalModel) -> None:
        self.spec = spec

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, CardsError):
            raise ModelError(f"model={self.spec.model!r} cannot be loaded: {error}") from error
