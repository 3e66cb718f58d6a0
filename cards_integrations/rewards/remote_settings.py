"""The settings of a reward model behind HTTP."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from cards_integrations.http_client import Keyed, ServerUrl
from cards_integrations.rewards.base import Reward
from cards_integrations.rewards.question import HELPFUL, AnyQuestion
from cards_integrations.rewards.steps import Aggregate

KEY = "CARDS_REWARD_API_KEY"
Protocol = Literal["classify", "score", "predict", "json", "pooling", "generative_scoring", "systemone"]
ONLY_WITH: dict[str, tuple[Protocol, ...]] = {
    "label": ("classify", "predict", "pooling"),
    "tokenizer": ("classify", "pooling", "generative_scoring"),
    "use_activation": ("score",),
    "separator": ("pooling",),
    "step_tag": ("pooling",),
    "after_tag": ("pooling",),
    "aggregate": ("pooling",),
    "words": ("generative_scoring",),
    "question": ("systemone",),
}
"""Settings that are for some protocols only."""


class RemoteSettings(Keyed, Reward):
    """The settings of `RemoteReward`, without the model that is built from them."""

    model_config = ConfigDict(hide_input_in_errors=True)  # it may contain the key

    key_setting: ClassVar[str] = "reward.api_key"
    key_variable: ClassVar[str] = KEY
    kind: Literal["remote"] = "remote"
    """Names this class in settings files."""
    url: ServerUrl | tuple[ServerUrl, ...]
    """The URL of the server, or those of several replicas."""
    protocol: Protocol
    """The endpoint that is called, and the form of request and reply."""
    model: Annotated[str, Field(min_length=1)] | None = None
    """The name of the model at the server. Scales are only remembered for a named model, as a URL may serve another one
    tomorrow."""
    label: Annotated[int, Field(ge=0)] | str | None = None
    """Which score is used: an index with "classify" and "pooling", a name with "predict". None: the only one or, with
    "pooling", the last."""
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """An embedded name, hub id or directory of a tokenizer, with which "classify" and "pooling" send token ids.
    "generative_scoring" needs it."""
    prompt_format: str | None = None
    """How `{prompt}` and `{response}` become one text. None: with a tokenizer "chat", the reward model's own template,
    else "{prompt}{response}"; for "generative_scoring" the rubric of `JudgeReward`, which goes through the template as
    a message of the user; for "systemone" JSON with message, answer and context."""
    use_activation: bool = False
    """Whether vLLM applies the model's activation, usually a sigmoid, to the scores of "score". Use True for
    late-interaction models, whose vectors are normalised by it."""
    separator: Annotated[str, Field(min_length=1)] = "\n\n"
    """For "pooling": the text that ends a step of an answer; it is not part of the step."""
    step_tag: Annotated[str, Field(min_length=1)] = "<extra_0>"
    """For "pooling": the text of the token that the model was trained to read after each step."""
    after_tag: str = ""
    """For "pooling": the text between a tag and the next step."""
    aggregate: Aggregate = "min"
    """For "pooling": how the scores of the steps become one: the last, the least, their product or their mean."""
    words: tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] = ("Yes", "No")
    """For "generative_scoring": the score is log p of the first word minus that of the second; their first tokens are
    compared."""
    question: AnyQuestion = HELPFUL
    """For "systemone": the question about an answer. A text is a yes-or-no question."""
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    """Seconds for one HTTP request."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Further attempts after an error that may be temporary: no connection, no answer in time, 429, 5xx."""
    concurrency: Annotated[int, Field(ge=1)] = 8
    """Most requests in flight."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Most answers in one request; "systemone" takes one."""

    @field_validator("prompt_format")
    @classmethod
    def _has_response(cls, value: str | None) -> str | None:
        if value not in (None, "chat") and "{response}" not in str(value):
            raise ValueError("prompt_format must contain {response}")
        return value

    @model_validator(mode="after")
    def _has_a_use(self) -> Self:
        for name, protocols in ONLY_WITH.items():
            value: Any = getattr(self, name)
            if value != type(self).model_fields[name].default and self.protocol not in protocols:
                known = " or ".join(f"protocol={each!r}" for each in protocols)
                raise ValueError(f"{name}={value!r} with protocol={self.protocol!r}: leave it out; it is for {known}")
        return self

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if self.protocol == "generative_scoring" and self.tokenizer is None:
            raise ValueError("protocol='generative_scoring' needs tokenizer=, which has the tokens of the words")
        if self.words[0] == self.words[1]:
            raise ValueError("the two words are the same")
        chat = self.prompt_format == "chat"
        if chat and (self.tokenizer is None or self.protocol == "generative_scoring"):
            raise ValueError("prompt_format='chat' needs tokenizer=, which has the template")
        return self

    @model_validator(mode="after")
    def _label_as_served(self) -> Self:
        by_name = self.protocol == "predict"
        if self.label is not None and isinstance(self.label, str) != by_name:
            hint = "give its name, such as 'LABEL_1'" if by_name else "give its index"
            raise ValueError(f"label={self.label!r} with protocol={self.protocol!r}: {hint}")
        return self

    @property
    def name(self) -> str:
        where = ", ".join(self.urls)
        return f"remote {self.model} at {where}" if self.model else f"remote {where}"

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs of all replicas."""
        return (self.url,) if isinstance(self.url, str) else self.url

    @property
    def is_reproducible(self) -> bool:
        return self.model is not None and super().is_reproducible
