"""The reward models of one engine: which are built, and how long they stay."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from cards_integrations.chat.template import ChatTokenizer, same_vocabulary
from cards_integrations.errors import CardsError, ModelError, RewardError, said
from cards_integrations.models.local.checks import embedding_rows
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.progress import phase
from cards_integrations.rewards.base import CausalModel, Loader, Reward, RewardModel
from cards_integrations.rewards.registry import known_as
from cards_integrations.rewards.scorers.sentences import WholeSentences
from cards_integrations.threads import InterpreterExit, ended_before_exit, in_thread, retrieve_error
from cards_integrations.transformer.step_times import StepTimes

log = logging.getLogger("cards_integrations")
KEPT = 16  # reward models that stay loaded although they are not in use
CACHE_SHARE = 0.25  # share of the memory for caches that these may hold


class RewardLoader(Loader):
    """Builds the reward models of one engine, each once, even if several composites have it as a part.

    A model in use stays. Of the others, those whose settings say `stays_loaded` are kept for later requests, up to
    `KEPT` of them and `CACHE_SHARE` of the memory for caches; beyond that the least recently used are released.
    """

    def __init__(self, models: ModelLoader) -> None:
        self.models = models
        self.built: dict[Reward, RewardModel] = {}  # least recently used first
        self._users: Counter[Reward] = Counter()
        self._parts: dict[Reward, list[Reward]] = {}  # the models that a model has taken from here
        self._loading: dict[tuple[Reward, bool], asyncio.Task[RewardModel]] = {}
        self._timed: set[RewardModel] = set()
        self._building: dict[Reward, threading.Lock] = {}
        self._lock = threading.Lock()  # of the dicts above; only held while they are changed
        if models is not None and models.memory is not None:
            models.memory.reclaim = self.reclaim

    @asynccontextmanager
    async def lease(self, settings: Reward, timed: bool = False) -> AsyncIterator[RewardModel]:
        """Hold a reward model inside the block. It is loaded in a thread if need be, once for all that wait for it.

        Args:
            settings: The settings of the reward.
            timed: Whether its step times are needed; they are then measured in the same thread.

        Raises:
            RewardError, ModelError: It cannot be loaded; the next call tries again.
        """
        key = _key(settings)
        self._take(key)
        try:
            yield await self._loaded(settings, timed)
        finally:
            self._give_back(key)

    @property
    def step_times(self) -> list[StepTimes]:
        """The step times of the loaded models for which they were asked for."""
        return [times for model in list(self._timed) if (times := model.step_times) is not None]

    async def _loaded(self, settings: Reward, timed: bool) -> RewardModel:
        key = _key(settings)
        known = self._known(key)
        if known is not None and (not timed or known in self._timed):
            return known
        task = self._loading.get((key, timed))
        if task is None:
            task = self._loading[key, timed] = asyncio.create_task(in_thread(self._load, settings, timed))
            task.add_done_callback(lambda task: self._end_of_load(key, timed, task))
        return await asyncio.shield(task)  # a request that gives up does not stop it for the others

    def _load(self, settings: Reward, timed: bool) -> RewardModel:
        with ended_before_exit(), phase(f"loading reward {known_as(settings)!r}"):
            model = self[settings]
            if timed:
                _ = model.step_times
                self._timed.add(model)
            return model

    def _end_of_load(self, key: Reward, timed: bool, task: asyncio.Task[RewardModel]) -> None:
        self._loading.pop((key, timed), None)
        retrieve_error(task)  # those that waited may be gone
        self._tidy()

    def causal(self, spec: LocalModel | None, name: str) -> CausalModel:
        if self.models.language_model is None:
            raise ModelError(f"reward {name!r} needs a local language model: use LocalModel, or another reward.")
        own, model, tokenizer = self.models.language_model
        memory = self.models.memory
        if spec is None or spec.same_weights(own):
            return CausalModel(model, _chat(tokenizer, model), True, True, memory)
        other, its_tokenizer = self.models.causal(spec)
        same = same_vocabulary(its_tokenizer, tokenizer)
        return CausalModel(other, _chat(its_tokenizer, other), False, same, memory)

    def __getitem__(self, settings: Reward) -> RewardModel:
        key = _key(settings)
        with self._lock:
            building = self._building.setdefault(key, threading.Lock())
        with building:
            if (known := self._known(key)) is None:
                known = self.built[key] = self._build(settings, key)
        self._building.pop(key, None)
        return known

    def _known(self, key: Reward) -> RewardModel | None:
        """Return the model if it is built, and mark it as the most recently used."""
        with self._lock:
            if (known := self.built.pop(key, None)) is not None:
                self.built[key] = known
            return known

    def _build(self, settings: Reward, key: Reward) -> RewardModel:
        borrower = _Borrower(self)
        try:
            model = settings.build(borrower)
        except BaseException as error:
            for part in borrower.taken:
                self._count(part, -1)
            if isinstance(error, (CardsError, InterpreterExit)):
                raise
            raise RewardError(f"reward {settings.name!r} cannot be loaded: {said(error)}") from error
        self._parts[key] = borrower.taken
        if settings.scores_whole_sentences:
            model = WholeSentences(model)
        model.timeout = settings.timeout
        return model

    # --- how long they stay ---

    def reclaim(self) -> bool:
        """Release the least recently used model with caches; return False if all are in use."""
        for key, model in self._unused():
            if _held(model):
                self._release(key)
                return True
        return False

    def _take(self, key: Reward) -> None:
        self._count(key, 1)

    def _give_back(self, key: Reward) -> None:
        self._count(key, -1)
        self._tidy()

    def _count(self, key: Reward, change: int) -> None:
        with self._lock:
            self._users[key] += change
            if not self._users[key]:
                del self._users[key]

    def _unused(self) -> list[tuple[Reward, RewardModel]]:
        return [(key, model) for key, model in list(self.built.items()) if key not in self._users]

    def _tidy(self) -> None:
        """Release the models that are not to be kept. The parts of a composite are out of use once it is released."""
        while (surplus := self._surplus()) is not None:
            self._release(surplus)

    def _surplus(self) -> Reward | None:
        unused = self._unused()
        for key, _ in unused:
            if not _stays(key):
                return key
        memory = self.models.memory if self.models is not None else None
        held, most = sum(_held(model) for _, model in unused), memory.limit * CACHE_SHARE if memory else 0.0
        return unused[0][0] if len(unused) > KEPT or held > most else None

    def _release(self, key: Reward) -> None:
        with self._lock:
            if key in self._users:  # taken meanwhile
                return
            model = self.built.pop(key)
        self._timed.discard(model)
        try:
            model.release()
        except Exception:  # it must not fail the request that is served now
            log.exception("reward %r cannot be released", key.kind)
        for part in self._parts.pop(key, ()):
            self._count(part, -1)


class _Borrower(Loader):
    """The loader as a reward sees it while it is built: models that it takes are in use as long as the reward stays."""

    def __init__(self, loader: RewardLoader) -> None:
        self.loader = loader
        self.models = loader.models
        self.taken: list[Reward] = []

    def causal(self, spec: LocalModel | None, name: str) -> CausalModel:
        return self.loader.causal(spec, name)

    def __getitem__(self, settings: Reward) -> RewardModel:
        key = _key(settings)
        self.loader._count(key, 1)
        self.taken.append(key)
        return self.loader[settings]


def _stays(settings: Reward) -> bool:
    """Return whether a model is kept for later. An error in its settings means no, and fails no request."""
    try:
        return settings.stays_loaded
    except Exception:
        log.exception("reward %r cannot say whether it stays loaded", settings.kind)
        return False


def _held(model: RewardModel) -> int:
    """Return the bytes of a model's own caches. An error counts as none."""
    try:
        return model.cache_bytes
    except Exception:
        log.exception("reward %r cannot say what its caches hold", model.name)
        return 0


def _key(settings: Reward) -> Reward:
    """Return the settings without what makes no difference to the model."""
    return settings if settings.parts else settings.model_copy(update={"scale": None})


def _chat(tokenizer: Any, model: Any) -> ChatTokenizer:
    return ChatTokenizer(tokenizer, rows=embedding_rows(model))
