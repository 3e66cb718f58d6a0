"""Drafting within a grammar: every candidate obeys it, alone or in a batch, and nothing else of the method changes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny
import torch
from conftest import Start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from cards_integrations.chat.grammar import Grammar, as_grammar, json_rule
from cards_integrations.decoding import BestOfN, Cards, Decoding, FixedLength, Sampling, Uncertainty
from cards_integrations.engine import Engine, Request
from cards_integrations.errors import SettingsError
from cards_integrations.models.base import CLOSE_WITHIN
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import FunctionReward

LETTERS = FunctionReward(function=lambda prompt, texts: [sum(map(text.count, "aeiou")) / 4 for text in texts])
CARDS = Cards(target_reward=2.0, beta=0.3, max_rejections=4, boundary=Uncertainty(threshold=4.5, min_length=2))
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "mood": {"enum": ["happy", "sad"]}},
    "required": ["name", "mood"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that reads and writes any text."""
    return tiny.save(tmp_path_factory.mktemp("bytes"), tiny.causal(vocab_size=280), tiny.byte_pairs())


@pytest.fixture(scope="module")
def engine(readable: str) -> Any:
    from cards_integrations.engine import EngineSettings
    from cards_integrations.models.local.settings import LocalModel

    engine = Engine(LocalModel(model=readable), EngineSettings(dtype="float32"))
    yield engine
    engine.close()


def asked(grammar: Any, seed: int = 0, decoding: Decoding = CARDS, max_tokens: int = 120, **options: Any) -> Request:
    return Request("the cat", decoding, LETTERS, Sampler(**options), max_tokens, seed=seed, grammar=as_grammar(grammar))


# --- what is written ---

SCALARS = st.sampled_from(
    [{"type": "integer"}, {"type": "boolean"}, {"type": "null"}, {"enum": ["a", "b c", 3]}, {"const": "x\ny"},
     {"type": "string", "maxLength": 6}, {"type": "number"}, {"anyOf": [{"type": "boolean"}, {"type": "null"}]}]
)  # fmt: skip
NAMES = st.lists(st.sampled_from(["a", "name", "ä", "two words", "$x"]), min_size=1, max_size=3, unique=True)


def _object(names: list[str], kinds: list[dict[str, Any]]) -> dict[str, Any]:
    properties = dict(zip(names, kinds * 3, strict=False))
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, inner),
        st.builds(_object, NAMES, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=4,
)


@given(SCHEMAS, st.integers(0, 99))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_answer_validates_or_says_that_it_was_cut(engine: Engine, schema: dict[str, Any], seed: int) -> None:
    answer = engine.run(asked(schema, seed))
    if len(answer.token_ids) == 120:
        assert answer.finish_reason == "length"
    else:
        jsonschema.validate(json.loads(answer.text), schema)


def test_what_is_open_at_the_limit_is_closed(engine: Engine) -> None:
    """A random model hardly ever ends a string, a number or a list by itself."""
    inner = _object(["b"], [{"type": "string"}])
    schema = _object(["a", "c"], [{"type": "array", "items": {"type": "number"}, "minItems": 1}, inner])
    answers = engine.run_many([asked(schema, seed, max_tokens=200) for seed in range(12)])
    for answer in answers:
        jsonschema.validate(json.loads(answer.text), schema)
        assert (answer.finish_reason == "length") == (len(answer.token_ids) > 200 - CLOSE_WITHIN)
    assert sum(answer.finish_reason == "length" for answer in answers) > 6


@pytest.mark.parametrize("max_tokens", [3, 4, 5, 60])
def test_an_end_near_the_limit_is_natural_where_nothing_was_forced(engine: Engine, max_tokens: int) -> None:
    whole = engine.run(asked(Grammar.choice(["aaa", "bbb"]), 1, max_tokens=max_tokens))
    assert (len(whole.token_ids), whole.finish_reason) == (3, "stop")


def test_what_was_closed_in_an_earlier_segment_is_cut(engine: Engine) -> None:
    by_ones = CARDS.model_copy(update={"boundary": FixedLength(length=1)})
    answer = engine.run(asked(_object(["a"], [{"type": "string"}]), 1, by_ones, max_tokens=40))
    assert answer.text.endswith('"}')
    assert len(answer.segments[-1].token_ids) == 1
    assert answer.finish_reason == "length"


