"""What was read is not read again, changes no text, and stays within one budget."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from internals import assert_idle, balance, finished_texts, language_model, reward_models, until
from internals import caches as caches_of
from speculator import Watch

from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.decoding import Cards, FixedLength, Sampling, Uncertainty
from cards_integrations.engine import Engine, Request
from cards_integrations.engine.session import Session
from cards_integrations.errors import OutOfMemory
from cards_integrations.models.base import Candidate, Context
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, Conversation
from cards_integrations.trace import Alignment, Usage
from cards_integrations.transformer import kv_block
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Output, Transformer
from cards_integrations.transformer.kv_cache import Branch, Tree
from cards_integrations.transformer.kv_memory import MIN_PREFIX, KVMemory

SAMPLER = Sampler(temperature=1.0)
LENGTH, ROOM = 5, 20
LONG = 2 * MIN_PREFIX  # a text that is worth keeping
EVERY_FIRST = Cards(target_reward=-50.0, beta=0.7, boundary=FixedLength(length=LENGTH))
CHOOSY = Cards(target_reward=0.5, beta=0.3, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=6))


@dataclass
class Pair:
    model: str
    reward: ClassifierReward


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3_text"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return endless(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return endless(tmp_path_factory.mktemp("llamas"))


def endless(folder: Path, family: str = "llama") -> Pair:
    """A model that knows no end of sequence, and a reward model."""
    size = {"max_position_embeddings": 4096}
    model = tiny.save(folder / "model", tiny.causal(family, eos_token_id=None, **size), tiny.words(eos_token=None))
    judge = tiny.save(folder / "judge", tiny.classifier(family, **size), tiny.words(eos_token=None))
    return Pair(model, ClassifierReward(model=judge))


def words(count: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in random.Random(seed).choices(range(6, 48), k=count))


def plain(prompt: str, seed: int = 0, room: int = ROOM) -> Request:
    return Request(prompt, Sampling(), sampler=SAMPLER, max_tokens=room, seed=seed)


def guided(prompt: str, reward: ClassifierReward, decoding: Cards, seed: int = 0, room: int = ROOM) -> Request:
    return Request(prompt, decoding, reward, SAMPLER, room, seed=seed)


# --- the texts ---


def dialogue(engine: Engine, reward: ClassifierReward) -> list[Alignment]:
    """Each turn sends all that was said before."""
    history, said = words(LONG, 0), []
    for turn in range(3):
        said.append(engine.run(guided(history, reward, CHOOSY, seed=turn)))
        history += f" {said[-1].text} {words(5, turn + 1)}"
    return said


@pytest.mark.parametrize("width", [1, 4])
def test_a_dialogue_is_the_same_without_reuse(pair: Pair, start: Start, width: int) -> None:
    engine = start(pair.model, width=width)
    said = dialogue(engine, pair.reward)
    expected = dialogue(start(pair.model, width=width, prefix_reuse=False), pair.reward)
    for one, other in zip(said, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert [s.reward for s in one.segments] == pytest.approx([s.reward for s in other.segments], abs=1e-4)
        assert other.usage.cached_tokens == 0
    cached = [alignment.usage.cached_tokens for alignment in said]
    assert cached[0] == 0
    assert all(now > before + 5 for before, now in pairwise(cached))


def test_a_second_turn_reads_what_is_new(llamas: Pair, start: Start) -> None:
    """To the token: of the answer the language model has not read the last one, the reward model has read all."""
    engine = start(llamas.model, width=1)
    history = words(LONG, 0)
    first = engine.run(guided(history, llamas.reward, EVERY_FIRST))
    assert first.usage.cached_tokens == 0
    assert first.usage.lm_tokens == LONG + ROOM - 1
    assert first.usage.rm_tokens == LONG + ROOM
    answer = " ".join(tiny.words().convert_ids_to_tokens(first.token_ids))  # its text is without padding
    second = engine.run(guided(f"{history} {answer} {words(7, 1)}", llamas.reward, EVERY_FIRST))
    assert second.usage.prompt_tokens == LONG + ROOM + 7
    assert second.usage.cached_tokens == LONG + ROOM - 1
    assert second.usage.lm_tokens == (1 + 7) + ROOM - 1
    assert second.usage.rm_tokens == 7 + ROOM
    [judge] = reward_models(engine)
    assert engine.inspect().tokens == first.usage.lm_tokens + second.usage.lm_tokens
    assert judge.transformer.tokens == first.usage.rm_tokens + second.usage.rm_tokens  # type: ignore[attr-defined]


def test_the_same_prompt_again_reads_its_last_token(llamas: Pair, start: Start) -> None:
    engine = start(llamas.model, width=1)
    one, two = (engine.run(plain(words(LONG, 0), seed=3)) for _ in range(2))
    assert two.token_ids == one.token_ids
    assert (two.usage.cached_tokens, two.usage.lm_tokens) == (LONG - 1, 1 + ROOM - 1)


def test_a_short_prompt_is_read_again(llamas: Pair, start: Start) -> None:
    engine = start(llamas.model)
    for length, cached in ((MIN_PREFIX, 0), (MIN_PREFIX + 1, MIN_PREFIX)):
        for _ in range(2):
            again = engine.run(plain(words(length, length), room=1))
        assert again.usage.cached_tokens == cached


@pytest.mark.parametrize("order", [*permutations([10, 40, 25])])
def test_the_longest_common_prefix_wins(llamas: Pair, start: Start, order: tuple[int, ...]) -> None:
    engine, shared = start(llamas.model), words(LONG + 50, 0).split()
    for length in order:
        engine.run(plain(" ".join([*shared[: LONG + length], words(30, length)]), room=2))
    again = engine.run(plain(" ".join([*shared, words(10, 1)]), room=2))
    assert again.usage.cached_tokens == LONG + 40


def test_a_prompt_shared_by_sixteen_at_once_is_read_once(llamas: Pair, start: Start) -> None:
    """The others read the last token of theirs, whether all of it is shared or not."""
    engine, system = start(llamas.model, width=1), words(LONG, 0)
    prompts = [f"{system} {words(1, seed)}" for seed in range(16)]
    expected = start(llamas.model, width=1, prefix_reuse=False).run_many([plain(p, s) for s, p in enumerate(prompts)])
    together = engine.run_many([plain(p, seed) for seed, p in enumerate(prompts)])
    assert [a.token_ids for a in together] == [a.token_ids for a in expected]
    assert sorted(a.usage.cached_tokens for a in together) == [0, *[LONG] * 15]
    assert engine.inspect().tokens == LONG + 1 + 15 * 1 + 16 * (ROOM - 1)


def test_a_long_beginning_is_held_once_by_both_models(llamas: Pair, start: Start) -> None:
    """Eight requests with one system prompt, of which texts, rewards and what is read are as without; nothing stays."""
    engine, system = start(llamas.model, width=2), words(300, 0)
    asked = [guided(f"{system} {words(5, seed + 1)}", llamas.reward, CHOOSY, seed) for seed in range(8)]
    expected = start(llamas.model, width=2, prefix_reuse=False).run_many(asked)
    watch = Watch(engine)
    together = engine.run_many(asked)
    assert watch.shared == 16  # rows of both models
    for one, other in zip(together, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert [s.reward for s in one.segments] == pytest.approx([s.reward for s in other.segments], abs=1e-4)
    assert sorted(answer.usage.cached_tokens >= 300 for answer in together) == [False] + [True] * 7
    assert_idle(engine)


def test_without_reuse_nothing_is_kept(llamas: Pair, start: Start) -> None:
    engine = start(llamas.model, prefix_reuse=False)
    for _ in range(2):
        again = engine.run(guided(words(LONG, 0), llamas.reward, EVERY_FIRST))
        assert again.usage.cached_tokens == 0
        assert engine.inspect().cached_prefixes == ()


# --- one transformer ---


class Texts:
    """Texts that are read by a transformer with a memory, one after another."""

    def __init__(self, model: Any, limit: int = 2**40) -> None:
        self.model = model
        self.memory = KVMemory(limit)
        self.transformer = Transformer(tiny_copy(model), self.memory)
        self.cache = self.transformer.cache

    def read(self, ids: list[int]) -> int:
        """Read a text and keep it; returns how many tokens were known."""
        tree = self.cache.open()
        self.memory.recall(tree, ids)
        known = len(tree.ids)
        self.append(tree, ids[known:])
        assert tree.ids == ids
        self.memory.keep(tree)
        self.cache.close(tree)
        return known

    def append(self, tree: Tree, ids: list[int]) -> torch.Tensor:
        branch = tree.branch()
        logits = self.logits([ForwardInput(branch, ids)])
        tree.keep(branch)
        tree.drop(branch)
        return logits[0]

    def logits(self, feeds: list[ForwardInput]) -> list[torch.Tensor]:
        return [row.value for row in self.transformer.logits(feeds) if isinstance(row, Output)]

    @torch.inference_mode()
    def error(self, ids: list[int], logits: torch.Tensor) -> float:
        """How far these are from the plain model's after all of the ids."""
        return float((logits - self.model(torch.tensor([ids])).logits[0, -1]).abs().max())


