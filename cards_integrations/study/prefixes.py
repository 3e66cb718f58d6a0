"""Beginnings of plain answers, with their rewards and the language model's hidden states at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cards_integrations.decoding import Decoding, Uncertainty
from cards_integrations.decoding.base import Session
from cards_integrations.decoding.segmentation import AnyBoundary
from cards_integrations.engine.engine import Engine
from cards_integrations.rewards.value_head import Target, pooled
from cards_integrations.study.aligner import Aligner
from cards_integrations.trace import Alignment

AT_ONCE = 64  # answers of a batch, whose hidden states are then read


class ScoredPrefixes(Decoding):
    """A plain answer whose beginnings are scored at the ends of segments."""

    method: Literal["scored_prefixes"] = "scored_prefixes"
    boundary: AnyBoundary = Uncertainty()
    """Where a segment ends."""

    async def generate(self, session: Session) -> None:
        """Draft and keep until the session is finished."""
        await session.prompt_reward()
        while not session.finished:
            async for draft in session.drafts(until=self.boundary, limit=1):
                draft.verdict = "accepted"
                await session.keep(draft)
                break


@dataclass(frozen=True)
class Prefixes:
    """Beginnings of answers: the inputs of a value head, and the rewards that it learns to predict."""

    states: torch.Tensor
    """What a head reads of each beginning, (n, 2 hidden size)."""
    rewards: torch.Tensor
    """The reward of each beginning, (n,)."""
    finished: torch.Tensor
    """The reward of the finished answer, (n,)."""
    whole: torch.Tensor
    """True for beginnings that are the whole answer, (n,)."""
    prompts: torch.Tensor
    """The index of the prompt, (n,)."""

    def of(self, prompts: Sequence[int]) -> Prefixes:
        """Return the beginnings of answers to these prompts, by index."""
        kept = torch.isin(self.prompts, torch.tensor(prompts))
        return Prefixes(*(each[kept] for each in self._columns))

    @classmethod
    def joined(cls, several: Sequence[Prefixes]) -> Prefixes:
        """Return several as one, in order."""
        return cls(*map(torch.cat, zip(*(each._columns for each in several), strict=True)))

    @property
    def _columns(self) -> tuple[torch.Tensor, ...]:
        return self.states, self.rewards, self.finished, self.whole, self.prompts

    def targets(self, target: Target) -> torch.Tensor:
        """Return what a head should predict, (n,)."""
        return self.finished if target == "value" else self.rewards


def collect_prefixes(
    llm: Aligner,
    engine: Engine,
    prompts: Sequence[Any],
    contexts: Sequence[Any] | None,
    seed: int,
    progress: bool,
    options: dict[str, Any],
) -> Prefixes:
    """Draft plain answers to prompts, and collect the states and rewards of their beginnings.

    Args:
        llm: The language model, with the reward that scores.
        engine: The engine that answers for it.
        prompts: Strings or lists of messages.
        contexts: The context of each prompt, for rewards that read it.
        seed: The seed of the first answer; those of the others follow it.
        progress: Whether to show the progress; `progress=False` of the LLM takes precedence.
        options: Arguments of `align`; `decoding` has to be `ScoredPrefixes`.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(map(repr, prompts)))}
    parts: list[Prefixes] = []
    for start in range(0, len(prompts), AT_ONCE):
        asked = range(start, min(start + AT_ONCE, len(prompts)))
        title = f"plain answers to prompts {start + 1} to {asked[-1] + 1} of {len(prompts)}"
        answers = llm.align_batch(
            [prompts[i] for i in asked],
            [seed + i for i in asked],
            [contexts[i] if contexts is not None else None for i in asked],
            title if progress else False,
            **options,
        )
        states = engine.states([(answer.prompt_ids, answer.token_ids) for answer in answers])
        parts += map(_beginnings, answers, states, [number[repr(prompts[i])] for i in asked])
    return Prefixes.joined(parts)


def _beginnings(answer: Alignment, states: torch.Tensor, prompt: int) -> Prefixes:
    """Return the beginnings of an answer: the empty one, and those up to the end of each segment.

    Args:
        answer: The answer of `ScoredPrefixes`.
        states: The hidden states after its prompt and each of its tokens, (1 + tokens, hidden size).
        prompt: The index of its prompt.
    """
    lengths = torch.tensor([0, *(len(segment.token_ids) for segment in answer.segments)])
    rewards = torch.tensor([answer.prompt_reward or 0.0, *(segment.reward or 0.0 for segment in answer.segments)])
    whole = torch.arange(len(lengths)) == len(answer.segments)
    finished = rewards[-1].expand(len(rewards))
    ends = lengths.cumsum(0).tolist()
    return Prefixes(
        torch.stack([pooled(states[: end + 1]).flatten() for end in ends]),
        rewards,
        finished,
        whole,
        torch.full_like(lengths, prompt),
    )
