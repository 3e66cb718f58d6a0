"""Methods side by side on one engine: the same prompts, seeds and rewards, every answer in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from cards_integrations.decoding import AnyDecoding, Decoding, as_decoding
from cards_integrations.errors import SettingsError
from cards_integrations.rewards import AnyReward, as_reward
from cards_integrations.settings import as_context
from cards_integrations.study.metrics import Mean, distinct, mean, self_bleu
from cards_integrations.study.rows import Results, Row, read_rows
from cards_integrations.trace import Alignment

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from cards_integrations.llm import CardsLLM

COSTS = ("drafted_tokens", "looked_at_tokens", "drafts", "lm_forwards", "lm_tokens", "rm_forwards", "rm_tokens")
OWN = ("model", "max_tokens", "temperature", "top_k", "stop")  # settings of the LLM on which an answer depends
QUESTION = ("arm", "settings", *OWN, "guide", "judge", "asked", "context", "seed")
NEEDED = {"arm", "prompt", "asked", "text"}


@dataclass(frozen=True)
class Arm:
    """All answers of one method."""

    name: str
    rows: tuple[Row, ...]

    def mean(self, name: str) -> Mean | None:
        """Of a number of its answers, over prompts; None where it is not known."""
        known = [(row[name], row["prompt"]) for row in self.rows if row.get(name) is not None]
        return mean([value for value, _ in known], [prompt for _, prompt in known]) if known else None

    @cached_property
    def diversity(self) -> dict[str, float | None]:
        """distinct-1, distinct-2, and self-BLEU where prompts have several answers."""
        texts = [row["text"] for row in self.rows]
        by_prompt: dict[int, list[str]] = {}
        for row in self.rows:
            by_prompt.setdefault(row["prompt"], []).append(row["text"])
        return {
            "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2),
            "self_bleu": self_bleu(list(by_prompt.values())),
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; one row for each answer."""

    rows: tuple[Row, ...]

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """By name, in the order in which they ran."""
        names = dict.fromkeys(row["arm"] for row in self.rows)
        return {name: Arm(name, tuple(row for row in self.rows if row["arm"] == name)) for name in names}

    @classmethod
    def load(cls, *files: str | Path) -> Comparison:
        """From the files that `compare` wrote."""
        return cls(tuple(row for file in files for row in read_rows(file, NEEDED)))

    def difference(self, one: str, other: str, name: str) -> Mean:
        """The mean of one arm's number minus the other's, over the prompts that both have answered."""
        sides = []
        for arm in (one, other):
            by_prompt: dict[int, list[float]] = {}
            for row in self.arms[arm].rows:
                by_prompt.setdefault(row["prompt"], []).append(row[name])
            sides.append({prompt: sum(values) / len(values) for prompt, values in by_prompt.items()})
        shared = sides[0].keys() & sides[1].keys()
        return mean([sides[0][prompt] - sides[1][prompt] for prompt in sorted(shared)])

    def cost_at(self, level: float, cost: str, family: Sequence[str], reward: str = "judged") -> float | None:
        """What a family of arms (best-of-4, -8, -16, ...) pays for a mean reward, between its members.

        Linear in the reward and the logarithm of the cost; None outside what the family reaches.
        """
        import numpy as np

        points = []
        for name in family:
            reached, paid = self.arms[name].mean(reward), self.arms[name].mean(cost)
            if reached is not None and paid is not None:
                points.append((reached.value, float(np.log(paid.value))))
        points.sort()
        if not points or not points[0][0] <= level <= points[-1][0]:
            return None
        rewards, costs = zip(*points, strict=True)
        return float(np.exp(np.interp(level, rewards, costs)))

    def summary(self) -> dict[str, dict[str, Any]]:
        """Means with their intervals, by arm and name; diversity."""
        names = ("reward", "judged", "log_p_per_token", "tokens", "seconds", *COSTS)
        return {arm.name: {**{name: arm.mean(name) for name in names}, **arm.diversity} for arm in self.arms.values()}

    def table(self) -> Table:
        """For a terminal."""
        from cards_integrations.study.report import table

        return table(self)

    def plot(self, cost: str = "drafted_tokens") -> Figure:
        """Rewards against cost, with 95% intervals."""
        from cards_integrations.study.report import frontier

        return frontier(self, cost)

    def to_html(self, path: str | Path) -> Path:
        """A page with the table, the charts and example answers, that opens offline."""
        from cards_integrations.study.report import page

        path = Path(path)
        path.write_text(page(self), encoding="utf-8")
        return path


