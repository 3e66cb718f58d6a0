"""Rows of any widths beside each other: exact, as large as their texts, and given back."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from internals import assert_empty, balance, finished_texts

from cards_integrations.transformer.cache_layers import TreeLayer
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Output, Transformer
from cards_integrations.transformer.kv_block import width_for, width_within
from cards_integrations.transformer.kv_cache import Branch, Tree, TreeCache
from cards_integrations.transformer.kv_memory import MIN_PREFIX, KVMemory, first_to_read
from cards_integrations.transformer.prefix_tree import PrefixNode, common

TOKENS = range(2, tiny.SIZES["vocab_size"])
LENGTHS = (1, 2, 3, 5, 40, 90)  # what a branch may grow by; rows are 64, 128, 192, ... wide


@dataclass
class Model:
    """A text for each branch and trunk, as plain lists: what the cache must say.

    `parents` are those of branches that left another branch, and `orphans` left a trunk that was given up.
    """

    trunk: list[int] = field(default_factory=list)
    branches: dict[Branch, list[int]] = field(default_factory=dict)
    parents: dict[Branch, Branch] = field(default_factory=dict)
    orphans: set[Branch] = field(default_factory=set)

    def keepable(self) -> list[Branch]:
        return [branch for branch in self.branches if branch not in self.parents and branch not in self.orphans]

    def without(self, branch: Branch) -> list[Branch]:
        """Give a branch up, and all that left it; returns them, the last one first."""
        gone = [each for child, parent in [*self.parents.items()] if parent is branch for each in self.without(child)]
        self.branches.pop(branch, None)
        self.parents.pop(branch, None)
        return [*gone, branch]


class Walk:
    """Opens, branches, grows, keeps, cuts, drops and closes at random, and compares with plain forwards."""

    def __init__(self, family: str, seed: int, rounded: bool, **options: Any) -> None:
        self.dice = random.Random(seed)
        self.plain = tiny.causal(family, max_position_embeddings=2048, **options)
        twin = tiny.causal(family, max_position_embeddings=2048, **options)
        twin.load_state_dict(self.plain.state_dict())
        self.memory = KVMemory(2**40)
        self.transformer = Transformer(twin.eval(), self.memory)
        self.transformer._logits.rounding = rounded
        self.cache = self.transformer.cache
        if self.cache.min_shared is not None:
            self.cache.min_shared = 50
        self.live: dict[Tree, Model] = {}
        self.beginnings = [self.dice.choices(TOKENS, k=n) for n in (70, 130, 300)]
        self.widths: set[int] = set()
        self.recalled = self.shared = self.unshared = 0
        self.worst = 0.0

    def ids(self, count: int) -> list[int]:
        return self.dice.choices(TOKENS, k=count)

    def open(self, beginning: list[int]) -> None:
        tree = self.cache.open()
        text = beginning + self.ids(3)
        self.memory.recall(tree, text)
        assert tree.ids == text[: len(tree.ids)]
        self.recalled += bool(tree.ids)
        self.shared += bool(tree.shared)
        self.live[tree] = Model(list(tree.ids))
        branch = tree.branch()
        self.live[tree].branches[branch] = list(tree.ids)
        self.forward([(tree, branch, text[len(tree.ids) :])])
        self.keep(tree, branch)

    def grow(self) -> None:
        inputs = []
        for tree, model in self.live.items():
            for _ in range(self.dice.randint(0, 2)):
                self.branch(tree, model)
            for branch in model.branches:
                if self.dice.random() < 0.5:
                    inputs.append((tree, branch, self.ids(self.dice.choice(LENGTHS))))
        self.dice.shuffle(inputs)
        if inputs:
            self.forward(inputs)

    def branch(self, tree: Tree, model: Model) -> None:
        """From the tip or from within the trunk, or from a branch."""
        kind = self.dice.randrange(3)
        if kind == 0 or not model.branches:
            model.branches[tree.branch()] = list(model.trunk)
        elif kind == 1:
            base = self.dice.randrange(1, len(model.trunk) + 1)
            self.unshared += base < tree.prefix
            model.branches[tree.branch(base)] = model.trunk[:base]
        else:
            parent = self.dice.choice([*model.branches])
            own = self.dice.randint(0, len(parent.ids))
            child = parent.branch(own)
            model.branches[child], model.parents[child] = model.branches[parent][: parent.base + own], parent

    def forward(self, inputs: list[tuple[Tree, Branch, list[int]]]) -> None:
        feeds = [ForwardInput(branch, ids) for _, branch, ids in inputs]
        for (tree, branch, ids), row in zip(inputs, self.transformer.logits(feeds), strict=True):
            text = self.live[tree].branches[branch]
            text += ids
            assert branch.length == len(text)
            assert isinstance(row, Output)
            with torch.inference_mode():
                plain = self.plain(torch.tensor([text])).logits[0, -1]
            self.worst = max(self.worst, float((row.value - plain).abs().max()))
        self.widths |= {block.columns for block in self.cache.blocks.values()}

    def keep(self, tree: Tree, branch: Branch) -> None:
        """Keep a branch, or a part of it, and drop some of the others."""
        model = self.live[tree]
        base, tokens = branch.base, self.dice.choice([len(branch.ids), self.dice.randint(0, len(branch.ids))])
        kept = model.branches[branch][: base + tokens]
        children = [child for child, parent in model.parents.items() if parent is branch]
        tree.keep(branch, tokens)
        assert tree.ids == kept
        model.orphans |= {other for other in model.keepable() if other is not branch and other.base > base}
        model.trunk, model.branches[branch] = kept, list(kept)
        for child in children:
            del model.parents[child]
            if child.base > len(kept):  # what it saw is gone
                self.drop(tree, child)
        for other in [*model.branches]:
            if other in model.branches and self.dice.random() < 0.5:
                self.drop(tree, other)

    def drop(self, tree: Tree, branch: Branch) -> None:
        for gone in self.live[tree].without(branch):
            tree.drop(gone)

    def prune(self) -> None:
        for tree, model in [*self.live.items()]:
            keepable = model.keepable()
            if keepable and (len(model.branches) > 4 or self.dice.random() < 0.4):
                self.keep(tree, self.dice.choice(keepable))
            if self.dice.random() < 0.2:
                self.close(tree)

    def close(self, tree: Tree) -> None:
        self.memory.keep(tree)
        self.cache.close(tree)
        del self.live[tree]

    def step(self) -> None:
        while len(self.live) < 3:
            beginning = self.dice.choice([[], *self.beginnings, *self.beginnings])
            for _ in range(2):
                self.open(beginning[: self.dice.choice([65, 100, 300])])
        self.grow()
        balance(self.cache)
        self.prune()
        balance(self.cache)


FULL = {"layer_types": ["full_attention"] * tiny.SIZES["num_hidden_layers"]}
"""Of a family with windows, and with scores that are capped."""


@pytest.mark.parametrize("rounded", [False, True], ids=["", "rounded"])
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("gpt2", {}), ("mistral", {}), ("gemma2", {}), ("gemma2", FULL)],
    ids=["llama", "gpt2", "mistral", "gemma2", "gemma2 without windows"],
)
def test_random_walks_give_the_plain_logits(family: str, options: dict[str, Any], rounded: bool) -> None:
    """Across widths, with prefixes of finished and of live texts, held once or copied, and trunks that are cut."""
    walk = Walk(family, 0, rounded, **options)
    for _ in range(12):
        walk.step()
    assert walk.worst < 1e-4
    assert len(walk.widths) > 3
    assert walk.recalled
    if walk.cache.min_shared is not None:
        assert walk.shared
        assert walk.unshared
    for tree in [*walk.live]:
        walk.close(tree)
    assert_empty(walk.cache)


# --- how much memory ---


def opened(transformer: Transformer, lengths: list[int]) -> list[Tree]:
    """Rows with texts of these lengths."""
    trees = []
    for length in lengths:
        tree = transformer.cache.open()
        branch = tree.branch()
        transformer.logits([ForwardInput(branch, [5 + length % 9] * length)])
        tree.keep(branch)
        tree.drop(branch)
        trees.append(tree)
    return trees


def bytes_alone(length: int) -> int:
    transformer = Transformer(tiny.causal(max_position_embeddings=4096))
    opened(transformer, [length])
    return transformer.cache.bytes


def allocated(transformer: Transformer) -> int:
    """Bytes of the tensors that there are."""
    pairs = [pair for block in transformer.cache.blocks.values() for pair in block.states.values()]
    return sum(states.nbytes for pair in pairs for states in pair)


def test_no_row_pays_for_the_longest() -> None:
    """Fifteen short texts beside a long one take what they take by themselves; when it leaves, its memory goes."""
    short, long = [30 + i for i in range(15)], 1900
    transformer = Transformer(tiny.causal(max_position_embeddings=4096))
    *_, last = opened(transformer, [*short, long])
    own = sum(map(bytes_alone, short))
    assert transformer.cache.bytes == allocated(transformer)
    assert transformer.cache.bytes <= 1.3 * (own + bytes_alone(long))
    transformer.cache.close(last)
    assert transformer.cache.bytes == allocated(transformer) <= 1.3 * own


def test_a_busy_cache_gives_rows_back() -> None:
    transformer = Transformer(tiny.causal(max_position_embeddings=4096))
    trees = opened(transformer, [50] * 40)
    for tree in trees[1:]:
        transformer.cache.close(tree)
    assert allocated(transformer) <= 2 * bytes_alone(50)
    balance(transformer.cache)


def test_a_row_that_was_wide_gets_narrow() -> None:
    """Once the candidates that made it wide are gone."""
    transformer = Transformer(tiny.causal(max_position_embeddings=4096))
    [tree] = opened(transformer, [30])
    branches = [tree.branch() for _ in range(20)]
    transformer.logits([ForwardInput(branch, [7] * 64) for branch in branches])
    assert allocated(transformer) > 8 * bytes_alone(94)
    for branch in branches[1:]:
        tree.drop(branch)
    tree.keep(branches[0])
    assert allocated(transformer) <= 2 * bytes_alone(94)
    balance(transformer.cache)


def test_short_rows_do_not_read_the_width_of_the_longest() -> None:
    """The cells of attention of a step of fifteen short texts and a long one are those of both."""

    def cells(lengths: list[int]) -> int:
        transformer = Transformer(tiny.causal(max_position_embeddings=4096))
        branches = [tree.branch() for tree in opened(transformer, lengths)]
        seen: list[int] = []
        run = transformer._logits.run

        def counted(tensors: Any, metadata: Any) -> Any:
            seen.append(sum(group.tokens.numel() * group.width for group in metadata.groups))
            return run(tensors, metadata)

        transformer._logits.run = counted
        transformer.logits([ForwardInput(branch, [9]) for branch in branches])
        [found] = seen
        return found

    short = [30] * 15
    assert cells([*short, 1900]) <= 1.1 * cells(short) + cells([1900])


def test_captured_steps_survive_the_growth_of_another_width() -> None:
    """They know the addresses of their own blocks only; when one of these grows, they are given up."""
    transformer = Transformer(tiny.causal(max_position_embeddings=4096))
    static = transformer._logits
    static.rounding = True
    branches = [tree.branch() for tree in opened(transformer, [30] * 4)]

    def captured_after(steps: int) -> set[int]:
        for _ in range(steps):
            transformer.logits([ForwardInput(branch, [7]) for branch in branches])
        return {id(step) for step in static.steps.values() if step is not None}

    before = captured_after(3)
    assert len(before) == 1
    opened(transformer, [1900, 300])
    assert captured_after(2) == before
    more = opened(transformer, [30] * 20)
    branches += [tree.branch() for tree in more]
    assert not before & captured_after(3)


def test_widths() -> None:
    assert [width_for(n) for n in (1, 64, 65, 129, 257, 321, 33_000)] == [64, 64, 128, 192, 320, 448, 36_352]
    assert [width_within(n) for n in (0, 63, 64, 191, 450)] == [0, 0, 64, 128, 448]


# --- what live rows share ---


def test_a_common_beginning_is_held_once() -> None:
    """Sixteen rows that begin with the same 400 tokens take these once, and a few columns each."""
    transformer = Transformer(tiny.causal(max_position_embeddings=4096), KVMemory(2**40))
    memory, cache = transformer.memory, transformer.cache
    system = random.Random(5).choices(TOKENS, k=400)
    trees: list[Tree] = []
    for seed in range(16):
        tree = cache.open()
        text = [*system, *random.Random(seed).choices(TOKENS, k=20)]
        memory.recall(tree, text)
        assert len(tree.ids) == max((common(text, other.ids) for other in trees), default=0)
        branch = tree.branch()
        transformer.logits([ForwardInput(branch, text[len(tree.ids) :])])
        tree.keep(branch)
        trees.append(tree)
    [prefix] = cache.prefixes
    assert (len(prefix), prefix.users) == (384, {*trees})  # a multiple of 64
    assert all(tree.block.columns == 64 for tree in trees)
    assert cache.bytes <= (400 + 64 * 20) * cache.bytes_per_token
    for tree in trees:
        memory.keep(tree)
        cache.close(tree)
    assert not cache.prefixes
    assert_empty(cache)
    assert memory.prefix_lengths == (420,) * 16
    assert memory.prefix_bytes <= (400 + 16 * 20) * cache.bytes_per_token


# --- finished texts ---


def test_ten_thousand_texts_share_what_they_have_in_common() -> None:
    """A lookup compares a prompt with itself, however many texts there are; what they share is held once."""
    dice = random.Random(0)
    memory = KVMemory(2**40)
    transformer = Transformer(tiny.causal(), memory)
    cache, texts = transformer.cache, memory._texts(transformer.cache)
    system = dice.choices(TOKENS, k=200)
    for _ in range(10_000):
        ids = [*system, *dice.choices(TOKENS, k=20)]
        path, known = texts.match(ids)
        path = texts.cut(path, known)
        if known < len(ids):
            texts.insert(path, ids[known:], [])
    assert len(memory.prefix_lengths) == 10_000
    assert memory.prefix_bytes < (200 + 10_000 * 20) * cache.bytes_per_token
    path, known = texts.match([*system, *dice.choices(TOKENS, k=20)])
    assert known >= 200
    assert len(path) < 20
    memory.limit = cache.bytes + 220 * cache.bytes_per_token
    assert memory.evict_for(0)
    assert memory.used <= memory.limit
    assert memory.prefix_lengths == (220,)
    assert texts.tokens == sum(len(node.ids) for node in texts.nodes()) == 220


def test_the_tree_finds_what_a_scan_finds() -> None:
    """Random texts over two tokens, kept and evicted, against all pairs."""
    dice = random.Random(1)
    transformer = Transformer(tiny.causal(), memory := KVMemory(2**40))
    texts, known = memory._texts(transformer.cache), list[list[int]]()
    for turn in range(400):
        ids = dice.choices([7, 8], k=dice.randint(1, 12))
        path, found = texts.match(ids)
        assert found == max((common(ids, other) for other in known), default=0)
        assert found == 0 or path[-1].end - len(path[-1].ids) < found <= path[-1].end
        path = texts.cut(path, found)
        if found < len(ids):
            texts.insert(path, ids[found:], [])
        known = [*known, ids]
        if turn % 3 == 0:
            before = len(memory.prefix_lengths)
            memory._evict()
            known = finished_texts(memory, transformer.cache)
            assert len(known) >= before - 1
    assert all(node.end == depth(node) for node in texts.nodes())


def depth(node: PrefixNode) -> int:
    return len(node.ids) + (depth(node.parent) if node.parent else 0)


def test_the_longest_live_text_is_found() -> None:
    dice = random.Random(2)
    transformer = Transformer(tiny.causal(max_position_embeddings=4096), KVMemory(2**40))
    cache, beginning = transformer.cache, dice.choices(TOKENS, k=400)
    lengths = [70, 130, 200, 330]
    trees = opened(transformer, [0] * 0)
    for length in lengths:
        tree = cache.open()
        branch = tree.branch()
        transformer.logits([ForwardInput(branch, [*beginning[:length], *dice.choices(TOKENS, k=80)])])
        tree.keep(branch)
        trees.append(tree)
    for asked in (65, 129, 190, 240, 400):
        _, found = cache.live_texts.longest(cache.trees, beginning[:asked])
        assert found == max(common(tree.ids, beginning[:asked]) for tree in trees)
    longest = trees.pop()
    cache.close(longest)
    _, found = cache.live_texts.longest(cache.trees, beginning)
    assert found == max(common(tree.ids, beginning) for tree in trees)
    trees[-1].keep(trees[-1].branch(100))  # cut
    assert cache.live_texts.longest(cache.trees, beginning)[1] == max(common(t.ids, beginning) for t in trees)


def test_which_prompts_are_read_first() -> None:
    """Those that share nothing worth reusing with an earlier one, as all pairs would have it."""
    dice = random.Random(3)
    starts = [dice.choices(TOKENS, k=MIN_PREFIX) for _ in range(3)]
    starts += [[*start[:-1], 99] for start in starts]
    texts = [[*dice.choice(starts), *dice.choices(TOKENS, k=dice.randint(0, 3))] for _ in range(60)]
    first: list[int] = []
    for index, text in enumerate(texts):
        if not any(min(common(texts[other], text), len(text) - 1) >= MIN_PREFIX for other in first):
            first.append(index)
    assert first_to_read(texts) == first


def test_branches_of_a_closed_row_free_nothing_more() -> None:
    """Scores that fail after their conversation was closed drop its branches late."""
    cache = TreeCache([TreeLayer()])
    closed, other = cache.open(), cache.open()
    late = closed.branch()
    cache.close(closed)
    closed.drop(late)
    branches = [other.branch() for _ in range(20)]
    assert len({branch.mask_row for branch in branches}) == 20
