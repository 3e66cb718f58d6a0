"""Which types of models give here what plain transformers gives: tiny random models of every type, through the engine.

python tests/census.py [causal | classifier | composite] [TYPE ...]    those, or all: a line for each
python tests/census.py --write [causal | classifier | composite]       into tests/census.json and docs/models.md
"""

from __future__ import annotations

import collections
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from shrunk import VOCABULARY, shrunk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto

from cards_integrations.decoding import BestOfN, Cards, FixedLength, Sampling
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.errors import CardsError
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward

EXACT, REFUSED, WRONG, LATE, CRASH, NOT_BUILT = VERDICTS = (
    "EXACT", "REFUSED AT LOAD", "WRONG", "REFUSED LATE", "CRASH", "NOT BUILT",
)  # fmt: skip
RIGHT = (EXACT, REFUSED, NOT_BUILT)
TOKENS = 24
SECONDS = 180.0  # on a busy machine
EOS = 1
LETTERS = "".join(chr(i) for i in range(ord("A"), ord("A") + VOCABULARY - 3))
PROMPTS = ("DUf", "".join(LETTERS[3 + (i * 5) % 50] for i in range(17)))
RAW = ("Error: ", "The language model failed", "The model failed")  # what an error of ours does not say
ROOT = Path(__file__).parent.parent
FOUND = Path(__file__).parent / "census.json"
PAGE = ROOT / "docs" / "models.md"


class Verdict(NamedTuple):
    """What was found of a type, and why if it is not exact."""

    found: str
    why: str = ""


def causal_types() -> list[str]:
    """All types of language models that this transformers knows."""
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def classifier_types() -> list[str]:
    """All types of language models that this transformers knows as classifiers, too."""
    return sorted({*causal_types(), "mistral4"} & {*modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES})


def composite_types() -> list[str]:
    """All types of models for images and text that this transformers knows."""
    return sorted(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


TYPES = {"causal": causal_types, "classifier": classifier_types, "composite": composite_types}


# --- models ---


def letters() -> PreTrainedTokenizerFast:
    """One token for each letter, so that the tokens of a text are those that it was written with."""
    names = ["<pad>", "</s>", "<unk>", *LETTERS]
    fast = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=4096, **special)


