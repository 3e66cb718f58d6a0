"""Reads and checks the body of a request of OpenAI's API, field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cards_integrations.chat.message import Message, as_prompt
from cards_integrations.chat.template import FormattedPrompt
from cards_integrations.errors import short_repr
from cards_integrations.server.choices import Choices
from cards_integrations.server.errors import ApiError, invalid

Endpoint = Literal["chat", "completions"]

PASSED_ON = {
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "min_tokens", "timeout"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "finish_at"),
    *("response_format", "thinking", "max_thinking_tokens", "chat_template_kwargs"),
}
"""Fields that are passed to the engine as they are."""
CHAT_ONLY = {"tools", "tool_choice", "parallel_tool_calls"}
IGNORED = {
    *("user", "store", "metadata", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "include_obfuscation"),
}
"""Fields that concern OpenAI's own service only."""
NEUTRAL: dict[str, Any] = {
    "modalities": ["text"], "echo": False, "suffix": "", "best_of": 1, "functions": [], "function_call": "none",
}  # fmt: skip
"""Fields that are not supported, and the values that ask for nothing, which are accepted."""
MAX_LOGPROBS = 20
HINTS = {"functions": " Send tools instead.", "function_call": " Send tool_choice instead."}


@dataclass(frozen=True)
class Call:
    """A request that has been read and checked.

    Attributes:
        prompts: The prompts, each of which is answered `n` times.
        options: Arguments of `Options.request`.
        n: The number of answers to each prompt.
        stream: Whether to send each kept segment at once.
        include_usage: Whether a stream ends with the usage.
        trace: Whether to send rewards, thresholds and rejected drafts as well.
    """

    prompts: list[str | list[Message]]
    options: dict[str, Any] = field(default_factory=dict)
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    trace: bool = False


