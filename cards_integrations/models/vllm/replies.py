"""What a vLLM server says: the forms of its replies, and what has to be asked before it drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import httpx
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from cards_integrations.errors import ModelError
from cards_integrations.http_client import HIDDEN
from cards_integrations.models.vllm.settings import KEY, VllmModel

if TYPE_CHECKING:
    from cards_integrations.chat.template import ChatTokenizer

COMPLETIONS, MODELS, TOKENIZE = "/v1/completions", "/v1/models", "/tokenize"
PROBE = "The café's 1,000 guests:\n\t- said «no» 👍 (twice)."  # two tokenizers that agree on it are one
M = TypeVar("M", bound=BaseModel)
HINTS = {
    401: f"Set model.api_key, or {KEY}.",
    403: f"Set model.api_key, or {KEY}.",
    404: "Check model.base_url and model.model.",
}


class Tokenized(BaseModel):
    tokens: list[int]


class Card(BaseModel):
    id: str
    max_model_len: int | None = None


class Cards(BaseModel):
    data: list[Card]


class LogProbs(BaseModel):
    token_logprobs: list[FiniteFloat]


class Choice(BaseModel):
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    token_ids: list[int]
    logprobs: LogProbs


class Details(BaseModel):
    cached_tokens: int | None = None


class Paid(BaseModel):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None


class Completion(BaseModel):
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    usage: Paid


class ServerHandshake:
    """What has to be known of a server before it drafts; asked of the replicas that answer, one of which has to."""

    def __init__(self, spec: VllmModel) -> None:
        self.spec = spec
        self.key = spec.key
        self.replicas: dict[str, Cards] = {}
        errors = []
        for url in spec.urls:
            try:
                self.replicas[url] = self._read(Cards, url, self._ask("GET", url, MODELS))
            except ModelError as error:
                errors.append(error)
        if not self.replicas:
            raise errors[0]

    def context_window(self) -> int:
        window = 2**31
        for url, cards in self.replicas.items():
            served = {card.id: card for card in cards.data}
            if self.spec.model not in served:
                raise self._error(url, f"serves {', '.join(served)}, and not model.model={self.spec.model!r}.")
            window = min(window, served[self.spec.model].max_model_len or window)
        return window

    def check_tokenizer(self, chat: ChatTokenizer) -> None:
        """Its ids and ours must be the same, or answers would be read wrongly."""
        ours = chat.encode(PROBE)
        for url in self.replicas:
            body = {"model": self.spec.model, "prompt": PROBE, "add_special_tokens": False}
            theirs = self._read(Tokenized, url, self._ask("POST", url, TOKENIZE, body)).tokens
            if ours != theirs:
                named = self.spec.tokenizer or self.spec.model
                raise self._error(url, f"and tokenizer {named!r} disagree: set model.tokenizer to the served one's.")

    def has_plugin(self, prompt_ids: Sequence[int]) -> bool:
        """A server with `EntropyStop` refuses a threshold that is no number; others do not look at it."""
        body = {"model": self.spec.model, "prompt": list(prompt_ids), "max_tokens": 1}
        body["vllm_xargs"] = {"cards_threshold": "is there a plug-in?"}
        asked = [self._ask("POST", url, COMPLETIONS, body, refused=400) for url in self.replicas]
        return all(reply.status_code == 400 and "cards_threshold" in reply.text for reply in asked)

    def _ask(self, method: str, url: str, path: str, body: Any = None, refused: int | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else None
        try:
            reply = httpx.request(method, url + path, json=body, headers=headers, timeout=30.0)
        except httpx.HTTPError as error:
            told = f"cannot be reached: {type(error).__name__}: {error}. Is it running, and model.base_url right?"
            raise self._error(url, told) from error
        if not reply.is_success and reply.status_code != refused:
            mend = HINTS.get(reply.status_code, "See its log.")
            raise self._error(url, f"answered HTTP {reply.status_code} at {path}: {reply.text[:200]!r}. {mend}")
        return reply

    def _read(self, form: type[M], url: str, reply: httpx.Response) -> M:
        try:
            return form.model_validate_json(reply.content)
        except ValidationError:  # it would quote a reply that may repeat the key
            raise self._error(url, f"answered {reply.text[:200]!r}, which is not vLLM's.") from None

    def _error(self, url: str, told: str) -> ModelError:
        text = f"model {self.spec.model!r}: the server at {url} {told}"
        return ModelError(text.replace(self.key, HIDDEN) if self.key else text)
