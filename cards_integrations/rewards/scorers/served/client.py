"""The client of a reward model behind HTTP. A protocol is a path, what is sent there, and how the scores are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, FailFast, ValidationError

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import RewardError
from cards_integrations.http_client import REPLY_BYTES, ServiceClient, gathered
from cards_integrations.rewards.base import Response, RewardModel
from cards_integrations.rewards.remote_settings import KEY, RemoteSettings

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
T = TypeVar("T")
Entries = Annotated[list[T], FailFast()]  # an error of the first that is wrong, and not of each of a million


class RemoteModel(RewardModel):
    """A reward model of one protocol."""

    path: ClassVar[str]
    health: ClassVar[str | None] = "/health"
    """Where replicas say that they are ready; None if they do not."""

    def __init__(self, settings: RemoteSettings, key: str | None) -> None:
        self.name = settings.name
        self.settings = settings
        self.servers = ServiceClient(
            f"reward {settings.name!r}", settings.urls, key=key, timeout=settings.request_timeout,
            retries=settings.retries, concurrency=settings.concurrency, error=RewardError, hints=HINTS,
            setting="reward.url", health=self.health,
        )  # fmt: skip

    def use_tokenizer(self, chat: ChatTokenizer, padding: int | None) -> None:
        """Send token ids.

        Args:
            chat: The served model's tokenizer.
            padding: The token that its config calls padding.
        """
        raise NotImplementedError(f"{type(self).__name__} sends texts.")

    @abstractmethod
    def body(self, responses: Sequence[Response]) -> dict[str, Any]:
        """Return what is sent for these responses, as JSON."""

    @abstractmethod
    def read(self, content: bytes, body: dict[str, Any], responses: Sequence[Response]) -> list[float]:
        """Return the scores in a reply.

        Args:
            content: The reply.
            body: What it answers.
            responses: What that was made of.

        Raises:
            ValueError: It is not what the protocol promises.
        """

    def limit(self, body: dict[str, Any], texts: int) -> int:
        """Bytes of the reply at most."""
        return REPLY_BYTES + SCORE_BYTES * texts

    @property
    def batch_size(self) -> int:
        """Answers in one request at most."""
        return self.settings.batch_size

    async def score(self, responses: Sequence[Response]) -> list[float]:
        size = self.batch_size
        batches = [responses[start : start + size] for start in range(0, len(responses), size)]
        return [score for found in await gathered(self._ask(batch) for batch in batches) for score in found]

    async def _ask(self, responses: Sequence[Response]) -> list[float]:
        """Return the scores of one batch."""

        def paid() -> None:
            for conversation in dict.fromkeys(response.conversation for response in responses):
                conversation.usage.rm_forwards += 1

        body = self.body(responses)
        reply = await self.servers.post(self.path, body, limit=self.limit(body, len(responses)), on_try=paid)
        try:
            found = self.read(reply.content, body, responses)
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


class IndexedEntry(BaseModel):
    """One of the entries of a list, which may come in another order."""

    index: int


E = TypeVar("E", bound=IndexedEntry)


def in_order(entries: list[E]) -> list[E]:
    """Sort the entries by their indices.

    Raises:
        ValueError: These are not 0, 1, 2, ...
    """
    ordered = sorted(entries, key=lambda entry: entry.index)
    if [entry.index for entry in ordered] != list(range(len(ordered))):
        raise ValueError("the indices are not 0, 1, 2, ... Check reward.protocol.")
    return ordered


def named(model: str | None) -> dict[str, str]:
    """The model's name as a request has it."""
    return {} if model is None else {"model": model}
