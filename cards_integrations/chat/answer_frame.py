"""How a chat template writes an assistant's last answer: the text around it, and what it strips from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cards_integrations.errors import PromptError

PLACEHOLDER = "\u2063answer\u2063"  # stands for the answer while a rendered conversation is split around it
_EDGE = "\n \n"


@dataclass(frozen=True)
class AnswerFrame:
    """A conversation that was rendered as a whole, its last answer left out.

    Attributes:
        before: The text before the answer.
        after: The text after it.
        left: What is stripped from the beginning of an answer: characters, or None for all white space.
        right: What is stripped from its end.
        marks: Texts, such as those around thoughts, for which the template may write an answer in another way.
        upto_such: Renders the conversation up to the end of an answer with such a text; None without a template.
    """

    before: str
    after: str = ""
    left: str | None = ""
    right: str | None = ""
    marks: tuple[str, ...] = ()
    upto_such: Callable[[str], str] | None = None

    def shown(self, answer: str) -> str:
        """Return an answer as the template writes it."""
        return answer.lstrip(self.left).rstrip(self.right)

    def upto(self, answer: str) -> str:
        """Return the conversation up to the end of an answer."""
        if self.upto_such is not None and any(mark in answer for mark in self.marks):
            return self.upto_such(answer)
        return self.before + self.shown(answer)

    def whole(self, answer: str) -> str:
        """Return the conversation with an answer, and what follows it."""
        return self.upto(answer) + self.after


def answer_frame(render: Callable[[str], str], marks: tuple[str, ...] = ()) -> AnswerFrame:
    """Find out how a template writes an answer.

    Args:
        render: Renders the whole conversation with an answer.
        marks: Texts, such as those around thoughts, for which the template may write an answer in another way.

    Raises:
        PromptError: The template does not show the answer, or `render` raises it.
    """
    before, found, after = render(PLACEHOLDER).partition(PLACEHOLDER)
    if not found:
        raise PromptError("The chat template does not write what the assistant answers.")
    padded = render(_EDGE + PLACEHOLDER + _EDGE)
    left, _, right = padded.removeprefix(before).removesuffix(after).partition(PLACEHOLDER)
    stripped = _stripped(left), _stripped(right[::-1])
    return AnswerFrame(before, after, *stripped, marks, lambda answer: render(answer).removesuffix(after))


def _stripped(kept: str) -> str | None:
    """Return which characters a template strips from an edge, given what it keeps of `_EDGE`; None for white space."""
    return {_EDGE: "", _EDGE.lstrip("\n"): "\n"}.get(kept)
