"""Does each reward guide? Does calibration foresee? Are guided answers grounded? Is stopping as good as a target?

    python benchmarks/rewards.py [--parts guide judges heads grounded calibration stopping] [--models ../shared/models]
    python benchmarks/rewards.py --parts guide --rewards judge  # only those with these words in their names

    guide        every kind of reward guides SmolLM2: its mean for plain and for CARDS answers (best-of-4 for the
                 judge that writes critiques, which reads finished answers only), same prompts, seeds and length
                 limit, 95% bootstrap intervals of the paired difference
    judges       the same for judges that are the tiny pair's language model
    heads        the same for other kinds of heads, which have the weights of the tiny pair's sentiment model
    grounded     twenty questions with a context: how many answers hold the context's fact
    calibration  predicted against measured acceptance, tokens and reward, on other prompts
    stopping     optimal stopping against calibrated CARDS: rewards at equal tokens looked at

Writes results/rewards.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from frontier import BOUNDARY, DID, WHO
from grounded_questions import PROMPT, QUESTIONS
from quality import PROMPTS, interval
from rich.console import Console
from rich.table import Table

from cards_integrations import CardsLLM
from cards_integrations.cli.demo import JUDGE
from cards_integrations.decoding import BestOfN, Cards, Cascade, Decoding, OptimalStopping, Sampling
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards import (
    NAMED,
    ClassifierReward,
    CritiqueJudgeReward,
    FunctionReward,
    GateReward,
    GradedJudgeReward,
    GroundednessReward,
    ImplicitReward,
    JudgeReward,
    LengthReward,
    MinReward,
    PatternReward,
    ProcessReward,
    RelevanceReward,
    RemoteReward,
    Reward,
    WeightedReward,
)
from cards_integrations.rewards.prompts import PLAIN
from cards_integrations.study.metrics import distinct, points, repeated_3grams
from cards_integrations.trace import Alignment

SENTIMENT = NAMED["sentiment"].parts[0]  # without its guard
RESULTS = Path(__file__).parent / "results" / "rewards.json"
SEEDS = 5
PRINCIPLES = ("Does it answer the message?", "Is it friendly?", "Is it free of repetition?")
SERVER = """
    import http.server, json
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *args): pass
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            scores = [sum(map(r.lower().count, "aeiou")) / max(1, len(r)) for r in asked["responses"]]
            body = json.dumps({"scores": scores}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
"""


def short_words(prompt: str, responses: list[str]) -> list[float]:
    """Minus the mean length of a word, in letters."""
    words = [response.split() for response in responses]
    return [-sum(map(len, each)) / max(1, len(each)) for each in words]


@contextmanager
def server() -> Iterator[str]:
    """A process that scores answers by their share of vowels."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SERVER)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def distilled(llm: CardsLLM, folder: Path, n: int = 8, epochs: int = 2) -> LocalModel:
    """SmolLM2 tuned (LoRA) on its own best-of-8 answers: the tuned model of an `ImplicitReward`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from cards_integrations.models.local.resolve import resolve_model

    best = llm.align_batch(PLAIN, range(len(PLAIN)), decoding=BestOfN(n=n), max_tokens=48)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2"), dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-3)
    torch.manual_seed(0)
    for _ in range(epochs):
        for answer in best:
            ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
            labels = ids.clone()
            labels[:, : len(answer.prompt_ids)] = -100
            tuned(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    tuned.save_pretrained(folder)
    return LocalModel(model="smollm2", adapter=str(folder))


def rewards(url: str, tuned: LocalModel) -> dict[str, Reward]:
    """One of each kind."""
    return {
        "classifier, decoder (sentiment)": SENTIMENT,
        "classifier, encoder (sentiment)": NAMED["sentiment-minilm"],
        "function (short words)": FunctionReward(function=short_words),
        "length (20 words)": LengthReward(target=20),
        "pattern (rain, sun; no I)": PatternReward(wanted=["rain", "sun"], forbidden=[r"\bI\b"], case_sensitive=True),
        "implicit (distilled best-of-8)": ImplicitReward(tuned=tuned),
        "judge (SmolLM2 itself)": JudgeReward(),
        "judge of three principles (SmolLM2 itself)": JudgeReward(criteria=PRINCIPLES),
        "graded judge, 1 to 5 (SmolLM2 itself)": GradedJudgeReward(),
        "critique judge, best-of-4 (SmolLM2 itself)": CritiqueJudgeReward(max_critique_tokens=48),
        "relevance (MiniLM)": RelevanceReward(),
        "groundedness by likelihood": GroundednessReward(),
        "groundedness by embedding": GroundednessReward(by="embedding"),
        "remote (share of vowels)": RemoteReward(url=url, protocol="json"),
        "weighted (sentiment + relevance)": WeightedReward(rewards=[SENTIMENT, RelevanceReward()]),
        "min (sentiment, 20 words)": MinReward(rewards=[SENTIMENT, LengthReward(target=20)]),
        "guarded (sentiment, no repetition)": NAMED["sentiment"],
        "gate (no I, then sentiment)": GateReward(
            gate=PatternReward(forbidden=[r"\bI\b"], case_sensitive=True), reward=SENTIMENT, closed=-5
        ),
    }


def guided(llm: CardsLLM, reward: Reward, prompts: Sequence[str], decoding: Decoding) -> dict[str, Any]:
    """Plain and guided answers by the reward that guides, same prompts and seeds."""
    ask = {"seeds": range(len(prompts)), "reward": reward}
    plain = llm.align_batch(prompts, decoding=Sampling(), **ask)
    before = np.array([llm.score(p, [a.text], reward)[0] for p, a in zip(prompts, plain, strict=True)])
    aligned = llm.align_batch(prompts, decoding=decoding, **ask)
    after = np.array([a.reward for a in aligned])
    return {
        "plain": float(before.mean()),
        "cards": float(after.mean()),
        "difference": interval(after - before, np.random.default_rng(0)),
        "looked at": measured(aligned)["drafted_tokens"],
        "drafted": float(np.mean([a.usage.drafted_tokens for a in aligned])),
        "win_rate": float(np.mean([points(*pair) for pair in zip(after, before, strict=True)])),
        **{name: [text[name] for text in map(texts_of, (plain, aligned))] for name in TEXT_NUMBERS},
        "tokens": [float(np.mean([len(a.token_ids) for a in answers])) for answers in (plain, aligned)],
    }


def judges(options: argparse.Namespace) -> dict[str, Any]:
    """The kinds of judges on the tiny pair's language model, which tells stories: what would it go on with?"""
    rubric, feelings = "{prompt} {response}\n{criterion} ", ["sad", "scared", "happy"]
    asked: dict[str, Reward] = {
        "judge of two principles": JudgeReward(
            rubric=rubric, criteria=["They were happy.", "It was a sunny day."], words=("They", "But")
        ),
        "graded judge": GradedJudgeReward(rubric=rubric, criteria=["Tim felt"], grades=feelings),
        "critique judge, best-of-4": CritiqueJudgeReward(
            rubric=rubric, criteria=["In the end,"], verdict=" Tim felt ", grades=feelings, max_critique_tokens=24
        ),
    }
    prompts = [f"{who} {did}" for did in DID for who in WHO][:24]
    llm = CardsLLM(model=str(options.models / "stories260k"), max_tokens=48, temperature=0.9, reward=None)
    return on_tiny_pair(llm, asked, prompts, "judges guide the tiny pair")


def heads(options: argparse.Namespace) -> dict[str, Any]:
    """A process reward model, and one of two labels, made of the tiny pair's sentiment model."""
    llm = CardsLLM(model=str(options.models / "stories260k"), max_tokens=48, temperature=0.9, reward=None)
    prompts = [f"{who} {did}" for did in DID for who in WHO][:24]
    with tempfile.TemporaryDirectory() as folder:
        steps, labels = other_heads(options.models / "rm-sentiment-stories260k", Path(folder))
        asked: dict[str, Reward] = {
            "process, mean over sentences": ProcessReward(
                model=steps, separator=".", step_tag=".", aggregate="mean", prompt_format="{prompt}{response}"
            ),
            "two labels, weighted": ClassifierReward(
                model=labels, weights={"0": -0.5, "1": 1.0}, prompt_format="{prompt}{response}"
            ),
        }
        return on_tiny_pair(llm, asked, prompts, "other heads guide the tiny pair")


def other_heads(sentiment: Path, folder: Path) -> tuple[str, str]:
    """Directories of a token classifier and of a classifier of two labels: nothing, and the sentiment."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(sentiment)
    weight = torch.cat([torch.zeros_like(model.score.weight), model.score.weight]).detach()
    model.score.weight = torch.nn.Parameter(weight)
    model.config.num_labels = model.num_labels = 2
    of_tokens = AutoModelForTokenClassification.from_config(model.config)
    of_tokens.load_state_dict({**model.state_dict(), "score.bias": torch.zeros(2)})
    for made, name in ((of_tokens, "steps"), (model, "labels")):
        made.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(sentiment).save_pretrained(folder / name)
    return str(folder / "steps"), str(folder / "labels")


def on_tiny_pair(llm: CardsLLM, asked: Mapping[str, Reward], prompts: Sequence[str], title: str) -> dict[str, Any]:
    """Each reward guides: a row of the table for each."""
    found: dict[str, Any] = {}
    table = Table("reward", "plain", "guided", "difference", title=title)
    for name, reward in asked.items():
        decoding = BestOfN(n=4) if isinstance(reward, CritiqueJudgeReward) else Cards(boundary=BOUNDARY)
        row = found[name] = guided(llm, reward, prompts, decoding)
        mean, low, high = row["difference"]
        table.add_row(name, f"{row['plain']:.3g}", f"{row['cards']:.3g}", f"{mean:.3g} [{low:.3g}, {high:.3g}]")
    llm.close()
    Console(width=120).print(table)
    return found


def guide(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    table = Table(
        "reward", "plain", "CARDS", "difference", "wins, %", "looked at / kept", "tokens", "repeated 3-grams, %",
        "distinct-2", "log p / token", title="each reward guides",
    )  # fmt: skip
    llm = CardsLLM(max_tokens=48)
    with server() as url, tempfile.TemporaryDirectory() as folder:
        chosen = [name for name in rewards(url, LocalModel()) if any(word in name for word in options.rewards)]
        tuned = distilled(llm, Path(folder)) if any("implicit" in name for name in chosen) else LocalModel()
        for name in chosen:
            reward = rewards(url, tuned)[name]
            prompts: list[str] = PROMPTS[: options.prompts]
            if isinstance(reward, GroundednessReward):
                prompts = [PROMPT.format(question=q, context=c) for q, c, _ in QUESTIONS[: options.prompts]]
            decoding = BestOfN(n=4) if isinstance(reward, CritiqueJudgeReward) else Cards()
            row = guided(llm, reward, prompts, decoding)
            found[name] = row
            mean, low, high = row["difference"]
            table.add_row(
                name, f"{row['plain']:.3g}", f"{row['cards']:.3g}", f"{mean:.3g} [{low:.3g}, {high:.3g}]",
                f"{100 * row['win_rate']:.0f}",
                f"{row['looked at'] / row['tokens'][1]:.1f}",
                f"{row['tokens'][0]:.0f} / {row['tokens'][1]:.0f}",
                *(f"{row[name][0]:.2f} / {row[name][1]:.2f}" for name in TEXT_NUMBERS),
            )  # fmt: skip
    llm.close()
    Console(width=200).print(table)
    return found


def grounded(options: argparse.Namespace) -> dict[str, Any]:
    """Counts over all seeds; the last half of the questions contradicts common knowledge."""
    llm = CardsLLM(max_tokens=32)
    prompts = [PROMPT.format(question=q, context=c) for q, c, _ in QUESTIONS] * SEEDS
    patterns = [pattern for *_, pattern in QUESTIONS] * SEEDS
    methods: dict[str, dict[str, Any]] = {
        "plain": {"decoding": Sampling()},
        "plain, greedy": {"decoding": Sampling(), "temperature": 0.0},  # the same for every seed
        "Cascade, groundedness by likelihood": {"decoding": Cascade(), "reward": GroundednessReward()},
        "CARDS, groundedness by likelihood": {"decoding": Cards(), "reward": GroundednessReward()},
        "CARDS, groundedness by embedding": {"decoding": Cards(), "reward": GroundednessReward(by="embedding")},
        "best-of-8, groundedness by likelihood": {"decoding": BestOfN(n=8), "reward": GroundednessReward()},
    }
    half, found = len(QUESTIONS) // 2, {}
    table = Table("answers that hold the fact", "agreeing with the world", "contradicting it", "all")
    for name, options_ in methods.items():
        answers = llm.align_batch(prompts, range(len(prompts)), **options_)
        holds = [bool(re.search(p, a.text, re.IGNORECASE)) for p, a in zip(patterns, answers, strict=True)]
        first = sum(h for i, h in enumerate(holds) if i % len(QUESTIONS) < half)
        found[name] = {"agreeing": first, "contradicting": sum(holds) - first, "of": half * SEEDS}
        table.add_row(name, f"{first} / {half * SEEDS}", f"{sum(holds) - first} / {half * SEEDS}",
                      f"{sum(holds)} / {len(holds)}")  # fmt: skip
    llm.close()
    Console(width=120).print(table)
    return found


def measured(answers: Sequence[Alignment]) -> dict[str, float]:
    drafts = [draft for a in answers for segment in a.segments for draft in segment.drafts]
    return {
        "acceptance": sum(draft.verdict == "accepted" for draft in drafts) / len(drafts),
        "kept_tokens": sum(len(a.token_ids) for a in answers) / len(answers),
        "drafted_tokens": sum(len(draft.token_ids) for draft in drafts) / len(answers),
        "rm_calls": 1 + len(drafts) / len(answers),
        "reward": float(np.mean([a.reward for a in answers])),
    }


TEXT_NUMBERS = ("repeated_3grams", "distinct_2", "log_p_per_token")


def texts_of(answers: Sequence[Alignment]) -> dict[str, float]:
    """Numbers about the texts themselves, whatever a reward says of them."""
    texts = [answer.text for answer in answers]
    return {
        "repeated_3grams": float(np.mean([repeated_3grams(text) for text in texts])),
        "distinct_2": distinct(texts, 2),
        "log_p_per_token": float(np.mean([a.log_likelihood / max(1, len(a.token_ids)) for a in answers])),
    }


def calibration(options: argparse.Namespace) -> dict[str, Any]:
    sentiment = SENTIMENT.model_copy(update={"scale": None})
    # (r - mean) / spread with these numbers is 100 r + 7
    shifted = WeightedReward(rewards=[sentiment.model_copy(update={"scale": (-0.07, 0.01)})], weights=[1.0])
    asked: dict[str, tuple[Reward, list[str], list[str]]] = {
        "sentiment": (sentiment, list(PLAIN), PROMPTS),
        "100 sentiment + 7": (shifted, list(PLAIN), PROMPTS),
        "groundedness by likelihood": (
            GroundednessReward(),
            [PROMPT.format(question=q, context=c) for q, c, _ in QUESTIONS[::2]]
            + [prompt for prompt, _ in GroundednessReward().prompts],
            [PROMPT.format(question=q, context=c) for q, c, _ in QUESTIONS[1::2]],
        ),
    }
    found: dict[str, Any] = {}
    table = Table("reward", "", "acceptance", "tokens looked at", "scores", "reward", title="calibration")
    llm = CardsLLM(max_tokens=64)
    for name, (reward, learnt_on, tried_on) in asked.items():
        began = time.perf_counter()
        # twice over the prompts: few are built in
        calibrated = llm.calibrate(learnt_on * 2, reward=reward, remember=False, progress=False)
        seconds = time.perf_counter() - began
        print(calibrated)
        answers = llm.align_batch(
            tried_on * 3, range(1000, 1000 + 3 * len(tried_on)), reward=reward, decoding=calibrated.decoding
        )
        rows = {"predicted": asdict(calibrated.chosen.predicted), "measured": measured(answers)}
        found[name] = {**rows, "target": calibrated.chosen.target, "beta": calibrated.chosen.beta, "seconds": seconds}
        for what, row in rows.items():
            table.add_row(name, what, *(f"{row[key]:.3g}" for key in
                          ("acceptance", "drafted_tokens", "rm_calls", "reward")))  # fmt: skip
    llm.close()
    Console(width=120).print(table)
    return found


def stopping(options: argparse.Namespace) -> dict[str, Any]:
    """Curves of (tokens looked at, reward, judge) for targets and for prices."""
    pairs: dict[str, tuple[CardsLLM, list[str], dict[str, Any], float, float]] = {}
    tiny = options.models / "stories260k"
    if tiny.is_dir():
        judge = ClassifierReward(model=str(options.models / "rm-sentiment-stories260k"))
        llm = CardsLLM(model=str(tiny), reward=judge, max_tokens=96, temperature=0.9)
        pairs["tiny pair"] = (llm, [f"{who} {did}" for did in DID for who in WHO], {"boundary": BOUNDARY}, -0.15, 0.5)
    pairs["SmolLM2"] = (CardsLLM(max_tokens=64, reward=SENTIMENT), PROMPTS[:16], {}, 0.75, 0.53)
    found: dict[str, Any] = {}
    for pair, (llm, prompts, settings, mean, spread) in pairs.items():
        table = Table(
            "", "tokens looked at", "guiding reward", "judge", "repeated 3-grams, %", "distinct-2", "log p / token",
            title=f"{pair}: a target or a price",
        )  # fmt: skip
        methods: dict[str, Decoding] = {
            f"target mean + {k:g} spreads": Cards(target_reward=mean + k * spread, beta=0.15 * spread, **settings)
            for k in (0.5, 1.0, 1.5, 2.0)
        }
        for price in (0.02, 0.01, 0.005, 0.0025):
            methods[f"price {price:g} spreads a token"] = Cards(
                acceptance=OptimalStopping(price=price * spread), **settings
            )
        for name, decoding in methods.items():
            answers = llm.align_batch(prompts, range(len(prompts)), decoding=decoding)
            judged = [llm.score(p, [a.text], JUDGE)[0] for p, a in zip(prompts, answers, strict=True)]
            rng = np.random.default_rng(0)
            row = {
                "looked at": measured(answers)["drafted_tokens"],
                "reward": interval(np.array([a.reward for a in answers]), rng),
                "judge": interval(np.array(judged), rng),
                **texts_of(answers),
            }
            found.setdefault(pair, {})[name] = row
            table.add_row(name, f"{row['looked at']:.0f}", *(
                f"{m:.2f} [{low:.2f}, {high:.2f}]" for m, low, high in (row["reward"], row["judge"])),
                *(f"{row[name]:.2f}" for name in TEXT_NUMBERS))  # fmt: skip
        llm.close()
        Console(width=120).print(table)
    return found


PARTS = {
    "guide": guide,
    "judges": judges,
    "heads": heads,
    "grounded": grounded,
    "calibration": calibration,
    "stopping": stopping,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", type=Path, default=Path(__file__).parents[2] / "shared" / "models")
    parser.add_argument("--prompts", type=int, default=16, help="how many of them, for the part guide")
    parser.add_argument("--rewards", nargs="+", default=[""], help="words of which a name has one, for the part guide")
    options = parser.parse_args()
    for part in options.parts:
        now = PARTS[part](options)
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # as another run may have left it meanwhile
        found[part] = {**found.get(part, {}), **now}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
