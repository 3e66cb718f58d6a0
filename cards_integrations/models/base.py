"""Where text is drafted: the protocol between the engine and a language model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from cards_integrations.chat.message import PARTIAL_CHARACTER, Message
from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.errors import CardsError
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler
from cards_integrations.trace import FinishReason, Usage

if TYPE_CHECKING:
    import torch

    from cards_integrations.chat.grammar import Grammar, Matcher
    from cards_integrations.chat.template import ChatTokenizer
    from cards_integrations.transformer.kv_memory import CacheNeed
    from cards_integrations.transformer.step_times import StepTimes

CLOSE_WITHIN = 32  # tokens before the limit; arguments that are still to come take some


class Boundary(BaseModel):
    """Where a candidate segment ends, besides end-of-sequence, stop strings and the room left."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def ends_before(self, logits: torch.Tensor, log_p: torch.Tensor, rows: list[int]) -> torch.Tensor | None:
        """For logits and log-probabilities (n, vocabulary) of the next token: end here?

        Asked of these `rows` only, (rows,) bool; None if never.
        """
        return None

    def ends_after(self, text: str) -> bool:
        """Does a segment with this text end with its last token?"""
        return False

    @property
    def served(self) -> Mapping[str, str | float] | None:
        """What `vllm_plugin.EntropyStop` has to know to end the segment in a server; None if it does not do that."""
        return None

    @property
    def reads_text(self) -> bool:
        return type(self).ends_after is not Boundary.ends_after

    @property
    @abstractmethod
    def min_tokens(self) -> int:
        """Tokens before which `ends_before` and `ends_after` are not asked."""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Tokens at which the segment ends at the latest."""


@dataclass(eq=False)
class Context:
    """A prompt and the text kept so far, as every candidate of a request sees it."""

    prompt: str | list[Message]
    prompt_ids: list[int]
    max_tokens: int
    sampler: Sampler
    stop: StopStrings
    usage: Usage
    matcher: Matcher | None = None  # where the text is in its grammar
    ids: list[int] = field(default_factory=list)
    text: str = ""
    state: Any = None  # the language model's own


@dataclass(eq=False)
class Candidate:
    """One candidate segment, from its first token to its end.

    It follows the text kept when it began and, if it was drafted ahead, `parent`, a finished
    candidate of the segment before; `before` are the ids of both, `before_text` what they say. `text` and
    `ids` are the candidate's own: a character whose bytes are split between segments is the text of the one
    that completes it. `response` is all the text, cut before a stop string. `whole` says that the text
    is all of the ids (no stop string was cut off). With a `rank` the first token is not drawn: it is the
    one of that rank, or of the last one that is allowed. `end_log_p` is log p of the end-of-sequence token
    that ended it.
    """

    context: Context
    boundary: Boundary
    uniforms: Uniforms
    index: int
    parent: Candidate | None = None
    ids: list[int] = field(default_factory=list)
    rank: int | None = None
    log_likelihood: float = 0.0
    end_log_p: float = 0.0
    finish: FinishReason | None = None
    whole: bool = True
    matcher: Matcher | None = None
    state: Any = None  # the language model's own
    waiter: Any = None  # whoever began it
    before: list[int] = field(init=False)
    before_text: str = field(init=False)
    response: str = field(init=False)

    def __post_init__(self) -> None:
        parent = self.parent
        self.before = self.context.ids.copy() if parent is None else parent.before + parent.ids
        self.response = self.context.text if parent is None else parent.response
        self.before_text = self.response.rstrip(PARTIAL_CHARACTER)

    @property
    def text(self) -> str:
        text = self.response[len(self.before_text) :]
        return text if self.finish else text.rstrip(PARTIAL_CHARACTER)

    @property
    def remaining_tokens(self) -> int:
        """Tokens that this candidate may still take."""
        return min(self.boundary.max_tokens, self.context.max_tokens - len(self.before)) - len(self.ids)

    @property
    def end(self) -> int:
        """Length of the text before plus this candidate, in tokens."""
        return len(self.before) + len(self.ids)

    @property
    def closing(self) -> bool:
        """Has a text with a grammar come so near to its limit that it has to end what is open?"""
        limit = self.context.max_tokens
        return self.matcher is not None and limit - self.end <= min(CLOSE_WITHIN, limit // 4)


class LanguageModel(Protocol):
    """A language model that drafts candidates of many contexts in one running batch.

    `begin` starts a candidate; `sample` gives every candidate that has logits its next token and
    returns those that have ended; `forward` computes the next logits of those it is given, as far as
    `unread` says that there is something to compute; contexts that cannot go on (there is no memory, say)
    end up in `failed`. `times` are the seconds of a step by its number of candidates, and `needs` what a
    request of so many tokens takes in the caches of this machine. All are called from one thread.
    """

    name: str
    chat: ChatTokenizer
    context_window: int
    failed: dict[Context, CardsError]

    @property
    def times(self) -> StepTimes: ...
    def cache_needs(self, tokens: int) -> list[CacheNeed]: ...
    def matcher(self, grammar: Grammar) -> Matcher: ...
    def read(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> torch.Tensor: ...
    def open(self, context: Context) -> None: ...
    def close(self, context: Context) -> None: ...
    def vacancies(self, context: Context, boundary: Boundary) -> int: ...
    def begin(self, candidate: Candidate) -> None: ...
    def drop(self, candidate: Candidate) -> None: ...
    def keep(self, candidate: Candidate) -> None: ...
    def sample(self) -> list[Candidate]: ...
    def unread(self, candidates: Iterable[Candidate]) -> Mapping[Any, Context]: ...
    def forward(self, candidates: Iterable[Candidate]) -> None: ...
    def reset(self) -> None: ...
    def decode(self, ids: Sequence[int]) -> str: ...
