"""What a decoding method is, and what it sees: a session that drafts and keeps, and drafts with rewards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from cards_integrations.models.base import Boundary
from cards_integrations.settings_model import SettingsModel
from cards_integrations.trace import Guidance, ScaleOrigin, SearchPlan, Verdict


class Scale(BaseModel):
    """How a reward scores plain answers of a model, and what a calibration has chosen for this pair."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    mean: FiniteFloat
    """Mean reward of the plain answers."""
    std: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Their standard deviation."""
    target: FiniteFloat | None = None
    """The target reward that a calibration has chosen."""
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The beta that a calibration has chosen, in units of the reward."""


@dataclass(eq=False)
class Draft:
    """A finished candidate segment.

    Attributes:
        index: Its place among the drafts of its segment, or of its call of `Session.grow`.
        text: Its own text.
        reward: The reward of the whole answer up to its end; NaN if it was not scored.
        end: Tokens of the whole answer up to its end.
        uniform: A uniform random number in [0, 1) of its own, for the method's decisions.
        finished: True if no text can follow it: end-of-sequence, a stop string or the token limit.
        log_p: Sum of log p of its own tokens in nats, an end-of-sequence included.
        rank: The rank of its first token (0 is the most probable) if `Session.grow` was given `ranks`.
        threshold: What its reward was compared with, for the trace; set by the method.
        verdict: What became of it, for the trace; set by the method, or by `Session.reject` and `keep_best`.
    """

    index: int
    text: str
    reward: float
    end: int
    uniform: float
    finished: bool = False
    log_p: float = 0.0
    rank: int | None = None
    threshold: float | None = None
    verdict: Verdict = "unscored"


class StepCosts(Protocol):
    """What steps cost while other requests run beside this one: in seconds, or in any other unit."""

    def draft(self, width: int) -> float:
        """Return the cost of a step in which each request drafts one token of `width` candidates."""

    def score(self, tokens: int) -> float:
        """Return the cost of a call of the reward model in which each request has `tokens` new tokens."""


class Session(Protocol):
    """One request as its decoding method sees it: no tensors, no threads, no framework.

    A segment at a time, `drafts` gives candidates, `reject` sets them aside, and `keep` or `keep_best` makes one of
    them part of the answer. `grow` gives the next segments of several branches at once, for searches in a tree.

    Attributes:
        max_tokens: The most tokens of the answer.
        plan: The plan that the method follows, for the trace; set by the method.
    """

    max_tokens: int
    plan: SearchPlan | None

    @property
    def finished(self) -> bool:
        """True if the kept text ends with end-of-sequence, at a stop string or at the token limit."""

    @property
    def reward_scale(self) -> Scale | None:
        """How the reward scores plain answers; None unless the method's `needs_scale` is true."""

    async def prompt_reward(self) -> float:
        """Return r(x), the reward of the prompt with an empty answer."""

    async def step_costs(self) -> StepCosts:
        """Return what steps cost under the present load; requests that begin together count each other.

        Raises:
            SettingsError: The steps were not timed.
        """

    def drafts(
        self, until: Boundary, limit: int, scored: bool = True, passes: Callable[[Draft], bool] | None = None
    ) -> AsyncIterator[Draft]:
        """Draft candidates for the next segment: i.i.d., and in the order of their index.

        Leaving the loop gives up what was drafted ahead. Another call for the same segment goes on with further
        candidates; those of the earlier call can still be kept.

        Args:
            until: Where a candidate ends.
            limit: The most candidates of this call. A greedy request has one: all would be the same.
            scored: False if the method makes no use of rewards.
            passes: Tells whether the method will keep a draft once it examines it. This decides what is drafted ahead,
                never what is kept. None if the method examines all drafts before it keeps one.
        """

    async def grow(
        self,
        parents: Sequence[Draft | None],
        until: Boundary,
        scored: bool = True,
        ranks: Sequence[int] | None = None,
    ) -> list[Draft]:
        """Draft a child for each parent, all of them together: the next segments of several branches.

        The drafts stay until they are given up, or another branch is kept. A draft can be a parent in one call only
        (several times in that call), and stays as long as one of its children does.

        Args:
            parents: What each child follows: an earlier draft, or the kept text (None).
            until: Where a child ends.
            scored: False if the method makes no use of rewards.
            ranks: For each child, the rank of its first token by probability, which is then not drawn: 0 is the most
                probable token. Where fewer tokens are allowed, the least probable of them is taken.

        Returns:
            The children, in the order of their parents.
        """

    def give_up(self, draft: Draft) -> None:
        """Note that this draft of `grow` will have no more children, and free what it holds."""

    def reject(self, draft: Draft) -> Draft:
        """Mark a draft of `drafts` as rejected, and free what cannot be kept any more.

        The best of a segment's rejected drafts stays, for `keep_best` or `keep`; what the others hold is freed.

        Returns:
            The best of the segment's rejected drafts: the one with the highest reward, the earliest in a tie.
        """

    async def keep_best(self) -> Draft:
        """Keep the best of the segment's rejected drafts, with the verdict "best".

        Returns:
            That draft.

        Raises:
            CardsError: If no draft of this segment was rejected.
        """

    async def keep(self, draft: Draft) -> None:
        """Append a draft to the answer; whatever else was drafted for this segment is given up.

        A draft of `grow` brings its ancestors along, and its own descendants stay.
        """


class Decoding(SettingsModel):
    """A decoding method: its settings, and one coroutine that reads like the paper.

    Examples:
        >>> @register_method
        ... class Shorter(Decoding):
        ...     method: Literal["shorter"] = "shorter"
        ...
        ...     async def generate(self, session: Session) -> None:
        ...         while not session.finished:
        ...             drafts = [draft async for draft in session.drafts(until=FixedLength(length=8), limit=2)]
        ...             await session.keep(min(drafts, key=lambda draft: len(draft.text)))
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: str
    """Names the method in settings files."""
    needs_reward: ClassVar[bool] = True
    """False if the method works without a reward model."""

    @property
    def needs_scale(self) -> bool:
        """True if the method reads `Session.reward_scale`, which may have to be measured first."""
        return False

    def guidance(self, scale: Scale | None, origin: ScaleOrigin | None) -> Guidance | None:
        """Return what the trace reports of target and beta; None for a method without them.

        Args:
            scale: `Session.reward_scale`.
            origin: Where that scale came from.
        """
        return None

    async def generate(self, session: Session) -> None:
        """Draft and keep until `session.finished`."""
        raise NotImplementedError
