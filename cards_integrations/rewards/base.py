"""The protocol of reward models: settings that build a model, and a model that scores answers.

A reward model sees the whole answer so far (kept text plus candidate). It may remember what it has read of a
conversation; so a decoder scores a candidate by reading its new tokens only.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import ConfigDict, Field, FiniteFloat

from cards_integrations.chat.message import Message
from cards_integrations.chat.template import ChatTokenizer, as_text
from cards_integrations.errors import OutOfMemory, RewardError, said, short_repr
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.hung_calls import HUNG_CALLS
from cards_integrations.rewards.prompts import PLAIN
from cards_integrations.settings_model import SettingsModel
from cards_integrations.trace import Usage

if TYPE_CHECKING:
    import torch

    from cards_integrations.transformer.kv_memory import CacheNeed, KVMemory
    from cards_integrations.transformer.step_times import StepTimes

Scores = Sequence[float] | Awaitable[Sequence[float]]


@dataclass(eq=False)
class Conversation:
    """The request that answers belong to. Hashes by identity."""

    prompt: str | list[Message]
    """The user's text, or the messages of a chat."""
    usage: Usage
    """What the request has cost so far; a reward model adds its own forwards."""
    context: tuple[str, ...] = ()
    """The texts that answers should be grounded in."""


@dataclass(eq=False)
class Response:
    """An answer so far. Hashes by identity."""

    conversation: Conversation
    """What it answers."""
    text: str
    """All of the answer so far."""
    ids: list[int] | None = None
    """The language model's own tokens; None if the text was cut, or another wrote it."""
    log_likelihood: float | None = None
    """The sum of their log p in nats under the language model (full vocabulary, temperature 1); None as above."""
    finished: bool = False
    """True if no more text follows."""
    parts: dict[str, float] = field(default_factory=dict)
    """The scores of a composite's parts by name, which the composite fills in."""
    parent: Response | None = None
    """A scored response, not kept yet, that this one continues."""
    states: torch.Tensor | None = None
    """The language model's last hidden state after the last token, and the mean of those after all tokens of the
    answer, (2, hidden size), float32. None if no reward reads them, if the text was cut, or if another wrote it."""


class RewardModel(ABC):
    """A loaded reward model, called in the engine's thread; higher scores are better.

    What a model remembers of conversations (from `open` to `close`) and of responses (from `score` to `keep` or `drop`)
    it keeps in dicts of its own. `close` ends all that is known of a conversation and of its responses.
    """

    name: str
    """Its name in errors, logs and traces."""
    timeout: float | None = None
    """Seconds that one call of `score` may take."""
    across_requests: bool = False
    """True if one call of `score` may take answers of several requests."""

    @property
    def reads_states(self) -> bool:
        """True if drafted answers should come with the language model's hidden states."""
        return False

    @property
    def step_times(self) -> StepTimes | None:
        """Seconds of a call by its number of tokens; None if it does not occupy the language model's device.

        Read for the first time in a thread of its own, where they may be measured.
        """
        return None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV caches that belong to this model alone."""
        return 0

    def cache_needs(self, conversation: Conversation, tokens: int) -> list[CacheNeed]:
        """Return the rows and columns that a request of `tokens` tokens takes in the KV caches of this model."""
        return []

    def growth(self, responses: Sequence[Response]) -> int:
        """Return by how many bytes the KV caches grow at most when these are scored."""
        return 0

    def preempt(self, conversation: Conversation) -> None:
        """Free what a conversation holds in KV caches; it is not scored until `resume`."""

    def resume(self, conversation: Conversation) -> None:
        """Let a preempted conversation be scored again."""

    def open(self, conversation: Conversation) -> None:
        """Begin a request.

        Raises:
            PromptError, RewardError: The model cannot score answers to this prompt. Nothing is left open.
        """

    @abstractmethod
    async def score(self, responses: Sequence[Response]) -> Sequence[float]:
        """Score answers of open conversations.

        Args:
            responses: All of one conversation, unless `across_requests`.

        Returns:
            One finite float for each response, in their order.
        """

    def keep(self, response: Response) -> None:
        """Continue the request from this scored response."""

    def drop(self, response: Response) -> None:
        """Give up this scored response. Does nothing if it is not known."""

    def close(self, conversation: Conversation) -> None:
        """End the request. Does nothing if it is not open."""

    def release(self) -> None:
        """Give back what this model alone holds: caches, connections, tasks. It is not used after this.

        Models that it got from its loader may serve others, and are not released here.
        """


DEEPEST = 16  # how deep rewards may ask for each other; each waits in a thread
scoring: ContextVar[int] = ContextVar("scoring", default=0)
"""Above 0 while a reward is computed: what it asks the engine for must not wait for the requests that wait for it.

