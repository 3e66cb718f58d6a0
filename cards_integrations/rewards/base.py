"""The protocol of reward models: settings that build a model, and a model that scores answers.

A reward model sees whole answers so far (kept text plus candidate). It may keep a state for each
request, which is how a decoder scores a candidate by its new tokens only.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from weakref import WeakValueDictionary

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from cards_integrations.chat.message import Message
from cards_integrations.chat.template import ChatTokenizer, as_text, same_vocabulary
from cards_integrations.errors import CardsError, ModelError, OutOfMemory, RewardError
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.prompts import PLAIN
from cards_integrations.threads import in_thread
from cards_integrations.trace import Usage

if TYPE_CHECKING:
    from cards_integrations.transformer.kv_memory import CacheNeed
    from cards_integrations.transformer.step_times import StepTimes

Scores = Sequence[float] | Awaitable[Sequence[float]]


@dataclass(eq=False)
class Conversation:
    """The request that answers belong to; `context` are the texts that they should be grounded in."""

    prompt: str | list[Message]
    usage: Usage
    context: tuple[str, ...] = ()


@dataclass(eq=False)
class Response:
    """An answer so far.

    `ids` are the language model's own tokens, and `log_likelihood` the sum of their log p in nats
    under it (full vocabulary, temperature 1); both None if the text was cut, or is not the model's.
    `finished`: no more text follows. A composite leaves the scores of its `parts` here, by name.
    `parent` is a scored response, not kept, that this one goes on from.
    """

    conversation: Conversation
    text: str
    ids: list[int] | None = None
    log_likelihood: float | None = None
    finished: bool = False
    parts: dict[str, float] = field(default_factory=dict)
    parent: Response | None = None


class RewardModel(ABC):
    """A loaded reward model, called in the engine's thread; higher scores are better.

    A model that remembers something about conversations (from `open` to `close`) or responses (from
    `score` to `keep` or `drop`) does so in dicts of its own: both hash by identity. At `close`
    everything of the conversation goes, its responses included.
    """

    name: str
    timeout: float | None = None
    across_requests: bool = False
    """May one call of `score` take the answers of several requests?"""

    @property
    def step_times(self) -> StepTimes | None:
        """Seconds of a call by its number of tokens, if it keeps the language model's device busy."""
        return None

    def cache_needs(self, conversation: Conversation, tokens: int) -> list[CacheNeed]:
        """Rows and columns that a request of so many tokens takes in the caches of this model."""
        return []

    def open(self, conversation: Conversation) -> None:
        """A request begins."""

    @abstractmethod
    async def score(self, responses: Sequence[Response]) -> Sequence[float]:
        """One finite float for each response."""

    def keep(self, response: Response) -> None:
        """The request goes on from this scored response."""

    def drop(self, response: Response) -> None:
        """This scored response was given up."""

    def close(self, conversation: Conversation) -> None:
        """The request has ended."""


scoring: ContextVar[bool] = ContextVar("scoring", default=False)
"""Is this part of a reward, for which requests wait?"""


async def scores(model: RewardModel, responses: Sequence[Response]) -> list[float]:
    """The scores, or a `RewardError` that names the reward and the text that caused it."""
    outer = scoring.set(True)
    try:
        async with asyncio.timeout(model.timeout) as deadline:
            found = [float(value) for value in await model.score(responses)]
    except (RewardError, OutOfMemory):
        raise
    except BaseException as error:  # a function may raise what would end the engine's thread
        if isinstance(error, asyncio.CancelledError) and _cancelled():
            raise
        if isinstance(error, TimeoutError) and deadline.expired():
            raise RewardError(
                f"reward {model.name!r} gave no scores within timeout={model.timeout} seconds."
            ) from error
        texts = ", ".join(repr(response.text) for response in responses)
        raise RewardError(f"reward {model.name!r} failed for {texts}: {type(error).__name__}: {error}") from error
    finally:
        scoring.reset(outer)
    if len(found) != len(responses):
        raise RewardError(f"reward {model.name!r} returned {len(found)} scores for {len(responses)} texts.")
    for value, response in zip(found, responses, strict=True):
        if not math.isfinite(value):
            raise RewardError(f"reward {model.name!r} returned {value} for the text {response.text!r}.")
    return found


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def count_forward(read: Iterable[tuple[Conversation, int]]) -> None:
    """Put a forward that many requests shared on the account of each, with the tokens read for it."""
    served = {}
    for conversation, tokens in read:
        conversation.usage.rm_tokens += tokens
        served[id(conversation.usage)] = conversation.usage
    for usage in served.values():
        usage.rm_forwards += 1