def tiny_copy(model: Any) -> Any:
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_copied_row_gives_the_plain_logits(family: str) -> None:
    """Of a trunk whose columns are out of order, of all of it and of a part, into rows that go on by themselves."""
    texts, dice = Texts(tiny.causal(family)), random.Random(0)
    source = texts.cache.open()
    ids: list[int] = []
    for _ in range(6):  # each time one of two branches is kept, and the columns of the other are taken again
        branches = [source.branch(), source.branch()]
        new = [dice.choices(range(2, 48), k=dice.randint(2, 5)) for _ in branches]
        texts.logits([ForwardInput(branch, part) for branch, part in zip(branches, new, strict=True)])
        chosen = dice.randrange(2)
        source.keep(branches[chosen])
        for branch in branches:
            source.drop(branch)
        ids += new[chosen]
    assert source.columns != sorted(source.columns)
    for tokens in (len(ids), 8, 1):
        copied = texts.cache.open()
        texts.cache.write(copied, ids[:tokens], texts.cache.read(source, tokens))
        more = dice.choices(range(2, 48), k=9)
        assert texts.error(ids[:tokens] + more, texts.append(copied, more)) < 1e-4
    more = dice.choices(range(2, 48), k=3)
    assert texts.error(ids + more, texts.append(source, more)) < 1e-4
    balance(texts.cache)


