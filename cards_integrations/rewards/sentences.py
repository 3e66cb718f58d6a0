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


class WholeSentences(Composite):
    """Scores an unfinished answer as far as its last complete sentence, and each such text once."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__(model.name, [model])
        self.known: dict[Conversation, dict[str, float]] = {}

    def open(self, conversation: Conversation) -> None:
        super().open(conversation)
        self.known[conversation] = {}

    def close(self, conversation: Conversation) -> None:
        self.known.pop(conversation, None)
        super().close(conversation)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        texts = [r.text if r.finished else whole_sentences(r.text) for r in responses]
        new: dict[tuple[Conversation, str], Response] = {}
        for response, text in zip(responses, texts, strict=True):
            if text not in self.known[response.conversation]:
                new.setdefault((response.conversation, text), response)
        for (conversation, text), value in zip(new, await self._ask(new), strict=True):
            self.known[conversation][text] = value
        return [self.known[r.conversation][text] for r, text in zip(responses, texts, strict=True)]

    async def _ask(self, new: dict[tuple[Conversation, str], Response]) -> list[float]:
        if not new:
            return []
        asked = []
        for (conversation, text), response in new.items():
            cut = Response(
                conversation, text, *((response.ids, response.log_likelihood) if text == response.text else ())
            )
            cut.finished = response.finished
            asked.append(cut)
        found = await self.part(0, asked)
        for response, cut in zip(new.values(), asked, strict=True):
            response.state, response.parts = cut.state, cut.parts
        return found
