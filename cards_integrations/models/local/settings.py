"""The settings of a model on this machine: which one, and where and how its weights are held."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from cards_integrations.chat.tools import FormatName
from cards_integrations.models.local.embedded import SMOLLM2
from cards_integrations.settings_model import SettingsModel

DType = Literal["auto", "float32", "bfloat16", "float16"]
Bits = Literal["int4", "int8", "float16"]


class Placement(SettingsModel):
    """Where and how weights are held."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device: str = "auto"
    """A torch device such as "cuda:1"; "auto" is the first GPU, or the CPU if there is none."""

    dtype: DType = "auto"
    """Precision of the weights. "auto" is bf16 on a GPU, and on a CPU that computes bf16 in hardware if the checkpoint
    is in half precision; float32 otherwise."""

    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """How accelerate spreads the layers of the language model and of reward models over several GPUs: "auto" fills all
    of them evenly, "sequential" one after the other. None puts each model on `device` as a whole."""

    threads: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """CPU threads of torch. "auto" gives a step fewer than torch would use while other processes keep cores busy, and
    leaves the number of the process as it is. A number is set for the whole process when the engine loads. None
    changes nothing."""


class LocalModel(SettingsModel):
    """A transformers model on this machine. Weights are read from safetensors and GGUF files only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    elsewhere = {name: f"engine=EngineSettings({name}=...) of the LLM" for name in Placement.model_fields}  # noqa: RUF012

    kind: Literal["local"] = "local"
    """Names this class in settings files."""

    model: Annotated[str, Field(min_length=1)] = SMOLLM2
    """An embedded name ("smollm2"), a hub id (owner/name), a local directory or a GGUF file (converted once)."""

    revision: str | None = None
    """Branch, tag or commit of the hub repository; None for its default branch."""

    adapter: str | None = None
    """Hub id or directory of a peft adapter, which is merged into the weights."""

    trust_remote_code: bool = False
    """Whether to run Python code that comes with the model."""

    quantization: Bits | None = None
    """Bits of the weights. None leaves them as in the checkpoint: a quantized one (GPTQ, AWQ, bitsandbytes, torchao) is
    loaded as by transformers, and the embedded smollm2, if `dtype` is "auto", runs in its own 4 bits on a CPU with
    AVX-512 and in "float16" on one with AVX2. "int4" (groups of 32) and "int8" round the linear layers of any other
    model at load: on a CPU for torch's own kernels, on a GPU by bitsandbytes. "float16" holds their weights in half
    precision and computes in float32, on a CPU only."""

    tool_format: FormatName | None = None
    """How the model was trained to call tools; None to infer it from the chat template."""

    def same_weights(self, other: LocalModel) -> bool:
        """Return True if both are the same model, whichever way it writes tool calls."""
        return self == other.model_copy(update={"tool_format": self.tool_format})


def as_local_model(value: Any) -> Any:
    """Return a `LocalModel` for a name, a path or JSON; anything else is returned as it is."""
    if isinstance(value, str) and value.startswith("{"):
        return LocalModel.model_validate_json(value)
    return LocalModel(model=str(value)) if isinstance(value, (str, Path)) else value


AnyLocalModel = Annotated[LocalModel, BeforeValidator(as_local_model)]