class BodyReader:
    """Reads the bodies of requests.

    Args:
        names: The names by which clients may call the model.
        choices: The methods and rewards that they may choose.
        n: The number of answers to a prompt if a request does not set it.
        max_choices: Most answers of one request.
    """

    def __init__(self, names: set[str], choices: Choices, n: int, max_choices: int) -> None:
        self._names = names
        self._choices = choices
        self._default_n = n
        self._max_choices = max_choices

    def read(self, endpoint: Endpoint, content: bytes, headers: Mapping[str, str]) -> Call:
        """Read the body of a request.

        Args:
            endpoint: Whether it is a chat or a completion.
            content: The body.
            headers: The headers, which may choose the method and the reward.

        Raises:
            ApiError, CardsError: A field is missing, not supported, or cannot be used as given.
        """
        fields = {name: value for name, value in parse(content).items() if value is not None and name not in IGNORED}
        self.check_model(fields.pop("model", None))
        prompts = _messages(fields) if endpoint == "chat" else _texts(fields)
        stream, usage = _flag(fields, "stream"), _include_usage(fields)
        n, extra = self._n(fields, len(prompts)), _object(fields, "cards")
        options = {"n": n, **_max_tokens(fields), **self._cards(extra, headers), **_effort(fields, endpoint)}
        options |= _logprobs(fields, endpoint)
        allowed = PASSED_ON | CHAT_ONLY if endpoint == "chat" else PASSED_ON
        for name, value in fields.items():
            if name in allowed:
                options[name] = value
            elif value != NEUTRAL.get(name, ...):
                raise invalid(f"{name}={short_repr(value)} is not supported.{HINTS.get(name, '')}", name)
        return Call(prompts, options, n, stream, usage, _flag(extra, "trace"))

    def check_model(self, name: Any) -> None:
        """Raise an `ApiError` (HTTP 404) if this server has no model with this name."""
        if not isinstance(name, str) or name not in self._names:
            known = ", ".join(sorted(self._names))
            missing = "No model is named" if name is None else f"The model {short_repr(name)} is not here"
            raise ApiError(
                404,
                f"{missing}: send model={known}.",
                param="model",
                code="model_not_found",
            )

    def _n(self, fields: dict[str, Any], prompts: int) -> int:
        n = fields.pop("n", self._default_n)
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise invalid(f"n={short_repr(n)}: send a number from 1 on.", "n")
        if n * prompts > self._max_choices:
            raise invalid(
                f"n={n}, to {prompts} prompts: at most {self._max_choices} answers are allowed; send fewer.", "n"
            )
        return n

    def _cards(self, extra: dict[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """Return the method, the reward and the context that were chosen; the body takes precedence over headers."""
        for name in extra.keys() - {"decoding", "reward", "context", "trace"}:
            raise invalid(f"cards.{name[:100]} is not known: send decoding, reward, context or trace.", "cards")
        found: dict[str, Any] = {}
        if (decoding := extra.get("decoding", headers.get("X-Cards-Decoding"))) is not None:
            found["decoding"] = self._choices.decoding(decoding)
        if (reward := extra.get("reward", headers.get("X-Cards-Reward"))) is not None:
            found["reward"] = self._choices.reward(reward)
        if (context := extra.get("context")) is not None:
            found["context"] = _strings(context, "cards.context")
        return found


def parse(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        ApiError: The body is something else.
    """
    try:
        found = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise invalid(f"The body is not JSON: {reason}.") from None
    if not isinstance(found, dict):
        raise invalid("The body is not a JSON object.")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _messages(fields: dict[str, Any]) -> list[str | list[Message]]:
    messages = fields.pop("messages", None)
    if not isinstance(messages, list):
        raise invalid("messages is missing: send a list of them.", "messages")
    return [as_prompt(messages)]


def _texts(fields: dict[str, Any]) -> list[str | list[Message]]:
    """Return the prompts of a completion, which the model reads as they are, without a chat template."""
    prompt = fields.pop("prompt", None)
    if prompt is None:
        raise invalid("prompt is missing: send a text, or a list of them.", "prompt")
    texts = _strings(prompt, "prompt")
    if not texts:
        raise invalid("prompt is an empty list: send at least one text.", "prompt")
    return [FormattedPrompt(text) for text in texts]


def _strings(value: Any, name: str) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise invalid(f"{name}={short_repr(value)}: send a text, or a list of texts; token ids are not read.", name)
    return found


def _max_tokens(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `max_tokens` under either of the names that OpenAI has given it."""
    given = [fields.pop(name) for name in ("max_tokens", "max_completion_tokens") if name in fields]
    if len(given) == 2 and given[0] != given[1]:
        raise invalid("max_tokens and max_completion_tokens differ: send one of them.", "max_tokens")
    return {"max_tokens": given[0]} if given else {}


def _logprobs(fields: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """Return the options of log-probabilities: a chat has a flag and a number, a completion only a number."""
    asked, top = fields.pop("logprobs", False), fields.pop("top_logprobs", 0)
    if endpoint == "completions" and not isinstance(asked, bool):
        asked, top = True, asked
    if not isinstance(top, int) or not 0 <= top <= MAX_LOGPROBS:
        name = "top_logprobs" if endpoint == "chat" else "logprobs"
        raise invalid(f"{name}={short_repr(top)}: send a number from 0 to {MAX_LOGPROBS}.", name)
    return {"logprobs": asked, "top_logprobs": top if asked else 0}


def _effort(fields: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """Return the options of `reasoning_effort`: an argument of the chat template; "none" turns thinking off, too."""
    effort = fields.pop("reasoning_effort", None) if endpoint == "chat" else None
    if effort is None:
        return {}
    given = _object({"chat_template_kwargs": fields.pop("chat_template_kwargs", {})}, "chat_template_kwargs")
    arguments = {"chat_template_kwargs": {"reasoning_effort": effort, **given}}
    return {**arguments, "thinking": fields.pop("thinking", "off")} if effort == "none" else arguments


def _include_usage(fields: dict[str, Any]) -> bool:
    options = _object(fields, "stream_options")
    return _flag(options, "include_usage")


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.pop(name, False)
    if not isinstance(value, bool):
        raise invalid(f"{name}={short_repr(value)}: send true or false.", name)
    return value


def _object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.pop(name, {})
    if not isinstance(value, dict):
        raise invalid(f"{name}={short_repr(value)}: send an object.", name)
    return value
