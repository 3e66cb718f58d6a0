"""Drafting on a vLLM server: methods run here, candidates are completions there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import CardsError, ModelError, SettingsError, said
from cards_integrations.http_client import REPLY_BYTES, Reply, ServiceClient
from cards_integrations.models.base import Boundary, Candidate, Context
from cards_integrations.models.sampling import NEVER
from cards_integrations.models.vllm.replies import (
    COMPLETIONS,
    HINTS,
    PROBE,
    PROMPT_TOKEN_BYTES,
    TOKEN_BYTES,
    Completion,
    ServerHandshake,
)
from cards_integrations.models.vllm.settings import VllmModel

log = logging.getLogger("cards_integrations")
MARKS = (".", "!", "?", "\n")
MAX_BIAS = 100  # a server takes larger ones for this
MAX_PENALTY = 2


class VllmLanguageModel:
    """Candidates as completions; implements `LanguageModel`.

    Each candidate is an HTTP request of its own: the server's prefix cache shares what they have in common, and giving
    one up aborts only that one. Sampling, and ending a segment by its uncertainty, happen in the server. The seed of a
    draft follows from its own stream here, so that a seed gives the same drafts as far as the server's arithmetic does
    not depend on its load.

    Args:
        spec: The settings.
        chat: The model's tokenizer and chat template.
        wake: Called when a candidate has ended.
    """

    def __init__(self, spec: VllmModel, chat: ChatTokenizer, wake: Callable[[], None]) -> None:
        self.spec = spec
        self.name = spec.model
        self.chat = chat
        self.wake = wake
        handshake = ServerHandshake(spec)
        self.context_window = handshake.context_window()
        handshake.check_tokenizer(chat)
        self.plugin = handshake.has_plugin(chat.encode(PROBE))
        self.servers = ServiceClient(
            f"model {spec.model!r}", spec.urls, key=spec.key, timeout=spec.request_timeout, retries=spec.retries,
            concurrency=spec.concurrency, error=ModelError, hints=HINTS, setting="model.base_url", health="/health",
        )  # fmt: skip
        self._affinity: dict[Context, int] = {}  # sends all candidates of a prompt to the replica that has it cached
        self._tasks: dict[Candidate, asyncio.Task[None]] = {}
        self._ended: list[Candidate] = []

    @cached_property
    def fallback(self) -> str:
        """How segments are ended that a server without the plug-in cannot end; logs a warning once."""
        log.warning(
            "model %r: no EntropyStop in the server; segments end by model.without_plugin=%r",
            self.name, self.spec.without_plugin,
        )  # fmt: skip
        return self.spec.without_plugin

    @cached_property
    def vocabulary(self) -> int:
        """One more than the highest token id of an answer."""
        return 1 + max(self.spec.sentinel or 0, *map(int, self.chat.tokenizer.get_vocab().values()))

    @cached_property
    def sentinel(self) -> int:
        """A token that no answer contains."""
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

    def open(self, context: Context) -> None:
        self._affinity[context] = hash(tuple(context.prompt_ids))

    def close(self, context: Context) -> None:
        self._affinity.pop(context, None)
        for candidate in [each for each in self._tasks if each.context is context]:
            self.drop(candidate)

    def begin(self, candidate: Candidate) -> None:
        self._tasks[candidate] = asyncio.get_running_loop().create_task(self._draft(candidate))

    def drop(self, candidate: Candidate) -> None:
        """Close the candidate's connection, which aborts it in the server."""
        task = self._tasks.pop(candidate, None)
        if task is not None:
            task.cancel()

    def keep(self, candidate: Candidate) -> None:
        del self._tasks[candidate]
        candidate.context.ids += candidate.ids
        candidate.context.text = candidate.response

    def sample(self) -> list[Candidate]:
        ended, self._ended = self._ended, []
        return [candidate for candidate in ended if candidate in self._tasks]

    async def _draft(self, candidate: Candidate) -> None:
        """Request one completion, and end the candidate with it."""
        context = candidate.context
        try:
            body = self._body(candidate)
            near, calls = self._affinity[context], context.usage
            calls.lm_forwards += 1
            limit = REPLY_BYTES + TOKEN_BYTES * body["max_tokens"] + PROMPT_TOKEN_BYTES * len(body["prompt"])
            reply = await self.servers.post(COMPLETIONS, body, limit=limit, affinity=near)
            self._take(candidate, self._completion(reply, body))
        except CardsError as error:
            candidate.error = error
        except Exception as error:
            log.exception("a candidate could not be drafted")
            candidate.error = ModelError(f"model {self.name!r}: {said(error)}")
        self._ended.append(candidate)
        self.wake()

    def _completion(self, reply: Reply, body: dict[str, Any]) -> Completion:
        """Parse and check a reply; raise an error that says what is wrong with it."""
        try:
            found = Completion.model_validate_json(reply.content)
        except ValidationError as error:
            told = error.errors(include_url=False)[0]
            fault: str | None = ": ".join([*(str(part) for part in told["loc"]), told["msg"]])
        else:
            by_id = body.get("return_tokens_as_token_ids", False)
            fault = found.fault(len(body["prompt"]), body["max_tokens"], self.vocabulary, by_id)
        if fault is None:
            return found
        raise ModelError(
            f"model {self.name!r} answered {self.servers.excerpt(reply)}: {fault}. Is the server a vLLM of 0.11 or "
            "later?"
        )

    def _body(self, candidate: Candidate) -> dict[str, Any]:
        context, boundary, sampler = candidate.context, candidate.boundary, candidate.context.sampler
        if candidate.rank is not None:
            raise SettingsError("Methods that choose tokens by rank (Args) need a local model.")
        body: dict[str, Any] = {
            "model": self.name,
            "prompt": [*context.prompt_ids, *candidate.before],
            "max_tokens": candidate.remaining_tokens,
            **self._sampling(candidate),
            "seed": int(candidate.uniforms[0] * 2**53),
            "logprobs": context.logprobs or 0,
            "return_token_ids": True,
            "stop": [] if context.stop.within else list(context.stop.strings),  # the server knows no calls
            "skip_special_tokens": True,  # in what stop strings are looked for; 0.33 has another default than 0.32
        }
        if sampler.logit_bias:
            body["logit_bias"] = {
                str(token): -MAX_BIAS if bias == NEVER else bias for token, bias in sampler.logit_bias
            }
        if sampler.stop_token_ids:
            body["stop_token_ids"] = list(sampler.stop_token_ids)
        if context.logprobs:
            body["return_tokens_as_token_ids"] = True
        least = max(0, sampler.min_tokens - len(candidate.before))
        if boundary.served is not None and self._served(boundary):
            if self.sentinel in sampler.stop_token_ids:
                raise SettingsError(
                    f"stop_token_ids: {self.sentinel} ends segments; set model.sentinel to another one."
                )
            body["stop_token_ids"] = [*sampler.stop_token_ids, self.sentinel]
            body["vllm_xargs"] = {**boundary.served, "cards_sentinel": self.sentinel}
            if least:  # the server's own `min_tokens` would forbid the sentinel, too
                body["vllm_xargs"]["cards_min_tokens"] = least
            return body
        if least:
            body["min_tokens"] = min(least, candidate.remaining_tokens)
        if boundary.served is None:
            return body
        if self.fallback == "refuse":
            raise ModelError(
                f"model {self.name!r}: the server does not end segments by uncertainty. Start it with --logits-"
                "processors cards_integrations.vllm_plugin:EntropyStop, or set model.without_plugin, or another "
                "boundary."
            )
        elif self.fallback == "fixed_length":
            body["max_tokens"] = min(candidate.remaining_tokens, self.spec.fallback_length)
            if least:
                body["min_tokens"] = min(least, body["max_tokens"])
        return body

    @staticmethod
    def _sampling(candidate: Candidate) -> dict[str, float]:
        """Return all settings of sampling, as a server takes missing ones from the model's generation_config."""
        sampler, max_tokens = candidate.context.sampler, candidate.context.max_tokens
        whole_answer = not candidate.before and candidate.boundary.min_tokens >= max_tokens
        penalties = {name: getattr(sampler, name) for name in ("presence_penalty", "frequency_penalty")}
        for name, penalty in penalties.items():
            if penalty and not whole_answer:
                raise SettingsError(
                    f"{name} behind vLLM needs a method that drafts whole answers, such as best_of_n: a server counts "
                    "the tokens of one call only, and every segment is a call. repetition_penalty counts prompt and "
                    "answer."
                )
            if abs(penalty) > MAX_PENALTY:
                raise SettingsError(f"{name}: a vLLM server takes numbers from -{MAX_PENALTY} to {MAX_PENALTY}.")
        if any(abs(bias) > MAX_BIAS for _, bias in sampler.logit_bias if bias != NEVER):
            raise SettingsError(f"logit_bias: a vLLM server takes numbers from -{MAX_BIAS} to {MAX_BIAS}.")
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(sampler, name) for name in names} | penalties

    def _take(self, candidate: Candidate, found: Completion) -> None:
        """Copy a completion into its candidate, and cut what the server did not cut."""
        [choice], paid, usage = found.choices, found.usage, candidate.context.usage
        ids, log_p = choice.token_ids, choice.logprobs.token_logprobs
        if not candidate.before and candidate.index == 0 and not usage.lm_tokens:  # the others find what it has read
            usage.cached_tokens = min(paid.cached_tokens, usage.prompt_tokens)
        usage.lm_tokens += paid.prompt_tokens - paid.cached_tokens + paid.completion_tokens
        by_token = choice.ends_with_token
        risen = by_token and self._served(candidate.boundary) and choice.stop_reason == self.sentinel
        usage.drafted_tokens += len(ids) - risen
        ended = by_token and not risen
        if by_token:
            ids = ids[:-1]
        if risen and len(ids) < candidate.boundary.min_tokens:
            raise ModelError(
                f"model {self.name!r}: the server ended a segment of at least {candidate.boundary.min_tokens} tokens "
                f"after {len(ids)}. Does it have EntropyStop of this version of cards-integrations?"
            )
        least = candidate.context.sampler.min_tokens
        if ended and len(candidate.before) + len(ids) < least:
            raise ModelError(
                f"model {self.name!r}: the server ended an answer of at least min_tokens={least} tokens after "
                f"{len(candidate.before) + len(ids)}. Does it have EntropyStop of this version of cards-integrations?"
            )
        length = self._cut(candidate, ids)
        candidate.ids = ids[:length]
        candidate.log_p = log_p[: len(candidate.ids)]
        candidate.log_likelihood = sum(candidate.log_p)
        if count := candidate.context.logprobs:
            candidate.top = [*choice.logprobs.top(count)[: len(candidate.ids)]]
        if length is None and ended:
            candidate.finish, candidate.end_log_p = "stop", log_p[-1]
        elif candidate.finish is None and candidate.end >= candidate.context.max_tokens:
            candidate.finish = "length"

    def _served(self, boundary: Boundary) -> bool:
        """Return True if the server ends segments of this boundary with the sentinel."""
        return boundary.served is not None and self.plugin

    def _cut(self, candidate: Candidate, ids: list[int]) -> int | None:
        """How many of the tokens are the candidate's if it ends before them, or with them, at a stop string or a mark.

        None: all of them, and whatever ended them in the server ends the candidate.
        """
        context, boundary = candidate.context, candidate.boundary
        candidate.response = self.chat.decode([*candidate.before, *ids], context.start)
        punctuated = boundary.reads_text or (
            boundary.served is not None and not self.plugin and self.spec.without_plugin == "punctuation"
        )
        for length in range(1, len(ids) + 1) if punctuated or context.stop else ():
            response = self.chat.decode([*candidate.before, *ids[:length]], context.start)
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
