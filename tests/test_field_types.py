"""Types of fields of pydantic classes: the grammar takes each, and what it lets through pydantic takes as well."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import tiny
from field_types import CHECKED, TYPES, VALUES
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from cards_integrations.chat.grammar import Grammar, GrammarTokenizer, as_grammar

SAMPLES = 5
FREE_TOKENS = 30  # that a random model writes before what is open is closed


@pytest.fixture(scope="module")
def grammars() -> GrammarTokenizer:
    tokenizer = tiny.byte_pairs()
    return GrammarTokenizer(tokenizer, len(tokenizer), {tokenizer.eos_token_id})


def form(kind: Any) -> type[BaseModel]:
    try:
        return create_model("Form", __config__=ConfigDict(regex_engine="python-re"), f=(kind, ...))
    except ImportError as error:
        pytest.skip(str(error))


def sample(grammars: GrammarTokenizer, grammar: Grammar, seed: int) -> str:
    """A text that a grammar lets through: random tokens, and then those that close it."""
    draw, matcher, tokenizer = random.Random(seed), grammars.matcher(grammar), grammars.tokenizer
    ids = list[int]()
    while not matcher.complete and len(ids) < 3000:
        [allowed] = grammars.allowed([matcher])
        if len(ids) > FREE_TOKENS:
            grammars.close(allowed)
        token = draw.choice(allowed.nonzero().flatten().tolist())
        if token in grammars.eos:
            break
        matcher.take(token)
        ids.append(token)
    return bytes(tokenizer.decode_bytes(ids)).decode()


@pytest.mark.parametrize("name", TYPES)
def test_what_a_grammar_lets_through_is_taken(grammars: GrammarTokenizer, name: str) -> None:
    cls = form(TYPES[name])
    grammar = as_grammar(cls)
    assert grammar is not None
    for seed in range(SAMPLES):
        cls.model_validate_json(sample(grammars, grammar, seed))


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in VALUES for value in VALUES[name]], ids=str)
def test_what_is_of_a_type_can_be_written(grammars: GrammarTokenizer, name: str, value: Any) -> None:
    cls = form(TYPES[name])
    text = json.dumps({"f": value}, ensure_ascii=False)
    cls.model_validate_json(text)
    grammar = as_grammar(cls)
    assert grammar is not None
    matcher = grammars.matcher(grammar)
    for token in grammars.tokenizer.tokenize_str(text):
        matcher.take(token)
    assert matcher.complete or grammars.allowed([matcher])[0, grammars.eos].all()


@pytest.mark.parametrize("name", CHECKED)
def test_what_is_left_to_validation_is_taken_or_refused_by_it(grammars: GrammarTokenizer, name: str) -> None:
    cls = form(CHECKED[name][0])
    grammar = as_grammar(cls)
    assert grammar is not None
    for seed in range(SAMPLES):
        text = sample(grammars, grammar, seed)
        try:
            cls.model_validate_json(text)
        except (ValidationError, ArithmeticError):
            assert text.startswith('{"f": ')
