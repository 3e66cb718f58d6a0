"""The kept segment has exactly the law of the method, at every width; two tempting shortcuts do not."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from speculator import Eager
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cards_integrations.decoding import Cards, Uncertainty
from cards_integrations.engine import Engine, Request
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import FunctionReward

pytestmark = pytest.mark.law

LETTERS = ["</s>", "a", "b", "c", "d", "e"]
EOS = 0
PROMPT = [2, 4, 1]  # "b d a"
SAMPLER = Sampler(temperature=1.0, top_k=4)
LONGEST = 3
BOUNDARY = Uncertainty(threshold=1.55, min_length=1, max_length=LONGEST)
SAMPLES = 4000

Text = tuple[int, ...]


def reward(text: str) -> float:
    """Longer is better, with a part that only looks random; no two texts, but for their spaces, are equal."""
    return 0.5 * len(text.split()) + zlib.crc32(text.strip().encode()) / 2**32


async def rewards(prompt: str, texts: list[str]) -> list[float]:
    return [reward(text) for text in texts]


@dataclass
class Tree:
    """Every possible segment: the law of its tokens, and where it ends."""

    tokens: dict[Text, list[float]]  # p(next token | prefix), for each prefix that goes on
    p: dict[Text, float]  # p(segment)
    reward: dict[Text, float]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Tree:
        tree = cls({}, {}, {})
        tree._grow(model, (), 1.0)
        assert sum(tree.p.values()) == pytest.approx(1)
        tree.reward = {s: reward(" ".join(LETTERS[i] for i in s)) for s in tree.p}
        return tree

    def _grow(self, model: torch.nn.Module, prefix: Text, p: float) -> None:
        with torch.inference_mode():
            logits = model(torch.tensor([[*PROMPT, *prefix]])).logits[0, -1].double()
        log_p = logits.log_softmax(-1)
        if len(prefix) == LONGEST or (prefix and -(log_p.exp() * log_p).sum() >= BOUNDARY.threshold):
            self.p[prefix] = self.p.get(prefix, 0) + p
            return
        likely = logits.topk(SAMPLER.top_k).indices
        weights = torch.zeros(len(LETTERS), dtype=torch.double)
        weights[likely] = (logits[likely] / SAMPLER.temperature).softmax(-1)
        self.tokens[prefix] = weights.tolist()
        for token, weight in enumerate(self.tokens[prefix]):
            if token == EOS:
                self.p[prefix] = self.p.get(prefix, 0) + p * weight
            elif weight:
                self._grow(model, (*prefix, token), p * weight)

    def draft(self, uniforms: Uniforms) -> Text:
        """The candidate that these random numbers make."""
        ids: Text = ()
        while ids in self.tokens:
            below, token = 0.0, -1
            while below <= uniforms[len(ids)]:
                token += 1
                below += self.tokens[ids][token]
            if token == EOS:
                break
            ids = (*ids, token)
        return ids


@dataclass
class Method:
    """What the paper says: the chance of acceptance of each segment, and the law of the kept one."""

    tree: Tree
    settings: Cards

    def __post_init__(self) -> None:
        target, alpha, beta = float(self.settings.target_reward), self.settings.alpha, float(self.settings.beta)
        r0 = (1 - alpha) * reward("") + alpha * target
        self.chance = {
            s: min(1.0, math.exp((r - min(r0 + len(s) * (target - r0) / LONGEST, target)) / beta))
            for s, r in self.tree.reward.items()
        }

    def law(self) -> dict[Text, float]:
        """Accepted among the first m drafts, else the best of those m and one more."""
        m, p, r, chance = self.settings.max_rejections, self.tree.p, self.tree.reward, self.chance
        rejected = 1 - sum(p[s] * chance[s] for s in p)
        tries = sum(rejected**k for k in range(m))

        def none_above(limit: float, below: Callable[[float, float], bool]) -> float:
            """P(m drafts are rejected, one more is drawn, and no reward is above the limit)."""
            seen = [s for s in p if below(r[s], limit)]
            return sum(p[s] * (1 - chance[s]) for s in seen) ** m * sum(p[s] for s in seen)

        return {
            s: p[s] * chance[s] * tries + none_above(r[s], float.__le__) - none_above(r[s], float.__lt__) for s in p
        }

    def in_order(self, drafts: list[Text], verdicts: list[float]) -> Text:
        for draft, verdict in zip(drafts[:-1], verdicts, strict=False):
            if verdict < self.chance[draft]:
                return draft
        return self.best(drafts)

    def best_of_round(self, drafts: list[Text], verdicts: list[float], width: int = 4) -> Text:
        for at in range(0, len(drafts) - 1, width):
            passing = self.passing(drafts[:-1], verdicts, range(at, min(at + width, len(drafts) - 1)))
            if passing:
                return self.best(passing)
        return self.best(drafts)

    def first_finished(self, drafts: list[Text], verdicts: list[float], width: int = 4) -> Text:
        for at in range(0, len(drafts) - 1, width):
            passing = self.passing(drafts[:-1], verdicts, range(at, min(at + width, len(drafts) - 1)))
            if passing:
                return min(passing, key=len)
        return self.best(drafts)

    def passing(self, drafts: list[Text], verdicts: list[float], which: range) -> list[Text]:
        return [drafts[i] for i in which if verdicts[i] < self.chance[drafts[i]]]

    def best(self, drafts: list[Text]) -> Text:
        return max(drafts, key=self.tree.reward.__getitem__)


def distance(law: dict[Text, float], kept: list[Text]) -> float:
    """Total variation between a law and what was seen."""
    seen = Counter(kept)
    assert seen.keys() <= law.keys()
    return sum(abs(law[s] - seen[s] / len(kept)) for s in law) / 2


def sampling_error(law: dict[Text, float], samples: int) -> float:
    """What the distance is on average from chance alone, and what it exceeds once in a million."""
    average = sum(math.sqrt(2 * p * (1 - p) / math.pi / samples) for p in law.values()) / 2
    return average + math.sqrt(math.log(1e6) / 2 / samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    fast = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    sizes: dict[str, Any] = {"vocab_size": 6, "eos_token_id": EOS, "pad_token_id": None, "max_position_embeddings": 16}
    model = tiny.causal(seed=23, initializer_range=0.2, **sizes)
    return tiny.save(tmp_path_factory.mktemp("letters"), model, tokenizer)


@pytest.fixture(scope="module")
def tree(folder: str) -> Tree:
    return Tree.of(AutoModelForCausalLM.from_pretrained(folder).eval())


def settings(max_rejections: int) -> Cards:
    return Cards(target_reward=2.2, beta=0.4, max_rejections=max_rejections, boundary=BOUNDARY)


@pytest.fixture(scope="module", params=[20, 2], ids=["cap 20", "cap 2"])
def method(request: pytest.FixtureRequest, tree: Tree) -> Method:
    return Method(tree, settings(request.param))


def naive(method: Method, rule: Callable[[list[Text], list[float]], Text]) -> list[Text]:
    """What a rule keeps of the very drafts that the engine sees."""
    kept = []
    for seed in range(SAMPLES):
        streams = [Uniforms(seed, 0, draft) for draft in range(method.settings.max_rejections + 1)]
        kept.append(rule([method.tree.draft(u) for u in streams], [u.verdict for u in streams]))
    return kept


@pytest.fixture(scope="module")
def in_order(method: Method) -> list[Text]:
    return naive(method, method.in_order)


def first_segments(engine: Engine, method: Method, samples: int) -> list[Text]:
    """What the engine keeps with seeds 0, 1, ..."""
    prompt, judge = " ".join(LETTERS[i] for i in PROMPT), FunctionReward(function=rewards)
    requests = [Request(prompt, method.settings, judge, SAMPLER, LONGEST, seed=seed) for seed in range(samples)]
    return [alignment.segments[0].token_ids for alignment in engine.run_many(requests)]


@pytest.mark.parametrize("width", [1, "auto"])
def test_kept_segments_have_the_law(
    folder: str, method: Method, in_order: list[Text], start: Start, width: int | str
) -> None:
    kept = first_segments(start(folder, width=width), method, SAMPLES)
    law = method.law()
    print(f"total variation {distance(law, kept):.4f}, bound {sampling_error(law, SAMPLES):.4f}")
    assert distance(law, kept) < sampling_error(law, SAMPLES)
    assert kept == in_order


def test_drafting_ahead_of_every_verdict(folder: str, method: Method, in_order: list[Text], start: Start) -> None:
    engine = start(folder)
    eager = Eager(engine, most=200, wait=2)
    assert first_segments(engine, method, 500) == in_order[:500]
    assert len(eager.adopted) > 50


@pytest.mark.parametrize("rule", [Method.best_of_round, Method.first_finished])
def test_shortcuts_have_another_law(tree: Tree, rule: Callable[..., Text]) -> None:
    method = Method(tree, settings(20))
    law = method.law()
    kept = naive(method, lambda drafts, verdicts: rule(method, drafts, verdicts))
    print(f"total variation {distance(law, kept):.4f}, bound {sampling_error(law, SAMPLES):.4f}")
    assert distance(law, kept) > sampling_error(law, SAMPLES)


def test_the_case_is_not_trivial(method: Method) -> None:
    law, tree = method.law(), method.tree
    assert sum(law.values()) == pytest.approx(1)
    assert sum(p > 0.005 for p in law.values()) >= 20
    assert all(sum(law[s] for s in law if len(s) == length) > 0.05 for length in range(4))
    assert 0.1 < sum(tree.p[s] * method.chance[s] for s in tree.p) < 0.9  # accepted at the first draft