def build(kind: str, folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Path:
    """Save a random model of a type, whose biases and norms differ from each other, with the tokenizer of letters."""
    torch.manual_seed(0)
    model = auto.from_config(shrunk(kind, **options)).float().eval()
    drawn = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() <= 1 and not name.endswith(("A_log", "dt_bias", ".D")):
                weights.add_(torch.randn(weights.shape, generator=drawn) * 0.1)
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    read = AutoTokenizer.from_pretrained(folder)
    if read(PROMPTS[0])["input_ids"] != letters()(PROMPTS[0])["input_ids"]:
        raise ValueError("transformers reads its tokenizer as another one")
    return folder


@torch.inference_mode()
def greedy(model: Any, ids: list[int]) -> list[int]:
    """The plain loop: all is read again for each token."""
    found: list[int] = []
    for _ in range(TOKENS):
        logits = model(torch.tensor([ids + found]), use_cache=False).logits[0, -1]
        if not torch.isfinite(logits).all():
            raise ValueError("its logits are not finite")
        if (token := int(logits.argmax())) == EOS:
            break
        found.append(token)
    return found


# --- verdicts ---


@contextmanager
def opened(model: Path) -> Iterator[Engine]:
    engine = Engine(LocalModel(model=str(model)), EngineSettings(device="cpu", dtype="float32"))
    try:
        yield engine
    finally:
        engine.close()


def of_causal(kind: str, folder: Path, auto: Any = AutoModelForCausalLM) -> Verdict:
    """Two requests of different lengths at once, against the plain loop."""
    try:
        plain = auto.from_pretrained(build(kind, folder, auto), dtype=torch.float32).eval()
        expected = [greedy(plain, letters()(prompt)["input_ids"]) for prompt in PROMPTS]
    except Exception as error:
        return Verdict(NOT_BUILT, _said(error))
    sampler = Sampler(temperature=0)
    requests = [Request(prompt, Sampling(), sampler=sampler, max_tokens=TOKENS, seed=1) for prompt in PROMPTS]
    with opened(folder) as engine:
        try:
            engine.loaded()
        except Exception as error:
            return _refused(error, REFUSED)
        try:
            found = [list(answer.token_ids) for answer in engine.run_many(requests)]
        except Exception as error:
            return _refused(error, LATE)
    return Verdict(EXACT) if found == expected else Verdict(WRONG, f"{found} instead of {expected}")


def of_composite(kind: str, folder: Path) -> Verdict:
    """The language part of a model for images and text."""
    return of_causal(kind, folder, AutoModelForImageTextToText)


def of_classifier(kind: str, folder: Path) -> Verdict:
    """All scores of two guided requests at once, and of two that draw whole answers, against plain forwards."""
    try:
        build(kind, folder, AutoModelForSequenceClassification, num_labels=1, is_decoder=False)
        plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        _score(plain, PROMPTS[0])
    except Exception as error:
        return Verdict(NOT_BUILT, _said(error))
    drawn = build("llama", folder.with_name("llama"), tie_word_embeddings=False)
    reward = ClassifierReward(model=str(folder))
    with opened(drawn) as engine:
        try:
            engine.score(reward, PROMPTS[0], [LETTERS[0]])
        except Exception as error:
            return _refused(error, REFUSED)
        methods = (Cards(target_reward=0.0, boundary=FixedLength(length=4)), BestOfN(n=8))
        requests = [Request(p, method, reward, max_tokens=12, seed=1) for method in methods for p in PROMPTS]
        try:
            answers = engine.run_many(requests)
        except Exception as error:
            return _refused(error, LATE)
    return _compared(plain, [(request.prompt, answer) for request, answer in zip(requests, answers, strict=True)])


def _compared(plain: Any, answers: list[tuple[Any, Any]]) -> Verdict:
    from naive import drafts

    compared = worst = 0.0
    for prompt, answer in answers:
        for draft, ids in drafts(answer):
            if min(ids, default=3) >= 3 and draft.reward is not None:
                worst = max(worst, abs(draft.reward - _score(plain, prompt + letters().decode(ids))))
                compared += 1
    if compared < 8:
        return Verdict(CRASH, f"only {compared:.0f} scores to compare")
    return Verdict(EXACT) if worst < 1e-3 else Verdict(WRONG, f"a score is {worst:.2g} off")


@torch.inference_mode()
def _score(model: Any, text: str) -> float:
    ids = torch.tensor([letters()(text)["input_ids"]])
    return float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])


def _refused(error: Exception, how: str) -> Verdict:
    """Refused by an error of this package; any other error is a crash."""
    raw = not isinstance(error, CardsError) or any(words in str(error) for words in RAW)
    return Verdict(CRASH if raw else how, _said(error))


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, CardsError) else f"{type(error).__name__}: {text[:200]}"


# --- each in a process of its own ---

JUDGES: dict[str, Callable[[str, Path], Verdict]] = {
    "causal": of_causal, "classifier": of_classifier, "composite": of_composite,
}  # fmt: skip


def judged(task: str, kind: str) -> Verdict:
    """In this process."""
    with tempfile.TemporaryDirectory(prefix="census-") as folder:
        found = JUDGES[task](kind, Path(folder) / "model")
        return found._replace(why=found.why.replace(folder, "FOLDER"))


