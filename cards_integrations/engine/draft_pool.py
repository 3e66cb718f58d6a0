"""The candidates of one request, on their way to drafts with rewards.

`DraftPool` keeps the books: what is drafted now, what the method has examined, what grows in a tree, and what was
drafted ahead for the next segment. It frees what is given up, and makes what is kept part of the answer.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cards_integrations.decoding.base import Draft, StepCosts
from cards_integrations.engine.scoring import ScoreQueue
from cards_integrations.errors import CardsError, as_cards_error, short_repr
from cards_integrations.models.base import Boundary, Candidate, Context, LanguageModel
from cards_integrations.models.randomness import Uniforms
from cards_integrations.rewards.base import Conversation, Response
from cards_integrations.transformer.step_times import StepTimes

if TYPE_CHECKING:
    import torch

MIN_REACH = 0.02  # a candidate that is examined with a lower probability is not drafted ahead
FIRST_LEVEL = 2**32  # tree levels are numbered from here, segments from 0, so that each has its own random numbers


class SessionHost(Protocol):
    """What a request asks of the engine that runs it."""

    @property
    def language_model(self) -> LanguageModel:
        """Where candidates are drafted."""

    def step_costs(self, scoring: StepTimes) -> StepCosts:
        """Return what steps cost now, with a reward model that takes these times.

        Raises:
            SettingsError: Steps were not timed.
        """

    def vacancies(self, context: Context, boundary: Boundary) -> int:
        """Return for how many more candidates of a request there is memory."""

    def wake(self) -> None:
        """Note that there is something new to draft or to score."""


@dataclass(eq=False)
class PendingDraft:
    """A candidate from its first token until it is kept or given up.

    Attributes:
        candidate: What the language model drafts.
        score: Resolved with its reward, or with NaN if none is asked for.
        source: The segment or tree level that it belongs to.
        parent: The draft of the segment before that it follows; None if it follows the kept text.
        response: What the reward model is asked to score; None before it is asked.
        next_segment: Candidates that were drafted ahead, to follow this one if it is kept.
        children: How many drafts of a tree follow it, and need what it holds.
        ended: True once it gets no more tokens.
        given_up: True if it will have no more children.
        kept: True once it is part of the answer.
    """

    candidate: Candidate
    score: asyncio.Future[float]
    source: SegmentDrafts
    parent: PendingDraft | None = None
    response: Response | None = None
    next_segment: SegmentDrafts | None = None
    children: int = 0
    ended: bool = False
    given_up: bool = False
    kept: bool = False
    _draft: Draft | None = None

    @property
    def draft(self) -> Draft | None:
        """What the method sees of it; None before there is a score."""
        if self._draft is None and self.score.done() and not self.score.cancelled() and not self.score.exception():
            c, reward = self.candidate, self.score.result()
            finished, log_p = c.finish is not None, c.log_likelihood + c.end_log_p
            self._draft = Draft(c.index, c.text, reward, c.end, c.uniforms.verdict, finished, log_p, c.rank)
        return self._draft

    @property
    def parts(self) -> dict[str, float]:
        """The scores that a composite reward is made of, by name."""
        return self.response.parts if self.response else {}


@dataclass(frozen=True)
class DraftPlan:
    """What a method asks `Session.drafts` for.

    Attributes:
        until: Where the candidates end.
        limit: Most candidates of the segment, those of earlier calls included.
        scored: True if rewards are asked for.
        passes: Tells whether the method will keep a draft; None if it examines all of them first.
    """

    until: Boundary
    limit: int
    scored: bool
    passes: Callable[[Draft], bool] | None

    def drafts_like(self, other: DraftPlan) -> bool:
        """True if candidates that were drafted for the other plan can be used for this one."""
        return (self.until, self.limit, self.scored) == (other.until, other.limit, other.scored)


class NoTokens(Boundary):
    """Ends a candidate before its first token, as soon as the text that it follows has been read."""

    @property
    def min_tokens(self) -> int:
        return 0

    @property
    def max_tokens(self) -> int:
        return 0


class OwnErrors:
    """A block whose errors end one request. A class, as a generator would cost more at each request of each step."""

    def __init__(self, fail: Callable[[Exception], None]) -> None:
        self._fail = fail

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is not None:
            self._fail(error if isinstance(error, Exception) else as_cards_error(error, "Drafting failed"))
        return error is not None


class RankedCandidate(NamedTuple):
    """A candidate that could be drafted in the next step.

    Attributes:
        reach: The probability that the method will examine it.
        drafts: The segment or tree level that it belongs to.
        pending: The candidate; None if it has not begun.
    """

    reach: float
    drafts: SegmentDrafts
    pending: PendingDraft | None


class Chance(NamedTuple):
    """What may become of a candidate; `SegmentDrafts` has the formulas.

    Attributes:
        pending: The candidate.
        examined: The probability that the method will examine it.
        kept: The probability that the method will keep it.
    """

    pending: PendingDraft
    examined: float
    kept: float


class DraftPool:
    """All candidates of one request.

    Args:
        context: The prompt and the kept text.
        seed: Seed of all random numbers of the request.
        conversation: The request as the reward model knows it.
        scores: The queue that takes requests for rewards; None without a reward model.
        host: The engine.
    """

    def __init__(
        self, context: Context, seed: int, conversation: Conversation, scores: ScoreQueue | None, host: SessionHost
    ) -> None:
        self.context = context
        self.seed = seed
        self.conversation = conversation
        self.scores = scores
        self.host = host
        self.current: SegmentDrafts | None = None
        self.examined: dict[Draft, PendingDraft] = {}
        self.best_rejected: Draft | None = None
        self.nodes: dict[Draft, PendingDraft] = {}  # the drafts of the tree, parents before their children
        self.last_kept: PendingDraft | None = None
        self.segments = 0  # kept
        self.levels = 0
        self.log_likelihood = 0.0
        self.log_p: list[float] = []  # of each kept token
        self.top: list[Sequence[tuple[int, float]]] = []
        self.error: Exception | None = None
        self._pending: dict[Candidate, PendingDraft] = {}

    # --- what a method does ---

    def open_segment(
        self, until: Boundary, limit: int, scored: bool, passes: Callable[[Draft], bool] | None
    ) -> SegmentDrafts:
        """Draft for the next segment, beginning with candidates that were drafted ahead if they suit."""
        self._give_up_ahead()
        begun = len(self.examined)  # in earlier calls for this segment
        plan = DraftPlan(until, begun + limit, scored, passes)
        ahead = self.last_kept.next_segment if self.last_kept is not None else None
        self.last_kept = None
        if ahead is not None and ahead.plan.drafts_like(plan):
            self.current = ahead
        else:
            if ahead is not None:
                ahead.drop()
            self.current = SegmentDrafts(self, plan, self.segments, None, begun)
        self.current.open()
        return self.current

    async def prompt_states(self) -> torch.Tensor | None:
        """Read the prompt as drafting does, and return the hidden states after it; None once drafting has begun."""
        if self.segments or self.current is not None:
            return None
        if self.error is not None:
            raise self.error
        self.current = SegmentDrafts(self, DraftPlan(NoTokens(), 1, False, None), 0, None)
        self.current.open()
        pending = self.current.begin()
        await pending.score
        self._give_up_ahead()
        return pending.candidate.states

    async def grow(
        self, parents: Sequence[Draft | None], until: Boundary, scored: bool, ranks: Sequence[int] | None
    ) -> list[Draft]:
        """Draft a child for each parent; they stay in the tree until they are given up."""
        plan = DraftPlan(until, len(parents), scored, None)
        number = FIRST_LEVEL + self.levels
        self.levels += 1
        self.current = level = TreeLevel(self, plan, number, [self._node(parent) for parent in parents], ranks)
        for parent in level.parents:
            if parent is not None:
                parent.given_up = True  # it is grown from only once, and stays as long as its children
        level.open()
        drafts = [draft async for draft in level]
        for draft in drafts if scored else ():
            draft.verdict = "rejected"  # until it is kept
        level.drafts, self.examined, self.current = self.examined, {}, None
        self.nodes.update(level.drafts)
        return drafts

    def reject(self, draft: Draft) -> Draft:
        """Reject an examined draft, and free it unless it is the best rejected draft of the segment so far.

        Returns:
            That best draft: the one with the highest reward, the first in a tie.
        """
        _own(self.examined, draft)
        draft.verdict = "rejected"
        best = self.best_rejected
        if best is None or draft.reward > best.reward:
            best, draft = draft, best or draft
            self.best_rejected = best
        if draft is not best:
            self.release(self.examined[draft])
        return best

    def keep(self, draft: Draft) -> Iterator[tuple[PendingDraft, dict[Draft, PendingDraft]]]:
        """Make a draft part of the answer, with those of its ancestors that are not yet; give up all others.

        Yields:
            Each draft once it has become part of the answer, with all drafts that were examined for its segment.
        """
        if draft in self.nodes:
            yield from self._keep_branch(self.nodes[draft])
            return
        kept, examined = _own(self.examined, draft), self.examined
        self._give_up_ahead()
        for pending in examined.values():
            if pending is not kept:
                self.release(pending)
        self._append(kept)
        self.examined, self.best_rejected, self.last_kept = {}, None, kept
        yield kept, examined

    def cut(self, tokens: int) -> None:
        """Cut the answer to its first `tokens` tokens."""
        del self.log_p[tokens:], self.top[tokens:]
        self.log_likelihood = sum(self.log_p)

    def give_up(self, draft: Draft) -> None:
        """Free a draft of the tree as soon as no other follows it."""
        pending: PendingDraft | None = _own(self.nodes, draft)
        while pending is not None and not pending.kept:
            pending.given_up = pending.given_up or pending.draft is draft
            if not pending.given_up or pending.children:
                return
            self._forget(pending)
            pending = pending.parent

    # --- what the engine does ---

    def candidate_ended(self, candidate: Candidate) -> None:
        """Ask for the reward of a candidate that has ended."""
        pending = self._pending.get(candidate)
        if pending is not None:  # else it was given up meanwhile
            pending.ended = True
            pending.source.drafting.pop(candidate, None)
            if pending.source.scoring:
                self.submit(pending)

    @property
    def drafted_tokens(self) -> int:
        """Tokens of the candidates that are neither kept nor given up."""
        return sum(len(candidate.ids) for candidate in self._pending)

    def waiting(self, acceptance_rate: float) -> float:
        """Return the probability that the answer cannot go on before rewards are known; see `SegmentDrafts.waiting`."""
        return 1.0 if self.current is None else self.current.waiting(1.0, acceptance_rate)

    def fail(self, error: Exception) -> None:
        """Let everything that the method awaits, now or later, raise this error."""
        self.error = error
        for pending in self.current.ahead if self.current else ():
            if not pending.score.done():
                pending.score.set_exception(error)

    def own_errors(self) -> OwnErrors:
        """Return a block whose errors end this request alone."""
        return OwnErrors(self.fail)

    def close(self) -> None:
        """Free everything; drafting any further raises an error."""
        self.error = self.error or CardsError("The request has ended: nothing can be drafted in its session.")
        self._give_up_ahead()
        for pending in [*self.examined.values(), *reversed(list(self.nodes.values()))]:
            self.release(pending)
        if self.last_kept is not None and self.last_kept.next_segment is not None:
            self.last_kept.next_segment.drop()

    # --- what drafts do ---

    def begin(
        self, source: SegmentDrafts, number: int, index: int, parent: PendingDraft | None, rank: int | None = None
    ) -> PendingDraft:
        """Start a candidate of the segment or tree level with this number."""
        uniforms = Uniforms(self.seed, number, index)
        origin = parent.candidate if parent else None
        candidate = Candidate(self.context, source.plan.until, uniforms, index, origin, rank=rank)
        pending = PendingDraft(candidate, asyncio.get_running_loop().create_future(), source, parent)
        self._pending[candidate] = pending
        self.host.language_model.begin(candidate)
        self.host.wake()
        return pending

    def submit(self, pending: PendingDraft) -> None:
        """Ask for the reward of a candidate that has ended, or resolve its score with NaN if none is wanted."""
        if pending.score.done():
            return  # cancelled with the request that waits for it
        if not pending.source.plan.scored:
            pending.score.set_result(math.nan)
            return
        assert self.scores is not None  # a session refuses to draft otherwise
        pending.response = self._response(pending)
        self.scores.submit(pending.response, pending.score)

    def release(self, pending: PendingDraft) -> None:
        """Free what a candidate holds; has no effect a second time."""
        if pending.next_segment is not None:
            pending.next_segment.drop()
            pending.next_segment = None
        pending.score.cancel()
        self._pending.pop(pending.candidate, None)
        self.host.language_model.drop(pending.candidate)
        if pending.response is not None and self.scores is not None:
            self.scores.reward_model.drop(pending.response)

    def _response(self, pending: PendingDraft) -> Response:
        candidate, parent = pending.candidate, pending.parent
        response = Response(self.conversation, candidate.response, finished=candidate.finish is not None)
        if candidate.whole:
            response.ids = candidate.before + candidate.ids
            branch = self._unkept(pending)
            response.log_likelihood = self.log_likelihood + sum(each.candidate.log_likelihood for each in branch)
            response.states = candidate.states
        response.parent = parent.response if parent is not None else None
        return response

    def _append(self, kept: PendingDraft) -> None:
        """Make a candidate the last segment of the answer."""
        kept.kept = True
        self._pending.pop(kept.candidate, None)
        self.host.language_model.keep(kept.candidate)
        if kept.response is not None and self.scores is not None:
            self.scores.reward_model.keep(kept.response)
        self.log_likelihood += kept.candidate.log_likelihood
        self.log_p += kept.candidate.log_p
        self.top += kept.candidate.top
        self.segments += 1

    def _keep_branch(self, last: PendingDraft) -> Iterator[tuple[PendingDraft, dict[Draft, PendingDraft]]]:
        path = self._unkept(last)
        for pending in reversed(list(self.nodes.values())):  # children before their parents
            if pending not in path and last not in self._unkept(pending):
                self._forget(pending)
        for pending in path:
            assert pending.draft is not None and last.draft is not None and isinstance(pending.source, TreeLevel)  # noqa: PT018
            pending.draft.verdict = last.draft.verdict
            del self.nodes[pending.draft]
            self._append(pending)
            yield pending, pending.source.drafts
        self.last_kept = last

    def _unkept(self, pending: PendingDraft | None) -> list[PendingDraft]:
        """Return the path from the kept text to this draft, the draft included."""
        path: list[PendingDraft] = []
        while pending is not None and not pending.kept:
            path.insert(0, pending)
            pending = pending.parent
        return path

    def _node(self, parent: Draft | None) -> PendingDraft | None:
        if parent is None or (self.last_kept is not None and self.last_kept.draft is parent):
            return None
        if parent.finished:
            raise CardsError("A draft that is finished has no children: no text can follow it.")
        return _own(self.nodes, parent)

    def _forget(self, pending: PendingDraft) -> None:
        self.release(pending)
        assert pending.draft is not None
        del self.nodes[pending.draft]
        if pending.parent is not None:
            pending.parent.children -= 1

    def _give_up_ahead(self) -> None:
        """Free what was drafted for the open segment and has not been examined."""
        if self.current is not None:
            self.current.drop()
        self.current = None


def _own(drafts: Mapping[Draft, PendingDraft], draft: Draft) -> PendingDraft:
    """Return the pending draft of a draft that a method passes in."""
    if (pending := drafts.get(draft)) is None:
        raise CardsError(
            f"The draft {short_repr(getattr(draft, 'text', draft))} is not of this segment: it was kept or given up "
            "before, or belongs to another request."
        )
    return pending


class SegmentDrafts:
    """Candidates of one segment, in index order; an asynchronous iterator of drafts.

    They follow the kept text or, if drafted ahead, a candidate of the segment before (`parent`) on which there is no
    verdict yet. If that is kept, the method goes on with these. They are scored once the parent is known to pass, even
    if the method has not come to it yet.

    What is worth drafting before verdicts are known follows from what the method will probably do. It examines
    candidates in order, and keeps the first that passes; if none of all `limit` passes, it keeps the one with the
    highest reward. Hence, for candidate i of this segment:

        examined(i) = reach * (1 - p(0)) * ... * (1 - p(i - 1))
        kept(i)     = examined(i) * p(i) + examined(limit) * best(i)

    - `reach` is the probability that the method comes to this segment: 1 for the open one, kept(parent) for one that is
      drafted ahead. So kept(i) is the `reach` of the segment after candidate i: `ranked_candidates` and `waiting` go on
      there with it.
    - p(i) is the probability that candidate i passes: `acceptance_rate` while its reward is unknown, then 1 or 0, as
      `plan.passes` tells; 0 for those that were examined before, as they were rejected.
    - best(i) is the probability that it has the highest reward: 1 / limit while its reward is unknown; k / limit for
      the best of the k candidates whose rewards are known, and 0 for the others of these.

    If `plan.passes` is None, the method examines all candidates before it keeps one: examined(i) = reach, and kept(i) =
    reach / limit. Candidates with examined(i) < `MIN_REACH` are left out, and then examined(limit) counts as 0.

    Args:
        pool: The candidates of the request.
        plan: What the method asked for.
        number: Which segment it is, for the random numbers.
        parent: The candidate that they follow; None for the kept text.
        begun: How many candidates of the segment have begun before.
    """

    def __init__(
        self, pool: DraftPool, plan: DraftPlan, number: int, parent: PendingDraft | None, begun: int = 0
    ) -> None:
        self.pool = pool
        self.plan = plan
        self.number = number
        self.parent = parent
        self.begun = begun  # how many so far, which is the index of the next one
        self.ahead: deque[PendingDraft] = deque()  # not examined yet
        self.drafting: dict[Candidate, None] = {}  # those of them that have not ended, in the same order
        self.scoring = False  # True once rewards are asked for

    def open(self) -> None:
        """Let the method examine these: their parent, if any, has been kept."""
        self.parent = None
        self.score()
        self.pool.host.wake()

    def score(self) -> None:
        """Ask for the rewards of all that have ended, and from now on of each that ends."""
        if not self.scoring:
            self.scoring = True
            for pending in self.ahead:
                if pending.ended:
                    self.pool.submit(pending)

    def __aiter__(self) -> SegmentDrafts:
        return self

    async def __anext__(self) -> Draft:
        pool = self.pool
        if pool.error is not None:
            raise pool.error
        if pool.current is not self or (not self.ahead and self.begun == self.plan.limit):
            raise StopAsyncIteration
        if not self.ahead:
            self.begin()
        pending = self.ahead[0]
        await pending.score
        self.ahead.popleft()
        draft = pending.draft
        assert draft is not None
        pool.examined[draft] = pending
        pool.context.usage.drafts += 1
        return draft

    @property
    def vacancies(self) -> int:
        """How many more candidates may begin within the limit and the memory; one always may, within the limit."""
        remaining = self.plan.limit - self.begun
        if remaining <= 0 or not self.ahead:
            return remaining
        more = self.pool.host.vacancies(self.pool.context, self.plan.until) - len(self.drafting)
        return min(remaining, max(0, more))

    @property
    def certain(self) -> int:
        """How many candidates of a segment with this plan are examined, whatever their rewards are."""
        return self.plan.limit if self.plan.passes is None else 1

    def waiting(self, reach: float, acceptance_rate: float) -> float:
        """Return the probability that the answer goes on with a candidate that waits for its reward.

        The candidate may be one of these, or one that was drafted ahead after them: it is the sum of kept(i) over those
        that have ended without a reward, and of what this method returns for the segments after the others.

        Args:
            reach: Probability that the method gets to these drafts.
            acceptance_rate: Probability that a candidate without a reward passes.
        """
        found = 0.0
        for pending, _, kept in self._chances(reach, acceptance_rate)[0]:
            if pending.draft is None:
                found += kept if pending.ended else 0.0
            elif pending.next_segment is not None:
                found += pending.next_segment.waiting(kept, acceptance_rate)
        return found

    def begin(self) -> PendingDraft:
        """Start the next candidate."""
        return self._begin(self.parent)

    def _begin(self, parent: PendingDraft | None, rank: int | None = None) -> PendingDraft:
        pending = self.pool.begin(self, self.number, self.begun, parent, rank)
        self.ahead.append(pending)
        self.drafting[pending.candidate] = None
        self.begun += 1
        return pending

    def ranked_candidates(self, reach: float, acceptance_rate: float) -> Iterator[RankedCandidate]:
        """Yield what could be drafted in the next step, what is drafted ahead of verdicts included.

        These are the candidates that have begun and not ended, those of the segments after candidates that have ended,
        and those that have not begun, as far as there is memory.

        Args:
            reach: Probability that the method gets to these drafts.
            acceptance_rate: Probability that a candidate without a reward passes.
        """
        begun, reach = self._chances(reach, acceptance_rate)
        for pending, examined, kept in begun:
            if not pending.ended:
                yield RankedCandidate(examined, self, pending)
            elif kept >= MIN_REACH and pending.candidate.finish is None:
                yield from self._following(pending).ranked_candidates(kept, acceptance_rate)
        for _ in range(self.vacancies if reach >= MIN_REACH else 0):
            if reach < MIN_REACH:
                return
            yield RankedCandidate(reach, self, None)
            reach *= self._going_on(acceptance_rate)

    def _chances(self, reach: float, acceptance_rate: float) -> tuple[list[Chance], float]:
        """Return examined(i) and kept(i) of the candidates that have begun, by the formulas of the class.

        Args:
            reach: Probability that the method gets to these drafts.
            acceptance_rate: Probability that a candidate without a reward passes.

        Returns:
            The candidates that the method may examine or keep, and examined(i) of the first one that has not begun. The
            best rejected candidate has an entry of its own, as it may be kept, but is not examined again.
        """
        found: list[Chance] = []
        best, known = self._best_rejected, self.begun - len(self.ahead)
        for pending in self.ahead:
            if reach < MIN_REACH:
                return found, 0.0
            passing = self._passing(pending, acceptance_rate)
            found.append(Chance(pending, reach, reach * passing))
            if pending.draft is not None:
                known += 1
                best = max(best, pending, key=_reward) if best else pending
            reach *= self._going_on(passing)
        if self.plan.passes is not None:
            none_passes = reach * (1 - acceptance_rate) ** (self.plan.limit - self.begun)  # examined(limit)
            each = none_passes / self.plan.limit
            found = [one._replace(kept=one.kept + each) if one.pending.draft is None else one for one in found]
            found += [Chance(best, 0.0, each * known)] if best is not None else []
        return found, reach

    def _following(self, pending: PendingDraft) -> SegmentDrafts:
        """Return the drafts of the next segment after a candidate that has ended."""
        if pending.next_segment is None:
            pending.next_segment = SegmentDrafts(self.pool, self.plan, self.number + 1, pending)
        if self.scoring and pending.draft is not None:
            pending.next_segment.score()
        return pending.next_segment

    def drop(self) -> None:
        """Give up all candidates that have not been examined."""
        for pending in self.ahead:
            self.pool.release(pending)

    @property
    def _best_rejected(self) -> PendingDraft | None:
        """The best of the candidates that the method has examined and rejected."""
        best = self.pool.best_rejected
        return None if best is None or self.pool.current is not self else self.pool.examined[best]

    def _going_on(self, passing: float) -> float:
        """Return examined(i + 1) / examined(i), given p(i): 1 - p(i), or 1 if the method examines all candidates."""
        return 1.0 if self.plan.passes is None else 1 - passing

    def _passing(self, pending: PendingDraft, acceptance_rate: float) -> float:
        """Return p(i), the probability that a candidate passes, or 1 / limit if the best of all will be kept."""
        if self.plan.passes is None:
            return 1 / self.plan.limit
        return acceptance_rate if pending.draft is None else float(self.plan.passes(pending.draft))


def _reward(pending: PendingDraft) -> float:
    assert pending.draft is not None
    return pending.draft.reward


class TreeLevel(SegmentDrafts):
    """Drafts that a method asks for together, which can be parents of the next level.

    All of them are drafted and scored; they stay until they are given up.

    Args:
        pool: The candidates of the request.
        plan: What the method asked for.
        number: Which level it is, for the random numbers.
        parents: What each child follows; None for the kept text.
        ranks: The rank of each child's first token by probability, 0 being the most probable; None draws it.
    """

    def __init__(
        self,
        pool: DraftPool,
        plan: DraftPlan,
        number: int,
        parents: Sequence[PendingDraft | None],
        ranks: Sequence[int] | None,
    ) -> None:
        super().__init__(pool, plan, number, None)
        self.parents = parents
        self.ranks = ranks
        self.drafts: dict[Draft, PendingDraft] = {}

    def begin(self) -> PendingDraft:
        """Start the child of the next parent."""
        parent = self.parents[self.begun]
        pending = self._begin(parent, None if self.ranks is None else self.ranks[self.begun])
        if parent is not None:
            parent.children += 1
        return pending

    def waiting(self, reach: float, acceptance_rate: float) -> float:
        """Return how many candidates wait for their rewards: the method needs all of a level."""
        return sum(pending.ended and pending.draft is None for pending in self.ahead)

    def ranked_candidates(self, reach: float, acceptance_rate: float) -> Iterator[RankedCandidate]:
        """Yield all that has not ended, with equal probabilities."""
        for pending in self.ahead:
            if not pending.ended:
                yield RankedCandidate(reach, self, pending)
        for _ in range(self.vacancies):
            yield RankedCandidate(reach, self, None)
