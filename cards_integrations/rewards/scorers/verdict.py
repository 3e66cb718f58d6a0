"""From a judge's next-token logits to a score: the margin of two words, or the mean of grades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import SettingsError
from cards_integrations.transformer.prefix_tree import common

Tokens = tuple[int, ...]


class Verdict(Protocol):
    """Turns logits into scores.

    Attributes:
        beginnings: Beginnings of replies, each of which is read after the question. The verdict uses the logits before
            each of their tokens, and after the last. Replies of a single token have the empty beginning.
    """

    beginnings: Sequence[Tokens]

    def read(self, logits: Sequence[torch.Tensor]) -> list[float]:
        """Return a score for each question.

        Args:
            logits: For each question and beginning, of n tokens, (n + 1, vocabulary).
        """


class Margin:
    """logit(yes) - logit(no) of the first token."""

    beginnings: Sequence[Tokens] = ((),)

    def __init__(self, yes: int, no: int) -> None:
        self.words = [yes, no]

    @classmethod
    def of(cls, words: tuple[str, str], chat: ChatTokenizer) -> Margin:
        """Compare the first tokens of two words.

        Raises:
            SettingsError: They begin with the same token, or with none.
        """
        yes, no = (_reply(word, chat)[:1] for word in words)
        if not yes or not no or yes == no:
            raise SettingsError(f"reward.words={words!r} do not begin with two different tokens of a model.")
        return cls(yes[0], no[0])

    def read(self, logits: Sequence[torch.Tensor]) -> list[float]:
        rows = torch.cat([each[:, self.words] for each in logits]).float()
        found: list[float] = (rows[:, 0] - rows[:, 1]).tolist()
        return found


class Expectation:
    """sum_g p(g) value(g) over grades g, where p is the probability of all tokens of a grade, normalised over grades.

    If one grade begins another ("1" and "10"), the probability of the longer one is subtracted from the shorter.

    Args:
        grades: The tokens of each grade.
        values: The value of each.
    """

    def __init__(self, grades: Sequence[Tokens], values: Sequence[float]) -> None:
        self.values = values
        known = {grade[:n] for grade in grades for n in range(len(grade))}
        self.beginnings: Sequence[Tokens] = sorted(a for a in known if not any(b[: len(a)] == a != b for b in known))
        self.tokens = sorted({token for grade in grades for token in grade})
        rows = [begun[:n] for begun in self.beginnings for n in range(len(begun) + 1)]
        self._steps = [
            [(rows.index(grade[:n]), self.tokens.index(token)) for n, token in enumerate(grade)] for grade in grades
        ]
        self._longer = [_next_longer(grade, grades) for grade in grades]
        self._rows = len(rows)

    @classmethod
    def of(cls, grades: Sequence[tuple[str, float]], chat: ChatTokenizer) -> Expectation:
        """Use grades as whole replies of the judge.

        Raises:
            SettingsError: Two of them have the same tokens, or one has none that the judge knows.
        """
        replies = [_reply(word, chat) for word, _ in grades]
        _check([word for word, _ in grades], replies, chat)
        return cls([*map(tuple, replies)], [value for _, value in grades])

    @classmethod
    def after(
        cls, text: str, grades: Sequence[tuple[str, float]], chat: ChatTokenizer
    ) -> tuple[list[int], Expectation]:
        """Use grades as they continue a text.

        Returns:
            The tokens of the text, as far as they do not depend on the grade, and what to read after these.

        Raises:
            SettingsError: As for `of`.
        """
        whole = [chat.encode_answer(text + word) for word, _ in grades]
        same = min([common(whole[0], other) for other in whole[1:]] + [len(each) - 1 for each in whole])
        _check([word for word, _ in grades], [each[same:] for each in whole], chat)
        return whole[0][:same], cls([tuple(each[same:]) for each in whole], [value for _, value in grades])

    def read(self, logits: Sequence[torch.Tensor]) -> list[float]:
        own = [each.float().log_softmax(-1)[:, self.tokens] for each in logits]
        log_p = torch.cat(own).tolist()
        return [self._mean(log_p[i : i + self._rows]) for i in range(0, len(log_p), self._rows)]

    def _mean(self, log_p: Sequence[Sequence[float]]) -> float:
        """Return the mean grade from log p in nats, (rows, tokens)."""
        whole = [sum(log_p[row][token] for row, token in steps) for steps in self._steps]
        p = [math.exp(each - max(whole)) for each in whole]
        alone = [max(0.0, own - sum(p[i] for i in longer)) for own, longer in zip(p, self._longer, strict=True)]
        return sum(each * value for each, value in zip(alone, self.values, strict=True)) / sum(alone)


def _next_longer(grade: Tokens, grades: Sequence[Tokens]) -> list[int]:
    """Return the indices of the grades that begin with this one, and with no longer one that does."""
    longer = [i for i, other in enumerate(grades) if other != grade and other[: len(grade)] == grade]
    return [i for i in longer if not any(grades[i] != grades[j] == grades[i][: len(grades[j])] for j in longer)]


def _check(words: Sequence[str], tokens: Sequence[Sequence[int]], chat: ChatTokenizer) -> None:
    """Check that a judge can tell grades apart.

    Raises:
        SettingsError: Two of them have the same tokens, or one has none that the judge knows.
    """
    unknown = chat.tokenizer.unk_token_id
    for word, own in zip(words, tokens, strict=True):
        if not own or unknown in own:
            raise SettingsError(f"reward.grades: the judge's tokenizer has no token for {word!r}; use other words.")
        if [*map(list, tokens)].count(list(own)) > 1:
            raise SettingsError(f"reward.grades: {word!r} and another grade are the same tokens; use other words.")


def _reply(word: str, chat: ChatTokenizer) -> list[int]:
    """Return the tokens of a word as a reply of the judge; after a space if there is no template."""
    return chat.encode(word) if chat.has_template else chat.encode_answer(" " + word)
