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


Text = tuple[Conversation, str, bool]  # and whether it is finished


class WholeSentences(Composite):
    """Scores an unfinished answer as far as its last complete sentence, and each such text once."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__(model.name, [model])
        self.known: dict[Conversation, dict[Text, tuple[float, dict[str, float]]]] = {}

    def open(self, conversation: Conversation) -> None:
        super().open(conversation)
        self.known[conversation] = {}

    def close(self, conversation: Conversation) -> None:
        self.known.pop(conversation, None)
        super().close(conversation)

    async def score(self, responses: Sequence[Response]) -> list[float]:
        cuts = [self._cut(response) for response in responses]
        new: dict[Text, Response] = {}
        for response, cut in zip(responses, cuts, strict=True):
            text = (cut.conversation, cut.text, cut.finished)
            if text not in self.known[cut.conversation] and text not in new:
                response.state = cut.state = [None]  # the first to ask holds what is read for it
                new[text] = cut
        found = await self.part(0, list(new.values())) if new else []
        for (text, cut), value in zip(new.items(), found, strict=True):
            self.known[cut.conversation][text] = value, cut.parts
        scores = []
        for response, cut in zip(responses, cuts, strict=True):
            value, parts = self.known[cut.conversation][cut.conversation, cut.text, cut.finished]
            response.parts.update(parts)
            scores.append(value)
        return scores

    def _cut(self, response: Response) -> Response:
        text = response.text if response.finished else whole_sentences(response.text)
        cut = Response(response.conversation, text, finished=response.finished, parent=response.parent)
        if text == response.text:
            cut.ids, cut.log_likelihood = response.ids, response.log_likelihood
        return cut
