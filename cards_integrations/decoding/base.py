"""What a decoding method sees: a session that drafts and keeps, and drafts with rewards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from cards_integrations.models.base import Boundary
from cards_integrations.trace import Verdict


class Scale(BaseModel):
    """Mean and spread (standard deviation) of a reward over plain answers of a model.

    A calibration also remembers the target and the beta that it chose.
    """

    model_config = ConfigDict(frozen=True)

    mean: FiniteFloat
    std: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    target: FiniteFloat | None = None
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(eq=False)
class Draft:
    """A finished candidate segment.

    `end` is the length of all the text up to its end, in tokens; `log_p` the sum of log p of its own
    tokens (an end-of-sequence included) in nats; `finished` says that no text can follow; `rank` is that
    of its first token (0: the most probable one) where `Session.grow` was told `ranks`.
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


class Session(Protocol):
    """One request, seen from a decoding method: no tensors, no threads, no framework."""

    max_tokens: int

    @property
    def finished(self) -> bool:
        """End-of-sequence, a stop string or the token limit has been reached."""

    @property
    def reward_scale(self) -> Scale | None:
        """How the reward scores plain answers, for methods that need it."""

    async def prompt_reward(self) -> float:
        """r(x): the reward of the prompt with an empty answer."""

    def drafts(
        self, until: Boundary, limit: int, scored: bool = True, passes: Callable[[Draft], bool] | None = None
    ) -> AsyncIterator[Draft]:
        """At most `limit` i.i.d. candidates for the next segment, in index order.

        `passes` says whether the method will keep a draft if it comes to look at it (None: it looks
        at all of them first). What is drafted ahead follows from it, never what is kept. Another call for
        the same segment goes on with further candidates; those looked at before can still be kept.
        """

    async def grow(
        self,
        parents: Sequence[Draft | None],
        until: Boundary,
        scored: bool = True,
        ranks: Sequence[int] | None = None,
    ) -> list[Draft]:
        """A child for each parent (None is the kept text), in order: the next segments of several branches.

        They are drafted and scored together, and stay until they are given up or another branch is kept. A
        draft can be a parent in one call only, and stays as long as one of its children does. `ranks`: the
        first token is not drawn, but that of this rank (0: the most probable one), or the last one that is
        allowed where there are fewer.
        """

    def give_up(self, draft: Draft) -> None:
        """This one of `grow` will have no more children."""

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
        """

    async def keep(self, draft: Draft) -> None:
        """Append the candidate to the answer; whatever else was drafted is given up.

        One of `grow` brings its ancestors along, and its own descendants stay.
        """


class Decoding(BaseModel):
    """A decoding method: its settings, and one coroutine that reads like the paper."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    needs_reward: ClassVar[bool] = True

    @property
    def needs_scale(self) -> bool:
        """Does it ask for `Session.reward_scale`?"""
        return False

    async def generate(self, session: Session) -> None:
        """Draft and keep until `session.finished`."""
        raise NotImplementedError
