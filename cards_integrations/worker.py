"""The engine's thread: all requests of a process in one batch.

It runs an asyncio loop. Every request is a task in it (its decoding method); one more task drives
the models: sample, score what has ended, let the methods react, forward. So methods, models and
requests share one thread and need no lock.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from cards_integrations.decoding.base import Decoding
from cards_integrations.errors import CardsError, CardsTimeout, EngineClosed, ModelError, PromptError, SettingsError
from cards_integrations.models.base import Context, Message
from cards_integrations.models.loading import LocalModel, ModelLoader, Placement
from cards_integrations.models.local import LocalLanguageModel
from cards_integrations.models.randomness import fresh_seed
from cards_integrations.models.sampling import Sampler
from cards_integrations.models.stops import StopStrings
from cards_integrations.rewards.base import Conversation, Response, Reward, RewardModel
from cards_integrations.session import Chunk, Pending, Session, score
from cards_integrations.trace import Alignment, Usage

T = TypeVar("T")
log = logging.getLogger("cards_integrations")


class EngineSettings(Placement):
    """What is about the machine, not the method.

    `width` is how many candidates a request may draft at once ("auto": what pays on the device,
    shared among the live requests); no result depends on it. `max_rows` is how many requests run at
    once; more of them wait.
    """

    width: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    max_rows: Annotated[int, Field(ge=1)] = 64


@dataclass(frozen=True)
class Request:
    """One answer to be written."""

    prompt: str | list[Message]
    decoding: Decoding
    reward: Reward | None = None
    sampler: Sampler = field(default_factory=Sampler)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int | None = None
    timeout: float | None = None


class Worker:
    """The thread, its loop, and everything that lives there. Ended by `stop`."""

    def __init__(self, model: LocalModel, settings: EngineSettings) -> None:
        self.model = model
        self.settings = settings
        self.failed = False
        self.rewards: dict[Reward, RewardModel] = {}
        self.live: set[Session] = set()
        self._judging: set[asyncio.Task[None]] = set()
        self.error: CardsError | None = None
        self.loop = asyncio.new_event_loop()
        self.language_model: LocalLanguageModel
        self.loaded: Future[LocalLanguageModel] = Future()
        self._stopping = False
        self.thread = threading.Thread(target=self._main, name="cards-engine", daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    # --- from any thread ---

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def stop(self) -> None:
        """End the thread; whoever waits gets `EngineClosed`. Also runs at interpreter exit."""
        atexit.unregister(self.stop)
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._halt)
        if threading.current_thread() is not self.thread:
            self.thread.join()

    # --- in the worker's thread ---

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loader = ModelLoader(self.settings)
            model, tokenizer = self.loader.causal(self.model)
            self.language_model = LocalLanguageModel(model, tokenizer, self.model.model)
        except Exception as error:
            self.failed = True  # the next request tries again
            self.error = error if isinstance(error, CardsError) else ModelError(f"{type(error).__name__}: {error}")
            self.loaded.set_exception(self.error)
        else:
            self.loaded.set_result(self.language_model)
        self._work = asyncio.Event()
        self._rows = asyncio.Semaphore(self.settings.max_rows)
        if not self.failed:
            self._driver = self.loop.create_task(self._drive())
        self.loop.run_forever()
        self.loop.run_until_complete(self._end())
        self.loop.close()

    def _halt(self) -> None:
        self._stopping = True
        self.error = self.error or EngineClosed("The engine was closed.")
        self.loop.stop()

    async def _end(self) -> None:
        await asyncio.sleep(0)  # what was submitted last begins, so that it can say why it ends
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def answer(self, request: Request, emit: Callable[[Chunk], None] | None) -> Alignment:
        """One request, from its prompt to its alignment."""
        try:
            with self._at_work():
                async with asyncio.timeout(request.timeout), self._rows:
                    return await self._answer(request, emit)
        except TimeoutError:
            raise CardsTimeout(f"No answer within timeout={request.timeout} seconds.") from None

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """What a caller is told where the model did not load, or the engine is closed meanwhile."""
        if self.error is not None:
            raise self.error
        try:
            yield
        except asyncio.CancelledError:
            if self._stopping:
                raise EngineClosed("The engine was closed while the request ran.") from None
            raise

    async def _answer(self, request: Request, emit: Callable[[Chunk], None] | None) -> Alignment:
        began = time.perf_counter()
        model = self.language_model
        _, prompt_ids = model.chat.prompt(request.prompt)
        self._check_room(request, len(prompt_ids))
        usage = Usage(prompt_tokens=len(prompt_ids))
        stop, seed = StopStrings(request.stop), fresh_seed() if request.seed is None else request.seed
        context = Context(request.prompt, prompt_ids, request.max_tokens, request.sampler, stop, usage)
        settings = request.reward if request.decoding.needs_reward else None
        reward = self._reward(settings) if settings else None
        session = Session(self, context, seed, reward, settings.scale if settings else None, emit)
        self.live.add(session)
        try:
            await request.decoding.generate(session)
        finally:
            self.live.discard(session)
            session.close()
        usage.completion_tokens = len(context.ids)
        usage.seconds = time.perf_counter() - began
        assert session.finish is not None
        return Alignment(
            text=context.text,
            token_ids=tuple(context.ids),
            prompt_ids=tuple(prompt_ids),
            reward=session.segments[-1].reward,
            segments=tuple(session.segments),
            usage=usage,
            finish_reason=session.finish,
            log_likelihood=session.log_likelihood,
            seed=seed,
            prompt_reward=session.prompt_score,
            model=model.name,
            method=request.decoding.method,
        )

    def _check_room(self, request: Request, prompt_tokens: int) -> None:
        window = self.language_model.context_window
        if prompt_tokens >= window:
            raise PromptError(f"The prompt has {prompt_tokens} tokens, and the model's context is {window}.")
        if prompt_tokens + request.max_tokens > window:
            raise SettingsError(
                f"max_tokens={request.max_tokens} does not fit: the prompt has {prompt_tokens} tokens, and the "
                f"model's context is {window}; the most that fits is {window - prompt_tokens}."
            )

    def _reward(self, settings: Reward) -> RewardModel:
        if settings not in self.rewards:
            self.rewards[settings] = settings.build(self.loader)
        return self.rewards[settings]

    async def score_texts(self, settings: Reward, prompt: str | list[Message], texts: list[str]) -> list[float]:
        with self._at_work():
            model = self._reward(settings)
            conversation = Conversation(prompt, Usage())
            model.open(conversation)
            try:
                return await score(model, [Response(conversation, text) for text in texts])
            finally:
                model.close(conversation)

    def width(self) -> int:
        """Candidates a request may draft at once: the settings', or a fair share of what pays here."""
        if self.settings.width != "auto":
            return self.settings.width
        most, rows = (4, 16) if self.loader.device.type == "cpu" else (16, 128)
        return max(1, min(most, rows // max(1, len(self.live))))

    def wake(self) -> None:
        self._work.set()

    async def _drive(self) -> None:
        """Sample, score what has ended, let the methods react, forward; for ever."""
        while True:
            await self._work.wait()
            try:
                ended = self.language_model.sample()
                busy = bool(ended)
                if ended:
                    self._deliver([candidate.waiter for candidate in ended])
                else:
                    busy = self.language_model.forward()
            except Exception as error:
                self._fail(error)
                busy = False
            if not busy:
                self._work.clear()
            # Two turns of the loop: in the first the rewards score, in the second the methods go on.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def _fail(self, error: Exception) -> None:
        """An error in a model's forward reaches every request in it; the next one finds clean rows."""
        log.exception("the language model failed")
        wrapped = ModelError(f"The language model failed: {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        for session in self.live:
            session.fail(wrapped)
        self.language_model.reset()

    def _deliver(self, ended: list[tuple[Session, Pending]]) -> None:
        """Resolve finished candidates, the scored ones through their reward models, batched."""
        groups: dict[Any, list[tuple[Session, Pending]]] = {}
        for session, pending in ended:
            model = pending.judge
            if model is None:
                pending.done.set_result(float("nan"))
                continue
            groups.setdefault((model, None if model.across_requests else session), []).append((session, pending))
        for (model, _), group in groups.items():
            task = self.loop.create_task(self._judge(model, group))
            self._judging.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._judging.discard)

    async def _judge(self, model: RewardModel, group: list[tuple[Session, Pending]]) -> None:
        """Score a group of candidates; if that fails, each request alone, so that one harms no other."""
        group = [(session, pending) for session, pending in group if not pending.done.done()]
        if not group:
            return  # all given up by now
        responses = []
        for session, pending in group:
            candidate = pending.candidate
            ids = [*candidate.context.ids, *candidate.ids] if candidate.whole else None
            pending.response = Response(session.conversation, candidate.response, ids)
            responses.append(pending.response)
        try:
            scores = await score(model, responses)
        except Exception as error:
            for response in responses:
                model.drop(response)
            sessions = dict.fromkeys(session for session, _ in group)
            if len(sessions) > 1:
                for one in sessions:
                    await self._judge(model, [(s, p) for s, p in group if s is one])
                return
            for _, pending in group:
                if not pending.done.done():
                    pending.done.set_exception(error)
            return
        for (_, pending), value in zip(group, scores, strict=True):
            if not pending.done.done():
                pending.done.set_result(value)
