"""Answers the prompts of a study with one method or another, and scores the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cards_integrations.decoding import Decoding
from cards_integrations.rewards.base import Reward
from cards_integrations.study.aligner import Aligner
from cards_integrations.trace import Alignment


@dataclass
class Runner:
    """Answers the prompts with one method or another; each prompt always has the same seed."""

    llm: Aligner
    """The language model."""
    prompts: Sequence[Any]
    """Strings or lists of messages."""
    contexts: Sequence[Any]
    """The context of each prompt."""
    seed: int
    """The seed of the first prompt; those of the others follow it."""
    progress: bool
    """Whether to show the progress."""
    options: dict[str, Any]
    """Arguments of `align`."""

    def answers(self, decoding: Decoding, title: str) -> list[Alignment]:
        """Return one answer to each prompt, showing `title` as the progress."""
        seeds = [self.seed + i for i in range(len(self.prompts))]
        progress, options = title if self.progress else False, {**self.options, "decoding": decoding}
        return self.llm.align_batch(self.prompts, seeds, self.contexts, progress, **options)

    def scores(self, answers: Sequence[Alignment], reward: Reward) -> list[float]:
        """Return the reward of each answer to the prompts."""
        asked = zip(self.prompts, answers, self.contexts, strict=True)
        return [self.llm.score(prompt, [answer.text], reward, context)[0] for prompt, answer, context in asked]
