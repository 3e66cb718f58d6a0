"""Drafting on a vLLM server: the methods stay here, candidates are completions there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from cards_integrations.chat.tools import FormatName
from cards_integrations.errors import CardsError, ModelError, SettingsError
from cards_integrations.http_client import Keyed, ServerUrl, ServiceClient
from cards_integrations.models.base import Boundary, Candidate, Context
from cards_integrations.models.vllm.replies import COMPLETIONS, HINTS, KEY, PROBE, Completion, ServerHandshake

if TYPE_CHECKING:
    import torch

    from cards_integrations.chat.grammar import Grammar, Matcher
    from cards_integrations.chat.template import ChatTokenizer
    from cards_integrations.models.local.loader import ModelLoader
    from cards_integrations.transformer.kv_memory import CacheNeed
    from cards_integrations.transformer.step_times import StepTimes

log = logging.getLogger("cards_integrations")
MARKS = (".", "!", "?", "\n")
AHEAD = 64  # candidates of one request at most


class VllmModel(Keyed):
    """A causal model that vLLM serves at `base_url`, or at several replicas; `model` is its served name.

    `tokenizer` (embedded name, hub id or directory; by default `model`) is read here: prompts and answers
    travel as token ids. Segments that end by uncertainty need `EntropyStop` in the server:
    `--logits-processors cards_integrations.vllm_plugin:EntropyStop`. Where it is missing,
    `without_plugin` says whether to refuse, or to end such segments by their length (of `fallback_length`
    tokens), or at punctuation. `sentinel` is the id of a token that answers never hold, with which the
    server ends a segment; by default a special token that is no end-of-sequence.

    `api_key` goes out as a Bearer token (None: CARDS_VLLM_API_KEY, if that is set), and is not written
    with the settings. `request_timeout` is in seconds, for one candidate. What may pass is tried `retries`
    times more, at another replica if there is one; `concurrency` candidates are drafted at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    key_setting: ClassVar[str] = "model.api_key"
    key_variable: ClassVar[str] = KEY
    kind: Literal["vllm"] = "vllm"
    base_url: ServerUrl | tuple[ServerUrl, ...]
    model: Annotated[str, Field(min_length=1)]
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    tool_format: FormatName | None = None
    without_plugin: Literal["refuse", "fixed_length", "punctuation"] = "refuse"
    fallback_length: Annotated[int, Field(ge=1)] = 12
    sentinel: Annotated[int, Field(ge=0)] | None = None
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
    retries: Annotated[int, Field(ge=0)] = 3
    concurrency: Annotated[int, Field(ge=1)] = 256

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

    def same_weights(self, other: object) -> bool:
        """No weights of a server are shared."""
        return False

    def context_window(self) -> int:
        """Tokens of prompt and answer together, as the server says."""
        return _context_window(self)

    def build(self, loader: ModelLoader, wake: Callable[[], None]) -> VllmLanguageModel:
        """Meet the server; called once per engine, in a thread of its own."""
        from cards_integrations.chat.template import ChatTokenizer
        from cards_integrations.models.local.settings import LocalModel

        spec = LocalModel(
            model=self.tokenizer or self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        chat = ChatTokenizer(loader.tokenizer(spec), self.tool_format)
        return VllmLanguageModel(self, chat, wake)


@lru_cache
def _context_window(spec: VllmModel) -> int:
    return ServerHandshake(spec).context_window()


class VllmLanguageModel:
    """Candidates as completions behind the `LanguageModel` protocol.

    Each candidate is a request of its own: the server's prefix cache shares what they have in common, and
    giving one up aborts it there alone. Sampling, and the end of a segment by its uncertainty, are decided
    in the server; a draft's random numbers follow from its own stream here, so a seed gives the same drafts
    as far as the server's arithmetic does not depend on its load.
    """

    def __init__(self, spec: VllmModel, chat: ChatTokenizer, wake: Callable[[], None]) -> None:
        self.spec = spec
        self.name = spec.model
        self.chat = chat
        self.wake = wake
        greeting = ServerHandshake(spec)
        self.context_window = greeting.context_window()
        greeting.check_tokenizer(chat)
        self.plugin = greeting.has_plugin(chat.encode(PROBE))
        self.servers = ServiceClient(
            f"model {spec.model!r}", spec.urls, key=spec.key, timeout=spec.request_timeout, retries=spec.retries,
            concurrency=spec.concurrency, error=ModelError, hints=HINTS, setting="model.base_url", health="/health",
        )  # fmt: skip
        self.failed: dict[Context, CardsError] = {}
        self.ended: list[Candidate] = []

    @cached_property
    def fallback(self) -> str:
        """How segments that a server without the plug-in cannot end are ended; a warning says so, once."""
        log.warning(
            "model %r: no EntropyStop in the server; segments end by model.without_plugin=%r",
            self.name, self.spec.without_plugin,
        )  # fmt: skip
        return self.spec.without_plugin

    @cached_property
    def sentinel(self) -> int:
        """A token that no answer holds."""
        if self.spec.sentinel is not None:
            return self.spec.sentinel
        tokenizer = self.chat.tokenizer
        special = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        named = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "unk", "mask", "cls", "sep")]
        padding = tokenizer.pad_token_id  # may be one of several ends
        for token in [*named, *(i for i in special if i != padding), padding]:
            if token is not None and token != tokenizer.eos_token_id and token not in self.chat.markers:
                return int(token)
        raise ModelError(f"model {self.name!r}: its tokenizer has no special token to spare; set model.sentinel.")

    @property
    def times(self) -> StepTimes:
        """Not seconds: what a step of a server costs with more candidates, so that few are drafted in vain."""
        from cards_integrations.transformer.step_times import StepTimes

        return StepTimes({1: 1.0, 16: 2.0})

    def cache_needs(self, tokens: int) -> list[CacheNeed]:
        return []

    def matcher(self, grammar: Grammar) -> Matcher:
        raise SettingsError(
            "Grammars, response formats and enforced tool calls need a local model: a server does not go on with "
            "a grammar from one segment to the next. Use LocalModel, or tool_choice='auto'."
        )

    def read(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
        raise ModelError("Logits of whole answers are read by a local model only: leave segment_length out.")

    def decode(self, ids: Sequence[int]) -> str:
        return self.chat.decode(ids)

    def open(self, context: Context) -> None:
        context.state = hash(tuple(context.prompt_ids))  # all candidates of a prompt find it in one replica's cache

    def close(self, context: Context) -> None:
        context.state = None
        self.failed.pop(context, None)

    def vacancies(self, context: Context, boundary: Boundary) -> int:
        return AHEAD

    def begin(self, candidate: Candidate) -> None:
        candidate.state = asyncio.get_running_loop().create_task(self._draft(candidate))

    def drop(self, candidate: Candidate) -> None:
        """Closes its connection, and so ends it in the server."""
        if candidate.state is not None:
            candidate.state.cancel()
            candidate.state = None

    def keep(self, candidate: Candidate) -> None:
        candidate.context.ids += candidate.ids
        candidate.context.text = candidate.response

    def sample(self) -> list[Candidate]:
        ended, self.ended = self.ended, []
        return [candidate for candidate in ended if candidate.state is not None]

    def unread(self, candidates: Iterable[Candidate]) -> Mapping[Any, Context]:
        return {}

    def forward(self, candidates: Iterable[Candidate]) -> None:
        """Nothing is computed here."""

    def reset(self) -> None:
        self.ended = []

    async def _draft(self, candidate: Candidate) -> None:
        """One completion, from the request to the candidate's end."""
        context = candidate.context
        try:
            body = self._body(candidate)
            near, calls = context.state, context.usage
            calls.lm_forwards += 1
            reply = await self.servers.post(COMPLETIONS, body, affinity=near)
            try:
                found = Completion.model_validate_json(reply.content)
            except ValidationError as error:
                told = error.errors(include_url=False)[0]
                raise ModelError(
                    f"model {self.name!r} answered {self.servers.excerpt(reply)}: {told['loc']}: {told['msg']}. "
                    "Is the server a vLLM of 0.11 or later?"
                ) from None
            self._take(candidate, found)
        except CardsError as error:
            self.failed[context] = error
        except Exception as error:
            log.exception("a candidate could not be drafted")
            self.failed[context] = ModelError(f"model {self.name!r}: {type(error).__name__}: {error}")
        else:
            self.ended.append(candidate)
        if context.state is None:
            self.failed.pop(context, None)  # the request has ended meanwhile
        self.wake()

    def _body(self, candidate: Candidate) -> dict[str, Any]:
        context, boundary, sampler = candidate.context, candidate.boundary, candidate.context.sampler
        if candidate.rank is not None:
            raise SettingsError("Methods that choose tokens by rank (Args) need a local model.")
        body: dict[str, Any] = {
            "model": self.name,
            "prompt": [*context.prompt_ids, *candidate.before],
            "max_tokens": candidate.remaining_tokens,
            "temperature": sampler.temperature,
            "top_k": sampler.top_k,
            "top_p": 1.0,
            "min_p": 0.0,  # or what the model's generation_config says
            "repetition_penalty": 1.0,
            "seed": int(candidate.uniforms[0] * 2**53),
            "logprobs": 0,
            "return_token_ids": True,
            "stop": list(context.stop.strings),
        }
        if boundary.served is None:
            return body
        if self._served(boundary):
            body["stop_token_ids"] = [self.sentinel]
            body["vllm_xargs"] = {**boundary.served, "cards_sentinel": self.sentinel}
        elif self.fallback == "refuse":
            raise ModelError(
                f"model {self.name!r}: the server does not end segments by uncertainty. Start it with --logits-"
                "processors cards_integrations.vllm_plugin:EntropyStop, or set model.without_plugin, or another "
                "boundary."
            )
        elif self.fallback == "fixed_length":
            body["max_tokens"] = min(candidate.remaining_tokens, self.spec.fallback_length)
        return body

    def _take(self, candidate: Candidate, found: Completion) -> None:
        """Make the completion the candidate's: what the server did not cut is cut here."""
        [choice], paid, usage = found.choices, found.usage, candidate.context.usage
        ids, log_p = choice.token_ids, choice.logprobs.token_logprobs
        cached = (paid.prompt_tokens_details and paid.prompt_tokens_details.cached_tokens) or 0
        usage.lm_tokens += paid.prompt_tokens - cached + paid.completion_tokens
        if not candidate.before and candidate.index == 0:  # the others find what this one has read
            usage.cached_tokens = min(cached, usage.prompt_tokens)
        by_token = choice.finish_reason == "stop" and not isinstance(choice.stop_reason, str)
        risen = by_token and self._served(candidate.boundary) and choice.stop_reason == self.sentinel
        usage.drafted_tokens += len(ids) - risen
        ended = by_token and not risen
        if by_token:
            ids = ids[:-1]
        length = self._cut(candidate, ids)
        candidate.ids = ids[:length]
        candidate.log_likelihood = sum(log_p[: len(candidate.ids)])
        if length is None and ended:
            candidate.finish, candidate.end_log_p = "stop", log_p[-1]
        elif candidate.finish is None and candidate.end >= candidate.context.max_tokens:
            candidate.finish = "length"

    def _served(self, boundary: Boundary) -> bool:
        """Does the server end these segments with the sentinel?"""
        return boundary.served is not None and self.plugin

    def _cut(self, candidate: Candidate, ids: list[int]) -> int | None:
        """How many of the tokens are the candidate's if it ends before them, or with them, at a stop string or a mark.

        None: all of them, and whatever ended them in the server ends the candidate.
        """
        context, boundary = candidate.context, candidate.boundary
        candidate.response = self.decode([*candidate.before, *ids])
        punctuated = boundary.reads_text or (
            boundary.served is not None and not self.plugin and self.spec.without_plugin == "punctuation"
        )
        for length in range(1, len(ids) + 1) if punctuated or context.stop else ():
            response = self.decode([*candidate.before, *ids[:length]])
            at = context.stop.find(response, len(candidate.before_text))
            if at is not None:
                candidate.response, candidate.whole, candidate.finish = response[:at], False, "stop"
                return length
            text = response[len(candidate.before_text) :]
            ends = boundary.ends_after(text) if boundary.reads_text else text.endswith(MARKS)
            if punctuated and ends and length >= boundary.min_tokens:
                candidate.response = response
                return length
        return None
