"""The text that a reward model reads around an answer."""

from __future__ import annotations

from cards_integrations.chat.template import ChatTokenizer, as_text
from cards_integrations.rewards.base import Conversation


class Layout:
    """The text that a reward model reads around an answer."""

    def __init__(self, chat: ChatTokenizer, prompt_format: str | None = None, end_of_turn: bool = True) -> None:
        self.chat = chat
        self.format = prompt_format or ("chat" if chat.has_template else "{prompt}{response}")
        self.end_of_turn = end_of_turn

    def around(self, conversation: Conversation) -> tuple[str, str]:
        """The text before the answer and after it."""
        if self.format == "chat":
            before, after = self.chat.around_answer(conversation.prompt)
            return before, after if self.end_of_turn else ""
        before, _, after = self.format.partition("{response}")
        prompt = as_text(conversation.prompt)
        return before.replace("{prompt}", prompt), after.replace("{prompt}", prompt)

    @property
    def special(self) -> bool:
        """Does the tokenizer add its BOS? A chat template brings its own."""
        return self.format != "chat"


def scored(ids: list[int], padding: int | None) -> list[int]:
    """Up to where transformers reads the score: the last token that does not pad, as the end of a turn may."""
    end = len(ids)
    while end > 1 and ids[end - 1] == padding:
        end -= 1
    return ids[:end]