def test_free_text_is_not_closed(engine: Engine) -> None:
    free = Grammar.regex(r"(?s:.*)")
    answers = engine.run_many([asked(free, seed, max_tokens=40) for seed in range(8)])
    assert max(len(answer.token_ids) for answer in answers) == 40


def test_rejected_drafts_obey_it_too(engine: Engine) -> None:
    answers = engine.run_many([asked(PERSON, seed) for seed in range(8)])
    assert sum(len(segment.drafts) > 1 for answer in answers for segment in answer.segments) > 8
    for answer in answers:
        kept = ""
        for segment in answer.segments:
            for draft in segment.drafts:
                text = kept + draft.text
                assert text.startswith('{"name": "'[: len(text)])
                assert text.count("}") <= 1 or '"}' in text
            kept += segment.text
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), PERSON)


@pytest.mark.parametrize("decoding", [Sampling(), BestOfN(n=4), CARDS], ids=["sampling", "best of n", "cards"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_methods_and_greedy(engine: Engine, decoding: Decoding, temperature: float) -> None:
    answer = engine.run(asked(Grammar.regex(r"[0-9]{2}/[0-9]{2}"), 3, decoding, temperature=temperature))
    assert answer.finish_reason == "stop"
    day, month = answer.text.split("/")
    assert day.isdigit()
    assert month.isdigit()


def test_schemas_of_pydantic_classes(engine: Engine) -> None:
    class Cat(BaseModel):
        name: str
        lives: int

    answers = engine.run_many([asked(Cat, seed, max_tokens=200) for seed in range(6)])
    assert any(answer.finish_reason == "stop" for answer in answers)
    for answer in answers:
        if answer.finish_reason == "stop":
            Cat.model_validate_json(answer.text)


def test_an_object_has_the_named_properties_unless_the_schema_says_more(engine: Engine) -> None:
    properties = {"properties": {"const": 1}, "a": {"type": "object", "properties": {"enum": {"const": 2}}}}
    schema = {"type": "object", "properties": properties, "required": ["a", "properties"]}
    for seed in range(6):
        found = json.loads(engine.run(asked(schema, seed)).text)
        assert found.keys() == {"a", "properties"}
        assert found["a"] in ({}, {"enum": 2})
    more = {**schema, "additionalProperties": {"type": "boolean"}}
    texts = [engine.run(asked(more, seed, temperature=5.0)).text for seed in range(12)]
    assert any("true" in text or "false" in text for text in texts)


def test_it_ends_where_nothing_can_follow_and_may_end_where_it_is_whole(engine: Engine) -> None:
    assert {engine.run(asked(Grammar.choice(["a\n", 'b"']), seed, temperature=9.0)).text for seed in range(12)} == {
        "a\n",
        'b"',
    }
    answers = engine.run_many([asked(Grammar.regex("[ab]{2,40}"), seed, max_tokens=60) for seed in range(30)])
    assert all(answer.finish_reason == "stop" and 2 <= len(answer.text) <= 40 for answer in answers)


# --- the method is the same ---


@pytest.mark.law
def test_the_law_of_a_choice(readable: str, engine: Engine) -> None:
    """Two texts of one token each: drawn by their probabilities among the allowed."""
    model = AutoModelForCausalLM.from_pretrained(readable)
    chat = engine.loaded().chat
    [one], [two] = chat.encode("x"), chat.encode("q")
    with torch.inference_mode():
        logits = model(torch.tensor([chat.prompt("the cat")[1]])).logits[0, -1]
    p = float(logits[[one, two]].softmax(-1)[0])
    n = 600
    requests = [asked(Grammar.choice("xq"), seed, Sampling(), temperature=1.0, top_k=0) for seed in range(n)]
    seen = Counter(answer.text for answer in engine.run_many(requests))
    assert seen["x"] + seen["q"] == n
    assert seen["x"] / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    answer = engine.run(requests[0])
    raw = logits.log_softmax(-1)[answer.token_ids[0]]
    assert answer.log_likelihood == pytest.approx(float(raw), abs=1e-4)  # the model's own, not the masked one


def test_forced_tokens_do_not_end_a_segment(engine: Engine) -> None:
    """Every token is uncertain here, but a constant leaves no choice."""
    restless = Cards(target_reward=-9.0, beta=1.0, boundary=Uncertainty(threshold=0.0, min_length=1))
    free = engine.run(asked(None, 0, restless, max_tokens=12))
    assert all(len(segment.token_ids) == 1 for segment in free.segments)
    bound = engine.run(asked({"const": "the cat sat on the mat"}, 0, restless))
    assert json.loads(bound.text) == "the cat sat on the mat"
    assert len(bound.segments) < len(bound.token_ids)


@pytest.mark.parametrize("width", [1, 8])
def test_same_seed_same_text_at_every_load(readable: str, start: Start, width: int) -> None:
    requests = [asked(PERSON if seed % 2 else None, seed, max_tokens=40) for seed in range(10)]
    alone = [start(readable).run(request) for request in requests[:5]]
    together = start(readable, width=width).run_many(requests)
    assert [a.token_ids for a in alone] == [a.token_ids for a in together[:5]]


def test_line_breaks_that_are_added_tokens_are_text(start: Start, tmp_path: Path) -> None:
    """And a mark that is an added token is none, though it may be spelled."""
    tokenizer = tiny.line_breaks()
    model = tiny.save(tmp_path, tiny.causal(vocab_size=len(tokenizer)), tokenizer)
    engine, mark = start(model), tokenizer.convert_tokens_to_ids("<mark>")
    for rule, text in ((r"\n\n[ab]\n", r"\n\n[ab]\n"), ("<mark>", "<mark>")):
        answers = engine.run_many([asked(Grammar.regex(rule), seed, Sampling()) for seed in range(8)])
        assert all(re.fullmatch(text, answer.text) for answer in answers)
        assert all(mark not in answer.token_ids for answer in answers)
    breaks = {tokenizer.convert_tokens_to_ids(text) for text in ("\n", "\n\n")}
    written = engine.run_many([asked(Grammar.regex(r"\n\n"), seed, Sampling()) for seed in range(8)])
    assert breaks & {token for answer in written for token in answer.token_ids}


def test_fixed_segments_and_stop_strings(engine: Engine) -> None:
    by_fours = CARDS.model_copy(update={"boundary": FixedLength(length=4)})
    answer = engine.run(asked(PERSON, 1, by_fours))
    jsonschema.validate(json.loads(answer.text), PERSON)
    stopped = engine.run(Request("the cat", CARDS, LETTERS, max_tokens=99, stop=('"mood',), grammar=as_grammar(PERSON)))
    jsonschema.validate(json.loads(stopped.text), PERSON)


# --- what cannot be used ---


@pytest.mark.parametrize(
    "grammar",
    [Grammar.regex("(?=a)b"), Grammar.regex("("), Grammar("nonsense ][")],
)
def test_bad_grammars(engine: Engine, grammar: Grammar) -> None:
    with pytest.raises(SettingsError, match="grammar"):
        engine.run(asked(grammar))
    assert engine.run(asked(PERSON)).text.startswith("{")
    assert engine.inspect().idle


@pytest.mark.parametrize("value", [3, "{}", ["a"]])
def test_not_a_grammar(value: Any) -> None:
    with pytest.raises(SettingsError, match="grammar="):
        as_grammar(value)


def test_an_empty_choice() -> None:
    with pytest.raises(SettingsError, match="choice"):
        Grammar.choice([])


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "widget"}, "widget"),
        ({"properties": {"a": {"items": {"type": "widget"}}}}, r"field 'a\[\]'.*widget"),
        ({"properties": {"a": {"$ref": "#/$defs/missing"}}}, "field 'a'.*points to nothing"),
        (
            {"properties": {"a": {"type": "object", "properties": {"b": False}, "required": ["b"]}}, "required": ["a"]},
            "field 'a'",
        ),
        ({"properties": {"a": {"minimum": "1"}}}, "field 'a'.*not a number"),
        ({"properties": {"a": {"type": "string", "minLength": 5, "maxLength": 3}}, "required": ["a"]}, "field 'a'"),
        ({"properties": {"a": {"anyOf": 3}}}, "field 'a'.*not a list"),
        ({"properties": 3}, "properties=3"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_with_its_field(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        json_rule({"type": "object", **schema})
