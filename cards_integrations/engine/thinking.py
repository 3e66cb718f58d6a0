"""The thoughts before an answer: they are written first, and become part of the prompt of the answer.

So rewards, stop strings, grammar and tool calls of the answer never see a thought.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cards_integrations.chat.template import ChatTokenizer, FormattedPrompt
from cards_integrations.chat.thinking import ThinkingFormat, switches
from cards_integrations.decoding.sampling import Sampling
from cards_integrations.engine.request import Chunk, Request
from cards_integrations.engine.session import Session
from cards_integrations.errors import SettingsError
from cards_integrations.models.base import Boundary, Context
from cards_integrations.models.randomness import derived_seed
from cards_integrations.models.sampling import NEVER
from cards_integrations.trace import Thinking

Emit = Callable[[Chunk], None]
LONGEST_OPENING = 16  # tokens within which a model opens its thoughts, if it does
MARKS = 64  # tokens that are reserved for the marks around thoughts


@dataclass(frozen=True)
class Begun:
    """Where the answer begins.

    Attributes:
        request: The request for the answer.
        ids: All tokens before it.
        thinking: The thoughts that these contain; None if there are none.
    """

    request: Request
    ids: list[int]
    thinking: Thinking | None = None


class OpenSession(Protocol):
    """Opens a session for one phase of a request."""

    def __call__(
        self, phase: Request, prompt_ids: list[int], seed: int, guided: bool, emit: Emit | None
    ) -> AbstractAsyncContextManager[Session]: ...


class BeginsWith(Boundary):
    """Ends as soon as it is clear whether a text begins with a mark."""

    mark: str

    @property
    def min_tokens(self) -> int:
        return 1

    @property
    def max_tokens(self) -> int:
        return LONGEST_OPENING

    def ends_after(self, text: str) -> bool:
        begun = text.lstrip()
        return begun.startswith(self.mark) or not self.mark.startswith(begun)


def phase_of(request: Request, **changes: Any) -> Request:
    """Return a request for a text before the answer: without grammar, tools and other options of the answer."""
    sampler = request.sampler.model_copy(update={"min_tokens": 0, "stop_token_ids": ()})
    plain = replace(request, grammar=None, tools=None, logprobs=None, finish_at="token", sampler=sampler)
    return replace(plain, **changes)


@dataclass(frozen=True)
class Rendered:
    """A prompt up to where the thoughts or, without any, the answer begins."""

    text: str
    ids: list[int]


def render(request: Request, chat: ChatTokenizer) -> Rendered:
    """Return the prompt of a request as the chat template writes it, with the thoughts open, closed or left out."""
    arguments = switches(request.thinking, request.chat_template_kwargs)
    text, ids = chat.prompt(request.prompt, request.tools, arguments)
    if request.thinking != "off" or chat.thinking is None or isinstance(request.prompt, FormattedPrompt):
        return Rendered(text, ids)
    on = {**arguments, **switches("free", request.chat_template_kwargs)}
    suffix = chat.thinking.without_thoughts(text, lambda: chat.prompt(request.prompt, request.tools, on)[0] != text)
    return Rendered(text + suffix, [*ids, *chat.encode(suffix)] if suffix else ids)


@dataclass(frozen=True)
class Thinker:
    """Writes the thoughts of one request.

    Attributes:
        request: The request.
        chat: The model's tokenizer.
        window: Tokens of the model's context.
        session: Opens a session of the engine.
        emit: Called with each kept segment of the thoughts.
    """

    request: Request
    chat: ChatTokenizer
    window: int
    session: OpenSession
    emit: Emit | None

    async def think(self, prompt: Rendered, seed: int) -> Begun:
        """Write the thoughts, if the model has any.

        Args:
            prompt: The prompt of the request.
            seed: The seed of the request.
        """
        form = self._format()
        if form is None:
            return Begun(self.request, prompt.ids)
        ids = prompt.ids
        if self.request.thinking == "off" or form.is_closed(prompt.text):
            return Begun(self._without_opening(form), ids)
        if not form.is_open(prompt.text):
            if not await self._opens(form, ids, derived_seed(seed, "opening")):
                return Begun(self._without_opening(form), ids)
            ids = [*ids, *self._encode(form.opening + form.before)]
        phase = self._phase(form, len(prompt.ids))
        emit = None if self.emit is None else ThoughtStream(self.emit)
        guided = self.request.thinking == "aligned"
        async with self.session(phase, ids, derived_seed(seed, "thoughts"), guided, emit) as session:
            await session.write(phase.decoding)
        return self._closed(form, ids, session)

    def _format(self) -> ThinkingFormat | None:
        """Return how the model writes its thoughts; None if this request has none."""
        form, mode = self.chat.thinking, self.request.thinking
        if isinstance(self.request.prompt, FormattedPrompt):
            return None
        if form is None and mode not in (None, "off"):
            raise SettingsError(
                f"thinking={mode!r}: the model's chat template shows no marks around thoughts; leave thinking= out."
            )
        return form

    def _phase(self, form: ThinkingFormat, prompt_tokens: int) -> Request:
        """Return the request for the thoughts alone."""
        room = self.window - prompt_tokens - self.request.max_tokens - MARKS
        if room < 1:
            raise SettingsError(
                f"There is no room to think: the prompt has {prompt_tokens} tokens, max_tokens is "
                f"{self.request.max_tokens}, and the model's context {self.window}. Use a smaller max_tokens, or "
                "thinking='off'."
            )
        decoding = self.request.decoding if self.request.thinking == "aligned" else Sampling()
        most = min(self.request.max_thinking_tokens, room)
        return phase_of(self.request, decoding=decoding, max_tokens=most, stop=(form.closing,))

    async def _opens(self, form: ThinkingFormat, ids: list[int], seed: int) -> bool:
        """Let the model decide whether to think."""
        phase = phase_of(self.request, decoding=Sampling(), max_tokens=LONGEST_OPENING, stop=())
        async with self.session(phase, ids, seed, False, None) as session:
            async for draft in session.drafts(until=BeginsWith(mark=form.opening), limit=1, scored=False):
                return form.opens(draft.text)
        return False

    def _without_opening(self, form: ThinkingFormat) -> Request:
        """Return the request for the answer, which must not begin to think again."""
        sampler, mark = self.request.sampler, self._encode(form.opening)
        if len(mark) > 1:  # its single tokens occur in other texts, too
            return self.request
        bias = (*sampler.logit_bias, (mark[0], NEVER))
        return replace(self.request, sampler=sampler.model_copy(update={"logit_bias": bias}))

    def _closed(self, form: ThinkingFormat, ids: list[int], session: Session) -> Begun:
        """Return the prompt with the thoughts, closed as the template closes them."""
        context = session.context
        by_model = form.closing in self.chat.decode(context.ids, context.start)
        own = self._without_mark(context) if by_model else context.ids
        context.usage.reasoning_tokens = len(context.ids)
        assert session.finish is not None  # a method goes on until then
        thinking = Thinking(context.text.strip(), tuple(own), tuple(session.segments), session.finish)
        ids = [*ids, *own, *self._encode(form.close(context.text, by_model))]
        return Begun(self._without_opening(form), ids, thinking)

    def _without_mark(self, context: Context) -> list[int]:
        """Return the ids of the thoughts without the closing mark, which may begin within a token."""
        ids = context.ids
        while ids and not context.text.startswith(self.chat.decode(ids, context.start)):
            ids = ids[:-1]
        return [*ids, *self._encode(context.text[len(self.chat.decode(ids, context.start)) :])]

    def _encode(self, text: str) -> list[int]:
        return self.chat.encode(text) if text else []


class ThoughtStream:
    """Passes the text of thoughts on, without the whitespace around it."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._text = ""
        self._shown = 0

    def __call__(self, chunk: Chunk) -> None:
        self._text += chunk.text
        text = self._text.strip()
        self._emit(Chunk("", chunk.segment, chunk.number, thought=text[self._shown :]))
        self._shown = len(text)