1 for the reward of a request; 2 for the reward of a request that a reward has made; and so on."""


async def scores(model: RewardModel, responses: Sequence[Response]) -> list[float]:
    """Score responses with the model's timeout, and check what it returns.

    Raises:
        RewardError: The model failed, which the error tells with the reward's name and the texts; or rewards ask for
            each other without end.
        OutOfMemory: As the model raised it.
    """
    if scoring.get() >= DEEPEST:
        raise RewardError(
            f"reward {model.name!r} is asked for by {DEEPEST} rewards within each other: it asks for itself. "
            "Let it use another reward."
        )
    outer = scoring.set(scoring.get() + 1)
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
                f"reward {model.name!r} gave no scores within timeout={model.timeout} seconds: use a larger timeout."
            ) from error
        texts = ", ".join(short_repr(response.text) for response in responses[:3])
        more = f" and {len(responses) - 3} more" if len(responses) > 3 else ""
        failed = f"reward {model.name!r} failed: {said(error)}"
        raise RewardError(f"{failed}; it was asked for {texts}{more}.") from error
    finally:
        scoring.reset(outer)
    if len(found) != len(responses):
        raise RewardError(
            f"reward {model.name!r} returned {len(found)} scores for {len(responses)} texts: it must return one each."
        )
    for value, response in zip(found, responses, strict=True):
        if not math.isfinite(value):
            raise RewardError(
                f"reward {model.name!r} returned {value} for the text {response.text!r}: scores must be finite numbers."
            )
    return found


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def count_forward(tokens_read: Iterable[tuple[Conversation, int]]) -> None:
    """Count one forward, which requests may share, in the usage of each with the tokens that were read for it."""
    served = {}
    for conversation, tokens in tokens_read:
        conversation.usage.rm_tokens += tokens
        served[id(conversation.usage)] = conversation.usage
    for usage in served.values():
        usage.rm_forwards += 1


@dataclass(frozen=True)
class CausalModel:
    """A causal model that a reward reads."""

    model: Any
    chat: ChatTokenizer
    is_language_model: bool
    """True if it is the language model that drafts."""
    same_vocabulary: bool
    """True if it has the language model's token ids."""
    memory: KVMemory | None
    """The budget of the KV caches of all models of the engine."""


class Loader(Protocol):
    """Gives `Reward.build` the weights of the engine, and the models of other rewards."""

    models: ModelLoader
    """Loads weights onto the engine's device, each once."""

    def causal(self, spec: LocalModel | None, name: str) -> CausalModel:
        """Load a causal model for a reward.

        Args:
            spec: The model; None for the language model that drafts.
            name: What errors call the reward.

        Raises:
            ModelError: The language model is not a local one, or the model does not load.
        """

    def __getitem__(self, settings: Reward) -> RewardModel:
        """Return the reward model of these settings: built once, and kept as long as the model that asks for it."""


