"""Settings of a language model that a vLLM server serves."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from cards_integrations.chat.tools import FormatName
from cards_integrations.http_client import Keyed, ServerUrl

KEY = "CARDS_VLLM_API_KEY"


class VllmModel(Keyed):
    """A causal model that one or several vLLM servers serve.

    Segments that end by uncertainty need the plug-in in the server:
    `--logits-processors cards_integrations.vllm_plugin:EntropyStop`. What may pass (no connection, no answer in time,
    an overloaded server) is tried again, at another replica if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)

    key_setting: ClassVar[str] = "model.api_key"
    key_variable: ClassVar[str] = KEY
    kind: Literal["vllm"] = "vllm"
    """The kind of backend, for settings files."""
    base_url: ServerUrl | tuple[ServerUrl, ...]
    """Where the server is, or all replicas; with or without `/v1`."""
    model: Annotated[str, Field(min_length=1)]
    """The name that the model is served under."""
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """The model's tokenizer, an embedded name, a hub id or a directory; by default `model`. It is read here, for
    prompts and answers travel as token ids."""
    revision: str | None = None
    """The tokenizer's revision on the hub."""
    trust_remote_code: bool = False
    """Run code that the tokenizer's repository brings."""
    tool_format: FormatName | None = None
    """How the model was taught to call tools, if its chat template does not show it."""
    without_plugin: Literal["refuse", "fixed_length", "punctuation"] = "refuse"
    """What to do where the plug-in is missing: refuse segments that end by uncertainty, or end them after
    `fallback_length` tokens, or at punctuation."""
    fallback_length: Annotated[int, Field(ge=1)] = 12
    """Tokens of a segment for `without_plugin="fixed_length"`."""
    sentinel: Annotated[int, Field(ge=0)] | None = None
    """Id of a token that answers never hold, with which the plug-in ends a segment; by default a special token that is
    no end-of-sequence."""
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
    """Seconds for one candidate."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a request that failed for a passing reason is tried again."""
    concurrency: Annotated[int, Field(ge=1)] = 256
    """Candidates that are drafted at once, of all requests."""

    @field_validator("base_url")
    @classmethod
    def _without_version(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        """OpenAI's clients are given `.../v1`; the health of a server is asked beside it."""
        if isinstance(value, tuple):
            if not value:
                raise ValueError("base_url is empty")
            return tuple(each.rstrip("/").removesuffix("/v1") for each in value)
        return value.rstrip("/").removesuffix("/v1")

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all replicas."""
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url
