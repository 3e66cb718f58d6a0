"""The text that a reward model reads around an answer."""

from __future__ import annotations

from dataclasses import replace

from cards_integrations.chat.answer_frame import AnswerFrame
from cards_integrations.chat.message import Message
from cards_integrations.chat.template import ChatTokenizer, as_text
from cards_integrations.rewards.base import Conversation


class InputFormat:
    """How prompt and answer become one text for a reward model with a tokenizer.

    Args:
        chat: The reward model's tokenizer, with its chat template if it has one.
        prompt_format: "chat" for that template, "pair" for two texts, or one text with `{response}` and usually
            `{prompt}`. None: "chat" if there is a template, else `otherwise`.
        end_of_turn: Whether what the template writes after an answer is read as well.
        otherwise: The format for a tokenizer without a template.

    Raises:
        ModelError: The template writes answers so that they cannot be scored while they grow.
    """

    def __init__(
        self, chat: ChatTokenizer, prompt_format: str | None = None, end_of_turn: bool = True,
        otherwise: str = "{prompt}{response}",
    ) -> None:  # fmt: skip
        self.chat = chat
        self.prompt_format = prompt_format or ("chat" if chat.has_template else otherwise)
        self.end_of_turn = end_of_turn
        if self.prompt_format == "chat":
            chat.check_answers()

    def around(self, conversation: Conversation) -> AnswerFrame:
        """Return what is read around the answer."""
        if self.prompt_format == "chat":
            frame = self.chat.around_answer(conversation.prompt)
            return frame if self.end_of_turn else replace(frame, after="")
        return AnswerFrame(*around_response(self.prompt_format, conversation.prompt))

    @property
    def is_pair(self) -> bool:
        """True if prompt and answer are two texts, which the tokenizer joins."""
        return self.prompt_format == "pair"

    @property
    def adds_special_tokens(self) -> bool:
        """True if the tokenizer adds its BOS; a chat template brings its own."""
        return self.prompt_format != "chat"


def around_response(prompt_format: str, prompt: str | list[Message]) -> tuple[str, str]:
    """Fill `{prompt}` in, and return the text before `{response}` and the text after it."""
    before, _, after = prompt_format.partition("{response}")
    text = as_text(prompt)
    return before.replace("{prompt}", text), after.replace("{prompt}", text)


def without_final_padding(ids: list[int], padding: int | None) -> list[int]:
    """Cut ids after the token at which transformers reads the score.

    That is the last token that is not padding; the end of a turn may be the padding token. At least one token is left.
    """
    end = len(ids)
    while end > 1 and ids[end - 1] == padding:
        end -= 1
    return ids[:end]
