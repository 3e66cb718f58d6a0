"""Train the two sentiment reward models: SmolLM2 (guides the demo) and MiniLM (judges, never guides).

Data: the human ratings behind VADER (Hutto & Gilbert, ICWSM 2014), 23,703 sentences from tweets,
film and product reviews and editorials, each rated by about 20 people on [-4, 4]; MIT licence.
They lie in the source distribution of `vadersentiment`:

    pip download --no-deps --no-build-isolation --no-binary :all: vadersentiment==3.3.2
    python training/sentiment_reward.py smollm2 vaderSentiment-3.3.2.tar.gz
    python training/sentiment_reward.py minilm  vaderSentiment-3.3.2.tar.gz

Both learn from answers of one to three consecutive sentences, *including partial answers*: the
target of a prefix is half the mean rating of the sentences it has reached, so that the score of a
prefix is the expected score of where it leads. The decoder learns at every token of an answer in
one pass (a causal model's prefixes cost nothing); the encoder sees a random prefix a time. The
user's turn is a neutral question or a random rated sentence, so that only the answer counts.
"""

from __future__ import annotations

import argparse
import csv
import html
import io
import json
import math
import random
import tarfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cards_integrations.models.local.embedded import embedded_model

ADAPTERS = Path(__file__).parent.parent / "cards_integrations" / "rewards" / "adapters"
QUESTIONS = [
    "Tell me something.",
    "What do you think?",
    "Write a sentence or two.",
    "How was your day?",
    "Give me your opinion.",
    "What happened?",
    "Write a short review.",
    "Describe it for me.",
    "What was it like?",
    "Could you say a few words about it?",
    "Write a paragraph about a product you bought.",
    "What did you think of the film?",
    "Write a short post.",
    "Summarise the news.",
    "What is on your mind?",
    "Tell me about your weekend.",
    "How do you feel about it?",
    "What should I know about this?",
    "Write the opening of an editorial.",
    "Can you tell me a story?",
    "Give me some advice.",
    "Describe your neighbourhood.",
    "What is your job like?",
    "Tell me about a person you know.",
]


@dataclass
class Answer:
    """Consecutive sentences of one document and their ratings in [-4, 4]."""

    sentences: list[str]
    ratings: list[float]

    def reached(self) -> list[float]:
        """For each sentence, half the mean rating of the sentences up to it."""
        return [sum(self.ratings[: i + 1]) / (i + 1) / 2 for i in range(len(self.ratings))]


def documents(sdist: Path) -> dict[str, list[tuple[str, float]]]:
    """Rated sentences by document, read from the tar file inside the source distribution."""
    found = defaultdict(list)
    with tarfile.open(sdist) as outer:
        inner = next(m for m in outer if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        data = outer.extractfile(inner)
        assert data is not None
        with tarfile.open(fileobj=io.BytesIO(data.read())) as ratings:
            for member in ratings:
                name = Path(member.name).name
                if not name.endswith("_GroundTruth.txt") or name.startswith("._"):
                    continue
                file = ratings.extractfile(member)
                assert file is not None
                text = io.TextIOWrapper(file, encoding="utf-8", errors="replace")
                for number, rating, sentence in csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE):
                    document = f"{name}:{number.split('_')[0]}"
                    found[document].append((html.unescape(sentence).strip(), float(rating)))
    return dict(found)


def answers(docs: list[list[tuple[str, float]]], rng: random.Random) -> list[Answer]:
    """Each sentence once, in answers of one to three; one-sentence documents are joined at random."""
    rng.shuffle(docs)
    runs = [doc for doc in docs if len(doc) > 1]
    runs.append([doc[0] for doc in docs if len(doc) == 1])
    made = []
    for run in runs:
        at = 0
        while at < len(run):
            part = run[at : at + rng.choice([1, 2, 3])]
            at += len(part)
            made.append(Answer([s for s, _ in part], [r for _, r in part]))
    rng.shuffle(made)
    return made