def judged_apart(task: str, kind: str) -> Verdict:
    """In a process of its own, which may hang or die."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["census"])
    begun, told = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(told, task, kind), daemon=True)
    process.start()
    told.close()
    try:
        found = Verdict(*begun.recv()) if begun.poll(SECONDS) else Verdict(CRASH, f"no answer within {SECONDS:.0f} s")
    except EOFError:
        found = Verdict(CRASH, "the process died")
    process.kill()
    process.join()
    return found


def _tell(told: Any, task: str, kind: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    try:
        told.send(tuple(judged(task, kind)))
    except BaseException as error:
        told.send((CRASH, f"{type(error).__name__}: {error}"))
    os._exit(0)


def census(task: str, kinds: Iterable[str], said: Callable[[str], object] = print) -> dict[str, Verdict]:
    """Judge types, two at a time, in their order."""
    found: dict[str, Verdict] = {}
    kinds = list(kinds)
    with ThreadPoolExecutor(int(os.environ.get("CENSUS_PROCESSES", "2"))) as pool:
        for kind, verdict in zip(kinds, pool.map(lambda kind: judged_apart(task, kind), kinds), strict=True):
            found[kind] = verdict
            said(f"{verdict.found:16} {kind:24} {verdict.why[:200]}")
    return found


# --- what is written of it ---


def known() -> dict[str, dict[str, Verdict]]:
    """What the last census found, by task and type."""
    read = json.loads(FOUND.read_text(encoding="utf-8"))
    return {task: {kind: Verdict(*each) for kind, each in verdicts.items()} for task, verdicts in read.items()}


def page(text: str, found: dict[str, dict[str, Verdict]]) -> str:
    """The page with its tables written anew; each stands between two comments."""
    for task, verdicts in found.items():
        begin, end = f"<!-- census of {task} types -->\n", "<!-- end of census -->"
        before, rest = text.split(begin)
        text = before + begin + table(verdicts) + rest[rest.index(end) :]
    return text


def table(verdicts: dict[str, Verdict]) -> str:
    rows = collections.defaultdict(list)
    for kind, verdict in verdicts.items():
        rows[verdict.found, reason(verdict)].append(kind)
    order = sorted(rows, key=lambda row: (VERDICTS.index(row[0]), -len(rows[row]), row[1]))
    lines = [_row(found, why, rows[found, why]) for found, why in order]
    return "| | types | which |\n|---|---|---|\n" + "".join(lines)


def _row(found: str, why: str, kinds: list[str]) -> str:
    said = f"{found.lower()}: {why}" if why else f"**{found.lower()}**"
    return f"| {said} | {len(kinds)} | {', '.join(kinds)} |\n"


def reason(verdict: Verdict) -> str:
    """Why, without what differs from type to type."""
    if verdict.found == NOT_BUILT:
        return "transformers makes, saves or reads no such model that is as small as those here"
    why = re.sub(r"^.*?model(='[^']*'| type '[^']*') ((cannot read trees of candidates here: )|has )?", "", verdict.why)
    why = re.sub(r"\bis [\d.,]+% off\b", "is far", why)
    why = re.sub(r"(its forward raises \w+) \(.*", r"\1", why)
    return why.replace("|", "/").removesuffix(".").removesuffix(", not supported here")[:160]


def counts(verdicts: dict[str, Verdict]) -> str:
    number = collections.Counter(verdict.found for verdict in verdicts.values())
    return ", ".join(f"{number[found]} {found}" for found in VERDICTS if number[found])


def main(asked: list[str]) -> None:
    write = "--write" in asked
    tasks = [task for task in asked if task in TYPES] or list(TYPES)
    kinds = {kind for kind in asked if kind not in (*TYPES, "--write")}
    found: dict[str, dict[str, Verdict]] = {}
    for task in tasks:
        some = [kind for kind in TYPES[task]() if not kinds or kind in kinds]
        found[task] = census(task, some, lambda line: print(line, flush=True))
        print(f"{task}: {counts(found[task])}", flush=True)
    if write and not kinds:
        every = {**(known() if FOUND.exists() else {}), **found}
        FOUND.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), every), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
