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
    """The URL of the server, or those of all replicas, with or without `/v1`."""
    model: Annotated[str, Field(min_length=1)]
    """The name that the model is served under."""
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """The model's tokenizer: an embedded name, a hub id or a directory; by default `model`. It is loaded here, as
    prompts and answers are sent as token ids."""
    revision: str | None = None
    """The tokenizer's revision on the hub."""
    trust_remote_code: bool = False
    """Whether code that comes with the tokenizer may run."""
    tool_format: FormatName | None = None
    """How the model was trained to call tools; None to infer it from the chat template."""
    without_plugin: Literal["refuse", "fixed_length", "punctuation"] = "refuse"
    """What to do if the server has no plug-in: refuse segments that end by uncertainty, or end them after
    `fallback_length` tokens or at punctuation."""
    fallback_length: Annotated[int, Field(ge=1)] = 12
    """Tokens of a segment for `without_plugin="fixed_length"`."""
    sentinel: Annotated[int, Field(ge=0)] | None = None
    """Id of a token that no answer contains, with which the plug-in ends a segment; by default a special token other
    than end-of-sequence."""
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
    """Seconds for one candidate."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a request is tried again after an error that may be temporary."""
    concurrency: Annotated[int, Field(ge=1)] = 256
    """Most candidates that are drafted at once, of all requests."""

    @field_validator("base_url")
    @classmethod
    def _without_version(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        """Remove the `/v1` that OpenAI's clients need: the health of a server is at another path."""
        if isinstance(value, tuple):
            if not value:
                raise ValueError("base_url is empty")
            return tuple(each.rstrip("/").removesuffix("/v1") for each in value)
        return value.rstrip("/").removesuffix("/v1")

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs of all replicas."""
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url
