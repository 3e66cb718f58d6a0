"""Where an answer begins: what its text is decoded after, and what of it is the template's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AnswerStart:
    """The end of a prompt, as decoding an answer has to know it.

    A token is decoded in another way where a text begins: sentencepiece's lose their space there. Decoded after the
    last tokens of the prompt, prompt and answer together are the text of all their tokens.

    Attributes:
        ids: The last tokens of the prompt that are text.
        text: What these are decoded to.
        space: What the chat template, or the tokenizer after a special token, puts before the content of an
            assistant's message; it is no part of an answer.
        visible: Special tokens that are text here, because a stop string has them.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    space: str = ""
    visible: frozenset[int] = frozenset()

    def answer_in(self, whole: str) -> str | None:
        """The answer in the text of the prompt's last tokens and its own; None if it does not begin like them."""
        if not whole.startswith(self.text):
            return None
        return whole[len(self.text) :].removeprefix(self.space)


NOTHING_BEFORE = AnswerStart()
