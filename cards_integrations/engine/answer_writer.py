"""From a request to its answer: the prompt, the thoughts, the session in which a method writes, the trace."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from cards_integrations.chat.grammar import Grammar
from cards_integrations.chat.message import Message
from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.chat.template import ChatTokenizer, as_text
from cards_integrations.chat.tool_reader import ToolReader
from cards_integrations.decoding.base import Decoding, Scale
from cards_integrations.engine.admission import Admission, check_length
from cards_integrations.engine.channel import Channels
from cards_integrations.engine.preemption import cache_needs
from cards_integrations.engine.request import Request
from cards_integrations.engine.scales import KnownScale
from cards_integrations.engine.session import Session
from cards_integrations.engine.step_loop import StepLoop
from cards_integrations.engine.thinking import Emit, Thinker, render
from cards_integrations.errors import SettingsError, said
from cards_integrations.models.base import ConstrainedModel, Context, LanguageModel
from cards_integrations.models.randomness import fresh_seed
from cards_integrations.rewards.base import Conversation, Response, RewardModel, scores
from cards_integrations.threads import in_thread
from cards_integrations.trace import Alignment, Usage
from cards_integrations.transformer.kv_memory import KVMemory

T = TypeVar("T")
LONG = 100_000  # characters of a text that takes longer to tokenize than a step takes
log = logging.getLogger("cards_integrations")


class AnswerWriter:
    """Writes answers, and scores texts, with the models of one engine.

    Args:
        language_model: Where candidates are drafted.
        steps: The loop that drives the models.
        admission: Who may begin.
        memory: The budget of all caches.
        check: Raises an error if the engine cannot go on.
    """

    def __init__(
        self, language_model: LanguageModel, steps: StepLoop, admission: Admission, memory: KVMemory,
        check: Callable[[], None],
    ) -> None:  # fmt: skip
        self.language_model = language_model
        self.steps = steps
        self.admission = admission
        self.memory = memory
        self.check = check

    async def write(
        self, request: Request, reward: RewardModel | None, known: KnownScale | None, emit: Emit | None
    ) -> Alignment:
        """Write the answer to a request that has a row.

        Args:
            request: What to answer.
            reward: The reward model that guides; None for a method that needs none.
            known: The scale of the reward; None if the method does not ask for it.
            emit: Called with each kept segment.
        """
        began, method = time.perf_counter(), request.decoding.method
        scale, origin = known or (None, None)
        model = self.language_model
        prompt = await _unblocking(len(as_text(request.prompt)), render, request, model.chat)
        check_length(len(prompt.ids), request.max_tokens, model.context_window)
        seed = fresh_seed() if request.seed is None else request.seed
        open_session = partial(self._session, Usage(prompt_tokens=len(prompt.ids)), reward, scale)
        thinker = Thinker(request, model.chat, model.context_window, open_session, emit)
        channels = Channels(model.chat, isinstance(model, ConstrainedModel), open_session)
        begun = await channels.enter(await thinker.think(prompt, seed), seed)
        async with open_session(begun.request, begun.ids, seed, True, emit) as session:
            await _draft(session, request.decoding)
        if session.cut and reward is not None and session.segments[-1].reward is not None:
            await self._score_again(session, reward)
        guidance = request.decoding.guidance(scale, origin)
        answer = session.alignment(method, began, guidance, begun.thinking)
        _log_end(answer)
        return answer

    async def score(
        self, reward: RewardModel, prompt: str | list[Message], texts: Sequence[str], context: tuple[str, ...]
    ) -> list[float]:
        """Return the rewards of finished answers to one prompt."""
        chat = self.language_model.chat
        conversation = Conversation(chat.without_tools(prompt), Usage(), context)
        characters = len(as_text(prompt)) + sum(map(len, texts))
        tokens = await _unblocking(characters, _tokens_of, chat, prompt, texts)
        async with self._open_to_score(reward, conversation, tokens):
            return await scores(reward, [Response(conversation, text, finished=True) for text in texts])

    async def _score_again(self, session: Session, reward: RewardModel) -> None:
        """Score an answer again that was cut after its last segment had been scored."""
        response, context = session.response(), session.context
        tokens = len(context.prompt_ids) + len(context.ids)
        async with self._open_to_score(reward, session.conversation, tokens):
            session.rescored(response, *await scores(reward, [response]))

    @asynccontextmanager
    async def _open_to_score(self, reward: RewardModel, conversation: Conversation, tokens: int) -> AsyncIterator[None]:
        """Keep a conversation of so many tokens open inside the block, so that its whole answers can be scored."""
        async with self.admission.memory_to_score(reward.cache_needs(conversation, tokens)):
            reward.open(conversation)
        try:
            yield
        finally:
            reward.close(conversation)
            self.admission.scored()

    @asynccontextmanager
    async def _session(
        self, usage: Usage, reward: RewardModel | None, scale: Scale | None,
        request: Request, prompt_ids: list[int], seed: int, guided: bool, emit: Emit | None,
    ) -> AsyncIterator[Session]:  # fmt: skip
        """Open a session as soon as there is memory for it; it is live inside the block."""
        chat = self.language_model.chat
        reward = reward if guided else None
        check_length(len(prompt_ids), request.max_tokens, self.language_model.context_window)
        context = self._context(request, prompt_ids, usage)
        conversation = Conversation(chat.without_tools(request.prompt), usage, request.context)
        needs = partial(cache_needs, self.steps.stepwise, context, conversation, reward)
        async with self.admission.memory(needs(), needs(whole=True)):
            self.check()  # the engine may have failed while this request waited
            reader = ToolReader(request.tools, chat.tool_format)
            session = Session(self.steps, context, seed, conversation, reward, scale, emit, reader)
            self.memory.evict_for(0)
            self.steps.live[context] = session
        try:
            yield session
        finally:
            del self.steps.live[context]
            session.close()
            self.steps.memory_freed()

    def _context(self, request: Request, prompt_ids: list[int], usage: Usage) -> Context:
        chat, grammar = self.language_model.chat, request.grammar
        stop = self._stop_strings(request)
        start = chat.answer_start(request.prompt, prompt_ids, stop.strings)
        context = Context(request.prompt, prompt_ids, request.max_tokens, request.sampler, stop, usage, start=start)
        context.logprobs = request.logprobs
        context.whole_sentences = request.finish_at == "sentence" and grammar is None and request.tools is None
        if request.tools is not None:
            grammar = chat.tool_format.grammar(request.tools, chat.grammar_literal, grammar)
        if grammar is not None:
            context.matcher = self._constrained(grammar).matcher(grammar)
        return context

    def _stop_strings(self, request: Request) -> StopStrings:
        """Return the strings that end the answer; none do within a grammar or a call, whose parts are no answers."""
        tools = request.tools
        if request.grammar is not None or (tools is not None and tools.forced):
            return StopStrings()
        reader = ToolReader(tools, self.language_model.chat.tool_format)
        return StopStrings(request.stop, None if tools is None else reader.in_call)

    def _constrained(self, grammar: Grammar) -> ConstrainedModel:
        model = self.language_model
        if not isinstance(model, ConstrainedModel):
            raise SettingsError(
                "Grammars, response formats and enforced tool calls need a local model: a server does not go on with "
                "a grammar from one segment to the next. Use LocalModel, or tool_choice='auto'."
            )
        return model


async def _draft(session: Session, decoding: Decoding) -> None:
    """Let a method write in its session."""
    log.info(
        "request %s: %s, prompt of %d tokens, seed %d",
        session.request_id, decoding.method, len(session.context.prompt_ids), session.seed,
    )  # fmt: skip
    try:
        await session.write(decoding)
    except BaseException as error:
        log.info("request %s: ended by %s", session.request_id, said(error))
        raise


def _log_end(answer: Alignment) -> None:
    usage = answer.usage
    log.info(
        "request %s: %s after %d tokens, %d drafts of %d tokens, %.2f s", answer.request_id, answer.finish_reason,
        usage.completion_tokens, usage.drafts, usage.drafted_tokens, usage.seconds,
    )  # fmt: skip
    if answer.out_of_reach:
        log.info("request %s: no candidate was accepted: the target is out of reach", answer.request_id)


async def _unblocking(characters: int, work: Callable[..., T], *args: Any) -> T:
    """Call a function that reads so many characters of text: in a thread if they are many, so that others go on."""
    return await in_thread(work, *args) if characters > LONG else work(*args)


def _tokens_of(chat: ChatTokenizer, prompt: str | list[Message], texts: Sequence[str]) -> int:
    """Return how many tokens a prompt and answers to it have."""
    return len(chat.prompt(prompt)[1]) + sum(len(chat.encode(text)) for text in texts)