def text(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(2, 48), k=length)


def test_the_least_recently_used_goes_first() -> None:
    texts = Texts(tiny.causal())
    texts.memory.limit = (
        texts.cache.bytes + texts.cache.row_bytes(LONG + 1) + 5 * LONG // 2 * texts.cache.bytes_per_token
    )
    a, b, c = (text(seed, LONG) for seed in range(3))
    assert texts.read(a) == texts.read(b) == 0
    tree = texts.cache.open()
    texts.memory.recall(tree, a)
    texts.cache.close(tree)
    assert texts.read(c) == 0
    assert finished_texts(texts.memory, texts.cache) == [a, c]
    assert [texts.read(ids) for ids in (a, c, b)] == [LONG - 1, LONG - 1, 0]


def test_a_text_takes_the_place_of_its_own_beginning() -> None:
    texts, ids = Texts(tiny.causal()), text(0, LONG)
    assert [texts.read(ids[:length]) for length in (MIN_PREFIX, LONG, MIN_PREFIX + 9)] == [
        0,
        MIN_PREFIX,
        MIN_PREFIX + 8,
    ]
    assert ids in finished_texts(texts.memory, texts.cache)
    assert ids[:MIN_PREFIX] not in finished_texts(texts.memory, texts.cache)


def test_a_text_larger_than_the_budget_is_not_kept() -> None:
    texts = Texts(tiny.causal())
    texts.memory.limit = texts.cache.bytes + texts.cache.row_bytes(LONG + 1) + (LONG - 1) * texts.cache.bytes_per_token
    assert [texts.read(text(0, length)) for length in (LONG, LONG, LONG - 1, LONG)] == [0, 0, 0, LONG - 1]


def test_a_longer_text_stays_within_the_budget() -> None:
    texts = Texts(tiny.causal())
    texts.memory.limit = (192 + 200) * texts.cache.bytes_per_token
    beginning, other = text(0, 100), text(1, 90)
    for ids in (beginning, other):
        texts.read(ids)
    tree = texts.cache.open()
    texts.append(tree, [*beginning, *text(2, 30)])
    texts.memory.keep(tree)
    assert texts.memory.used <= texts.memory.limit


# --- the budget ---


def test_the_budget_is_never_exceeded(llamas: Pair, start: Start) -> None:
    budget = 1_000_000
    requests = [guided(words(300, seed), llamas.reward, CHOOSY, seed) for seed in range(24)]
    expected = start(llamas.model, width=4).run_many(requests)
    engine = start(llamas.model, width=4, kv_memory=budget)
    watch = Watch(engine)
    assert [a.token_ids for a in engine.run_many(requests)] == [a.token_ids for a in expected]
    assert 0.4 * budget < watch.bytes <= budget
    assert 1 < watch.live < 24
    assert 0 < watch.kept < 48


def test_the_budget_with_a_long_and_a_short_request(llamas: Pair, start: Start) -> None:
    engine = start(llamas.model, width=1, kv_memory=500_000, prefix_reuse=False)
    watch = Watch(engine)
    engine.run_many([plain(words(1000, 0), room=4), plain(words(10, 1), room=4)])
    assert watch.bytes <= 500_000