def question(rng: random.Random, sentences: list[str]) -> str:
    return rng.choice(QUESTIONS) if rng.random() < 0.7 else rng.choice(sentences)


def decoder_example(tokenizer: Any, user: str, answer: Answer) -> tuple[list[int], list[float], list[float]]:
    """Token ids, a target for each and its weight (0 before the answer begins)."""
    chat = [{"role": "user", "content": user}]
    head = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids, targets, weights = list(head), [0.0] * len(head), [0.0] * (len(head) - 1) + [0.1]
    for i, (sentence, target) in enumerate(zip(answer.sentences, answer.reached(), strict=True)):
        new = tokenizer(sentence if i == 0 else " " + sentence, add_special_tokens=False)["input_ids"][:120]
        ids += new
        targets += [target] * len(new)
        weights += [0.15] * (len(new) - 1) + [1.0]
    return ids, targets, weights


def encoder_example(tokenizer: Any, answer: Answer, rng: random.Random) -> tuple[list[int], float]:
    """A whole answer half of the time, else a prefix of it in words."""
    upto = rng.randrange(len(answer.sentences))
    words = answer.sentences[upto].split()
    if rng.random() < 0.5:
        words = words[: max(1, rng.randrange(len(words) + 1))]
    text = " ".join([*answer.sentences[:upto], *words])
    return tokenizer(text, truncation=True, max_length=192)["input_ids"], answer.reached()[upto]


def pad(rows: list[list[Any]], value: Any) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


class Decoder:
    """SmolLM2 with LoRA on q, v, o; a loss at every token of the answer."""

    name, base, lr, batch = "sentiment-smollm2", "smollm2", 5e-4, 16
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"])

    def __init__(self) -> None:
        folder = embedded_model(self.base)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        body = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.bfloat16)
        body.score.float()
        self.model = get_peft_model(body, self.lora)

    def scores(self, rows: list[list[int]]) -> torch.Tensor:
        """Score at every token, (rows, longest row)."""
        ids = pad(rows, self.tokenizer.pad_token_id)
        mask = pad([[1] * len(row) for row in rows], 0)
        inner = self.model.get_base_model()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = inner.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return inner.score(hidden.float()).squeeze(-1).float()

    def loss(self, batch: list[Answer], sentences: list[str], rng: random.Random) -> torch.Tensor:
        made = [decoder_example(self.tokenizer, question(rng, sentences), answer) for answer in batch]
        targets, weights = pad([t for _, t, _ in made], 0.0), pad([w for _, _, w in made], 0.0)
        error = (self.scores([ids for ids, _, _ in made]) - targets) ** 2
        return (error * weights).sum() / weights.sum()

    def judge(self, texts: list[str], share: float) -> list[float]:
        found = []
        for at in range(0, len(texts), 32):
            made = [decoder_example(self.tokenizer, QUESTIONS[0], Answer([t], [0.0])) for t in texts[at : at + 32]]
            head = sum(w == 0.0 for w in made[0][2]) + 1
            rows = [ids[: head + max(1, math.ceil(share * (len(ids) - head)))] for ids, _, _ in made]
            found += [float(s[len(row) - 1]) for s, row in zip(self.scores(rows), rows, strict=True)]
        return found


