"""A model whose weights are no numbers, or not all there, or that does not fit its tokenizer, is refused by name."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from naive import lora
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from cards_integrations.decoding import BestOfN, Sampling
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.errors import ModelError, PromptError, RewardError
from cards_integrations.models.local.embedded import embedded_model
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import (
    ClassifierReward,
    GroundednessReward,
    JudgeReward,
    RelevanceReward,
    Reward,
    RewardLoader,
)
from cards_integrations.trace import Alignment

PROMPT = "w9 w20 w31"
Weights = dict[str, torch.Tensor]


def changed(folder: str, to: Path, change: Callable[[Weights], Weights], file: str = "model.safetensors") -> str:
    """A copy of a model or an adapter with other weights."""
    shutil.copytree(folder, to)
    weights = change({name: tensor.clone() for name, tensor in load_file(to / file).items()})
    save_file(weights, to / file, {"format": "pt"})
    return str(to)


def with_number(part: str, number: float) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        weights[next(name for name in weights if part in name)].view(-1)[-1] = number
        return weights

    return change


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w for name, w in weights.items() if not any(part in name for part in parts)}


def loader() -> ModelLoader:
    return ModelLoader(Placement(device="cpu", dtype="float32"))


@pytest.fixture
def adapter(tmp_path: Path, models: Callable[..., str]) -> str:
    return lora(tmp_path / "lora", models("llama"), ["q_proj", "v_proj"])


# --- weights ---


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("classifier", [False, True])
def test_weights_that_are_no_numbers(
    models: Callable[..., str], tmp_path: Path, number: float, classifier: bool
) -> None:
    bad = changed(models("llama", classifier), tmp_path / "bad", with_number("layers.1.mlp.down_proj", number))
    with pytest.raises(ModelError, match=r"bad.*layers\.1\.mlp\.down_proj\.weight.*NaN or infinity"):
        (loader().classifier if classifier else loader().causal)(LocalModel(model=bad))


def test_weights_too_large_for_the_dtype(models: Callable[..., str], tmp_path: Path) -> None:
    large = changed(models("llama"), tmp_path / "large", with_number("layers.0.mlp.up_proj", 7e4))
    assert loader().causal(LocalModel(model=large))
    with pytest.raises(ModelError, match=r"up_proj.*in float16.*dtype='float32'"):
        ModelLoader(Placement(device="cpu", dtype="float16")).causal(LocalModel(model=large))


@pytest.mark.parametrize("shared", [False, True])
def test_an_adapter_with_nan_is_named(models: Callable[..., str], adapter: str, tmp_path: Path, shared: bool) -> None:
    bad = changed(adapter, tmp_path / "nan", with_number("layers.1", float("nan")), "adapter_model.safetensors")
    models_of = loader()
    if shared:
        models_of.causal(LocalModel(model=models("llama")))
    with pytest.raises(ModelError, match=r"adapter='.*nan'.*layers\.1.*NaN"):
        models_of.causal(LocalModel(model=models("llama"), adapter=bad))


def test_the_language_model_of_an_engine_and_its_reward(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    bad = changed(models("llama", True), tmp_path / "bad", with_number("score", float("nan")))
    engine = start(models("llama"))
    with pytest.raises(ModelError, match=r"score\.weight"):
        engine.score(ClassifierReward(model=bad), PROMPT, ["w9"])
    assert engine.run(Request(PROMPT, Sampling(), max_tokens=2)).text


def test_a_half_precision_that_overflows_ends_its_own_request(tmp_path: Path) -> None:
    """The residual stream of w40 passes 65,504, the norm of infinity is NaN."""
    model = tiny.causal(eos_token_id=None)
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = 65_000.0
        model.model.layers[0].mlp.down_proj.weight *= 500
    folder = tiny.save(tmp_path / "large", model, tiny.words(eos_token=None))
    engine = Engine(LocalModel(model=folder), EngineSettings(device="cpu", dtype="float16", kv_memory=1e8))
    greedy = Sampler(top_k=5)
    asked = [Request(prompt, Sampling(), sampler=greedy, max_tokens=3, seed=1) for prompt in ("w9 w20", "w9 w40")]
    try:
        alone = engine.run(asked[0])
        futures = [engine.submit(request) for request in asked]
        assert futures[0].result(60).token_ids == alone.token_ids
        with pytest.raises(ModelError, match=r"gave NaN.*float16.*dtype='float32'"):
            futures[1].result(60)
        assert engine.inspect().idle
    finally:
        engine.close()


# --- what is missing ---


def test_an_adapter_fills_no_hole_of_the_model(models: Callable[..., str], adapter: str, tmp_path: Path) -> None:
    holed = changed(models("llama"), tmp_path / "holed", without("layers.1."))
    with pytest.raises(ModelError, match=r"holed.*no weights for model\.layers\.1\..* more of LlamaForCausalLM"):
        loader().causal(LocalModel(model=holed, adapter=adapter))


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_bias_that_the_config_leaves_out_is_told(tmp_path: Path, classifier: bool, prefix: str) -> None:
    """transformers passes over it; files may name the layers of the body alone."""
    model = (tiny.classifier if classifier else tiny.causal)(attention_bias=True)
    folder = tiny.save(tmp_path / "model", model, tiny.words())
    load = loader().classifier if classifier else loader().causal
    assert load(LocalModel(model=folder))
    shorter = changed(
        folder, tmp_path / "shorter", lambda weights: {n.replace("model.", prefix): w for n, w in weights.items()}
    )
    config = json.loads((tmp_path / "shorter" / "config.json").read_text())
    (tmp_path / "shorter" / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(
        ModelError, match=r"layers\.0\.self_attn\.k_proj\.bias and 7 more, .*config\.json.*attention_bias"
    ):
        load(LocalModel(model=shorter))


@pytest.mark.parametrize("shared", [False, True])
def test_an_adapter_of_some_layers_is_refused(
    models: Callable[..., str], adapter: str, tmp_path: Path, shared: bool
) -> None:
    half = changed(adapter, tmp_path / "half", without("layers.1."), "adapter_model.safetensors")
    models_of = loader()
    if shared:
        models_of.causal(LocalModel(model=models("llama")))
    with pytest.raises(ModelError, match=r"adapter='.*half' has no weights for .*layers\.1\.self_attn"):
        models_of.causal(LocalModel(model=models("llama"), adapter=half))


def test_an_adapter_of_another_model_or_task_is_refused(
    models: Callable[..., str], adapter: str, tmp_path: Path
) -> None:
    """peft puts what fits in place, and passes over the rest without a word."""
    shallow = tiny.save(tmp_path / "shallow", tiny.causal(num_hidden_layers=1), tiny.words())
    with pytest.raises(ModelError, match=r"adapter='.*lora' has weights for .*layers\.1\..*trained on another model"):
        loader().causal(LocalModel(model=shallow, adapter=adapter))
    base = AutoModelForSequenceClassification.from_pretrained(models("llama"), num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    get_peft_model(base, config).save_pretrained(tmp_path / "judge")
    with pytest.raises(ModelError, match=r"score\.weight.*for another task"):
        loader().causal(LocalModel(model=models("llama"), adapter=str(tmp_path / "judge")))


def test_an_adapter_that_is_no_change_of_weights_is_refused(models: Callable[..., str], tmp_path: Path) -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(tiny.causal(), prompts).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(PROMPT_TUNING\) cannot be merged into weights, as a LoRA can"):
        loader().causal(LocalModel(model=models("llama"), adapter=str(tmp_path)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_head_must_come_from_somewhere(models: Callable[..., str], tmp_path: Path, shared: bool, task: Any) -> None:
    """With a task type peft keeps the head beside the adapter; without one nobody has it."""
    base = AutoModelForSequenceClassification.from_pretrained(models("llama"), num_labels=1)
    get_peft_model(base, LoraConfig(task_type=task, r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    models_of, spec = loader(), LocalModel(model=models("llama"), adapter=str(tmp_path / "lora"))
    if shared:
        models_of.causal(LocalModel(model=models("llama")))
    if task is None:
        with pytest.raises(ModelError, match=r"no weights for score\.weight"):
            models_of.classifier(spec)
    else:
        model, _ = models_of.classifier(spec)
        torch.testing.assert_close(model.score.weight, base.score.weight.float())


def test_an_embedding_model_with_holes_is_refused(tmp_path: Path) -> None:
    whole = str(embedded_model("minilm"))
    holed = changed(whole, tmp_path / "holed", without(".output.dense.weight"))
    with pytest.raises(ModelError, match=r"holed.*no weights for encoder\.layer.* and 9 more"):
        RewardLoader(loader())[RelevanceReward(model=holed)]
    bad = changed(whole, tmp_path / "bad", with_number("layer.3.output.dense.weight", float("nan")))
    with pytest.raises(ModelError, match=r"bad.*layer\.3\.output\.dense\.weight.*NaN"):
        RewardLoader(loader())[RelevanceReward(model=bad)]


# --- tokens beyond the embedding ---


def with_tokens(folder: str, to: Path, *tokens: str, special: bool = True) -> str:
    from transformers import AutoTokenizer

    shutil.copytree(folder, to)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(to)
    return str(to)


def test_the_tokenizer_of_a_larger_model_is_refused(models: Callable[..., str], tmp_path: Path) -> None:
    small = tiny.save(tmp_path / "small", tiny.causal(vocab_size=40), tiny.words())
    with pytest.raises(ModelError, match=r"8 tokens of its tokenizer, such as 'w40', lie beyond the 40 rows"):
        loader().causal(LocalModel(model=small))


async def test_a_prompt_with_an_unknown_token_ends_no_other(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    engine = start(with_tokens(models("llama"), tmp_path / "more", "<extra>"))
    prompts = [PROMPT, "w9 <extra> w20", "w7"]
    asked = [engine.arun(Request(prompt, Sampling(), max_tokens=6, seed=1)) for prompt in prompts]
    first, refused, last = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(first, Alignment)
    assert isinstance(last, Alignment)
    assert isinstance(refused, PromptError)
    assert "<extra>" in str(refused)
    assert engine.inspect().idle


@pytest.mark.parametrize("kind", ["decoder", "encoder", "judge", "entailment"])
async def test_an_answer_with_a_token_that_the_reward_does_not_know(
    models: Callable[..., str], start: Start, tmp_path: Path, kind: str
) -> None:
    """The language model writes it, for it knows it; the neighbour of the same reward goes on."""
    rewards: dict[str, Callable[[], Reward]] = {
        "decoder": lambda: ClassifierReward(model=with_tokens(models("llama", True), tmp_path / "rm", "<extra>")),
        "encoder": lambda: ClassifierReward(model=with_tokens(models("bert", True), tmp_path / "rm", "<extra>")),
        "judge": lambda: JudgeReward(
            model=LocalModel(model=with_tokens(models("mistral"), tmp_path / "rm", "<extra>")), words=("w7", "w8")
        ),
        "entailment": lambda: GroundednessReward(
            by="entailment", model=with_tokens(models("bert", True), tmp_path / "rm", "<extra>"), label="LABEL_0"
        ),
    }
    engine, reward = start(models("llama")), rewards[kind]()
    context = ("w10 w11 .",)

    def scored(text: str) -> Any:
        return asyncio.to_thread(engine.score, reward, PROMPT, [text], context)

    good: Any
    bad: Any
    good, bad = await asyncio.gather(scored("w9 ."), scored("w9 <extra> ."), return_exceptions=True)
    assert isinstance(good, list)
    assert isinstance(bad, RewardError)
    assert "<extra>" in str(bad)
    best = Request(PROMPT, BestOfN(n=2), reward, max_tokens=4, seed=1, context=context)
    assert (await engine.arun(best)).text
    assert engine.inspect().idle
