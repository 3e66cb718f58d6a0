"""Which requests go on when the caches are full: the oldest; the newest are computed again later.

Requests take memory as they grow. When the next forward does not fit, the newest request gives its rows back. It keeps
its tokens, its random numbers and its drafts, so that it writes the same text once the tokens have been read again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cards_integrations.engine.session import Session
from cards_integrations.models.base import Candidate, Context, StepwiseModel
from cards_integrations.rewards.base import Conversation, RewardModel
from cards_integrations.transformer.kv_memory import CacheNeed, KVMemory

HEADROOM = 192  # tokens that a request can at least grow by when it begins or goes on
DRAFT_COLUMNS = 64  # columns that candidates may take beside the kept text


class Preemption:
    """Keeps the caches of all live requests within their memory.

    Args:
        memory: The budget of all caches.
        live: The requests, in order of arrival.
        stepwise: The language model, if it has a cache here.
    """

    def __init__(self, memory: KVMemory, live: dict[Context, Session], stepwise: StepwiseModel | None) -> None:
        self.memory = memory
        self.live = live
        self.stepwise = stepwise
        self.count = 0
        self.freed = asyncio.Event()  # set when there may be more memory than before
        self.stalled = False  # nothing has happened since a request was preempted
        self.held_back = False  # a request waits for memory that reward models hold

    @property
    def running(self) -> list[Session]:
        """The requests that are not preempted, in order of arrival."""
        return [session for session in self.live.values() if not session.preempted]

    @property
    def pending(self) -> bool:
        """True if a preempted request waits to go on."""
        return len(self.running) < len(self.live)

    def resume(self) -> None:
        """Let preempted requests go on, oldest first, as far as there is memory; at least one request always runs."""
        for session in self.live.values():
            if session.preempted:
                if self.running and (self.stalled or not self.memory.admits(self._needs(session), self.promised)):
                    return
                session.resume()
                self.memory.evict_for(0)
                self.freed.set()

    def _needs(self, session: Session) -> list[CacheNeed]:
        drafted = session.pool.drafted_tokens
        return cache_needs(self.stepwise, session.context, session.conversation, session.reward_model, drafted)

    @property
    def promised(self) -> int:
        """Bytes that reward models may take for the scores they compute now, and requests of rewards as a whole."""
        scores = sum(session.scores.promised for session in self.live.values() if session.scores)
        return scores + sum(self._whole(session) for session in self.live.values() if session.depth)

    def _whole(self, session: Session) -> int:
        return self.memory.needed(
            cache_needs(self.stepwise, session.context, session.conversation, session.reward_model, whole=True)
        )

    def nested(self, depth: int) -> bool:
        """True if a request of a reward runs that does not wait for one of this depth."""
        return any(session.depth >= depth for session in self.live.values())

    def to_draft(self, candidates: list[Candidate]) -> list[Candidate]:
        """Return those of the candidates for which a forward has memory."""
        stepwise = self.stepwise
        if stepwise is None or self.memory.evict_for(stepwise.growth(candidates) + self.promised):
            return candidates

        def growth(sessions: Sequence[Session]) -> int:
            return stepwise.growth(_of(candidates, sessions))

        contexts = {candidate.context for candidate in candidates}
        return _of(candidates, self._fitting([s for s in self.running if s.context in contexts], growth))

    def to_score(self) -> list[Session]:
        """Return the requests whose rewards can be computed now."""
        asking = [session for session in self.running if session.scores and session.scores.waiting]
        return self._fitting(asking, lambda sessions: sum(each.scores.growth for each in sessions if each.scores))

    def _fitting(self, sessions: Sequence[Session], growth: Callable[[Sequence[Session]], int]) -> list[Session]:
        """Return the requests that can be served in this step, because there is memory for their growth."""
        served = [*sessions]
        while served and not self.memory.evict_for(more := growth(served) + self.promised):
            if self.preempt_newest():
                served = [session for session in served if not session.preempted]
            elif waiting := self._can_wait(served):
                served.remove(waiting[-1])
                self.held_back = True
            elif self.memory.machine_has(more):
                break  # the last one may take what it needs
            else:
                session = served.pop()
                session.fail(self.memory.refusal(len(session.context.prompt_ids) + session.max_tokens))
        return served

    def preempt_newest(self) -> bool:
        """Preempt the newest request that can be preempted, except the oldest that runs; False if there is none."""
        oldest = next(iter(self.running), None)
        for session in reversed(self.live.values()):
            if session is not oldest and session.can_be_preempted:
                session.preempt()
                self.count, self.stalled = self.count + 1, True
                self.freed.set()
                return True
        return False

    def _can_wait(self, sessions: Sequence[Session]) -> list[Session]:
        """Return the requests that can wait until the reward models have finished others."""
        busy = any(session.scores and session.scores.under_way for session in self.live.values())
        return [session for session in sessions if busy and not session.depth]


def _of(candidates: Sequence[Candidate], sessions: Sequence[Session]) -> list[Candidate]:
    """Return the candidates of these requests."""
    contexts = {session.context for session in sessions}
    return [candidate for candidate in candidates if candidate.context in contexts]


def cache_needs(
    stepwise: StepwiseModel | None, context: Context, conversation: Conversation, reward: RewardModel | None,
    drafted: int = 0, whole: bool = False,
) -> list[CacheNeed]:  # fmt: skip
    """Return what a request takes in the caches of this machine.

    Args:
        stepwise: The language model, if it has a cache here.
        context: The prompt, and what is kept so far.
        conversation: The request as the reward model knows it.
        reward: The reward model, if there is one.
        drafted: Tokens of its candidates.
        whole: Count all that it may take until it ends, instead of what it takes soon.
    """
    left = context.max_tokens - len(context.ids)
    tokens = len(context.prompt_ids) + len(context.ids) + drafted + DRAFT_COLUMNS
    tokens += left if whole else min(left, HEADROOM)
    own = stepwise.cache_needs(context, tokens) if stepwise else []
    return [*own, *(reward.cache_needs(conversation, tokens) if reward else [])]