def test_the_budget_with_texts_kept_while_another_grows(llamas: Pair, start: Start) -> None:
    engine = start(llamas.model, width=1, kv_memory=600_000)
    watch = Watch(engine)
    engine.run_many([plain(words(20, 0), room=700), *(plain(words(200, seed), room=4) for seed in range(1, 5))])
    assert watch.bytes <= 600_000


def test_the_budget_with_many_candidates(llamas: Pair, start: Start) -> None:
    engine = start(llamas.model, width=16, kv_memory=350_000, prefix_reuse=False)
    watch = Watch(engine)
    decoding = Cards(target_reward=50.0, acceptance="hard", boundary=FixedLength(length=64))
    engine.run(guided(words(10, 0), llamas.reward, decoding, room=64))
    assert watch.bytes <= 350_000


@pytest.mark.parametrize(("tokens", "budget"), [(10, 60_000), (3000, 500_000)], ids=["with rewards", "by itself"])
def test_a_request_that_never_fits_is_told_so(llamas: Pair, start: Start, tokens: int, budget: int) -> None:
    """The cache of the reward model counts, too; the next request may fit."""
    engine = start(llamas.model, kv_memory=budget)
    with pytest.raises(OutOfMemory, match=r"kv_memory.*max_tokens"):
        engine.run(guided(words(tokens, 0), llamas.reward, EVERY_FIRST))
    assert engine.run(plain(words(10, 0))).text


async def test_requests_that_fit_one_after_another_finish_in_order(llamas: Pair, start: Start) -> None:
    requests = [plain(words(100, seed), seed) for seed in range(6)]
    expected = start(llamas.model).run_many(requests)
    engine = start(llamas.model, kv_memory=90_000)  # it begins with 184 tokens, which take 48 KiB, rounded up
    watch, finished = Watch(engine), []

    async def run(request: Request) -> Alignment:
        alignment = await engine.arun(request)
        assert request.seed is not None
        finished.append(request.seed)
        return alignment

    written = await asyncio.gather(*map(run, requests))
    assert [a.token_ids for a in written] == [a.token_ids for a in expected]
    assert finished == sorted(finished)
    assert watch.live == 1
    assert watch.bytes <= 90_000


async def test_one_that_waits_for_memory_can_be_cancelled(llamas: Pair, start: Start) -> None:
    engine = start(llamas.model, kv_memory=1_300_000)
    running = asyncio.create_task(engine.arun(plain(words(2500, 0), room=500)))
    await until(lambda: bool(engine.inspect().requests))
    waiting = asyncio.create_task(engine.arun(plain(words(2500, 1), room=500)))
    behind = asyncio.create_task(engine.arun(plain(words(100, 2))))
    await asyncio.sleep(0.05)
    assert engine.inspect().requests == 1
    waiting.cancel()
    running.cancel()
    assert (await behind).text
    outcomes = await asyncio.gather(running, waiting, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


# --- for a long time ---


def test_memory_is_flat(llamas: Pair, start: Start) -> None:
    """Over 500 requests, beside one that is open all the time, so that no cache begins afresh."""
    budget = 3_000_000
    engine = start(llamas.model, width=2, max_rows=32, kv_memory=budget)
    watch, model, caches = Watch(engine), language_model(engine), caches_of(engine)
    engine.run(guided("w9", llamas.reward, CHOOSY))
    model.open(Context("w9", [9], 1, SAMPLER, StopStrings(), Usage()))
    [judge] = reward_models(engine)
    judge.open(Conversation("w9", Usage()))
    sizes, objects = [], []
    for batch in range(5):
        seeds = range(100 * batch, 100 * batch + 100)
        engine.run_many([guided(words(MIN_PREFIX + seed % 14, seed), llamas.reward, CHOOSY, seed, 6) for seed in seeds])
        assert [len(cache.trees) for cache in caches] == [1, 1]
        blocks = [block for cache in caches for block in cache.blocks.values()]
        sizes.append([(block.rows, block.columns, tensors(block.states)) for block in blocks])
        gc.collect()
        kinds = Counter(map(type, gc.get_objects()))
        objects.append([kinds[kind] for kind in (Tree, Branch, Candidate, Session)])
    assert sizes[0] == sizes[-1]
    assert objects[0] == objects[-1]
    assert watch.bytes <= budget


def tensors(pairs: Mapping[int, kv_block.Pair]) -> list[tuple[int, ...]]:
    return [tuple(states.shape) for pair in pairs.values() for states in pair]
