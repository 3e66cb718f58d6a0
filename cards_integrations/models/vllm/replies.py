"""Replies of a vLLM server, and what has to be known of a server before it drafts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import httpx
from pydantic import BaseModel, FailFast, Field, FiniteFloat, Strict, ValidationError

from cards_integrations.errors import ModelError, said
from cards_integrations.http_client import HIDDEN, Reply, ReplyError, excerpt, exchange, shortened
from cards_integrations.models.vllm.settings import KEY, VllmModel
from cards_integrations.threads import in_own_loop

if TYPE_CHECKING:
    from cards_integrations.chat.template import ChatTokenizer

COMPLETIONS, MODELS, TOKENIZE = "/v1/completions", "/v1/models", "/tokenize"
PROBE = "The café's 1,000 guests:\n\t- said «no» 👍 (twice)."  # tokenizers that agree on it are taken to be the same
HANDSHAKE_TIMEOUT = 30.0  # seconds for each of the three questions, whatever the number of replicas
MODELS_BYTES = 2**22  # of the list of models at most: adapters may be thousands
TOKEN_BYTES = 2**10  # of a completion for each of its tokens at most: its text thrice, escaped
PROMPT_TOKEN_BYTES = 16  # for each of the prompt, which comes back with it
TOKEN_ID = "token_id:"  # how a server writes a token that it is to name by its id
ROUNDING = 1e-3  # by which a log-probability may be above 0
M = TypeVar("M", bound=BaseModel)
HINTS = {
    401: f"Set model.api_key, or {KEY}.",
    403: f"Set model.api_key, or {KEY}.",
    404: "Check model.base_url and model.model.",
}
Count = Annotated[int, Field(ge=0), Strict()]
TokenId = Annotated[int, Field(ge=0), Strict()]


class TokenizeReply(BaseModel):
    """Of POST /tokenize."""

    tokens: Annotated[list[int], FailFast()]


class ModelCard(BaseModel):
    """A model that the server serves; `max_model_len` are the tokens of prompt and answer together."""

    id: str
    max_model_len: int | None = None


class ModelList(BaseModel):
    """Of GET /v1/models."""

    data: Annotated[list[ModelCard], FailFast()]


class LogProbs(BaseModel):
    """Log-probabilities of the generated tokens, in nats, and of the most probable ones by "token_id:" and their id."""

    token_logprobs: Annotated[list[Annotated[FiniteFloat, Strict()]], FailFast()]
    top_logprobs: list[dict[str, float]] | None = None

    def top(self, count: int) -> list[list[tuple[int, float]]]:
        """Ids and log-probabilities of the most probable tokens in the place of each one; empty if there are none."""
        return [
            sorted(
                ((int(key.removeprefix(TOKEN_ID)), value) for key, value in each.items()), key=lambda pair: -pair[1]
            )[:count]
            for each in self.top_logprobs or ()
        ]


class Choice(BaseModel):
    """The one completion of a request; `stop_reason` is the stop string, or the id of the stop token, that ended it."""

    finish_reason: Literal["stop", "length"]
    stop_reason: Annotated[int, Strict()] | str | None = None
    token_ids: Annotated[list[TokenId], FailFast()]
    logprobs: LogProbs

    @property
    def ends_with_token(self) -> bool:
        """True if its last token ended it: the end of sequence, or one of `stop_token_ids`."""
        return self.finish_reason == "stop" and not isinstance(self.stop_reason, str)


class PromptTokensDetails(BaseModel):
    """How many tokens of the prompt the server had in its prefix cache."""

    cached_tokens: Count | None = None


class TokenUsage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: Count
    completion_tokens: Count = 0
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the server did not have to read; 0 if it does not say."""
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class Completion(BaseModel):
    """Of POST /v1/completions."""

    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    usage: TokenUsage

    def fault(self, prompt_tokens: int, max_tokens: int, vocabulary: int, tops_by_id: bool = False) -> str | None:
        """What is wrong with it as an answer to a request of such sizes; None if nothing is."""
        [choice], usage = self.choices, self.usage
        ids, log_p, finish = choice.token_ids, choice.logprobs.token_logprobs, choice.finish_reason
        if not ids:
            return f"no token, and finish_reason {finish!r}"
        if len(ids) != len(log_p):
            return f"{len(ids)} token ids and {len(log_p)} log-probabilities"
        if len(ids) > max_tokens or (finish == "length" and len(ids) < max_tokens):
            return f"{len(ids)} tokens and finish_reason {finish!r} for max_tokens={max_tokens}"
        if max(ids) >= vocabulary:
            return f"token {max(ids)}, and the tokenizer has {vocabulary}"
        tops = choice.logprobs.top_logprobs or ()
        if tops_by_id and not all(key.removeprefix(TOKEN_ID).isdecimal() for top in tops for key in top):
            return "top_logprobs that do not name tokens by their ids"
        if tops_by_id and len(tops) != len(ids):
            return f"{len(ids)} token ids and {len(tops)} top_logprobs"
        if max(log_p) > ROUNDING:
            return f"log-probability {max(log_p)}, above 0: its --logprobs-mode has to be raw_logprobs, the default"
        if choice.ends_with_token and choice.stop_reason not in (None, ids[-1]):
            return f"stop_reason {choice.stop_reason}, and token {ids[-1]} is the last"
        if usage.prompt_tokens != prompt_tokens or usage.cached_tokens > prompt_tokens:
            return f"{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} cached, for a prompt of {prompt_tokens}"
        return None


