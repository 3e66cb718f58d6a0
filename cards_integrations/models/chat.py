"""Prompts to token ids and back: chat templates, one BOS, and text that is really text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from cards_integrations.errors import PromptError
from cards_integrations.models.base import Message

_MARK = "\u2063answer\u2063"  # stands for the answer while a template is split around it
_HALF = "\ufffd"


class Formatted(str):
    """A prompt that is already in the model's own format, special tokens included."""


class ChatTokenizer:
    """A tokenizer and its chat template, if it has one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids; `special` adds what the tokenizer adds to a plain text (a BOS, for one)."""
        return list(self.tokenizer(checked(text), add_special_tokens=special)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text; half a character at its end is U+FFFD, and takes none of the characters before it along."""
        text = self._decode(ids)
        for cut in (1, 2, 3) if text.endswith(_HALF) else ():
            whole = self._decode(ids[:-cut])
            if not whole.endswith(_HALF):
                return text if text.startswith(whole) else whole + _HALF  # byte fallback spoils a run of bytes
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def prompt(self, prompt: str | list[Message]) -> tuple[str, list[int]]:
        """The text and the ids up to where the answer begins.

        A string is one user message; a model without a template gets plain text. The BOS comes from
        the template, or from the tokenizer if there is no template, never from both.
        """
        if isinstance(prompt, Formatted) or not self.has_template:
            text = as_text(prompt)
            bos = self.tokenizer.bos_token
            return text, self._nonempty(self.encode(text, special=not (bos and text.startswith(bos))))
        before, _ = self.around_answer(prompt)
        return before, self._nonempty(self.encode(before))

    def around_answer(self, prompt: str | list[Message]) -> tuple[str, str]:
        """The template's text before the assistant's answer and after it."""
        if isinstance(prompt, Formatted):
            return str(prompt), ""
        messages = as_messages(prompt)
        before = self._render(messages, add_generation_prompt=True)
        whole = self._render([*messages, {"role": "assistant", "content": _MARK}])
        after = whole.partition(_MARK)[2]
        return before, after.rstrip("\n")

    def around_part(self, before: str, after: str) -> tuple[str, str]:
        """A prompt of one user message, `before` + some part + `after`: its text before and after the part."""
        if not self.has_template:
            return before, after
        whole = self._render([{"role": "user", "content": before + _MARK + after}], add_generation_prompt=True)
        return whole.partition(_MARK)[::2]

    def _render(self, messages: list[Message], **options: Any) -> str:
        for message in messages:
            checked(message["content"])
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except TemplateError:
            merged = alternating(messages)  # the template may insist on strict turns
        try:
            return str(self.tokenizer.apply_chat_template(merged, tokenize=False, **options))
        except TemplateError as error:
            raise PromptError(f"The model's chat template does not take these messages: {error}") from error

    @staticmethod
    def _nonempty(ids: list[int]) -> list[int]:
        if not ids:
            raise PromptError("The prompt is empty: there is no token to start from.")
        return ids


def as_messages(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_text(prompt: str | list[Message]) -> str:
    """A plain text for those who read no chat: one message as it is, several with their roles."""
    messages = as_messages(prompt)
    if len(messages) == 1:
        return messages[0]["content"]
    return "".join(f"{m['role'].capitalize()}: {m['content']}\n" for m in messages) + "Assistant:"


def alternating(messages: list[Message]) -> list[Message]:
    """System text folded into the first user turn, and consecutive turns of one role merged."""
    merged: list[Message] = []
    for message in messages:
        role = "user" if message["role"] == "system" else message["role"]
        if merged and merged[-1]["role"] == role:
            merged[-1] = {"role": role, "content": merged[-1]["content"] + "\n\n" + message["content"]}
        else:
            merged.append({"role": role, "content": message["content"]})
    return merged


def checked(text: str) -> str:
    """The text, or an error that says where it is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The text has a lone surrogate at position {error.start}, which no tokenizer can read; "
            "clean it with text.encode('utf-8', 'replace').decode()."
        ) from None
    return text


def same_vocabulary(one: object, other: object) -> bool:
    """Do two tokenizers give every text the same ids?"""
    if one is other:
        return True
    backends = [getattr(t, "backend_tokenizer", None) for t in (one, other)]
    return None not in backends and backends[0].to_str() == backends[1].to_str()  # type: ignore[union-attr]