def compare(
    llm: CardsLLM,
    arms: Mapping[str, AnyDecoding | str | dict[str, Any]],
    prompts: Sequence[Any],
    *,
    contexts: Sequence[Any] | None = None,
    judge: AnyReward | str | None = None,
    seeds: Iterable[int] = (0,),
    at_once: int = 16,
    out: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Answer all prompts with every arm, and score all answers with both the LLM's reward and the judge's.

    An arm is a decoding method, or a dict of call arguments (`{"decoding": ..., "reward": ..., "model": ...}`).
    `judge` is a reward that guides nothing: what is searched for in one reward is overestimated by it.
    Answers are drafted `at_once` in a batch, and each is a line of `out` as soon as its batch is done; what
    stands there already is not asked again, so that a run that was stopped goes on.
    """
    results = Results(out, NEEDED)
    chosen = llm.resolve_options({})
    guide, judging = chosen.reward, as_reward(judge) if judge is not None else None
    own = _plain({**{name: getattr(chosen, name) for name in OWN}, "guide": guide, "judge": judging})
    known = {_key(row): row for row in results.rows}
    asked = contexts or [None] * len(prompts)
    rows: list[Row] = []
    for name, arm in arms.items():
        options = _options(name, arm)
        same = {"arm": name, "settings": _plain(options), **own}
        todo = [
            {**same, "prompt": i, "asked": prompt, "context": list(as_context(asked[i])), "seed": seed}
            for seed in seeds
            for i, prompt in enumerate(prompts)
        ]
        rows += [known[_key(row)] | row for row in todo if _key(row) in known]
        todo = [row for row in todo if _key(row) not in known]
        for batch in _batches(todo, at_once, name, progress):
            contexts = [row["context"] for row in batch]
            began = time.perf_counter()
            answers = llm.align_batch([row["asked"] for row in batch], [r["seed"] for r in batch], contexts, **options)
            seconds = (time.perf_counter() - began) / len(batch)
            for row, answer in zip(batch, answers, strict=True):
                row |= _measured(answer) | {"seconds": seconds}
                for kind, reward in (("reward", guide), ("judged", judging)):
                    score = reward and llm.score(row["asked"], [answer.text], reward, row["context"])[0]
                    row[kind] = score
            rows += batch
            results.add(batch)
    return Comparison(tuple(rows))


def _options(name: str, arm: Any) -> dict[str, Any]:
    if isinstance(arm, Mapping) and "decoding" in arm:
        return dict(arm)
    if isinstance(arm, (Decoding, str, dict)):
        return {"decoding": as_decoding(arm)}
    raise SettingsError(f"compare: the arm {name!r} is {arm!r}: pass a decoding method or a dict of call arguments.")


def _plain(value: Any) -> Any:
    """As JSON, the same in another process; of code there is only the name."""
    return json.loads(json.dumps(value, default=_part))


def _part(value: Any) -> Any:
    if not isinstance(value, BaseModel):
        return getattr(value, "__qualname__", None) or repr(value)
    try:
        return value.model_dump(mode="json")
    except PydanticSerializationError:  # a function in it cannot be imported by name
        return dict(value)


def _key(row: Row) -> str:
    """What makes two rows the same question; a file of an earlier version says less, and is asked anew."""
    return json.dumps([row.get(name) for name in QUESTION])


def _batches(rows: list[Row], size: int, name: str, progress: bool) -> Iterable[list[Row]]:
    from rich.progress import track

    starts = range(0, len(rows), size)
    for at in track(starts, description=name, disable=not progress or not rows, transient=True):
        yield rows[at : at + size]


def _measured(answer: Alignment) -> Row:
    usage, tokens = answer.usage, max(1, len(answer.token_ids))
    looked_at = sum(len(draft.token_ids) for segment in answer.segments for draft in segment.drafts)
    return {
        "text": answer.text,
        "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "log_p_per_token": answer.log_likelihood / tokens,
        "looked_at_tokens": looked_at,
        **{name: getattr(usage, name) for name in COSTS if name != "looked_at_tokens"},
    }