class Encoder:
    """MiniLM with LoRA on every linear map, its pooler and a scalar head; reads the answer alone."""

    name, base, lr, batch = "sentiment-minilm", "minilm", 1e-3, 32
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=8,
        lora_alpha=16,
        target_modules=["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
        modules_to_save=["classifier", "pooler"],
    )

    def __init__(self) -> None:
        folder = embedded_model(self.base)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        body = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        self.model = get_peft_model(body, self.lora)

    def scores(self, rows: list[list[int]]) -> torch.Tensor:
        mask = pad([[1] * len(row) for row in rows], 0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(input_ids=pad(rows, 0), attention_mask=mask).logits
        return logits.squeeze(-1).float()

    def loss(self, batch: list[Answer], sentences: list[str], rng: random.Random) -> torch.Tensor:
        made = [encoder_example(self.tokenizer, answer, rng) for answer in batch]
        return ((self.scores([ids for ids, _ in made]) - torch.tensor([t for _, t in made])) ** 2).mean()

    def judge(self, texts: list[str], share: float) -> list[float]:
        found: list[float] = []
        for at in range(0, len(texts), 64):
            cut = [t.split()[: max(1, math.ceil(share * len(t.split())))] for t in texts[at : at + 64]]
            rows = [self.tokenizer(" ".join(words), truncation=True, max_length=192)["input_ids"] for words in cut]
            found += self.scores(rows).tolist()
        return found


def pearson(a: list[float], b: list[float]) -> float:
    return float(torch.corrcoef(torch.tensor([a, b]))[0, 1])


def pair_accuracy(scores: list[float], ratings: list[float], rng: random.Random, pairs: int = 20_000) -> float:
    """Share of random pairs whose ratings differ by at least 1 that the scores put in the same order."""
    right = seen = 0
    while seen < pairs:
        i, j = rng.randrange(len(scores)), rng.randrange(len(scores))
        if abs(ratings[i] - ratings[j]) >= 1:
            seen += 1
            right += (scores[i] > scores[j]) == (ratings[i] > ratings[j])
    return right / pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["smollm2", "minilm"])
    parser.add_argument("sdist", type=Path)
    parser.add_argument(
        "--answers", type=int, default=0, help="training answers in all; 0: one epoch (decoder), three (encoder)"
    )
    parser.add_argument("--test-sentences", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)

    docs = documents(options.sdist)
    names = sorted(docs)
    rng.shuffle(names)
    held_out, rest = names[: len(names) // 10], names[len(names) // 10 :]
    test = [pair for name in held_out for pair in docs[name]]
    rng.shuffle(test)
    test = test[: options.test_sentences]

    trainee: Decoder | Encoder = Decoder() if options.model == "smollm2" else Encoder()
    pool: list[Answer] = []
    epochs = 1 if options.model == "smollm2" else 3
    for _ in range(epochs):
        pool += answers([docs[name] for name in rest], rng)
    pool = pool[: options.answers or None]
    sentences = [sentence for name in rest for sentence, _ in docs[name]]
    steps = len(pool) // trainee.batch
    optimizer = torch.optim.AdamW([p for p in trainee.model.parameters() if p.requires_grad], lr=trainee.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, trainee.lr, total_steps=steps, pct_start=0.08)
    began, running = time.time(), 0.0
    for step in range(steps):
        loss = trainee.loss(pool[step * trainee.batch : (step + 1) * trainee.batch], sentences, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}/{steps}  loss {running:.3f}  {time.time() - began:.0f} s", flush=True)

    texts, ratings = [t for t, _ in test], [r for _, r in test]
    trainee.model.eval()
    with torch.inference_mode():
        by_share = {share: trainee.judge(texts, share) for share in (0.25, 0.5, 0.75, 1.0)}
    found = {
        "training_answers": steps * trainee.batch,
        "held_out_sentences": len(test),
        "pearson": {str(share): round(pearson(scores, ratings), 3) for share, scores in by_share.items()},
        "pair_accuracy": round(pair_accuracy(by_share[1.0], ratings, rng), 3),
        "mean": round(sum(by_share[1.0]) / len(test), 3),
        "standard_deviation": round(float(torch.tensor(by_share[1.0]).std()), 3),
        "seconds": round(time.time() - began),
    }
    print(json.dumps(found, indent=2))
    folder = ADAPTERS / trainee.name
    trainee.model.peft_config["default"].base_model_name_or_path = trainee.base
    trainee.model.peft_config["default"].inference_mode = True
    trainee.model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
