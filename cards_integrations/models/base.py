"""What the engine asks of a language model, and the candidates that they share.

`LanguageModel` is all that a backend has to be. What only some backends can do is a protocol of its own:
`StepwiseModel` for a model that computes on this machine, a step at a time; `ConstrainedModel` for one that can be
held to a grammar; `LogitsReader` and `StateReader` for one that can read whole answers again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Protocol, runtime_checkable

from pydantic import ConfigDict, Field

from cards_integrations.chat.answer_start import NOTHING_BEFORE, AnswerStart
from cards_integrations.chat.message import PARTIAL_CHARACTER, Message
from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.errors import CardsError
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler
from cards_integrations.settings_model import SettingsModel
from cards_integrations.trace import FinishReason, Usage

if TYPE_CHECKING:
    import torch

    from cards_integrations.chat.grammar import Grammar, Matcher
    from cards_integrations.chat.template import ChatTokenizer
    from cards_integrations.transformer.kv_memory import CacheNeed
    from cards_integrations.transformer.step_times import StepTimes

CLOSE_WITHIN = 32  # tokens before the limit; required arguments that are still to come take some


class Boundary(SettingsModel):
    """Where a candidate segment ends, apart from end-of-sequence, stop strings and the token limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def ends_before(self, logits: torch.Tensor, log_p: torch.Tensor, rows: list[int]) -> torch.Tensor | None:
        """Decide whether a segment ends before the token that these logits are for.

        Args:
            logits: Raw logits of the next token, (n, vocabulary).
            log_p: Their log-softmax in nats, (n, vocabulary).
            rows: The rows to decide for.

        Returns:
            A bool for each of the rows, (rows,), or None if this boundary does not look at logits.
        """
        return None

    def ends_after(self, text: str) -> bool:
        """Decide whether a segment with this text ends with its last token.

        Args:
            text: The segment so far; it may end within a character (U+FFFD).

        Returns:
            True if the segment ends here.
        """
        return False

    @property
    def served(self) -> Mapping[str, str | float] | None:
        """The arguments with which `vllm_plugin.EntropyStop` ends the segment in a vLLM server; None if it cannot."""
        return None

    @property
    def reads_text(self) -> bool:
        """True if `ends_after` has to be called."""
        return type(self).ends_after is not Boundary.ends_after

    @property
    @abstractmethod
    def min_tokens(self) -> int:
        """Tokens of a segment before which neither `ends_before` nor `ends_after` is called."""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Tokens at which a segment ends at the latest."""


@dataclass(eq=False)
class Context:
    """A prompt and the text kept so far, as every candidate of a request sees it.

    Attributes:
        prompt: The user's text, or the messages.
        prompt_ids: The prompt's token ids, chat template included.
        max_tokens: Most tokens of the whole answer.
        sampler: How tokens are drawn from logits.
        stop: Strings that end the answer.
        usage: What the request has cost so far.
        matcher: Where the kept text is in its grammar; None without one.
        logprobs: How many of the most probable tokens are reported for each token; None reports nothing.
        whole_sentences: True if an answer that reaches `max_tokens` ends with its last whole sentence.
        states: True if candidates should come with the model's hidden states, if it has any.
        ids: Token ids of the kept text.
        text: The kept text.
        start: The end of the prompt, after which the kept text is decoded.
    """

    prompt: str | list[Message]
    prompt_ids: list[int]
    max_tokens: int
    sampler: Sampler
    stop: StopStrings
    usage: Usage
    matcher: Matcher | None = None
    logprobs: int | None = None
    whole_sentences: bool = False
    states: bool = False
    ids: list[int] = field(default_factory=list)
    text: str = ""
    start: AnswerStart = NOTHING_BEFORE


@dataclass(eq=False)
class Candidate:
    """One candidate segment, from its first token to its end.

    It follows the text kept when it began or, if it was drafted ahead, `parent`, a finished candidate of the
    segment before.

    Attributes:
        context: The request that it belongs to.
        boundary: Where it ends.
        uniforms: Its own stream of random numbers.
        index: Its place among the candidates of its segment.
        parent: The candidate that it follows; None if it follows the kept text.
        ids: Its own token ids.
        rank: If given, the first token is not drawn: it is the one of this rank by probability (0 is the most
            probable), or the least probable one that is allowed.
        log_p: log p of each of its tokens in nats, full vocabulary, temperature 1.
        top: For each of its tokens, the ids of the most probable ones and their log p, where the request reports them.
        log_likelihood: Sum of log p of its tokens.
        end_log_p: log p of the end-of-sequence token that ended it.
        finish: Why the whole answer ends with it; None if it can go on.
        whole: False if a stop string was cut off, so that the text is not all of the ids.
        matcher: Where it is in its grammar; None without one.
        error: Why it cannot be drafted. `sample` returns such a candidate like one that has ended, and its request
            fails.
        before: Token ids of the text that it follows.
        before_text: Their text, without an incomplete character at the end.
        limit: The most tokens that it may have.
        watched: True if its text is needed after each token, for stop strings or for its boundary.
        response: The whole answer with this candidate, cut before a stop string.
        states: If its context asks for states, once it has ended: the last hidden state after its last token, and the
            mean of those after all tokens of the answer, (2, hidden size) in float32; None if they are unknown.
    """

    context: Context
    boundary: Boundary
    uniforms: Uniforms
    index: int
    parent: Candidate | None = None
    ids: list[int] = field(default_factory=list)
    rank: int | None = None
    log_p: list[float] = field(default_factory=list)
    top: list[Sequence[tuple[int, float]]] = field(default_factory=list)
    log_likelihood: float = 0.0
    end_log_p: float = 0.0
    finish: FinishReason | None = None
    whole: bool = True
    matcher: Matcher | None = None
    error: CardsError | None = None
    before: list[int] = field(init=False)
    before_text: str = field(init=False)
    limit: int = field(init=False)
    watched: bool = field(init=False)
    response: str = field(init=False)
    states: torch.Tensor | None = None

    def __post_init__(self) -> None:
        parent = self.parent
        self.before = self.context.ids.copy() if parent is None else parent.before + parent.ids
        self.response = self.context.text if parent is None else parent.response
        self.before_text = self.response.rstrip(PARTIAL_CHARACTER)
        self.watched = bool(self.context.stop) or self.boundary.reads_text
        self.limit = min(self.boundary.max_tokens, self.context.max_tokens - len(self.before))

    @property
    def text(self) -> str:
        """Its own text. A character whose bytes are split between segments belongs to the segment that completes it."""
        text = self.response[len(self.before_text) :]
        return text if self.finish else text.rstrip(PARTIAL_CHARACTER)

    @property
    def remaining_tokens(self) -> int:
        """Tokens that it may still take."""
        return self.limit - len(self.ids)

    @property
    def end(self) -> int:
        """Tokens of the whole answer up to its end."""
        return len(self.before) + len(self.ids)

    @property
    def closing(self) -> bool:
        """True if it has a grammar, and is so near the token limit that it must close what is open."""
        limit = self.context.max_tokens
        return self.matcher is not None and limit - self.end <= min(CLOSE_WITHIN, limit // 4)


class LanguageModel(Protocol):
    """A language model that drafts candidates of many requests in one running batch.

    All methods are called from the engine's thread, inside its event loop. What a backend needs to know of a
    context or a candidate between two calls it keeps in dicts of its own, from `open` to `close` and from `begin`
    to `drop` or `keep`.
    """

    name: str
    """Its name in errors, logs and traces."""
    chat: ChatTokenizer
    """Its tokenizer, with its chat template."""
    context_window: int
    """Most tokens of prompt and answer together."""

    def open(self, context: Context) -> None:
        """Begin a request."""

    def close(self, context: Context) -> None:
        """End a request; its candidates are given up with it."""

    def begin(self, candidate: Candidate) -> None:
        """Start to draft a candidate."""

    def drop(self, candidate: Candidate) -> None:
        """Give up a candidate, finished or not; has no effect a second time."""

    def keep(self, candidate: Candidate) -> None:
        """Make a finished candidate part of its context, whose `ids`, `text` and `matcher` are then those after it."""

    def sample(self) -> list[Candidate]:
        """Give every candidate that has logits its next token.

        Returns:
            The candidates that have ended since the last call, with `ids`, `response`, `log_likelihood` and
            `finish` set, or with an `error`.
        """


@runtime_checkable
class StepwiseModel(LanguageModel, Protocol):
    """A language model that computes on this machine, a step at a time, with its caches in the engine's memory.

    Attributes:
        steps: Decode steps so far, each with one candidate at least.
        forwards: Forwards so far, those that only read prompts included.
        tokens: Tokens that these forwards have read.
    """

    steps: int

    @property
    def forwards(self) -> int: ...
    @property
    def tokens(self) -> int: ...

    def step_times(self) -> StepTimes:
        """Return the seconds of a step by its number of candidates; measured at the first call, and remembered."""

    def cache_needs(self, context: Context, tokens: int) -> list[CacheNeed]:
        """Return the rows and columns that a request takes in caches of this machine until it has `tokens` tokens."""

    def vacancies(self, context: Context, boundary: Boundary) -> int:
        """Return for how many more candidates of a request there is memory."""

    def growth(self, candidates: Iterable[Candidate]) -> int:
        """Return by how many bytes the caches grow at most when `forward` is called for these candidates."""

    def preempt(self, context: Context) -> None:
        """Free what a request holds in the caches; after `resume` it goes on from its tokens.

        Until then `begin`, `drop` and `keep` may be called for its candidates, but not `forward`.
        """

    def resume(self, context: Context) -> None:
        """Let a preempted request be computed again."""

    def has_unread(self, candidates: Iterable[Candidate]) -> bool:
        """True if a forward is needed before these candidates can have their next token."""

    def forward(self, candidates: Iterable[Candidate]) -> None:
        """Compute the next logits of these candidates."""

    def reset(self) -> None:
        """Forget every request, after an error in the middle of a forward."""


@runtime_checkable
class ConstrainedModel(Protocol):
    """A language model whose candidates can be held to a grammar."""

    def matcher(self, grammar: Grammar) -> Matcher:
        """Return a matcher at the beginning of the grammar."""


@runtime_checkable
class LogitsReader(Protocol):
    """A language model that can read a whole answer again, in pieces between which other requests go on."""

    def read(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the logits before each token of an answer, in pieces of (tokens, vocabulary), float32."""


@runtime_checkable
class StateReader(Protocol):
    """A language model that can read the hidden states of a whole answer again, in pieces like `LogitsReader`."""

    def read_states(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the last hidden states after the prompt and each token of an answer, in pieces of (n, hidden size)."""


class CustomModel(SettingsModel):
    """Settings of a language model that another package brings.

    Attributes:
        kind: The backend's name in settings files.
        model: What errors and metadata call the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    model: Annotated[str, Field(min_length=1)]

    def build(self, wake: Callable[[], None]) -> LanguageModel:
        """Make the language model; called once per engine, in a thread of its own.

        Args:
            wake: To be called from the engine's thread when `LanguageModel.sample` has something new to return.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build().")

    def context_window(self) -> int:
        """Return the most tokens of prompt and answer together."""
        return 2**31
