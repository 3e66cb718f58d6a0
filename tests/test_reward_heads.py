"""Heads as the files have them, pairs as cross-encoders read them, and labels that are added up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
)
from transformers import RobertaForSequenceClassification as Roberta

from cards_integrations.decoding import BestOfN, Cards, FixedLength
from cards_integrations.engine import Request
from cards_integrations.errors import CardsError, ModelError, RewardError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, ProcessReward

PROMPT, ANSWERS = "w7 w8 w9", [" w10 w11", " w12", " w13 w14 ."]
FORMAT = "{prompt}{response}"
SAMPLER = Sampler(temperature=1.0, logit_bias=((0, -50.0), (1, -50.0), (2, -50.0)))  # no special tokens


def with_head(folder: Path, architecture: str, prefix: str, head: nn.Module, **config: Any) -> str:
    """A tiny llama of which transformers knows only the body."""
    saved = Path(tiny.save(folder, tiny.classifier(), tiny.words()))
    weights = {name: each for name, each in load_file(saved / "model.safetensors").items() if name != "score.weight"}
    weights |= {f"{prefix}{name}": each.detach().clone() for name, each in head.state_dict().items()}
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    settings = json.loads((saved / "config.json").read_text())
    if not architecture.endswith("ForSequenceClassification"):
        settings = {name: each for name, each in settings.items() if name not in ("id2label", "label2id")}
    (saved / "config.json").write_text(json.dumps({**settings, "architectures": [architecture], **config}))
    return str(saved)


def layers(labels: int) -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, labels))


def linear(bias: bool) -> nn.Module:
    torch.manual_seed(7)
    made = nn.Linear(32, 1, bias=bias)
    if bias:
        nn.init.normal_(made.bias, std=3.0)
    return made


@torch.inference_mode()
def by_hand(head: nn.Module, text: str) -> torch.Tensor:
    """The head on the last hidden state of the tiny llama: (labels,)."""
    ids = tiny.words()(text, return_tensors="pt")["input_ids"]
    return head(tiny.classifier().model(ids).last_hidden_state[0, -1])


@pytest.mark.parametrize(
    ("architecture", "prefix", "head"),
    [
        ("LlamaForScore", "score_head.", linear(bias=True)),
        ("LlamaForScore", "score_head.", linear(bias=False)),
        ("LlamaRewardModel", "regression_head.", linear(bias=False)),
        ("EurusRewardModel", "regression_head.", linear(bias=False)),
        ("Qwen2ForRewardModel", "score.", layers(1)),
        ("LlamaForSequenceClassification", "score.", linear(bias=True)),
    ],
)
def test_a_head_is_read_as_it_is(
    tmp_path: Path, models: Callable[..., str], start: Start, architecture: str, prefix: str, head: nn.Module
) -> None:
    reward = ClassifierReward(model=with_head(tmp_path, architecture, prefix, head), prompt_format=FORMAT)
    engine = start(models("llama"))
    expected = [float(by_hand(head, PROMPT + answer)) for answer in ANSWERS]
    assert engine.score(reward, PROMPT, ANSWERS) == pytest.approx(expected, abs=1e-4)
    answer = engine.run(Request(PROMPT, BestOfN(n=3), reward, SAMPLER, 6, seed=1))
    assert answer.reward == pytest.approx(float(by_hand(head, PROMPT + answer.text)), abs=1e-4)


def test_the_head_of_a_process_model(tmp_path: Path, models: Callable[..., str], start: Start) -> None:
    head = layers(2)
    folder = with_head(tmp_path, "Qwen2ForProcessRewardModel", "score.", head, num_labels=2)
    reward = ProcessReward(model=folder, step_tag=".", separator="!", aggregate="last", prompt_format=FORMAT)
    ids = "w7 w8 w9 w10 . w11 ."
    expected = float(by_hand(head, ids).softmax(-1)[1])
    found = start(models("llama")).score(reward, PROMPT, [" w10 ! w11"])
    assert found == pytest.approx([expected], abs=1e-4)


@pytest.mark.parametrize(
    ("prefix", "config", "message"),
    [
        ("gating.", {}, "'gating.weight', which LlamaForSequenceClassification does not know"),
        ("score_head.", {"do_normalize": True, "architectures": ["LlamaForScore"]}, "normalizes its scores"),
        ("other.", {}, r"no weights for score\.weight"),
    ],
)
def test_a_head_that_is_not_known_is_refused(
    tmp_path: Path, models: Callable[..., str], start: Start, prefix: str, config: dict[str, Any], message: str
) -> None:
    folder = with_head(tmp_path, "LlamaOfSomebody", prefix, linear(bias=False), **config)
    with pytest.raises(ModelError, match=message):
        start(models("llama")).score(ClassifierReward(model=folder), PROMPT, ANSWERS)


OWN_CODE = """
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

