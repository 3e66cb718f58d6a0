"""The engine on an accelerator: is it right, and how far is it from what the hardware allows?

    python benchmarks/gpu.py                 # 7B-shaped, on CUDA
    python benchmarks/gpu.py --toy           # the same code at toy size, on whatever there is

First a small model writes the same answers on the device (float32) as on the CPU. Then random
weights of the shape of a 7B model (speed does not need trained ones) are measured at batch 1 and
64: milliseconds per answer for plain sampling, CARDS at an acceptance of about 0.2 and 0.5 (set
through the target), and best-of-20, each with its share of the floor: every step reads the weights
once, every token costs its multiplications. Last, some methods of wide.py answer one request at a
time, and their times over plain's are set beside those that its simulation gives for the same
forwards. Writes results/<device>.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from wide import COSTS, DEVICES, Clock, arms

from cards_integrations.decoding import BestOfN, Cards, Decoding, Sampling, Uncertainty
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward
from cards_integrations.trace import Alignment

TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SEVEN_B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
KV_HEADS = {"toy": 2, "7B": 8}
VOCABULARY = {"toy": 512, "7B": 32000}
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes per second
COMPUTE = {"H100": 7e11 * 1000, "H200": 7e11 * 1000}  # bf16 operations per second, as matmuls reach them
PROMPT = " ".join(f"w{i % 400 + 3}" for i in range(100))
WIDE = (
    "plain", "best-of-32", "TreeBoN 32, layers of 12", "TreeBoN 32, layers of 6", "best-of-16 per 6 tokens", "CARDS",
    "Cascade 1.2", "Cascade 1.4", "Cascade 2.0", "Cascade tokens:8",
)  # fmt: skip
REPEATS = 3  # answers of each, of which the median counts


def saved(folder: Path, size: str) -> tuple[str, str]:
    """Directories of a language model and a reward model: configs and a tokenizer, no weights."""
    shape = TOY if size == "toy" else SEVEN_B
    vocabulary = VOCABULARY[size]
    names = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))]
    fast = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = AutoConfig.for_model(
        "llama", **shape, vocab_size=vocabulary, num_key_value_heads=KV_HEADS[size], pad_token_id=0, bos_token_id=None,
        eos_token_id=1, max_position_embeddings=4096, tie_word_embeddings=False, num_labels=1,
    )  # fmt: skip
    for name in ("lm", "rm"):
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "lm"), str(folder / "rm")


class RandomWeights(ModelLoader):
    """Builds what it is asked for on the device; the same seed gives the same weights everywhere."""

    dtype = torch.float32

    def _load(self, spec: LocalModel, family: Any = None, options: dict[str, Any] | None = None) -> Any:
        config = AutoConfig.from_pretrained(spec.model)
        kind = AutoModelForCausalLM if spec.model.endswith("lm") else AutoModelForSequenceClassification
        if config.hidden_size < 1000:  # small enough to be the same on every device
            torch.manual_seed(len(spec.model))
            model = kind.from_config(config).to(self.device, self.dtype)
        else:
            with torch.device(self.device):
                model = kind.from_config(config, dtype=self.dtype)
        if hasattr(model, "lm_head"):
            model.lm_head.weight.data *= 30  # a head that is as sure of itself as a trained one
        return model.eval()


def engine(lm: str, device: str, dtype: torch.dtype, **settings: Any) -> Engine:
    import cards_integrations.engine.worker as worker

    RandomWeights.dtype = dtype
    worker.ModelLoader = RandomWeights  # type: ignore[misc]
    return Engine(LocalModel(model=lm), EngineSettings(device=device, **settings))


def check(lm: str, rm: str, device: str) -> dict[str, Any]:
    """The same answers on the device as on the CPU, in float32, with and without company."""
    method = Cards(target_reward=0.3, beta=0.3, boundary=Uncertainty(threshold=3.0, min_length=2, max_length=12))
    reward = ClassifierReward(model=rm)
    requests = [Request(f"{PROMPT} w{i + 9}", method, reward, Sampler(), 48, seed=i) for i in range(12)]
    torch.backends.cuda.matmul.allow_tf32 = False
    answers: list[list[Alignment]] = []
    for where in ("cpu", device):
        e = engine(lm, where, torch.float32)
        answers.append(e.run_many(requests))
        assert [e.run(r).token_ids for r in requests[:3]] == [a.token_ids for a in answers[-1][:3]]
        e.close()
    same = [a.token_ids == b.token_ids for a, b in zip(*answers, strict=True)]
    apart = [abs(float(a.reward or 0) - float(b.reward or 0)) for a, b in zip(*answers, strict=True)]
    return {"same answers": f"{sum(same)} of {len(same)}", "rewards differ by at most": max(apart)}


def measure(lm: str, rm: str, device: str, batches: list[int], tokens: int) -> dict[str, Any]:
    e = engine(lm, device, torch.bfloat16, max_rows=max(batches), prefix_reuse=False)
    reward, sampler = ClassifierReward(model=rm), Sampler()
    model = e.loaded().model
    size = sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        ids = torch.randint(3, model.config.vocab_size, (1, 256), device=model.device)
        entropy = torch.distributions.Categorical(logits=model(ids).logits[0].float()).entropy()
    boundary = Uncertainty(threshold=float(entropy.quantile(0.92)))

    def requests(decoding: Decoding, n: int, seed: int) -> list[Request]:
        return [
            Request(f"{PROMPT} w{i + 9}", decoding, reward, sampler, tokens, seed=seed * 1000 + i) for i in range(n)
        ]

    # Rewards of candidates: with a constant hard threshold at a quantile of them, that share passes.
    all_pass = Cards(target_reward=-1e9, alpha=1.0, acceptance="hard", boundary=boundary)
    seen = [d.reward for a in e.run_many(requests(all_pass, 8, 0)) for s in a.segments for d in s.drafts]
    methods: dict[str, Decoding] = {"plain": Sampling(), "best-of-20": BestOfN(n=20)}
    for share in (0.2, 0.5):
        target = float(np.quantile([r for r in seen if r is not None], 1 - share))
        methods[f"CARDS, acceptance {share}"] = Cards(
            target_reward=target, alpha=1.0, beta=0.1, acceptance="hard", boundary=boundary
        )
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    card = next((card for card in BANDWIDTH if card in name), None)
    found: dict[str, Any] = {"parameters": size, "methods": {}}
    for n in batches:
        for what, decoding in methods.items():
            e.run_many(requests(decoding, n, 1))  # captures the graphs of its shapes
            steps = e.loaded().steps
            began = time.perf_counter()
            answers = e.run_many(requests(decoding, n, 2))
            seconds = time.perf_counter() - began
            steps = e.loaded().steps - steps
            drafts = [d for a in answers for s in a.segments for d in s.drafts]
            run = {
                "ms per answer": 1000 * seconds / n,
                "answers per second": n / seconds,
                "ms per step": 1000 * seconds / steps,
                "steps": steps,
                "tokens kept": float(np.mean([a.usage.completion_tokens for a in answers])),
                "tokens drafted": float(np.mean([a.usage.drafted_tokens for a in answers])),
                "acceptance": len([d for d in drafts if d.verdict == "accepted"]) / len(drafts),
            }
            if card:
                read = sum(a.usage.lm_tokens + a.usage.rm_tokens for a in answers)
                floor = steps * 2 * size / BANDWIDTH[card] + read * 2 * size / COMPUTE[card]
                run["share of the floor"] = floor / seconds
            found["methods"][f"{what}, batch {n}"] = run
            print(f"{what:<24} batch {n:<4}", "  ".join(f"{k} {v:.3g}" for k, v in run.items()), flush=True)
    found["one request"] = set_beside(e, boundary, lambda decoding, seed: requests(decoding, 1, seed)[0], card)
    found["graphs"] = graphs_kept(e, requests(Sampling(), max(batches), 3))
    e.close()
    return found


def set_beside(
    e: Engine, boundary: Uncertainty, request: Callable[[Decoding, int], Request], card: str | None
) -> dict[str, Any]:
    """Times of wide.py's methods over that of a plain answer, as measured and as simulated, with their forwards."""
    clock = Clock(DEVICES["h200" if card else "cpu"], plans=False)
    methods = arms(boundary, (), (12, 6))
    found: dict[str, Any] = {}
    for arm in WIDE:
        e.run(request(methods[arm], 4))  # captures the graphs of its shapes
        runs = []
        for seed in range(5, 5 + REPEATS):
            before, began = clock.read().copy(), time.perf_counter()
            e.run(request(methods[arm], seed))
            runs.append([time.perf_counter() - began, *(clock.read() - before)])
        measured, *counted = map(float, np.median(runs, axis=0))
        found[arm] = {"measured": measured, **dict(zip(COSTS, counted, strict=True))}
        for cost, name in (("measured", "measured over plain"), ("seconds", "simulated over plain")):
            found[arm][name] = found[arm][cost] / found["plain"][cost]
        print(f"{arm:<24}", "  ".join(f"{k} {v:.3g}" for k, v in found[arm].items()), flush=True)
    return found


def graphs_kept(e: Engine, requests: list[Request]) -> dict[str, int]:
    """How many graphs there are, and how many of them are left after a long request has come and gone."""
    e.run_many(requests)
    steps = e.loaded().transformer._logits.steps
    before = {id(step) for step in steps.values() if step is not None}
    long = replace(requests[0], prompt=" ".join([PROMPT] * 20))
    e.run_many([*requests, long])
    e.run_many(requests)
    return {"captured": len(before), "left": len(before & {id(step) for step in steps.values()})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("No CUDA device here; --toy runs the same code at toy size.")
    with tempfile.TemporaryDirectory() as folder:
        toy = saved(Path(folder) / "small", "toy")
        checked = check(*toy, device)
        print(checked)
        models = toy if options.toy else saved(Path(folder) / "large", "7B")
        found = measure(*models, device, options.batch, options.tokens)
    if not options.toy:
        name = torch.cuda.get_device_name().replace(" ", "-").lower()
        file = Path(__file__).parent / "results" / f"{name}.json"
        file.write_text(json.dumps({"device": name, "check": checked, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
