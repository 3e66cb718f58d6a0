"""A reward model behind HTTP: vLLM, text-embeddings-inference, or a server of one's own."""

from __future__ import annotations

import asyncio
import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import httpx
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

from cards_integrations.errors import RewardError, SettingsError
from cards_integrations.models.chat import as_text
from cards_integrations.rewards.base import Response, Reward, RewardLoader, RewardModel
from cards_integrations.rewards.registry import register_reward

KEY = "CARDS_REWARD_API_KEY"
HIDDEN = "**********"  # what pydantic writes in place of a secret
EXCERPT = 200  # characters of a server's words in an error
BACK_OFF = wait_exponential(multiplier=0.25, max=8) + wait_random(0, 0.25)  # seconds between two tries
CLOSING: set[asyncio.Task[None]] = set()  # loops hold tasks weakly
MENDS = {
    401: f"Set reward.api_key, or {KEY}.",
    403: f"Set reward.api_key, or {KEY}.",
    404: "Check reward.url, reward.protocol and reward.model.",
    405: "Check reward.url and reward.protocol.",
    413: "Use a smaller reward.batch_size, or shorter answers.",
    422: "Check reward.protocol; the texts may be too long for the model.",
}


def _usable(key: str, name: str) -> str:
    """A key that can stand in a header; otherwise httpx would quote it in its error."""
    if key == HIDDEN:
        raise SettingsError(
            f"{name}='{HIDDEN}' stands for a key that was left out when the settings were written: "
            f"give the key again, or leave api_key out and set the environment variable {KEY}."
        )
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise SettingsError(f"{name} must be printable ASCII without spaces.")
    return key