class Scores(LlamaForSequenceClassification):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 3 * found.logits.tanh()
        return found

class Steps(LlamaForTokenClassification):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = -found.logits
        return found
"""


def with_code(model: Any, folder: Path, auto: str, name: str) -> str:
    """The folder of a model whose code is its own."""
    tiny.save(folder, model, tiny.words())
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {auto: f"own.{name}"}}))
    return str(folder)


def test_what_a_model_s_own_code_makes_of_its_scores(tmp_path: Path, models: Callable[..., str], start: Start) -> None:
    model, engine = tiny.classifier(), start(models("llama"))
    folder = with_code(model, tmp_path / "scores", "AutoModelForSequenceClassification", "Scores")
    with torch.inference_mode():
        expected = [
            3 * model(tiny.words()(PROMPT + answer, return_tensors="pt")["input_ids"]).logits.tanh().item()
            for answer in ANSWERS
        ]
    reward = ClassifierReward(model=folder, trust_remote_code=True, prompt_format=FORMAT)
    assert engine.score(reward, PROMPT, ANSWERS) == pytest.approx(expected, abs=1e-4)
    steps = AutoModelForTokenClassification.from_config(tiny.config("llama", num_labels=2))
    folder = with_code(steps, tmp_path / "steps", "AutoModelForTokenClassification", "Steps")
    process = ProcessReward(model=folder, trust_remote_code=True, step_tag=".", prompt_format=FORMAT)
    with pytest.raises(ModelError, match="its scores are not what its head makes of the hidden states"):
        engine.score(process, PROMPT, ANSWERS)


# --- several objectives ---


def test_labels_are_added_up_and_named(tmp_path: Path, models: Callable[..., str], start: Start) -> None:
    model = tiny.classifier(num_labels=3, id2label={0: "helpful", 1: "correct", 2: "verbose"})
    folder = tiny.save(tmp_path, model, tiny.words())
    weights: Any = {"helpful": 0.7, 1: 0.5, "verbose": -0.2}
    reward = ClassifierReward(model=folder, weights=weights, prompt_format=FORMAT)

    @torch.inference_mode()
    def by_recipe(answer: str) -> torch.Tensor:
        return model(tiny.words()(PROMPT + answer, return_tensors="pt")["input_ids"]).logits[0]

    engine, wanted = start(models("llama"), width=8), torch.tensor([0.7, 0.5, -0.2])
    expected = [float(by_recipe(answer) @ wanted) for answer in ANSWERS]
    assert engine.score(reward, PROMPT, ANSWERS) == pytest.approx(expected, abs=1e-4)
    method = Cards(target_reward=9.0, acceptance="hard", max_rejections=2, boundary=FixedLength(length=4))
    kept = ""
    for segment in engine.run(Request(PROMPT, method, reward, SAMPLER, 12, seed=2)).segments:
        kept += segment.text
        assert [*segment.parts] == ["helpful", "correct", "verbose"]
        assert list(segment.parts.values()) == pytest.approx(by_recipe(kept).tolist(), abs=1e-4)
    with pytest.raises(CardsError, match="choose one of"):
        engine.score(ClassifierReward(model=folder, weights={"kind": 1.0}), PROMPT, ANSWERS)


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", None])
def test_probabilities_are_those_of_the_model_s_own_problem(
    tmp_path: Path, models: Callable[..., str], start: Start, kind: str | None
) -> None:
    """Of labels that do not exclude each other, each has one of its own."""
    model = tiny.classifier(num_labels=3, id2label={0: "toxic", 1: "rude", 2: "threat"}, problem_type=kind)
    folder, engine = tiny.save(tmp_path, model, tiny.words()), start(models("llama"))
    with torch.inference_mode():
        logits = model(tiny.words()(PROMPT + ANSWERS[0], return_tensors="pt")["input_ids"]).logits[0]
    expected = logits.sigmoid() if kind == "multi_label_classification" else logits.softmax(-1)
    how: dict[str, Any] = {"model": folder, "prompt_format": FORMAT}
    for output, values in (("probability", expected), ("log_odds", expected.logit())):
        found = engine.score(ClassifierReward(**how, label="rude", output=output), PROMPT, ANSWERS[:1])
        assert found == pytest.approx([float(values[1])], abs=1e-4)
    both = ClassifierReward(**how, weights={"toxic": -1.0, "rude": -0.5}, output="probability")
    assert engine.score(both, PROMPT, ANSWERS[:1]) == pytest.approx([float(-expected[0] - expected[1] / 2)], abs=1e-4)


def test_one_label_or_weights() -> None:
    wrongs: list[dict[str, Any]] = [{"weights": {}}, {"weights": {"a": 1.0}, "label": "a"}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="leave label= out"):
            ClassifierReward(model="a/b", **wrong)


# --- pairs ---


def pairs() -> Any:
    tokenizer = tiny.words(cls_token="w6", sep_token="w7")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w6 $A w7", pair="w6 $A w7 $B:1 w7:1", special_tokens=[("w6", 6), ("w7", 7)]
    )
    return tokenizer


def encoder(window: int = 64) -> Any:
    torch.manual_seed(8)
    sizes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = {"intermediate_size": 48, "max_position_embeddings": window, "num_labels": 1, "initializer_range": 0.5}
    return BertForSequenceClassification(BertConfig(**sizes, **shape)).eval()


def test_an_encoder_reads_pairs(tmp_path: Path, models: Callable[..., str], start: Start) -> None:
    """Also in drafting, and with a prompt that is too long, which loses its beginning."""
    model = encoder(window=24)
    folder = tiny.save(tmp_path, model, pairs())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.truncation_side = "left"

    @torch.inference_mode()
    def by_recipe(prompt: str, answer: str) -> float:
        inputs = tokenizer(prompt, answer, truncation="only_first", max_length=24, return_tensors="pt")
        return float(model(**inputs).logits)

    engine, long = start(models("llama"), width=8), " ".join(f"w{8 + i}" for i in range(30))
    for reward in (ClassifierReward(model=folder), ClassifierReward(model=folder, prompt_format="pair")):
        for prompt in (PROMPT, long):
            found = engine.score(reward, prompt, ANSWERS)
            assert found == pytest.approx([by_recipe(prompt, answer) for answer in ANSWERS], abs=1e-4)
        answer = engine.run(Request(PROMPT, BestOfN(n=4), reward, SAMPLER, 8, seed=3))
        assert answer.reward == pytest.approx(by_recipe(PROMPT, answer.text), abs=1e-4)
    with pytest.raises(RewardError, match="the answer takes 24 tokens"):
        engine.score(ClassifierReward(model=folder), PROMPT, [" w9" * 24])


def roberta(folder: Path, labels: int = 1) -> tuple[Any, str]:
    """A model whose head has two layers, and its folder."""
    torch.manual_seed(9)
    sizes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = {"intermediate_size": 48, "max_position_embeddings": 20, "num_labels": labels, "initializer_range": 0.5}
    model = Roberta(RobertaConfig(**sizes, **shape, pad_token_id=1)).eval()
    tokenizer = pairs()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return model, tiny.save(folder, model, tokenizer)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_an_adapter_on_a_classifier_with_several_labels(
    tmp_path: Path, models: Callable[..., str], start: Start, task: Any
) -> None:
    """It brings a head of two layers, or leaves the model its own."""
    base, folder = roberta(tmp_path / "base", labels=3)
    model: Any = get_peft_model(base, LoraConfig(task_type=task, r=2, target_modules=["query"]))
    for name, weights in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(weights, std=0.3)
    model.save_pretrained(tmp_path / "lora")
    with torch.inference_mode():
        inputs = AutoTokenizer.from_pretrained(folder)("w8 w9", "w10", return_tensors="pt")
        expected = float(model.eval()(**inputs).logits[0, 2])
    reward = ClassifierReward(model=folder, adapter=str(tmp_path / "lora"), label=2)
    assert start(models("llama")).score(reward, "w8 w9", ["w10"]) == pytest.approx([expected], abs=1e-4)


def test_roberta_counts_from_behind_the_padding(tmp_path: Path, models: Callable[..., str], start: Start) -> None:
    model, folder = roberta(tmp_path)
    long = " ".join(f"w{8 + i}" for i in range(30))
    engine = start(models("llama"))
    found = engine.score(ClassifierReward(model=folder, prompt_format="{response}"), PROMPT, [long])
    ids = torch.tensor([[6, *range(38 - 16, 38), 7]])  # 20 positions, of which the first is the third
    with torch.inference_mode():
        assert found == pytest.approx([float(model(ids).logits)], abs=1e-4)
