"""What the host does in a step: one draw for all requests, and nothing for what has ended."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Start
from hypothesis import given, settings
from hypothesis import strategies as st
from internals import assert_idle, held, replace_scheduler
from numpy.random import Generator, Philox
from torch.utils._python_dispatch import TorchDispatchMode

from cards_integrations.decoding import Cards, Decoding, FixedLength, Sampling, Uncertainty
from cards_integrations.engine import Engine, Request
from cards_integrations.engine.scheduler import FixedWidth
from cards_integrations.engine.session import Session
from cards_integrations.errors import CardsError
from cards_integrations.models.base import Candidate
from cards_integrations.models.local.drawing import TokenDrawer
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler, draw
from cards_integrations.rewards import LengthReward

REQUESTS, ROOM = 64, 6
WITHIN = 60.0
ONE, MANY = [Sampler()] * REQUESTS, [Sampler(temperature=0.5 + i / 100) for i in range(REQUESTS)]


def cards(threshold: float) -> Cards:
    return Cards(target_reward=-50.0, beta=1.0, boundary=Uncertainty(threshold=threshold, min_length=1, max_length=3))


def requests(samplers: list[Sampler], thresholds: tuple[float, ...] = ()) -> list[Request]:
    methods: list[Decoding] = [cards(threshold) for threshold in thresholds] or [Sampling(chunk=3)]
    return [
        Request("w9 w20 w31", methods[i % len(methods)], LengthReward(target=9), sampler, ROOM, seed=i)
        for i, sampler in enumerate(samplers)
    ]


# --- one draw for all ---


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, Counter[str], int]]]:
    """Candidates, operations and transfers of each draw."""
    found: list[tuple[int, Counter[str], int]] = []
    plain, tolist, transfers = TokenDrawer.draw, torch.Tensor.tolist, 0

    def counted_tolist(tensor: torch.Tensor) -> Any:
        nonlocal transfers
        transfers += 1
        return tolist(tensor)

    def counted(drawer: TokenDrawer, candidates: Any, outputs: Any) -> Any:
        before = transfers
        with Operations() as operations:
            drawn = plain(drawer, candidates, outputs)
        found.append((len(candidates), operations.counts, transfers - before))
        return drawn

    with monkeypatch.context() as patch:
        patch.setattr(TokenDrawer, "draw", counted)
        patch.setattr(torch.Tensor, "tolist", counted_tolist)
        yield found


def run(engine: Engine, asked: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Counter[str], int]]:
    """The draws in which all take part."""
    with draws(monkeypatch) as found:
        engine.run_many(asked)
    return [each for each in found if each[0] == REQUESTS]


@pytest.mark.parametrize("thresholds", [(), (9.0,)])
def test_a_draw_does_not_grow_with_the_number_of_samplers(
    models: Callable[..., str], start: Start, monkeypatch: pytest.MonkeyPatch, thresholds: tuple[float, ...]
) -> None:
    engine = start(models("llama"), width=1, max_rows=REQUESTS)
    alike = run(engine, requests(ONE, thresholds), monkeypatch)
    several = run(engine, requests(MANY, thresholds), monkeypatch)
    assert alike
    assert several
    assert {transfers for *_, transfers in alike + several} == {1}
    most = max(sum(counts.values()) for _, counts, _ in alike)
    assert max(sum(counts.values()) for _, counts, _ in several) <= most < REQUESTS
    for _, counts, _ in several:
        assert sum(n for name, n in counts.items() if "log_softmax" in name) == 1


def test_each_boundary_is_asked_once(models: Callable[..., str], start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[float] = Counter()
    ends_before = Uncertainty.ends_before

    def counted(boundary: Uncertainty, *args: Any) -> torch.Tensor:
        asked[boundary.threshold] += 1
        return ends_before(boundary, *args)

    monkeypatch.setattr(Uncertainty, "ends_before", counted)
    engine = start(models("llama"), width=1, max_rows=REQUESTS)
    with draws(monkeypatch) as found:
        engine.run_many(requests(MANY, (7.0, 8.0, 9.0)))
    assert asked.keys() == {7.0, 8.0, 9.0}
    assert max(asked.values()) <= len(found)
    assert {transfers for *_, transfers in found} == {1}


def test_a_text_in_company_of_other_samplers(models: Callable[..., str], start: Start) -> None:
    kinds = [Sampler(temperature=t, top_k=k) for t in (0.0, 0.4, 1.3) for k in (0, 1, 5, 40)]
    asked = [*requests(kinds), *requests(kinds, (2.7, 2.9, 3.1))]
    engine = start(models("llama"), width=1, max_rows=len(asked))
    together = [answer.token_ids for answer in engine.run_many(asked)]
    assert together == [answer.token_ids for answer in map(engine.run, asked)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.sampled_from([0.0, 0.7, 1.0]), st.integers(0, 9)), min_size=1))
def test_the_company_of_a_draw_changes_no_token(seed: int, kinds: list[tuple[float, int]]) -> None:
    """Nor where logits are equal, and which of them are among the largest is the search's choice."""
    generator = torch.Generator().manual_seed(seed)
    samplers = [Sampler(temperature=temperature, top_k=top_k) for temperature, top_k in kinds]
    logits = torch.randn(len(kinds), 24, generator=generator).round()
    uniforms = torch.rand(len(kinds), generator=generator, dtype=torch.double).tolist()
    alone = [int(draw([each], logits, [i], [uniforms[i]])) for i, each in enumerate(samplers)]
    assert draw(samplers, logits, range(len(kinds)), uniforms).tolist() == alone


