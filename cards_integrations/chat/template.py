"""Prompts to token ids, and token ids to text: chat templates, one BOS, special tokens only where they belong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import groupby
from typing import Any

from jinja2.exceptions import TemplateError

from cards_integrations.chat.answer_frame import PLACEHOLDER, AnswerFrame, answer_frame
from cards_integrations.chat.answer_start import NOTHING_BEFORE, AnswerStart
from cards_integrations.chat.arrangements import arrangements, first_whole, tool_arrangements
from cards_integrations.chat.message import PARTIAL_CHARACTER, THOUGHTS, Message
from cards_integrations.chat.thinking import KEYS, ThinkingFormat, thinking_format
from cards_integrations.chat.tool_formats import FORMATS, ToolFormat
from cards_integrations.chat.tool_prompts import (
    PROBE,
    PROBE_OF_SEVERAL,
    PROBED_TOOLS,
    format_in,
    mentions_tools,
    shows_several,
    shows_tools,
    without_tool_messages,
)
from cards_integrations.chat.tools import FormatName, Tools
from cards_integrations.errors import ModelError, PromptError, said

TRIED = (
    "Yes.",
    'The Café opens at 9 a.m. -- 10 on Sundays; "No" is <b>no</b> answer.\n\n  1. Dr. O\'Neil\n  2. 50% & more\n'
    + "So be it. " * 20 + "End",
)  # fmt: skip
"""Answers on which a chat template is tested."""
BEFORE_ANSWER = 6  # tokens of the prompt after which an answer is decoded
NO_ARGUMENTS: Mapping[str, Any] = {}


class FormattedPrompt(str):
    """A prompt that the model reads as it is, special tokens included; no chat template is applied."""


class ChatTokenizer:
    """A tokenizer and its chat template, if it has one.

    Args:
        tokenizer: A tokenizer of transformers.
        tool_format: How the model writes a tool call; None to infer it from the template.
        rows: How many token ids the model has embeddings for; None if that is not known here.
    """

    def __init__(self, tokenizer: Any, tool_format: FormatName | None = None, rows: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._tool_format = tool_format
        self._rows = rows

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: The text.
            special: Whether to add the special tokens that the tokenizer puts around a plain text, such as a BOS.

        Raises:
            PromptError: The tokenizer cannot read the text, or the model does not have one of its tokens.
        """
        check_unicode(text)
        try:
            ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        except Exception as error:
            raise PromptError(f"The tokenizer cannot read the text: {said(error)}") from error
        self.check_ids(ids)
        return ids

    def encode_beginning(self, text: str) -> list[int]:
        """Return the token ids of the beginning of a text: with the special tokens before it, not those after it."""
        ids, appended = self.encode(text, special=True), self.appended
        return ids[: len(ids) - len(appended)] if appended and ids[-len(appended) :] == appended else ids

    def encode_answer(self, text: str) -> list[int]:
        """Return the token ids of a text that follows a prompt; a space at its beginning is kept."""
        return self.encode(text[1:] if self._puts_space_before and text.startswith(" ") else text)

    @cached_property
    def _puts_space_before(self) -> bool:
        """True if the tokenizer puts a space before a text: its first word has the token of one after a space."""
        return self._decode(self.encode("a") * 2) == self._decode(self.encode("a a"))

    @cached_property
    def appended(self) -> list[int]:
        """The ids that the tokenizer appends to a plain text, such as end-of-sequence."""
        plain, whole = self.encode("a"), self.encode("a", special=True)
        starts = [i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain]
        return whole[starts[0] + len(plain) :] if starts else []

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise a `PromptError` if the model has no embedding for one of these token ids."""
        token = max(ids, default=0)
        if self._rows is not None and token >= self._rows:
            raise PromptError(
                f"The text has the token {self.tokenizer.convert_ids_to_tokens(token)!r}, which was added to the "
                f"tokenizer as {token}; the model knows {self._rows} tokens only. Leave it out of the text."
            )

    def answer_start(self, prompt: str | list[Message], ids: Sequence[int], stop: Sequence[str] = ()) -> AnswerStart:
        """Return where the answer to a prompt begins.

        Args:
            prompt: The prompt.
            ids: Its token ids.
            stop: The stop strings of the answer.

        Raises:
            ModelError: The tokenizer cannot decode the prompt.
        """
        last: list[int] = []
        for token in reversed(ids):
            if self._shown([token]):
                last.insert(0, token)
            if len(last) == BEFORE_ANSWER:
                break
        raw = isinstance(prompt, FormattedPrompt) or not self.has_template
        space = "" if raw else self._space_before_content
        visible = {token for token, text in self._special.items() if any(text in each for each in stop)}
        try:
            text = self.decode(last)
        except Exception as error:
            raise ModelError(f"The tokenizer cannot decode a prompt: {said(error)}") from error
        return AnswerStart(tuple(last), text, space, frozenset(visible))

    @cached_property
    def _space_before_content(self) -> str:
        """The space between a generation prompt and the content of an answer; "" if there is none."""
        try:
            user: Message = {"role": "user", "content": "a"}
            before = self.encode(self._render([user], add_generation_prompt=True))
            whole = self.encode(self._render([user, {"role": "assistant", "content": "answer"}]))
        except PromptError:
            return ""
        text = self._decode(whole) if whole[: len(before)] == before else ""
        return " " if text.startswith(self._decode(before) + " answer") else ""

    def decode(self, ids: Sequence[int], start: AnswerStart = NOTHING_BEFORE) -> str:
        """Return the text of token ids of an answer.

        Args:
            ids: The token ids.
            start: Where the answer begins.

        Returns:
            The text; an incomplete character is one U+FFFD, and further ids change nothing else.
        """
        if not (start.text or start.space):
            return self._decode_characters(ids, start.visible)
        text = start.answer_in(self._decode_characters([*start.ids, *ids], start.visible))
        return self._decode_characters(ids, start.visible) if text is None else text

    def _decode_characters(self, ids: Sequence[int], visible: frozenset[int]) -> str:
        text = self._decode(ids, visible)
        if PARTIAL_CHARACTER in text and self._bytes:
            text = self._decode(self._whole_characters(ids, visible), visible)
        return text

    def token_text(self, token: int) -> str:
        """Return the text of a single token, which may be a special one, with the space that it may begin with."""
        text = str(self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        piece = self.tokenizer.convert_ids_to_tokens(token)
        return " " + text if isinstance(piece, str) and piece.startswith("\u2581") and text[:1] != " " else text

    def _whole_characters(self, ids: Sequence[int], visible: frozenset[int]) -> list[int]:
        """Return ids with the bytes of U+FFFD for partial characters.

        Otherwise, byte fallback decodes all bytes around a partial character to U+FFFD, too.
        """
        whole: list[int] = []
        for is_byte, run in groupby(self._shown(ids, visible), self._bytes.__contains__):
            if is_byte:
                text = bytes(self._bytes[token] for token in run).decode(errors="replace")
                whole += [self._byte_tokens[byte] for byte in text.encode()]
            else:
                whole += run
        return whole

    def _decode(self, ids: Sequence[int], visible: frozenset[int] = frozenset()) -> str:
        skip_special = not self.markers and not visible
        shown = list(ids) if skip_special else self._shown(ids, visible)
        return str(self.tokenizer.decode(shown, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))

    def _shown(self, ids: Sequence[int], visible: frozenset[int] = frozenset()) -> list[int]:
        """Return the ids without special tokens, except markers and visible ones.

        The bytes before and after a special token may be those of one character.
        """
        return [t for t in ids if t not in self._special or t in self.markers or t in visible]

    def prompt(
        self, prompt: str | list[Message], tools: Tools | None = None, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> tuple[str, list[int]]:
        """Render a prompt up to where the answer begins, and encode it.

        A string is one message of the user; a model without a template gets plain text. The BOS comes from the
        template, or from the tokenizer if there is no template, never from both. If the template knows no tools, an
        instruction in the system message describes them.

        Args:
            prompt: The prompt.
            tools: What the answer may call.
            arguments: Further arguments of the template, such as `enable_thinking`.

        Returns:
            The text and its token ids.

        Raises:
            PromptError: The prompt has no tokens, or the template or the tokenizer does not accept it.
        """
        if isinstance(prompt, FormattedPrompt):
            return self._plain(str(prompt))
        messages = self._with_thoughts(as_messages(prompt))
        if tools or mentions_tools(messages):
            schemas = tools.schemas if tools else ()
            if self.knows_tools:
                with suppress(PromptError, TemplateError):  # it may require an order that these messages do not have
                    before = self._render_tools(messages, list(schemas), arguments)
                    return before, self._nonempty(self.encode(before))
            messages = without_tool_messages(messages, self.tool_format, schemas)
        if not self.has_template:
            return self._plain(as_text(messages))
        before = self._render(messages, **{**arguments, "add_generation_prompt": True})
        return before, self._nonempty(self.encode(before))

    def _with_thoughts(self, messages: list[Message]) -> list[Message]:
        """Return the messages with their thoughts under the template's own key; without them if it has none."""
        key = self.thinking.key if self.thinking else None
        return [_renamed(message, key) if THOUGHTS in message else message for message in messages]

    def count(
        self, prompt: list[Message], tools: Tools | None = None, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> int:
        """Return the number of tokens of a conversation as a prompt; approximate where the template refuses it."""
        try:
            return len(self.prompt(prompt, tools, arguments)[1]) if prompt else 0
        except PromptError:
            text = as_text(prompt).encode(errors="replace").decode()
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _plain(self, text: str) -> tuple[str, list[int]]:
        bos = self.tokenizer.bos_token
        with_bos = bos and text.startswith(bos)
        return text, self._nonempty(self.encode(text) if with_bos else self.encode_beginning(text))

    def without_tools(self, prompt: str | list[Message]) -> str | list[Message]:
        """Return the conversation for a model that knows neither tools nor thoughts, such as a reward model."""
        if isinstance(prompt, str):
            return prompt
        if mentions_tools(prompt):
            return without_tool_messages(prompt, self.tool_format)
        return [_renamed(message, None) for message in prompt] if any(THOUGHTS in m for m in prompt) else prompt

    @property
    def knows_tools(self) -> bool:
        """True if the template shows tools, calls and results."""
        return self._template_format is not None

    @cached_property
    def thinking(self) -> ThinkingFormat | None:
        """How this model writes its thoughts, by its template; None if that has no marks of thoughts."""
        source = self.tokenizer.chat_template if self.has_template else ""
        text = source if isinstance(source, str) else "".join(map(str, source.values()))
        return thinking_format(text, self._apply)

    @property
    def tool_format(self) -> ToolFormat:
        """How this model writes a call: by the settings, or else by its template."""
        return FORMATS[self._tool_format or self._template_format or "hermes"]

    @cached_property
    def _template_format(self) -> FormatName | None:
        if not self.has_template:
            return None
        try:
            shown = self._apply(PROBE, tools=PROBED_TOOLS)
        except Exception:  # a template may raise anything for roles that it does not know
            return None
        return format_in(shown) if shows_tools(shown) else None

    @cached_property
    def _shows_several_calls(self) -> bool:
        """True if the template shows all calls of a turn, or refuses several."""
        try:
            return shows_several(self._apply(PROBE_OF_SEVERAL, tools=PROBED_TOOLS))
        except Exception:  # a template may raise anything
            return True

    @cached_property
    def _byte_tokens(self) -> list[int]:
        """The tokens of bytes 0 to 255 (sentencepiece's byte fallback); empty if one is missing."""
        found = self.tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
        known = set(found) - {None, self.tokenizer.unk_token_id}
        return found if len(known) == 256 and self._decode(found[0x41:0x42]) == "A" else []

    @cached_property
    def _bytes(self) -> dict[int, int]:
        return {token: byte for byte, token in enumerate(self._byte_tokens)}

    @cached_property
    def added_tokens(self) -> dict[int, Any]:
        """The tokens that were added to the vocabulary, as transformers describes them, by id."""
        return dict(self.tokenizer.added_tokens_decoder)

    @cached_property
    def _special(self) -> dict[int, str]:
        return {i: str(token) for i, token in self.added_tokens.items() if token.special}

    @cached_property
    def markers(self) -> dict[int, str]:
        """Special tokens that an answer's text contains, by id: those of calls, and those around thoughts."""
        around = (self.thinking.opening + self.thinking.closing) if self.thinking else ""
        return {i: text for i, text in self._special.items() if text in self.tool_format.markers or text in around}

    def grammar_literal(self, text: str) -> str:
        """Return a text as a literal of a grammar: a string, or the token that it is if it marks a call."""
        added = {str(token): i for i, token in self.added_tokens.items()}  # not all are special
        if text in self.tool_format.markers and text in added:
            return f"<[{added[text]}]>"
        return json.dumps(text, ensure_ascii=False)

    def grammar_literals(self, text: str) -> str:
        """Return a text as an expression of a grammar, in which all added tokens are tokens."""
        added = {str(token): f"<[{i}]>" for i, token in self.added_tokens.items()}
        pieces = re.split(f"({'|'.join(map(re.escape, added))})", text) if added else [text]
        return " ".join(added.get(piece) or json.dumps(piece, ensure_ascii=False) for piece in pieces if piece)

    def around_answer(self, prompt: str | list[Message]) -> AnswerFrame:
        """Return what the template writes around the assistant's answer to a prompt.

        Raises:
            PromptError: The template does not accept the prompt, or does not show the answer.
        """
        if isinstance(prompt, FormattedPrompt):
            return AnswerFrame(str(prompt))
        messages = as_messages(self.without_tools(prompt))
        return answer_frame(
            lambda text: self._render([*messages, {"role": "assistant", "content": text}]), self._thought_marks
        )

    def check_answers(self) -> None:
        """Check that the template writes the same text around all answers, and the answers as they are.

        Raises:
            ModelError: It changes, cuts, repeats or counts answers.
        """
        try:
            frame, messages = self.around_answer("Hi"), as_messages("Hi")
            for answer in TRIED:
                if self._render([*messages, {"role": "assistant", "content": answer}]) != frame.whole(answer):
                    raise ModelError(
                        f"The chat template of {self.tokenizer.name_or_path!r} changes the assistant's answers, or "
                        "what it writes around them goes by what they are, so that answers cannot be scored while they "
                        "grow: pass a prompt_format with {prompt} and {response}."
                    )
        except PromptError:
            return  # the template refuses this conversation; that of a request is checked in its turn

    def around_part(self, before: str, after: str) -> tuple[str, str]:
        """Return the rendered text around a part of a user's message, which is `before` + the part + `after`."""
        if not self.has_template:
            return before, after
        whole = self._render([{"role": "user", "content": before + PLACEHOLDER + after}], add_generation_prompt=True)
        return whole.partition(PLACEHOLDER)[::2]

    def around_last_but_one(self, prompt: str | list[Message], last: Message) -> AnswerFrame:
        """Return what the template writes around an answer that one more message follows, up to the model's reply.

        Args:
            prompt: The conversation before the answer.
            last: The message after it.

        Raises:
            PromptError: The prompt has no messages, or the template does not show the answer.
        """
        if isinstance(prompt, FormattedPrompt):
            raise PromptError("A formatted prompt has no messages that another one could follow: pass the messages.")
        messages = as_messages(self.without_tools(prompt))

        def render(text: str) -> str:
            return self._render([*messages, {"role": "assistant", "content": text}, last], add_generation_prompt=True)

        return answer_frame(render, self._thought_marks)

    @property
    def _thought_marks(self) -> tuple[str, ...]:
        return (self.thinking.opening, self.thinking.closing) if self.thinking else ()

    def _render(self, messages: list[Message], **options: Any) -> str:
        try:
            return first_whole(arrangements(messages), partial(self._apply, **options))
        except TemplateError as error:
            raise PromptError(f"The model's chat template does not accept these messages: {error}") from error

    def _render_tools(
        self, messages: list[Message], schemas: list[dict[str, Any]], arguments: Mapping[str, Any]
    ) -> str:
        """Render a prompt with the template's own form of tools, calls and results."""
        named = isinstance(self.tokenizer.chat_template, dict)  # with [] the one that is named "tool_use" is chosen
        shown = schemas if schemas or named else None
        options = {**arguments, "tools": shown, "add_generation_prompt": True}
        return first_whole(tool_arrangements(messages, self._shows_several_calls), partial(self._apply, **options))

    def _apply(self, messages: list[Message], **options: Any) -> str:
        for message in messages:
            check_unicode(message["content"])
            for key in KEYS:
                check_unicode(message.get(key) or "")
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except TemplateError:
            raise  # the caller may try other messages
        except Exception as error:
            raise PromptError(f"The chat template fails: {said(error)}") from error

    @staticmethod
    def _nonempty(ids: list[int]) -> list[int]:
        if not ids:
            raise PromptError("The prompt is empty: there is no token to start from.")
        return ids


def _renamed(message: Message, key: str | None) -> Message:
    """Return a message with its thoughts, if it has any, under this key; without them if the key is None."""
    rest = {name: value for name, value in message.items() if name != THOUGHTS}
    return {**rest, key: message[THOUGHTS]} if key and message.get(THOUGHTS) else rest


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """Return a prompt as messages; a string is one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_text(prompt: str | list[Message]) -> str:
    """Return a prompt as plain text: the content of one message, or several messages with their roles."""
    messages = as_messages(prompt)
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "".join(f"{m['role'].capitalize()}: {m['content']}\n" for m in messages) + "Assistant:"


def check_unicode(text: str) -> None:
    """Raise a `PromptError` if the text is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The text has a lone surrogate at position {error.start}, which no tokenizer can read; "
            "clean it with text.encode('utf-8', 'replace').decode()."
        ) from None


def same_vocabulary(one: object, other: object) -> bool:
    """True if two tokenizers give every text the same ids."""
    if one is other:
        return True
    backends = [getattr(t, "backend_tokenizer", None) for t in (one, other)]
    return None not in backends and backends[0].to_str() == backends[1].to_str()  # type: ignore[union-attr]
