"""Compares methods on one engine, with the same prompts, seeds and rewards; every answer goes to a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from cards_integrations.decoding import AnyDecoding, Decoding, as_decoding
from cards_integrations.errors import CardsError, SettingsError
from cards_integrations.models.sampling import Sampler
from cards_integrations.progress import Advance, phase, shown
from cards_integrations.rewards import AnyReward, as_reward
from cards_integrations.rewards.base import Reward
from cards_integrations.settings import as_context
from cards_integrations.study.aligner import Aligner
from cards_integrations.study.comparison import COSTS, REQUIRED_FIELDS, Comparison
from cards_integrations.study.metrics import repeated_3grams
from cards_integrations.study.rows import Results, Row
from cards_integrations.trace import Alignment

LLM_OPTIONS = ("model", "max_tokens", "stop", "finish_at", *Sampler.model_fields)  # options that change answers
SHORT = {"max_tokens": 4, "min_tokens": 0}
KEY_FIELDS = ("arm", "settings", *LLM_OPTIONS, "guide", "judge", "asked", "context", "seed")


def compare(
    llm: Aligner,
    arms: Mapping[str, AnyDecoding | str | dict[str, Any]],
    prompts: Sequence[Any],
    *,
    contexts: Sequence[Any] | None = None,
    judge: AnyReward | str | Callable[..., Any] | None = None,
    seeds: Iterable[int] = (0,),
    at_once: int = 16,
    out: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Answer all prompts with every arm, and score all answers with both the LLM's reward and the judge's.

    Args:
        llm: The language model, with its reward.
        arms: By name, decoding methods or dicts of call arguments
            (`{"decoding": ..., "reward": ..., "model": ...}`).
        prompts: Strings or lists of messages.
        contexts: The context of each prompt, for rewards that read it.
        judge: A reward that does not guide; the one that guides overestimates the answers that it was searched for.
        seeds: The seeds; each prompt is answered once with each of them.
        at_once: The number of prompts that are answered in one batch.
        out: A file to which every answer is added as a line of JSON once its batch is done. Answers that it already
            contains are not drafted again, so that an interrupted run continues.
        progress: Whether to show the progress; `progress=False` of the LLM takes precedence.

    Returns:
        The answers of all arms.

    Raises:
        SettingsError: An arm is not a method, or `out` contains something other than answers.
    """
    results = Results(out, REQUIRED_FIELDS)
    options = llm.resolve_options({})
    rewards = {"reward": options.reward, "judged": as_reward(judge) if judge is not None else None}
    shared = _as_json({
        **{name: getattr(options, name) for name in LLM_OPTIONS},
        "guide": rewards["reward"],
        "judge": rewards["judged"],
    })  # fmt: skip
    finished = {_key(row): row for row in results.rows}
    contexts = contexts or [None] * len(prompts)
    seeds = list(seeds)
    rows: list[Row] = []
    for name, arm in arms.items():
        arguments = _call_arguments(name, arm)
        common = {"arm": name, "settings": _as_json(arguments), **shared}
        wanted = [
            {**common, "prompt": i, "asked": prompt, "context": list(as_context(contexts[i])), "seed": seed}
            for seed in seeds
            for i, prompt in enumerate(prompts)
        ]
        rows += [finished[_key(row)] | row for row in wanted if _key(row) in finished]
        missing = [row for row in wanted if _key(row) not in finished]
        with shown(progress and options.progress and bool(missing)), phase(name, len(missing)) as advance:
            if missing:
                _warm_up(llm, missing[0], arguments)
            for start in range(0, len(missing), at_once):
                batch = missing[start : start + at_once]
                _answer(llm, batch, arguments, rewards, advance)
                rows += batch
                results.add(batch)
    return Comparison(tuple(rows))


def _warm_up(llm: Aligner, row: Row, arguments: dict[str, Any]) -> None:
    """Load the models and measure steps and scales with a few tokens, so that no answer is charged with that time."""
    with suppress(CardsError):  # so short an answer may break a schema; any other error comes again with the answers
        llm.align_batch([row["asked"]], [row["seed"]], [row["context"]], progress=False, **arguments | SHORT)


def _answer(
    llm: Aligner, rows: list[Row], arguments: dict[str, Any], rewards: Mapping[str, Reward | None], advance: Advance
) -> None:
    """Answer a batch of prompts, and add the answers, their costs and their rewards to the rows."""
    began = time.perf_counter()
    prompts, seeds, contexts = ([row[name] for row in rows] for name in ("asked", "seed", "context"))
    answers = llm.align_batch(prompts, seeds, contexts, **arguments)
    seconds = (time.perf_counter() - began) / len(rows)
    for row, answer in zip(rows, answers, strict=True):
        row |= _measured(answer) | {"seconds": seconds}
        for name, reward in rewards.items():
            row[name] = reward and llm.score(row["asked"], [answer.text], reward, row["context"])[0]
        advance()


def _call_arguments(name: str, arm: Any) -> dict[str, Any]:
    """Return the arguments of `align` for an arm.

    Raises:
        SettingsError: It is neither a method nor arguments.
    """
    if isinstance(arm, Mapping) and "decoding" in arm:
        return dict(arm)
    if isinstance(arm, (Decoding, str, dict)):
        return {"decoding": as_decoding(arm)}
    raise SettingsError(f"compare: the arm {name!r} is {arm!r}: pass a decoding method or a dict of call arguments.")


def _as_json(value: Any) -> Any:
    """Return settings as plain values, which are the same in every process: functions become their names."""
    return json.loads(json.dumps(value, default=_as_plain))


def _as_plain(value: Any) -> Any:
    if not isinstance(value, BaseModel):
        return getattr(value, "__qualname__", None) or repr(value)
    try:
        return value.model_dump(mode="json")
    except PydanticSerializationError:  # a function in it cannot be imported by name
        return dict(value)


def _key(row: Row) -> str:
    """Return the key of a row: rows with equal keys are the same answer. Rows of earlier versions match no others."""
    return json.dumps([row.get(name) for name in KEY_FIELDS])


def _measured(answer: Alignment) -> Row:
    """Return the text of an answer, and what it cost."""
    examined = [len(draft.token_ids) for segment in answer.segments for draft in segment.drafts]
    return {
        "text": answer.text,
        "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "out_of_reach": answer.out_of_reach,
        "repeated_3grams": repeated_3grams(answer.text),
        "log_p_per_token": answer.log_likelihood / max(1, len(answer.token_ids)),
        "looked_at_tokens": sum(examined),
        **{name: getattr(answer.usage, name) for name in COSTS if name != "looked_at_tokens"},
    }