class Broken(FixedLength):
    """Fails where it looks at logits."""

    def ends_before(self, *_: Any) -> torch.Tensor | None:
        raise ValueError("a broken boundary")

    @property
    def min_tokens(self) -> int:
        return 0


def test_what_one_raises_is_found_in_halves(
    models: Callable[..., str], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, neighbours = start(models("llama"), width=1, max_rows=REQUESTS), requests(MANY[1:])
    expected = [answer.token_ids for answer in engine.run_many(neighbours)]
    bad = replace(requests(MANY[:1], (9.0,))[0], decoding=cards(9.0).model_copy(update={"boundary": Broken(length=3)}))
    drawn: list[int] = []
    plain = TokenDrawer.draw

    def counted(drawer: TokenDrawer, candidates: Any, outputs: Any) -> Any:
        drawn.append(len(candidates))
        return plain(drawer, candidates, outputs)

    monkeypatch.setattr(TokenDrawer, "draw", counted)
    with held(engine, WITHIN):
        futures = [engine.submit(each) for each in (bad, *neighbours)]
    error, *answers = [future.exception(WITHIN) or future.result() for future in futures]
    assert isinstance(error, CardsError)
    assert "a broken boundary" in str(error)
    assert [answer.token_ids for answer in answers if not isinstance(answer, BaseException)] == expected
    assert drawn.count(1) <= 2  # the broken one, and its neighbour in the last half
    assert len(drawn) < 8 * ROOM + 2 * math.log2(REQUESTS)
    assert_idle(engine)


# --- random numbers ---


def test_uniforms_are_philox() -> None:
    """Those of a generator made for each draft, in whatever order and thread they are asked for."""

    def expected(seed: int, segment: int, draft: int) -> list[float]:
        key = np.array([seed % 2**64, 0], dtype=np.uint64)
        counter = np.array([0, 0, draft, segment], dtype=np.uint64)
        return list(Generator(Philox(key=key, counter=counter)).random(120))

    def found(place: tuple[int, int, int]) -> list[float]:
        uniforms = Uniforms(*place)
        return [uniforms.verdict, *(uniforms[i] for i in range(119))]

    places = [
        (seed, segment, draft) for seed in (0, 7, 2**63 - 1, -3) for segment in (0, 2**32 + 5) for draft in (0, 20)
    ]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(found, places * 20)) == [expected(*place) for place in places] * 20


# --- books ---


class Checked(FixedWidth):
    """Looks at the books of what is being drafted whenever it chooses."""

    finished = 0

    def candidates(self, sessions: Collection[Session]) -> list[Candidate]:
        chosen = super().candidates(sessions)
        for session in sessions:
            drafts = session.pool.current
            if drafts is not None:
                assert list(drafts.drafting) == [each.candidate for each in drafts.ahead if not each.ended]
                self.finished += sum(each.ended for each in drafts.ahead)
        assert not any(candidate.finish for candidate in chosen)
        return chosen


def test_candidates_that_have_ended_are_not_walked(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"), width=4, max_rows=8)
    engine.loaded()
    checked = Checked(4)
    replace_scheduler(engine, checked)
    uneven = Cards(target_reward=0.0, beta=1.0, boundary=Uncertainty(threshold=2.9, min_length=1, max_length=6))
    asked = [Request("w9 w20", uneven, LengthReward(target=9), Sampler(), 24, seed=seed) for seed in range(8)]
    engine.run_many(asked)
    assert checked.finished > 0
    assert_idle(engine)