class Reward(BaseModel):
    """Settings of a reward model. A subclass has a `kind` and either `score` or `build`.

    `granularity="sentence"` is for rewards that make sense on whole sentences only: an unfinished
    answer is scored as far as its last complete sentence. `timeout` is in seconds, for one call.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    standardises: ClassVar[bool] = False
    """Does it need the scales of its parts?"""

    kind: str
    scale: tuple[FiniteFloat, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    """Mean and spread of the reward over plain answers. None: measured where it is needed."""
    granularity: Literal["token", "sentence"] = "token"
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def name(self) -> str:
        """What errors and metadata call it."""
        return self.kind

    @property
    def parts(self) -> tuple[Reward, ...]:
        """The rewards that it is made of."""
        return ()

    def with_parts(self, parts: Sequence[Reward]) -> Reward:
        """The same, made of other parts."""
        return self

    def __hash__(self) -> int:
        return hash((type(self), *(_hash(getattr(self, name)) for name in type(self).model_fields)))

    @property
    def scaled_like(self) -> Reward:
        """The reward whose scale is this one's, too."""
        return self.with_parts([part.scaled_like for part in self.parts])

    def has_signal_for(self, conversation: Conversation) -> bool:
        """Has it anything to say here? Where it has not, the answer is a plain one."""
        return all(part.has_signal_for(conversation) for part in self.parts)

    @property
    def sentencewise(self) -> bool:
        """Is an unfinished answer scored as far as its last complete sentence?"""
        return self.granularity == "sentence"

    @property
    def lasting(self) -> bool:
        """Will the same settings mean the same in another process? Code of a notebook may change."""
        return type(self).__module__ != "__main__" and all(part.lasting for part in self.parts)

    @property
    def stays_loaded(self) -> bool:
        """As long as the engine, or only while a request needs it, as what is as good as free to build."""
        return not self.parts

    @property
    def prompts(self) -> Sequence[tuple[str, tuple[str, ...]]]:
        """Prompts, each with its context, on whose plain answers it can be measured."""
        return [(prompt, ()) for prompt in PLAIN]

    def score(self, prompt: str, responses: list[str]) -> Scores:
        """One float for each answer to the prompt, higher is better.

        Sync (run in a thread) or async (run in the engine's loop, which all requests share: it must not block).

        `prompt` is the user's text, or the whole conversation with roles if it has several messages.
        The reward of the prompt alone is asked for as `responses=[""]`.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither score() nor build().")

    def build(self, loader: RewardLoader) -> RewardModel:
        """Load it; called once per engine, in the engine's thread."""
        return CallableModel(self.name, self.score)


def _hash(value: Any) -> int:
    """Nothing for what has none: a plug-in's fields may be lists."""
    try:
        return hash(value)
    except TypeError:
        return 0


class CallableModel(RewardModel):
    """A Python callable, `function(prompt, responses)`, asked for one request at a time."""

    def __init__(self, name: str, function: Callable[[str, list[str]], Scores]) -> None:
        self.name = name
        self.function = function

    async def score(self, responses: Sequence[Response]) -> Sequence[float]:
        conversation = responses[0].conversation
        prompt, texts = as_text(conversation.prompt), [r.text for r in responses]
        if inspect.iscoroutinefunction(self.function):
            found: Scores = self.function(prompt, texts)
        else:
            found = await in_thread(self.function, prompt, texts)
        if inspect.isawaitable(found):
            found = await found
        conversation.usage.rm_forwards += 1
        if isinstance(found, (str, bytes, Mapping)):
            raise TypeError(f"it returned {type(found).__name__}, and not a list of numbers")
        return list(found)


class Instant(RewardModel):
    """A function of the response alone, so cheap that it needs no thread."""

    across_requests = True

    def __init__(self, name: str, function: Callable[[Response], float]) -> None:
        self.name = name
        self.function = function

    async def score(self, responses: Sequence[Response]) -> list[float]:
        return [self.function(response) for response in responses]


@dataclass(frozen=True)
class Causal:
    """A causal model that a reward reads; `own`: it is the language model that drafts."""

    model: Any
    chat: ChatTokenizer
    own: bool
    same_vocabulary: bool


class RewardLoader:
    """The reward models of one engine, each built once, whichever composite it is part of."""

    def __init__(self, models: ModelLoader) -> None:
        self.models = models
        self.built: WeakValueDictionary[Reward, RewardModel] = WeakValueDictionary()
        self._loaded: list[RewardModel] = []

    def causal(self, spec: LocalModel | None, name: str) -> Causal:
        """The language model itself (None), or another causal model, for the reward of this name."""
        if self.models.language_model is None:
            raise ModelError(f"reward {name!r} needs a local language model.")
        own, model, tokenizer = self.models.language_model
        if spec is None or spec.same_weights(own):
            return Causal(model, ChatTokenizer(tokenizer), own=True, same_vocabulary=True)
        other, its_tokenizer = self.models.causal(spec)
        return Causal(other, ChatTokenizer(its_tokenizer), False, same_vocabulary(its_tokenizer, tokenizer))

    def __getitem__(self, settings: Reward) -> RewardModel:
        key = settings if settings.parts else settings.model_copy(update={"scale": None})
        if (known := self.built.get(key)) is not None:
            return known
        try:
            model = settings.build(self)
        except CardsError:
            raise
        except Exception as error:
            raise RewardError(f"reward {settings.name!r} cannot be loaded: {type(error).__name__}: {error}") from error
        if settings.sentencewise:
            from cards_integrations.rewards.scorers.sentences import WholeSentences

            model = WholeSentences(model)
        model.timeout = settings.timeout
        self.built[key] = model
        if settings.stays_loaded:
            self._loaded.append(model)
        return model