class Reward(SettingsModel):
    """Settings of a reward model. A subclass has a `kind` and either `score` or `build`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, use_attribute_docstrings=True)

    needs_part_scales: ClassVar[bool] = False
    """True if the parts must come with their scales."""

    kind: str
    """Names the class in settings files."""
    scale: tuple[FiniteFloat, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    """Mean and standard deviation of the reward over plain answers. None: measured where it is needed."""
    granularity: Literal["token", "sentence"] = "token"
    """"sentence" scores an unfinished answer up to its last complete sentence; "token" scores all of it."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds that one call may take."""

    @property
    def name(self) -> str:
        """What errors and metadata call it."""
        return self.kind

    @property
    def parts(self) -> tuple[Reward, ...]:
        """The rewards that it is made of."""
        return ()

    def with_parts(self, parts: Sequence[Reward]) -> Reward:
        """Return the same reward, made of other parts."""
        return self

    def __hash__(self) -> int:
        return hash((type(self), *(_hash(getattr(self, name)) for name in type(self).model_fields)))

    def needs_scale_of(self, part: int) -> bool:
        """Return True if the part with this index must come with its scale."""
        return self.needs_part_scales

    @property
    def scale_source(self) -> Reward:
        """The reward whose scale is also the scale of this one."""
        return self.with_parts([part.scale_source for part in self.parts])

    @property
    def published_scale(self) -> tuple[float, float] | None:
        """Mean and standard deviation from the settings, or the files that they name; None if they must be measured."""
        return self.scale

    def has_signal_for(self, conversation: Conversation) -> bool:
        """Return True if the reward can guide an answer here; otherwise a plain answer is written."""
        return all(part.has_signal_for(conversation) for part in self.parts)

    @property
    def scores_whole_sentences(self) -> bool:
        """True if an unfinished answer is scored up to its last complete sentence."""
        return self.granularity == "sentence"

    @property
    def is_reproducible(self) -> bool:
        """True if equal settings mean the same reward in another process. Code of a notebook may change."""
        return type(self).__module__ != "__main__" and all(part.is_reproducible for part in self.parts)

    @property
    def held(self) -> tuple[Any, ...]:
        """What it depends on beside its settings where it is not reproducible: objects of this process."""
        return (type(self),)

    @property
    def stays_loaded(self) -> bool:
        """True if it is kept for later requests; False if it is cheap to build, and kept only while in use."""
        return not self.parts

    @property
    def prompts(self) -> Sequence[tuple[str, tuple[str, ...]]]:
        """Prompts, each with its context, on whose plain answers the scale is measured."""
        return [(prompt, ()) for prompt in PLAIN]

    def score(self, prompt: str, responses: list[str]) -> Scores:
        """Score answers to one prompt; higher is better.

        Either sync (run in a thread) or async (run in the engine's loop, which all requests share, so that it must not
        block).

        Args:
            prompt: The user's text, or the whole conversation with roles if it has several messages.
            responses: Answers, possibly unfinished. The reward of the prompt alone is asked for as `[""]`.

        Returns:
            One finite float for each answer.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither score() nor build().")

    def build(self, loader: Loader) -> RewardModel:
        """Load the reward model; called in a thread of its own, while other requests go on."""
        return CallableModel(self.name, self.score)


class ObjectReward(Reward):
    """Settings that hold an object of this process; there may be another one for each request."""

    @property
    def is_reproducible(self) -> bool:
        return False

    @property
    def stays_loaded(self) -> bool:
        return False


def _hash(value: Any) -> int:
    """Return the hash of a value, or 0 if it has none: fields of a plug-in may be lists."""
    try:
        return hash(value)
    except TypeError:
        return 0


class CallableModel(RewardModel):
    """A Python callable, `function(prompt, responses)`, asked for one request at a time."""

    def __init__(self, name: str, function: Callable[[str, list[str]], Scores]) -> None:
        self.name = name
        self.function = function
        if why := refusal(name, function):
            raise RewardError(why)

    async def score(self, responses: Sequence[Response]) -> Sequence[float]:
        conversation = responses[0].conversation
        prompt, texts = as_text(conversation.prompt), [r.text for r in responses]
        HUNG_CALLS.check(self.name, self.function)
        listed = partial(_listed, most=len(texts) + 1)
        if inspect.iscoroutinefunction(self.function):
            found: Scores = self.function(prompt, texts)
        else:
            found = await HUNG_CALLS.call(self.function, prompt, texts, then=listed)
        if inspect.isawaitable(found):
            found = listed(await HUNG_CALLS.finish(self.function, found))
        conversation.usage.rm_forwards += 1
        if not isinstance(found, list):
            raise TypeError(f"it returned {type(found).__name__}, not a list of numbers, one for each answer")
        return found


def refusal(name: str, function: Callable[..., Any]) -> str:
    """Return why a function cannot be called with the arguments of a reward; "" if it can."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have no signature
        return ""
    try:
        signature.bind("", [""])
    except TypeError as error:
        return (
            f"reward {name!r} is called with (prompt, answers), a text and a list of texts, and returns a number for "
            f"each answer; but it takes {signature}: {error}."
        )
    return ""


def _listed(found: Any, most: int) -> Any:
    """Turn any iterable, such as a generator, into a list; return anything else as it is.

    Args:
        found: What a function returned.
        most: How many items are read of an iterable without a length, which may be endless.
    """
    if isinstance(found, (str, bytes, Mapping)) or not isinstance(found, Iterable) or inspect.isawaitable(found):
        return found
    return list(found if isinstance(found, Sized) else islice(found, most))


class Instant(RewardModel):
    """A function of the response, so cheap that it needs no thread."""

    across_requests = True

    def __init__(self, name: str, function: Callable[[Response], float]) -> None:
        self.name = name
        self.function = function

    async def score(self, responses: Sequence[Response]) -> list[float]:
        return [self.function(response) for response in responses]
