"""A forward over trees of candidates gives what plain, uncached forwards give, for each architecture."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from conftest import Start

from cards_integrations.decoding import Sampling
from cards_integrations.engine import Request
from cards_integrations.errors import ModelError
from cards_integrations.models.sampling import Sampler
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Transformer
from cards_integrations.transformer.kv_cache import Branch, Tree

pytestmark = pytest.mark.slow

TOKENS = range(2, tiny.SIZES["vocab_size"])


@dataclass
class Walk:
    """Trees that open, branch, grow, are kept, dropped and closed at random."""

    model: Any
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    trees: dict[Tree, list[Branch]] = field(default_factory=dict)
    worst: float = 0.0
    compared: int = 0

    def __post_init__(self) -> None:
        self.transformer = Transformer(copy.deepcopy(self.model))

    def ids(self, fewest: int, most: int) -> list[int]:
        return self.dice.choices(TOKENS, k=self.dice.randint(fewest, most))

    def open(self) -> None:
        tree = self.transformer.cache.open()
        self.trees[tree] = []
        trunk = tree.branch()
        self.forward([ForwardInput(trunk, self.ids(3, 9))])
        tree.keep(trunk)

    def grow(self) -> None:
        feeds = []
        for tree, branches in self.trees.items():
            branches += [tree.branch() for _ in range(2)]
            feeds += [ForwardInput(branch, self.ids(1, 2)) for branch in branches if self.dice.random() < 0.7]
        self.dice.shuffle(feeds)
        self.forward(feeds)

    def prune(self) -> None:
        """Keep one branch of a tree and drop the others; or give the tree up, wherever its row is."""
        for tree, branches in list(self.trees.items()):
            if len(branches) > 5 or self.dice.random() < 0.3:
                kept = branches.pop(self.dice.randrange(len(branches)))
                for branch in branches:
                    tree.drop(branch)
                tree.keep(kept)
                branches.clear()
            if self.dice.random() < 0.2:
                self.transformer.cache.close(tree)
                del self.trees[tree]

    @torch.inference_mode()
    def forward(self, feeds: list[ForwardInput]) -> None:
        logits: list[Any] = self.transformer.logits(feeds)
        for feed, row in zip(feeds, logits, strict=True):
            path = feed.branch.tree.ids[: feed.branch.base] + feed.branch.ids
            plain = self.model(torch.tensor([path])).logits[0, -1]
            self.worst = max(self.worst, float((row.value - plain).abs().max()))
            self.compared += 1


@pytest.mark.parametrize(("family", "rounded"), tiny.RUNS)
def test_trees_give_the_plain_logits(family: str, rounded: bool) -> None:
    walk = Walk(tiny.causal(family))
    walk.transformer._logits.rounding = rounded
    for _ in range(15):
        while len(walk.trees) < 3:
            walk.open()
        walk.grow()
        walk.prune()
    assert walk.compared > 80
    assert walk.worst < 1e-4


def test_a_sliding_window_matters_here() -> None:
    """The texts above are longer than the windows: a model that sees everything answers differently."""
    ids = torch.tensor([[*range(2, 22)]])
    for family in ("mistral", "gemma2", "gemma3_text", "phi3"):
        narrow, wide = (tiny.causal(family, sliding_window=w)(ids).logits[0, -1] for w in (6, 200))
        assert float((narrow - wide).detach().abs().max()) > 0.1


def test_latents_are_kept_in_the_place_of_what_heads_make_of_them() -> None:
    family = tiny.FAMILIES["deepseek_v3"]
    cache = Transformer(tiny.causal("deepseek_v3")).cache
    rank = family["kv_lora_rank"] + family["qk_rope_head_dim"]
    assert cache.bytes_per_token == tiny.SIZES["num_hidden_layers"] * rank * 4


def test_layers_that_share_keys_have_none_of_their_own() -> None:
    cache = Transformer(tiny.causal("gemma4_text")).cache
    assert len(cache.layout) == 2  # of four layers
    assert {keys.shape[-1] for keys, _ in cache.layout.pairs} == {8, 16}


def test_bloom_cannot_draft(tmp_path: Any, start: Start) -> None:
    folder = tiny.save(tmp_path, tiny.causal("bloom"), tiny.words())
    with pytest.raises(ModelError, match=r"bloom.*cannot read trees"):
        start(folder).run(Request("w9 w20", Sampling()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral"])
def test_greedy_drafting_is_greedy_generation(family: str, models: Callable[..., str], start: Start) -> None:
    folder = models(family)
    model, tokenizer = tiny.causal(family), tiny.words()
    ids = tokenizer("w9 w20 w31 w5", return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=tiny.EOS)[0, ids.shape[1] :]
    request = Request("w9 w20 w31 w5", Sampling(), sampler=Sampler(temperature=0), max_tokens=30)
    assert list(start(folder).run(request).token_ids) == [i for i in plain.tolist() if i != tiny.EOS]
