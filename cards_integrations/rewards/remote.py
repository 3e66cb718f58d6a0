"""A reward model behind HTTP: vLLM, text-embeddings-inference, or a server of one's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from cards_integrations.chat.template import ChatTokenizer, as_text
from cards_integrations.errors import RewardError
from cards_integrations.http_client import REPLY_BYTES, Keyed, ServerUrl, ServiceClient, gathered, shortened
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.base import Loader, Response, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward
from cards_integrations.rewards.scorers.input_format import InputFormat, around_response, without_final_padding

KEY = "CARDS_REWARD_API_KEY"
SCORE_BYTES = 2**16  # of a reply for each text at most: the scores of a thousand labels
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

    `api_key` is sent as a Bearer token (None: CARDS_REWARD_API_KEY, if that is set), and is not written
    with the settings.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # it may hold the key

    key_setting: ClassVar[str] = "reward.api_key"
    key_variable: ClassVar[str] = KEY
    kind: Literal["remote"] = "remote"
    """Names this class in settings files."""
    url: ServerUrl | tuple[ServerUrl, ...]
    """Of the server, or of several replicas."""
    protocol: Literal["classify", "score", "predict", "json"]
    """What is sent where, and how the reply is read."""
    model: Annotated[str, Field(min_length=1)] | None = None
    """What vLLM calls the model. Scales are remembered for a named model only: a URL may serve another one
    tomorrow."""
    label: Annotated[int, Field(ge=0)] | str | None = None
    """Which score is taken: an index with "classify", a name with "predict"; None if there is only one."""
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """An embedded name, hub id or directory: then "classify" sends token ids."""
    prompt_format: str | None = None
    """How "classify" and "predict" make one text of `{prompt}` and `{response}`. None: with a tokenizer "chat",
    the reward model's own template, else "{prompt}{response}"."""
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    """Seconds for one HTTP request."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Further tries after an error that may pass: no connection, no answer in time, 429, 5xx."""
    concurrency: Annotated[int, Field(ge=1)] = 8
    """Requests in flight at most."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Answers in one request at most."""

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
        kind, hint = asked.get(self.protocol, ((), "leave it out"))
        if self.label is not None and not isinstance(self.label, kind):
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

    def build(self, loader: Loader) -> RewardModel:
        model = PROTOCOLS[self.protocol](self, self.key)
        if self.tokenizer is not None:
            spec = LocalModel(model=self.tokenizer)
            model.input_format = InputFormat(ChatTokenizer(loader.models.tokenizer(spec)), self.prompt_format)
            model.padding = loader.models.padding(spec)
        return model


class RemoteModel(RewardModel):
    """The client. A protocol is a path, what is sent there, and how the scores are read."""

    input_format: InputFormat | None = None
    """Set if token ids are sent."""
    padding: int | None = None
    """The token that the served model's config calls padding, if token ids are sent."""
    path: ClassVar[str]
    health: ClassVar[str | None] = "/health"
    """Where replicas say that they are ready; None if they do not."""

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
        """Return what is sent for these responses, as JSON."""

    @abstractmethod
    def read(self, content: bytes) -> list[float]:
        """Return the scores in a reply.

        Raises:
            ValueError: It is not what the protocol promises.
        """

    async def score(self, responses: Sequence[Response]) -> list[float]:
        size = self.settings.batch_size
        batches = [responses[start : start + size] for start in range(0, len(responses), size)]
        return [score for found in await gathered(self._ask(batch) for batch in batches) for score in found]

    async def _ask(self, responses: Sequence[Response]) -> list[float]:
        """The scores of one batch."""

        def paid() -> None:
            for conversation in dict.fromkeys(response.conversation for response in responses):
                conversation.usage.rm_forwards += 1

        body, limit = self.body(responses), REPLY_BYTES + SCORE_BYTES * len(responses)
        reply = await self.servers.post(self.path, body, limit=limit, on_try=paid)
        try:
            found = self.read(reply.content)
        except ValueError as error:
            raise self._error(f"answered {self.servers.excerpt(reply)}: {_reason(error)}") from None
        if len(found) != len(responses):
            raise self._error(f"returned {len(found)} scores for {len(responses)} texts. Check reward.protocol.")
        return found

    def _error(self, what: str) -> RewardError:
        return RewardError(self.servers.without_key(f"reward {self.name!r} {what}"))


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where + ': ' if where else ''}{first['msg']}. Check reward.url and reward.protocol."


