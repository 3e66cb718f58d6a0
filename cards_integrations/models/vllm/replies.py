"""Replies of a vLLM server, and what has to be known of a server before it drafts."""

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
PROBE = "The café's 1,000 guests:\n\t- said «no» 👍 (twice)."  # tokenizers that agree on it are taken to be the same
M = TypeVar("M", bound=BaseModel)
HINTS = {
    401: f"Set model.api_key, or {KEY}.",
    403: f"Set model.api_key, or {KEY}.",
    404: "Check model.base_url and model.model.",
}


class TokenizeReply(BaseModel):
    """Of POST /tokenize."""

    tokens: list[int]


class ModelCard(BaseModel):
    """A model that the server serves; `max_model_len` are the tokens of prompt and answer together."""

    id: str
    max_model_len: int | None = None


class ModelList(BaseModel):
    """Of GET /v1/models."""

    data: list[ModelCard]


class LogProbs(BaseModel):
    """Log-probabilities of the generated tokens, in nats."""

    token_logprobs: list[FiniteFloat]


class Choice(BaseModel):
    """The one completion of a request; `stop_reason` is the stop string, or the id of the stop token, that ended it."""

    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    token_ids: list[int]
    logprobs: LogProbs


class PromptTokensDetails(BaseModel):
    """How many tokens of the prompt the server had in its prefix cache."""

    cached_tokens: int | None = None


class TokenUsage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None


class Completion(BaseModel):
    """Of POST /v1/completions."""

    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    usage: TokenUsage


class ServerHandshake:
    """Learns what has to be known of a server before it drafts, from all replicas that answer.

    Args:
        spec: The model, and where it is served.

    Raises:
        ModelError: No replica answers.
    """

    def __init__(self, spec: VllmModel) -> None:
        self.spec = spec
        self.key = spec.key
        self.replicas: dict[str, ModelList] = {}
        errors = []
        for url in spec.urls:
            try:
                self.replicas[url] = self._parse(ModelList, url, self._request("GET", url, MODELS))
            except ModelError as error:
                errors.append(error)
        if not self.replicas:
            raise errors[0]

    def context_window(self) -> int:
        """Return the tokens of prompt and answer together that all replicas allow.

        Raises:
            ModelError: A replica does not serve the model.
        """
        window = 2**31
        for url, models in self.replicas.items():
            served = {card.id: card for card in models.data}
            if self.spec.model not in served:
                raise self._error(url, f"serves {', '.join(served)}, and not model.model={self.spec.model!r}.")
            window = min(window, served[self.spec.model].max_model_len or window)
        return window

    def check_tokenizer(self, chat: ChatTokenizer) -> None:
        """Check that the servers' token ids are those of our tokenizer; answers would be misread otherwise.

        Raises:
            ModelError: They differ.
        """
        ours = chat.encode(PROBE)
        for url in self.replicas:
            body = {"model": self.spec.model, "prompt": PROBE, "add_special_tokens": False}
            theirs = self._parse(TokenizeReply, url, self._request("POST", url, TOKENIZE, body)).tokens
            if ours != theirs:
                named = self.spec.tokenizer or self.spec.model
                raise self._error(url, f"and tokenizer {named!r} disagree: set model.tokenizer to the served one's.")

    def has_plugin(self, prompt_ids: Sequence[int]) -> bool:
        """Return True if all replicas have `EntropyStop`.

        It refuses a threshold that is no number; servers without it ignore the threshold.
        """
        body = {"model": self.spec.model, "prompt": list(prompt_ids), "max_tokens": 1}
        body["vllm_xargs"] = {"cards_threshold": "is there a plug-in?"}
        replies = [self._request("POST", url, COMPLETIONS, body, refused=400) for url in self.replicas]
        return all(reply.status_code == 400 and "cards_threshold" in reply.text for reply in replies)

    def _request(
        self, method: str, url: str, path: str, body: Any = None, refused: int | None = None
    ) -> httpx.Response:
        """The reply if it is successful, or has the status `refused`."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else None
        try:
            reply = httpx.request(method, url + path, json=body, headers=headers, timeout=30.0)
        except httpx.HTTPError as error:
            problem = f"cannot be reached: {type(error).__name__}: {error}. Is it running, and model.base_url right?"
            raise self._error(url, problem) from error
        if not reply.is_success and reply.status_code != refused:
            hint = HINTS.get(reply.status_code, "See its log.")
            raise self._error(url, f"answered HTTP {reply.status_code} at {path}: {reply.text[:200]!r}. {hint}")
        return reply

    def _parse(self, reply_type: type[M], url: str, reply: httpx.Response) -> M:
        try:
            return reply_type.model_validate_json(reply.content)
        except ValidationError:  # it would quote a reply that may repeat the key
            raise self._error(url, f"answered {reply.text[:200]!r}, which is not vLLM's.") from None

    def _error(self, url: str, problem: str) -> ModelError:
        text = f"model {self.spec.model!r}: the server at {url} {problem}"
        return ModelError(text.replace(self.key, HIDDEN) if self.key else text)
