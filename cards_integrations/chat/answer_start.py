"""Where an answer begins: the tokens that it is decoded after, and the space that belongs to the template."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AnswerStart:
    """The end of a prompt, as far as decoding the answer needs it.

    Tokens are decoded differently at the beginning of a text: those of sentencepiece lose their space there. So an
    answer is decoded after the last tokens of its prompt, whose text is then removed.

    Attributes:
        ids: The last tokens of the prompt that are text.
        text: The text of these.
        space: What the chat template, or the tokenizer after a special token, writes before the content of an
            assistant's message; it is not part of the answer.
        visible: Special tokens that are decoded to text, because a stop string contains them.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    space: str = ""
    visible: frozenset[int] = frozenset()

    def answer_in(self, whole: str) -> str | None:
        """Return the answer, given the text of the prompt's last tokens and its own; None without these in front."""
        if not whole.startswith(self.text):
            return None
        return whole[len(self.text) :].removeprefix(self.space)


NOTHING_BEFORE = AnswerStart()
