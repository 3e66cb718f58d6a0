"""`EntropyStop`, the plug-in of a vLLM server: which logits it changes, and what it imports. vLLM itself is a stub."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

VOCABULARY, SENTINEL = 8, 2
STUBS = (
    "vllm",
    "vllm.v1",
    "vllm.v1.sample",
    "vllm.v1.sample.logits_processor",
    "vllm.v1.sample.logits_processor.builtin",
    "vllm.v1.worker",
    "vllm.v1.worker.gpu",
    "vllm.v1.worker.gpu.sample",
    "vllm.v1.worker.gpu.sample.logits_processor",
)
ONE, TWO = "vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor"


class V1Base:
    """As vLLM's `LogitsProcessor` of model runner V1."""


class V2Base:
    """As that of V2."""


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`EntropyStop`, imported anew over modules that have vLLM's names."""
    modules = {name: ModuleType(name) for name in STUBS}
    vars(modules[ONE]).update(BatchUpdate=object, LogitsProcessor=V1Base)
    vars(modules[f"{ONE}.builtin"]).update(process_dict_updates=None)
    vars(modules[TWO]).update(LogitsProcessor=V2Base)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "cards_integrations.vllm_plugin", raising=False)
    from cards_integrations.vllm_plugin import EntropyStop

    yield EntropyStop
    del sys.modules["cards_integrations.vllm_plugin"]


def asked(threshold: float, measure: str = "entropy", least: int = 1, sentinel: int = SENTINEL) -> SimpleNamespace:
    xargs = {
        "cards_threshold": threshold,
        "cards_measure": measure,
        "cards_min_length": least,
        "cards_sentinel": sentinel,
    }
    plain = {"logit_bias": None, "repetition_penalty": 1.0}
    return SimpleNamespace(extra_args=xargs, **plain, all_stop_token_ids={1, sentinel})


def applied(plugin: Any, logits: torch.Tensor, *requests: SimpleNamespace, length: int = 3) -> torch.Tensor:
    """What both model runners make of these rows, each of a request that has written `length` tokens."""
    rows = range(len(requests))
    config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY))
    one = plugin(config, torch.device("cpu"), False)
    one.rules = {row: rule for row in rows if (rule := one._rule(requests[row], [7] * length))}
    prompt = torch.full((len(requests),), 5).numpy()
    two = plugin(config, SimpleNamespace(prompt_len=SimpleNamespace(np=prompt)))
    for row in rows:
        two.add_request(row, requests[row])
    context = SimpleNamespace(
        idx_mapping_np=torch.arange(len(requests)).numpy(), seq_lens_upper_bound_np=prompt + length
    )
    found, other = one.apply(logits.clone()), two.apply(logits.clone(), context)
    assert torch.equal(found, other)
    return torch.as_tensor(found)


def only(*tokens: int, value: float = 0.0) -> torch.Tensor:
    """A row that allows these tokens alone."""
    row = torch.full((VOCABULARY,), -math.inf)
    row[list(tokens)] = value
    return row


def test_the_sentinel_is_forced_where_uncertainty_rises_and_forbidden_elsewhere(plugin: Any) -> None:
    logits = torch.zeros(4, VOCABULARY)
    logits[1, 0] = 9.0
    forbidden = logits.clone()
    forbidden[:, SENTINEL] = -math.inf
    early, free = asked(1.0, least=4), SimpleNamespace(extra_args=None)
    found = applied(plugin, logits, asked(1.0), asked(1.0), early, free)
    assert torch.equal(found[0], only(SENTINEL))
    assert torch.equal(found[1:3], forbidden[1:3])
    assert torch.equal(found[3], logits[3])


@pytest.mark.parametrize("measure", ["entropy", "max_probability", "evidential"])
def test_a_masked_sentinel_is_never_raised(plugin: Any, measure: str) -> None:
    """vLLM's grammars mask before processors run; any token that they have masked fails there."""
    logits = torch.zeros(2, VOCABULARY)
    logits[0, SENTINEL] = -math.inf
    found = applied(plugin, logits, asked(0.5, measure), asked(0.5, measure))
    assert torch.equal(found[0], logits[0])
    assert torch.equal(found[1], only(SENTINEL))


@pytest.mark.parametrize(("measure", "value"), [("entropy", math.log(4)), ("max_probability", 0.75)])
def test_uncertainty_under_a_mask_is_that_of_what_it_allows(plugin: Any, measure: str, value: float) -> None:
    """Four tokens are left, the sentinel one of them."""
    logits = torch.stack([only(0, 1, SENTINEL, 3)] * 2)
    found = applied(plugin, logits, asked(value - 1e-3, measure), asked(value + 1e-3, measure))
    assert torch.equal(found[0], only(SENTINEL))
    assert torch.equal(found[1], only(0, 1, 3))