class ServerHandshake:
    """Learns what has to be known of a server before it drafts, from all replicas that answer.

    Its methods block, each for `HANDSHAKE_TIMEOUT` at most. They may be called in a thread with a running loop.

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
        for url, reply in self._ask(spec.urls, "GET", MODELS).items():
            try:
                self.replicas[url] = self._parse(ModelList, url, reply)
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
                names = shortened(", ".join(served))
                raise self._error(url, f"serves {names}, and not model.model={self.spec.model!r}.")
            window = min(window, served[self.spec.model].max_model_len or window)
        return window

    def check_tokenizer(self, chat: ChatTokenizer) -> None:
        """Check that the servers' token ids are those of our tokenizer; answers would be misread otherwise.

        Raises:
            ModelError: They differ.
        """
        ours = chat.encode(PROBE)
        body = {"model": self.spec.model, "prompt": PROBE, "add_special_tokens": False}
        for url, reply in self._ask(self.replicas, "POST", TOKENIZE, body).items():
            if ours != self._parse(TokenizeReply, url, reply).tokens:
                named = self.spec.tokenizer or self.spec.model
                raise self._error(url, f"and tokenizer {named!r} disagree: set model.tokenizer to the served one's.")

    def has_plugin(self, prompt_ids: Sequence[int]) -> bool:
        """Return True if all replicas have `EntropyStop`.

        It refuses a threshold that is no number; servers without it ignore the threshold.
        """
        body = {"model": self.spec.model, "prompt": list(prompt_ids), "max_tokens": 1}
        body["vllm_xargs"] = {"cards_threshold": "is there a plug-in?"}
        found = self._ask(self.replicas, "POST", COMPLETIONS, body, refused=400)
        replies = [_or_raise(reply) for reply in found.values()]
        return all(reply.status == 400 and b"cards_threshold" in reply.content for reply in replies)

    def _ask(
        self, urls: Iterable[str], method: str, path: str, body: Any = None, refused: int | None = None
    ) -> dict[str, Reply | BaseException]:
        """Ask all replicas at once, and return their replies, or why there is none."""

        async def together() -> dict[str, Reply | BaseException]:
            work = [self._reply(url, method, path, body, refused) for url in urls]
            return dict(zip(urls, await asyncio.gather(*work, return_exceptions=True), strict=True))

        return in_own_loop(together())

    async def _reply(self, url: str, method: str, path: str, body: Any, refused: int | None) -> Reply:
        """The reply if it is successful, or has the status `refused`."""
        limits: dict[str, Any] = {"timeout": HANDSHAKE_TIMEOUT, "limit": MODELS_BYTES}
        try:
            reply = await exchange(method, httpx.URL(url + path), key=self.key, body=body, **limits)
        except TimeoutError as error:
            raise self._error(url, f"gave no answer at {path} within {HANDSHAKE_TIMEOUT} seconds.") from error
        except httpx.HTTPError as error:
            what = shortened(self._hidden(said(error)))
            problem = f"cannot be reached: {what}. Is it running, and model.base_url right?"
            raise self._error(url, problem) from error
        except ReplyError as error:
            raise self._error(url, f"{error} Check model.base_url.") from None
        if not reply.is_success and reply.status != refused:
            hint = HINTS.get(reply.status, "See its log.")
            raise self._error(url, f"answered HTTP {reply.status} at {path}: {self._excerpt(reply)}. {hint}")
        return reply

    def _parse(self, reply_type: type[M], url: str, reply: Reply | BaseException) -> M:
        found = _or_raise(reply)
        try:
            return reply_type.model_validate_json(found.content)
        except ValidationError:  # it would quote a reply that may repeat the key
            raise self._error(url, f"answered {self._excerpt(found)}, which is not vLLM's.") from None

    def _error(self, url: str, problem: str) -> ModelError:
        return ModelError(self._hidden(f"model {self.spec.model!r}: the server at {url} {problem}"))

    def _excerpt(self, reply: Reply) -> str:
        return excerpt(reply.content, self.key)

    def _hidden(self, text: str) -> str:
        return text.replace(self.key, HIDDEN) if self.key else text


def _or_raise(reply: Reply | BaseException) -> Reply:
    if isinstance(reply, BaseException):
        raise reply
    return reply
