"""How fluent an answer is: whether it repeats itself, and whether the language model would have written it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from cards_integrations.rewards.base import Instant, Loader, Response, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward
from cards_integrations.rewards.scorers.repetition import n_rearranged, per_length, words


@register_reward
class FluencyReward(Reward):
    """0 for a fluent answer, negative for one that is not: a guard for other rewards, as in `GuardedReward`.

    The score is minus the share of the answer's n-grams of words that have occurred in it before, in any order of their
    words ("luxurious and elegant ... elegant and luxurious"). With `least_log_p` it is also lower by the nats by which
    the mean log p of a token under the language model falls below that. Both are taken over at least 32 n-grams or
    tokens, so that one repetition does not condemn the first words of an answer. The log p of a drafted answer is
    known, and costs nothing; another text, or one that was cut at a stop string, is read by the language model.
    """

    kind: Literal["fluency"] = "fluency"
    """Names this class in settings files."""
    n: Annotated[int, Field(ge=1)] = 3
    """Words of an n-gram. Words are separated by whitespace and punctuation, so that a script without spaces has hardly
    any."""
    least_log_p: FiniteFloat | None = None
    """The least mean log p of a token in nats (full vocabulary, temperature 1) that costs nothing; None ignores log p.
    One in a hundred plain answers of SmolLM2 is below -2.9."""

    def build(self, loader: Loader) -> RewardModel:
        if self.least_log_p is None:
            return Instant(self.name, lambda response: -self.repetition(response))
        from cards_integrations.rewards.scorers.fluency import Fluency
        from cards_integrations.rewards.scorers.likelihood import likelihood

        return Fluency(
            self.name, likelihood(loader.causal(None, self.name), "log p"), self.repetition, self.least_log_p
        )

    def repetition(self, response: Response) -> float:
        """Return the share of n-grams that have occurred before."""
        found = words(response.text)
        return per_length(n_rearranged(found, self.n), len(found) - self.n + 1)
