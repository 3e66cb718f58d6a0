"""A reward model behind HTTP: vLLM, text-embeddings-inference, or a server of one's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from cards_integrations.chat.template import ChatTokenizer, as_text
from cards_integrations.errors import RewardError
from cards_integrations.http_client import Keyed, ServerUrl, ServiceClient, gathered
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.base import Response, Reward, RewardLoader, RewardModel
from cards_integrations.rewards.registry import register_reward
from cards_integrations.rewards.scorers.layout import Layout, scored

KEY = "CARDS_REWARD_API_KEY"
HINTS = {
    400: "Check reward.url, reward.protocol and reward.model.",
    401: f"Set reward.api_key, or {KEY}.",
    403: f"Set reward.api_key, or {KEY}.",
    404: "Check reward.url, reward.protocol and reward.model.",
    405: "Check reward.url and reward.protocol.",
    413: "Use a smaller reward.batch_size, or shorter answers.",
    422: "Check reward.protocol; the texts may be too long for the model.",
}


@register_reward
class RemoteReward(Keyed, Reward):
    """A reward model behind HTTP. `protocol` says who answers:

    - "classify": vLLM's POST {url}/classify; the raw score of class `label`, an index (one class: 0).
    - "score": vLLM's POST {url}/score on the prompt and the answers.
    - "predict": text-embeddings-inference's POST {url}/predict; the raw score of `label`, a name.
    - "json": POST {url} of {"prompt": str, "context": [str], "responses": [str]} -> {"scores": [float]}.

    "classify" and "predict" read one text, which `prompt_format` makes of prompt and answer (None:
    "{prompt}{response}"). With a `tokenizer` (embedded name, hub id or directory) "classify" sends token
    ids, and `prompt_format` is by default "chat", the reward model's own template. `model`
    is what vLLM calls it; scales are remembered for a named model only, as a URL may serve another
    one tomorrow. `api_key` goes out as a Bearer token (None: CARDS_REWARD_API_KEY, if that is set),
    and is not written with the settings.

    `request_timeout` is in seconds, for one HTTP request. What may pass (no connection, no answer in
    time, 429, 5xx) is tried `retries` times more. At most `concurrency` requests are in flight, each
    with at most `batch_size` answers.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # it may hold the key

    key_setting: ClassVar[str] = "reward.api_key"
    key_variable: ClassVar[str] = KEY
    kind: Literal["remote"] = "remote"
    url: ServerUrl | tuple[ServerUrl, ...]
    protocol: Literal["classify", "score", "predict", "json"]
    model: Annotated[str, Field(min_length=1)] | None = None
    label: Annotated[int, Field(ge=0)] | str | None = None
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    prompt_format: str | None = None
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    retries: Annotated[int, Field(ge=0)] = 3
    concurrency: Annotated[int, Field(ge=1)] = 8
    batch_size: Annotated[int, Field(ge=1)] = 32

    @field_validator("prompt_format")
    @classmethod
    def _has_response(cls, value: str | None) -> str | None:
        if value not in (None, "chat") and "{response}" not in str(value):
            raise ValueError("prompt_format must contain {response}")
        return value

    @model_validator(mode="after")
    def _with_its_tokenizer(self) -> Self:
        if self.tokenizer is not None and self.protocol != "classify":
            raise ValueError(f"tokenizer={self.tokenizer!r}: only protocol='classify' takes token ids")
        if self.prompt_format == "chat" and self.tokenizer is None:
            raise ValueError("prompt_format='chat' needs tokenizer=, which has the template")
        return self

    @model_validator(mode="after")
    def _label_as_served(self) -> Self:
        asked = {"classify": (int, "give its index"), "predict": (str, "give its name, such as 'LABEL_1'")}
        kind, mend = asked.get(self.protocol, ((), "leave it out"))
        if self.label is not None and not isinstance(self.label, kind):
            raise ValueError(f"label={self.label!r} with protocol={self.protocol!r}: {mend}")
        return self

    @property
    def name(self) -> str:
        where = ", ".join(self.urls)
        return f"remote {self.model} at {where}" if self.model else f"remote {where}"

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all replicas."""
        return (self.url,) if isinstance(self.url, str) else self.url

    @property
    def lasting(self) -> bool:
        return self.model is not None and super().lasting

    def build(self, loader: RewardLoader) -> RewardModel:
        model = PROTOCOLS[self.protocol](self, self.key)
        if self.tokenizer is not None:
            spec = LocalModel(model=self.tokenizer)
            model.layout = Layout(ChatTokenizer(loader.models.tokenizer(spec)), self.prompt_format)
            model.padding = loader.models.padding(spec)
        return model


class Remote(RewardModel):
    """The client. A protocol is a path, what is sent there, and how the scores are read."""

    layout: Layout | None = None
    padding: int | None = None
    path: ClassVar[str]
    health: ClassVar[str | None] = "/health"

    def __init__(self, settings: RemoteReward, key: str | None) -> None:
        self.name = settings.name
        self.settings = settings
        self.servers = ServiceClient(
            f"reward {settings.name!r}", settings.urls, key=key, timeout=settings.request_timeout,
            retries=settings.retries, concurrency=settings.concurrency, error=RewardError, hints=HINTS,
            setting="reward.url", health=self.health,
        )  # fmt: skip

    @abstractmethod
    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        """What is sent."""

    @abstractmethod
    def read(self, content: bytes) -> list[float]:
        """The scores, or a `ValueError`."""

    async def score(self, responses: Sequence[Response]) -> list[float]:
        size = self.settings.batch_size
        batches = [responses[start : start + size] for start in range(0, len(responses), size)]
        return [score for found in await gathered(self._ask(batch) for batch in batches) for score in found]

    async def _ask(self, responses: Sequence[Response]) -> list[float]:
        """The scores of one batch."""

        def paid() -> None:
            for conversation in dict.fromkeys(response.conversation for response in responses):
                conversation.usage.rm_forwards += 1

        body = self.body(responses)
        reply = await self.servers.post(self.path, body, on_try=paid)
        try:
            found = self.read(reply.content)
        except ValueError as error:
            raise self._error(f"answered {self.servers.excerpt(reply)}: {_told(error)}") from None
        if len(found) != len(responses):
            raise self._error(f"returned {len(found)} scores for {len(responses)} texts. Check reward.protocol.")
        return found

    def _error(self, told: str) -> RewardError:
        return RewardError(self.servers.without_key(f"reward {self.name!r} {told}"))


def _told(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where + ': ' if where else ''}{first['msg']}. Check reward.url and reward.protocol."


# --- the protocols ---


class Entry(BaseModel):
    index: int


class Classified(Entry):
    probs: list[FiniteFloat]  # raw scores, without the activation


class Scored(Entry):
    score: FiniteFloat


class Predicted(BaseModel):
    label: str
    score: FiniteFloat


class Listed(BaseModel):
    scores: list[FiniteFloat]


class Classifications(BaseModel):
    data: list[Classified]


class PairScores(BaseModel):
    data: list[Scored]


E = TypeVar("E", bound=Entry)
Predictions = TypeAdapter(list[list[Predicted]])


def _in_order(entries: list[E]) -> list[E]:
    ordered = sorted(entries, key=lambda entry: entry.index)
    if [entry.index for entry in ordered] != list(range(len(ordered))):
        raise ValueError("the indices are not 0, 1, 2, ... Check reward.protocol.")
    return ordered


class OneText(Remote):
    """Reads prompt and answer as one text, whoever's they are."""

    across_requests = True

    def texts(self, responses: Sequence[Response]) -> list[str]:
        before, _, after = (self.settings.prompt_format or "{prompt}{response}").partition("{response}")
        prompts = [as_text(response.conversation.prompt) for response in responses]
        return [
            before.replace("{prompt}", prompt) + response.text + after.replace("{prompt}", prompt)
            for prompt, response in zip(prompts, responses, strict=True)
        ]