@pytest.mark.parametrize("threshold", [-1.0, 3.0])
def test_what_a_grammar_allows_alone_is_not_forbidden(plugin: Any, threshold: float) -> None:
    """Or nothing would be left to sample from."""
    found = applied(plugin, only(SENTINEL)[None], asked(threshold))
    assert torch.equal(found[0], only(SENTINEL))


def test_a_sentinel_beyond_the_vocabulary_changes_nothing(plugin: Any) -> None:
    logits = torch.zeros(1, VOCABULARY)
    assert torch.equal(applied(plugin, logits, asked(0.0, sentinel=VOCABULARY)), logits)


IMPORTS = f"""
import sys
from types import ModuleType

for name in {STUBS!r}:
    sys.modules[name] = ModuleType(name)
vars(sys.modules[{ONE!r}]).update(BatchUpdate=object, LogitsProcessor=type("V1", (), {{}}))
vars(sys.modules[{ONE!r} + ".builtin"]).update(process_dict_updates=None)
vars(sys.modules[{TWO!r}]).update(LogitsProcessor=type("V2", (), {{}}))
import torch

before = set(sys.modules)
import cards_integrations.vllm_plugin

print(*sorted({{name for name in set(sys.modules) - before if not name.startswith("torch")}}))
"""


def test_it_imports_nothing_that_a_server_does_not_have() -> None:
    """The package is installed there with `--no-deps`: its own two modules, and the standard library."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert [name for name in names if name.startswith("cards_integrations")] == [
        "cards_integrations",
        "cards_integrations.uncertainty",
        "cards_integrations.vllm_plugin",
    ]
    roots = {name.partition(".")[0] for name in names} - {"cards_integrations"}
    assert roots <= sys.stdlib_module_names


def test_a_bias_changes_no_uncertainty(plugin: Any) -> None:
    """vLLM has added it before the plug-in sees the logits."""
    raw = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)).double()
    p = raw[0].softmax(-1)
    entropy = float(-(p * p.log()).sum())
    for threshold, rises in ((entropy - 1e-6, True), (entropy + 1e-6, False)):
        request = asked(threshold)
        request.logit_bias = {3: 9.0, 5: -4.0}
        biased = raw.clone()
        biased[0, 3], biased[0, 5] = raw[0, 3] + 9.0, raw[0, 5] - 4.0
        found = applied(plugin, biased, request)
        assert (int(found.argmax()) == SENTINEL and found.isfinite().sum() == 1) == rises


@pytest.mark.parametrize("proposed", [0, 2])
def test_a_repetition_penalty_changes_no_uncertainty(plugin: Any, proposed: int) -> None:
    """Model runner V2 has applied it before the plug-in sees the logits, with what a speculative model has proposed."""
    prompt, output = [3, 4, 4], [6, 0]
    raw = 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)).double()
    assert {bool(value < 0) for value in raw[prompt + output]} == {True, False}
    p = raw.softmax(-1)
    entropy = float(-(p * p.log()).sum())
    changed = raw.clone()
    changed[[0, 3, 4, 6]] = torch.where(raw < 0, raw * 1.5, raw / 1.5)[[0, 3, 4, 6]]
    config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY))
    settled = torch.full((2, 9), 7)  # what lies behind the text is of no text
    settled[1, : 5 - proposed] = torch.tensor((prompt + output)[: 5 - proposed])
    states = SimpleNamespace(
        prompt_len=SimpleNamespace(np=torch.tensor([0, 3]).numpy()), all_token_ids=SimpleNamespace(gpu=settled)
    )
    last = [4, *output][2 - proposed :]  # what was fed to the model at each row
    rows = torch.arange(1 + proposed)
    context = SimpleNamespace(
        idx_mapping_np=torch.tensor([1]).numpy(), seq_lens_upper_bound_np=torch.tensor([5]).numpy(),
        expanded_idx_mapping=torch.ones_like(rows), expanded_local_pos=rows, input_ids=torch.tensor(last),
        pos=4 - proposed + rows,
    )  # fmt: skip
    for threshold, rises in ((entropy - 1e-6, True), (entropy + 1e-6, False)):
        request = asked(threshold)
        request.repetition_penalty = 1.5
        two = plugin(config, states)
        two.add_request(1, request)
        logits = torch.stack([*[raw] * proposed, changed])
        found = two.apply(logits, context)[-1]
        assert (int(found.argmax()) == SENTINEL and found.isfinite().sum() == 1) == rises


def test_ends_are_forbidden_before_the_minimum_and_the_sentinel_is_not(plugin: Any) -> None:
    logits = torch.zeros(2, VOCABULARY)
    calm, rising = asked(99.0), asked(0.0)
    for request in (calm, rising):
        request.extra_args["cards_min_tokens"] = 4
    found = applied(plugin, logits, calm, rising)
    assert (found[0] == -math.inf).nonzero().flatten().tolist() == [1, SENTINEL]
    assert torch.equal(found[1], only(SENTINEL))
    assert (applied(plugin, logits, calm, rising, length=4)[0] == -math.inf).nonzero().flatten().tolist() == [SENTINEL]
