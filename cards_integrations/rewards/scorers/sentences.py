"""For rewards that only make sense on whole sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from cards_integrations.rewards.base import Conversation, Response, RewardModel
from cards_integrations.rewards.composite import Composite

END = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]["'\u201d\u2019)\]]*(?=\s|$)|\n""")  # Latin and CJK


def whole_sentences(text: str) -> str:
    """The text up to the end of its last complete sentence."""
    ends = [match.end() for match in END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def sentences(text: str) -> list[str]:
    """Its sentences; the last one may be incomplete."""
    ends = [0, *(match.end() for match in END.finditer(text)), len(text)]
    found = [text[start:end].strip() for start, end in pairwise(ends)]
    return [sentence for sentence in found if sentence]


Text = tuple[str, bool]
"""A text, and whether it is finished."""
Known = tuple[float, dict[str, float]]
"""A score, and the scores of its parts."""


class WholeSentences(Composite):
    """Scores an unfinished answer as far as its last complete sentence, and each such text once."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__(model.name, [model])
        self.known: dict[Conversation, dict[Text, Known]] = {}

    def open(self, conversation: Conversation) -> None:
        super().open(conversation)
        self.known[conversation] = {}

    def close(self, conversation: Conversation) -> None:
        self.known.pop(conversation, None)
        super().close(conversation)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        texts = [(response.conversation, self._text(response)) for response in responses]
        new: dict[tuple[Conversation, Text], Response] = {}
        for (conversation, text), response in zip(texts, responses, strict=True):
            if text not in self.known[conversation]:
                new.setdefault((conversation, text), response)  # the first to ask holds what is read for it
        found = await self.part(0, list(new.values())) if new else []
        for ((conversation, text), response), value in zip(new.items(), found, strict=True):
            self.known[conversation][text] = value, dict(response.parts)
        return [self._known(response, text) for response, (_, text) in zip(responses, texts, strict=True)]

    def response_view(self, which: int, response: Response) -> Response:
        own = super().response_view(which, response)
        own.text, _ = self._text(response)
        if own.text != response.text:
            own.ids = own.log_likelihood = None
        return own

    def _known(self, response: Response, text: Text) -> float:
        value, parts = self.known[response.conversation][text]
        response.parts.update(parts)
        return value

    def _text(self, response: Response) -> Text:
        """What is scored of a response."""
        return response.text if response.finished else whole_sentences(response.text), response.finished