class Classify(OneText):
    path = "/classify"

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        return {**_named(self.settings.model), "input": self._input(responses), "use_activation": False}

    def _input(self, responses: Sequence[Response]) -> list[str] | list[list[int]]:
        if self.layout is None:
            return self.texts(responses)
        around = [self.layout.around(response.conversation) for response in responses]
        texts = [before + response.text + after for (before, after), response in zip(around, responses, strict=True)]
        encoded = [self.layout.chat.encode(text, special=self.layout.special) for text in texts]
        return [scored(ids, self.padding) for ids in encoded]

    def read(self, content: bytes) -> list[float]:
        data = Classifications.model_validate_json(content, strict=True).data
        return [self._chosen(entry.probs) for entry in _in_order(data)]

    def _chosen(self, probs: list[float]) -> float:
        label = self.settings.label
        if label is None and len(probs) == 1:
            return probs[0]
        if not isinstance(label, int) or label >= len(probs):
            raise ValueError(f"reward.label={label!r}: choose one of {list(range(len(probs)))}.")
        return probs[label]


class Predict(OneText):
    path = "/predict"

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        # [text], for two bare strings would be a pair
        return {"inputs": [[text] for text in self.texts(responses)], "raw_scores": True, "truncate": True}

    def read(self, content: bytes) -> list[float]:
        return [self._chosen(labels) for labels in Predictions.validate_json(content, strict=True)]

    def _chosen(self, labels: list[Predicted]) -> float:
        """By name, for the server puts the highest score first."""
        scores = {label.label: label.score for label in labels}
        if self.settings.label is None and len(labels) == 1:
            return labels[0].score
        if self.settings.label not in scores:
            raise ValueError(f"reward.label={self.settings.label!r}: choose one of {sorted(scores)}.")
        return scores[str(self.settings.label)]


class Score(Remote):
    path = "/score"

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        prompt = as_text(responses[0].conversation.prompt)
        return {**_named(self.settings.model), "text_1": prompt, "text_2": [response.text for response in responses]}

    def read(self, content: bytes) -> list[float]:
        return [entry.score for entry in _in_order(PairScores.model_validate_json(content, strict=True).data)]


class Json(Remote):
    path = ""
    health = None

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        asked = responses[0].conversation
        texts = [response.text for response in responses]
        return {"prompt": as_text(asked.prompt), "context": list(asked.context), "responses": texts}

    def read(self, content: bytes) -> list[float]:
        return Listed.model_validate_json(content, strict=True).scores


def _named(model: str | None) -> dict[str, str]:
    return {} if model is None else {"model": model}


PROTOCOLS: dict[str, type[Remote]] = {"classify": Classify, "score": Score, "predict": Predict, "json": Json}