# --- the protocols ---


T = TypeVar("T")
Entries = Annotated[list[T], FailFast()]  # an error of the first that is wrong, and not of each of a million


class IndexedEntry(BaseModel):
    index: int


class ClassScores(IndexedEntry):
    probs: Entries[FiniteFloat]  # raw scores, without the activation


class PairScore(IndexedEntry):
    score: FiniteFloat


class LabelScore(BaseModel):
    label: str
    score: FiniteFloat


class ScoreList(BaseModel):
    scores: Entries[FiniteFloat]


class Classifications(BaseModel):
    data: Entries[ClassScores]


class PairScores(BaseModel):
    data: Entries[PairScore]


E = TypeVar("E", bound=IndexedEntry)
Predictions = TypeAdapter(Entries[Entries[LabelScore]])


def _in_order(entries: list[E]) -> list[E]:
    ordered = sorted(entries, key=lambda entry: entry.index)
    if [entry.index for entry in ordered] != list(range(len(ordered))):
        raise ValueError("the indices are not 0, 1, 2, ... Check reward.protocol.")
    return ordered


class JoinedText(RemoteModel):
    """Sends prompt and answer as one text, those of several requests together."""

    across_requests = True

    def text(self, response: Response) -> str:
        """Return the text that is scored."""
        if self.input_format is not None:
            return self.input_format.around(response.conversation).whole(response.text)
        prompt_format = self.settings.prompt_format or "{prompt}{response}"
        before, after = around_response(prompt_format, response.conversation.prompt)
        return before + response.text + after


class Classify(JoinedText):
    path = "/classify"

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        return {**_named(self.settings.model), "input": self._input(responses), "use_activation": False}

    def _input(self, responses: Sequence[Response]) -> list[str] | list[list[int]]:
        texts, form = [self.text(response) for response in responses], self.input_format
        if form is None:
            return texts
        encoded = [form.chat.encode(text, special=form.adds_special_tokens) for text in texts]
        return [without_final_padding(ids, self.padding) for ids in encoded]

    def read(self, content: bytes) -> list[float]:
        data = Classifications.model_validate_json(content, strict=True).data
        return [self._chosen(entry.probs) for entry in _in_order(data)]

    def _chosen(self, probs: list[float]) -> float:
        label = self.settings.label
        if label is None and len(probs) == 1:
            return probs[0]
        if not isinstance(label, int) or label >= len(probs):
            raise ValueError(f"reward.label={label!r}: choose one of {shortened(str(list(range(len(probs)))))}.")
        return probs[label]


class Predict(JoinedText):
    path = "/predict"

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        # [text], for two bare strings would be a pair
        return {"inputs": [[self.text(response)] for response in responses], "raw_scores": True, "truncate": True}

    def read(self, content: bytes) -> list[float]:
        return [self._chosen(labels) for labels in Predictions.validate_json(content, strict=True)]

    def _chosen(self, labels: list[LabelScore]) -> float:
        """The score of the label by its name: the server puts the highest score first."""
        if self.settings.label is None and len(labels) == 1:
            return labels[0].score
        named = [label.score for label in labels if label.label == self.settings.label]
        if len(named) != 1:
            names = shortened(str(sorted(label.label for label in labels)))
            raise ValueError(f"reward.label={self.settings.label!r}: choose one of {names}.")
        return named[0]


class Score(RemoteModel):
    path = "/score"

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        prompt = as_text(responses[0].conversation.prompt)
        return {**_named(self.settings.model), "text_1": prompt, "text_2": [response.text for response in responses]}

    def read(self, content: bytes) -> list[float]:
        return [entry.score for entry in _in_order(PairScores.model_validate_json(content, strict=True).data)]


class Json(RemoteModel):
    path = ""
    health = None

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        asked = responses[0].conversation
        texts = [response.text for response in responses]
        return {"prompt": as_text(asked.prompt), "context": list(asked.context), "responses": texts}

    def read(self, content: bytes) -> list[float]:
        return ScoreList.model_validate_json(content, strict=True).scores


def _named(model: str | None) -> dict[str, str]:
    return {} if model is None else {"model": model}


PROTOCOLS: dict[str, type[RemoteModel]] = {"classify": Classify, "score": Score, "predict": Predict, "json": Json}