@register_reward
class RemoteReward(Reward):
    """A reward model behind HTTP. `protocol` says who answers:

    - "classify": vLLM's POST {url}/classify; the raw score of class `label`, an index (one class: 0).
    - "score": vLLM's POST {url}/score on the prompt and the answers.
    - "predict": text-embeddings-inference's POST {url}/predict; the raw score of `label`, a name.
    - "json": POST {url} of {"prompt": str, "context": [str], "responses": [str]} -> {"scores": [float]}.

    "classify" and "predict" read one text, which `prompt_format` makes of prompt and answer. `model`
    is what vLLM calls it; scales are remembered for a named model only, as a URL may serve another
    one tomorrow. `api_key` goes out as a Bearer token (None: CARDS_REWARD_API_KEY, if that is set),
    and is not written with the settings.

    `request_timeout` is in seconds, for one HTTP request. What may pass (no connection, no answer in
    time, 429, 5xx) is tried `retries` times more. At most `concurrency` requests are in flight, each
    with at most `batch_size` answers.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # it may hold the key

    kind: Literal["remote"] = "remote"
    url: str
    protocol: Literal["classify", "score", "predict", "json"]
    model: Annotated[str, Field(min_length=1)] | None = None
    label: Annotated[int, Field(ge=0)] | str | None = None
    prompt_format: str = "{prompt}{response}"
    api_key: SecretStr | None = None
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    retries: Annotated[int, Field(ge=0)] = 3
    concurrency: Annotated[int, Field(ge=1)] = 8
    batch_size: Annotated[int, Field(ge=1)] = 32

    @field_validator("url")
    @classmethod
    def _of_a_server(cls, value: str) -> str:
        try:
            url = httpx.URL(value)
        except httpx.InvalidURL as error:
            raise ValueError(f"this is no URL: {error}") from None
        if url.userinfo:
            raise ValueError("url must not carry a password, which errors would show: use api_key")
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"url={value!r} must be like http://localhost:8000")
        return value

    @field_validator("prompt_format")
    @classmethod
    def _has_response(cls, value: str) -> str:
        if "{response}" not in value:
            raise ValueError("prompt_format must contain {response}")
        return value

    @field_validator("api_key")
    @classmethod
    def _is_a_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _usable(value.get_secret_value(), "reward.api_key")
        return value

    @model_validator(mode="after")
    def _label_as_served(self) -> Self:
        asked = {"classify": (int, "give its index"), "predict": (str, "give its name, such as 'LABEL_1'")}
        kind, mend = asked.get(self.protocol, ((), "leave it out"))
        if self.label is not None and not isinstance(self.label, kind):
            raise ValueError(f"label={self.label!r} with protocol={self.protocol!r}: {mend}")
        return self

    @property
    def name(self) -> str:
        return f"remote {self.model} at {self.url}" if self.model else f"remote {self.url}"

    @property
    def lasting(self) -> bool:
        return self.model is not None and super().lasting

    def build(self, loader: RewardLoader) -> RewardModel:
        if self.api_key is not None:
            key: str | None = self.api_key.get_secret_value()
        else:
            key = os.environ.get(KEY, "").strip() or None
        return PROTOCOLS[self.protocol](self, key and _usable(key, KEY))


class MayPass(RewardError):
    """Another try may succeed."""


class Remote(RewardModel):
    """The client. A protocol is a path, what is sent there, and how the scores are read."""

    path: ClassVar[str]

    def __init__(self, settings: RemoteReward, key: str | None) -> None:
        self.name = settings.name
        self.settings = settings
        self.key = key
        url = httpx.URL(settings.url)
        self.url = url.copy_with(path=url.path.rstrip("/") + self.path) if self.path else url
        self.closing: asyncio.Task[None] | None = None

    @abstractmethod
    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        """What is sent."""

    @abstractmethod
    def read(self, content: bytes) -> list[float]:
        """The scores, or a `ValueError`."""

    async def score(self, responses: Sequence[Response]) -> list[float]:
        self._connect()
        size = self.settings.batch_size
        batches = [responses[start : start + size] for start in range(0, len(responses), size)]
        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(self._ask(batch)) for batch in batches]
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            raise first from first.__cause__
        return [score for task in asked for score in task.result()]

    def _connect(self) -> None:
        """A client for the running loop, closed when the loop ends its tasks (as an engine does, and asyncio.run)."""
        if self.closing is None or self.closing.done():
            width = self.settings.concurrency
            self.slots = asyncio.Semaphore(width)
            self.client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self.key}"} if self.key else None,
                limits=httpx.Limits(max_connections=width, max_keepalive_connections=width),
                timeout=None,
            )
            self.closing = asyncio.create_task(_close_at_the_end(self.client))
            CLOSING.add(self.closing)
            self.closing.add_done_callback(CLOSING.discard)

    async def _ask(self, responses: Sequence[Response]) -> list[float]:
        """The scores of one batch, after as many tries as it takes."""
        tries = 1 + self.settings.retries
        again = AsyncRetrying(
            stop=stop_after_attempt(tries), wait=BACK_OFF, retry=retry_if_exception_type(MayPass), reraise=True
        )
        try:
            reply: httpx.Response = await again(self._post, responses)
        except MayPass as error:
            raise RewardError(f"{error} Tries: {tries}.") from error
        try:
            found = self.read(reply.content)
        except ValueError as error:
            raise self._error(f"answered {self._excerpt(reply)}: {_told(error)}") from None
        if len(found) != len(responses):
            raise self._error(f"returned {len(found)} scores for {len(responses)} texts. Check reward.protocol.")
        return found

    async def _post(self, responses: Sequence[Response]) -> httpx.Response:
        """One HTTP request."""
        limit = self.settings.request_timeout
        try:
            async with self.slots, asyncio.timeout(limit):
                for conversation in dict.fromkeys(response.conversation for response in responses):
                    conversation.usage.rm_forwards += 1
                reply = await self.client.post(self.url, json=self.body(responses))
        except TimeoutError as error:
            mend = "Use a larger request_timeout, or a smaller batch_size."
            raise self._error(f"gave no answer within request_timeout={limit} seconds. {mend}", MayPass) from error
        except httpx.HTTPError as error:
            passing = isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError))
            told = f"cannot be reached: {type(error).__name__}: {error}. Is the server running, and reward.url right?"
            raise self._error(told, MayPass if passing else RewardError) from error
        if reply.is_success:
            return reply
        told = f"answered HTTP {reply.status_code}: {self._excerpt(reply)}."
        if reply.status_code == 429 or reply.is_server_error:
            raise self._error(f"{told} The server is overloaded or has failed: see its log.", MayPass)
        raise self._error(f"{told} {MENDS.get(reply.status_code, 'Check reward.url, protocol and model.')}")

    def _excerpt(self, reply: httpx.Response) -> str:
        text = self._without_key(" ".join(reply.text.split()))
        return repr(text if len(text) <= EXCERPT else text[:EXCERPT] + " ...")

    def _error(self, told: str, kind: type[RewardError] = RewardError) -> RewardError:
        """An error that names the reward and where it was asked."""
        return kind(self._without_key(f"reward {self.name!r} ({self.url}) {told}"))

    def _without_key(self, text: str) -> str:
        """A server may repeat what it was sent."""
        return text.replace(self.key, HIDDEN) if self.key else text


async def _close_at_the_end(client: httpx.AsyncClient) -> None:
    try:
        await asyncio.get_running_loop().create_future()  # for ever
    finally:
        await client.aclose()


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
        before, _, after = self.settings.prompt_format.partition("{response}")
        prompts = [as_text(response.conversation.prompt) for response in responses]
        return [
            before.replace("{prompt}", prompt) + response.text + after.replace("{prompt}", prompt)
            for prompt, response in zip(prompts, responses, strict=True)
        ]


class Classify(OneText):
    path = "/classify"

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        return {**_named(self.settings.model), "input": self.texts(responses), "use_activation": False}

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

    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        asked = responses[0].conversation
        texts = [response.text for response in responses]
        return {"prompt": as_text(asked.prompt), "context": list(asked.context), "responses": texts}

    def read(self, content: bytes) -> list[float]:
        return Listed.model_validate_json(content, strict=True).scores


def _named(model: str | None) -> dict[str, str]:
    return {} if model is None else {"model": model}


PROTOCOLS: dict[str, type[Remote]] = {"classify": Classify, "score": Score, "predict": Predict, "json": Json}
