"""Where sentences end, for rewards that only make sense on whole ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from cards_integrations.rewards.base import Conversation, Response, RewardModel
from cards_integrations.rewards.scorers.composite import Composite

SENTENCE_END = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]["'\u201d\u2019)\]]*(?=\s|$)|\n""")
"""A full stop, exclamation or question mark or ellipsis (Latin or CJK) with the quotes and brackets that
close after it, before whitespace or the end of the text; or a line break.

The rule knows no words and looks at no later text than the next character, so that what has been read of
an unfinished answer stays as it is. Its limits:

- Abbreviations and initials end a sentence: "Dr. Who" is two, and so are "e.g. tea", "J. Smith" and the
  number of a list item in "1. Tea". Decimals, versions and addresses do not ("3.14", "v1.2", "a.org").
- While an answer grows, a mark at its end counts: "It costs 3." is whole until "14" follows.
- An ellipsis ends a sentence wherever whitespace follows it: "Well... maybe" is two.
- Every line is a sentence of its own: headings, list items without marks, and lines that are wrapped.
- A mark without whitespace after it ends nothing: two Chinese or Japanese sentences on one line are one,
  as is "One.Two". Thai, and other scripts without these marks (such as the Devanagari danda and the
  Arabic question mark), are split at line breaks only.
"""


def whole_sentences(text: str) -> str:
    """Return the text up to the end of its last complete sentence, as `SENTENCE_END` has it."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, without the whitespace around them; the last one may be incomplete."""
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    found = [text[start:end].strip() for start, end in pairwise(ends)]
    return [sentence for sentence in found if sentence]


Scored = tuple[str, bool]
"""A text that was scored, and whether it is a finished answer."""
Score = tuple[float, dict[str, float]]
"""A score, and the scores of its parts."""


class WholeSentences(Composite):
    """Scores an unfinished answer up to its last complete sentence, and each such text only once."""

    owns_parts = True

    def __init__(self, model: RewardModel) -> None:
        super().__init__(model.name, [model])
        self.known: dict[Conversation, dict[Scored, Score]] = {}

    def open(self, conversation: Conversation) -> None:
        super().open(conversation)
        self.known[conversation] = {}

    def close(self, conversation: Conversation) -> None:
        self.known.pop(conversation, None)
        super().close(conversation)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        texts = [_scored_of(response) for response in responses]
        new: dict[tuple[Conversation, Scored], Response] = {}
        for text, response in zip(texts, responses, strict=True):
            if text not in self.known[response.conversation]:
                new.setdefault((response.conversation, text), response)  # the first to ask holds what is read for it
        found = await self.score_part(0, list(new.values())) if new else []
        for ((conversation, text), response), value in zip(new.items(), found, strict=True):
            self.known[conversation][text] = value, dict(response.parts)
        return [self._known(response, text) for response, text in zip(responses, texts, strict=True)]

    def response_view(self, part: int, response: Response) -> Response:
        view = super().response_view(part, response)
        view.text, _ = _scored_of(response)
        if view.text != response.text:
            view.ids = view.log_likelihood = view.states = None
        return view

    def _known(self, response: Response, text: Scored) -> float:
        value, parts = self.known[response.conversation][text]
        response.parts.update(parts)
        return value


def _scored_of(response: Response) -> Scored:
    text = response.text if response.finished else whole_sentences(response.text)
    return text, response.finished
