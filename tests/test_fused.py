"""Norms and layers that compute the same in fewer operations: where they take a place, and what they leave alone."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Transformer
from cards_integrations.transformer.fused import FusedLayer, FusedRMSNorm, OncePerForward, fuse
from cards_integrations.transformer.quantization import Float16Linear, Groups, Int4Linear, LowRank, Part, Together

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def model(family: str = "llama", **options: Any) -> Any:
    """A tiny one whose norms are not all ones."""
    sizes = {**SHAPE, "ffn_dim": 96, "head_dim": 16, "query_pre_attn_scalar": 16, "word_embed_proj_dim": 64}
    own = {key: value for key, value in sizes.items() if key in SHAPE or key in tiny.FAMILIES[family]}
    made: Any = tiny.causal(family, **own, **options)
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def count(made: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in made.modules())


def tree_logits(made: Any) -> torch.Tensor:
    """Of two branches of one text beside another text, after three steps."""
    transformer = Transformer(made)
    tree, other = transformer.cache.open(), transformer.cache.open().branch()
    trunk = tree.branch()
    transformer.logits([ForwardInput(trunk, [7, 8, 9, 30, 11]), ForwardInput(other, [5, 6])])
    tree.keep(trunk)
    branches = [tree.branch(), tree.branch(), other]
    for step in range(3):
        found = transformer.logits([ForwardInput(each, [9 + step + i]) for i, each in enumerate(branches)])
    return torch.stack([output.value for output in found])  # type: ignore[union-attr]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_whatever_is_replaced_gives_the_same(family: str) -> None:
    made = model(family)
    plain = copy.deepcopy(made)
    fuse(made)
    torch.testing.assert_close(tree_logits(made), tree_logits(plain), rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[7, 8, 9, 30]])
    with torch.inference_mode():
        torch.testing.assert_close(made(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_fused_model_s_own_generate_has_its_cache() -> None:
    made, ids = model(eos_token_id=None), torch.tensor([[7, 8, 9, 30]])
    plain = copy.deepcopy(made).generate(ids, max_new_tokens=12, do_sample=False)
    fuse(made)
    assert count(made, FusedLayer)
    assert made.generate(ids, max_new_tokens=12, do_sample=False).tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("family", "layers", "norms"),
    [("llama", True, True), ("mistral", True, True), ("qwen2", True, True), ("qwen3", False, True),
     ("gemma2", False, True), ("gpt_neox", False, False), ("opt", False, False)],
)  # fmt: skip
def test_only_what_has_the_known_shape_is_replaced(family: str, layers: bool, norms: bool) -> None:
    made = model(family)
    before = set(made.state_dict())
    fuse(made)
    assert (count(made, FusedLayer) > 0, count(made, FusedRMSNorm) > 0) == (layers, norms)
    assert set(made.state_dict()) == before  # parts keep their names, so adapters and checkpoints find them


def test_a_layer_of_the_known_shape_that_computes_something_else_stays() -> None:
    made = model()

    class Halved(type(made.model.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * 0.5

    made.model.layers[0].__class__ = Halved
    fuse(made)
    assert [type(layer).__name__ for layer in made.model.layers] == ["Halved", "FusedLayer"]


def test_a_norm_gives_the_same_bits_to_a_row_in_any_company() -> None:
    norm = FusedRMSNorm(nn.Parameter(torch.rand(576)), 1e-5)
    inputs = torch.randn(1, 70, 576) * 100
    whole = norm(inputs)
    for size in (1, 2, 7, 16, 64):
        assert torch.equal(norm(inputs[:, :size]), whole[:, :size])
    expected = nn.functional.rms_norm(inputs, (576,), norm.weight, 1e-5)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(norm(torch.zeros(1, 1, 576)), torch.zeros(1, 1, 576))


@pytest.mark.parametrize("kind", ["together", "float16", "adapter"])
def test_a_fused_layer_takes_its_products_as_they_are(kind: str) -> None:
    made = model()
    attention = made.model.layers[0].self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    if kind == "adapter":
        attention.v_proj = LowRank(attention.v_proj, torch.randn(2, 64), torch.randn(32, 2))
    else:
        weights = [layer.weight.data for layer in projections]
        linear = Float16Linear if kind == "float16" else lambda weight: Int4Linear(Groups.of(weight))
        together = Together(linear(torch.cat(weights)), [len(weight) for weight in weights])
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            setattr(attention, name, Part(together, index))
    plain = copy.deepcopy(made)
    fuse(made)
    assert count(made, FusedLayer) == 2
    tolerance = 1e-4 if kind != "together" else 0.05
    torch.testing.assert_close(tree_logits(made), tree_logits(plain), rtol=tolerance, atol=tolerance)


def test_a_copy_of_a_model_that_has_run_has_forwards_of_its_own() -> None:
    made = model()
    fuse(made)
    expected = tree_logits(made)
    copied = copy.deepcopy(made)
    [shared] = {layer.shared for layer in copied.model.layers}
    assert shared is not made.model.layers[0].shared
    assert torch.equal(tree_logits(copied), expected)


def test_two_threads_may_run_a_model_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward's steps are timed in a thread of their own, while the engine drafts with the same layers."""
    made = model()
    fuse(made)
    expected = tree_logits(made)
    others: list[threading.Thread] = []
    rotated = OncePerForward.rotated

    def interrupted(shared: OncePerForward, heads: torch.Tensor) -> torch.Tensor:
        if not others:
            others.append(threading.Thread(target=tree_logits, args=(made,)))
            others[0].start()
            others[0].join()
        return rotated(shared, heads)

    monkeypatch.setattr(OncePerForward, "rotated", interrupted)
    assert torch.equal(tree_logits(made), expected)


def test_two_threads_may_ask_for_the_parts_of_a_product() -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    together = Together(nn.Linear(8, 12, bias=False), [4, 8])
    together.linear.weight.data = weight
    parts = Part(together, 0), Part(together, 1)
    inputs, others = torch.ones(1, 8), torch.zeros(1, 8)
    first = parts[0](inputs)
    thread = threading.Thread(target=parts[0], args=(others,))
    thread.start()
    thread.join()
    assert torch.equal(torch.cat([first, parts[1](inputs)], -1), inputs @ weight.T)
    assert together._last.inputs is None
