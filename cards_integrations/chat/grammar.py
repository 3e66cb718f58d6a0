"""What the text of an answer may be: a grammar, and the tokens it allows next (by llguidance)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from cards_integrations.errors import ModelError, SettingsError, short_repr

MULTIPLES = 10**5  # of a number with more remainders the automaton takes seconds, or hours
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as models were taught
BY_NAME = ("properties", "$defs", "definitions", "dependentSchemas")  # mappings of names to schemas
AS_IT_IS = ("enum", "const", "default", "examples", "required", "allOf")  # no schemas, or only together one


@dataclass(frozen=True)
class Grammar:
    """A grammar in llguidance's variant of Lark. It begins with the answer and ends it."""

    lark: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """A JSON value that the schema validates, with a space after each comma and colon.

        Objects have the properties that are named and no others, unless `additionalProperties` says so.
        """
        return cls(f"start: {json_rule(schema)}")

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that a regular expression matches as a whole (Rust's regex syntax, no look-around)."""
        return cls("start: /" + pattern.replace("\n", r"\n").replace("/", r"\/") + "/")

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Grammar:
        """One of these texts."""
        several = [json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts)]
        if not several:
            raise SettingsError("A choice needs at least one text.")
        return cls("start: " + " | ".join(several))


def as_grammar(value: Any) -> Grammar | None:
    """A grammar from itself, a JSON schema, or a pydantic class."""
    if value is None or isinstance(value, Grammar):
        return value
    if isinstance(value, type) and issubclass(value, BaseModel):
        return Grammar.json_schema(value.model_json_schema())
    if isinstance(value, Mapping):
        return Grammar.json_schema(value)
    raise SettingsError(
        f"grammar={short_repr(value)}: pass Grammar.regex(...), Grammar.choice(...), a JSON schema or a pydantic class."
    )


def json_rule(schema: Mapping[str, Any]) -> str:
    """A JSON value as part of a rule."""
    if not isinstance(schema, Mapping):
        raise SettingsError(f"{short_repr(schema)} is no JSON schema: pass a mapping.")
    try:
        for multiple in _multiples(schema):
            if _digits(multiple) > MULTIPLES:
                raise SettingsError(f"multipleOf={short_repr(multiple)} has too many digits for a grammar.")
        closed = _closed(schema)
    except RecursionError:
        raise SettingsError(f"The JSON schema {short_repr(schema)} is nested too deeply.") from None
    return "%json " + as_json({**closed, "x-guidance": COMPACT}, "JSON schema", ensure_ascii=True)


def as_json(value: Any, what: str, ensure_ascii: bool = False) -> str:
    """As text; a `SettingsError` for what JSON cannot say."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii)
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingsError(f"{what} {short_repr(value)} cannot be written as JSON: {error}") from None


def _multiples(schema: Any) -> Iterator[int | float]:
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key == "multipleOf" and type(value) in (int, float):
                yield value
            else:
                yield from _multiples(value)
    elif isinstance(schema, list):
        for each in schema:
            yield from _multiples(each)


def _digits(number: int | float) -> int:
    """1 of 1,000,000 and of 0.01, 25 of 2.5; 0 of what is no number."""
    try:
        digits = Decimal(str(number)).normalize().as_tuple().digits
    except ValueError:  # thousands of digits
        return MULTIPLES + 1
    return int("".join(map(str, digits)) or 0)


def _closed(schema: Any) -> Any:
    """Without properties that nobody named: a model that may go on with them does, to its last token."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in BY_NAME and isinstance(value, Mapping):
            found[key] = {name: _closed(each) for name, each in value.items()}
        else:
            found[key] = value if key in AS_IT_IS else _closed(value)
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


class GrammarTokenizer:
    """The vocabulary as grammars see it; made once for a language model."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: set[int]) -> None:
        try:
            from llguidance import LLTokenizer

            self.tokenizer = LLTokenizer(_without_names(tokenizer), n_vocab=vocabulary, eos_token=_end(tokenizer, eos))
        except ImportError as error:
            raise ModelError(
                "Grammars, tools and structured output need llguidance: pip install llguidance."
            ) from error
        except Exception as error:
            raise ModelError(f"This tokenizer cannot be constrained by a grammar: {error}") from error
        self.vocabulary = vocabulary
        self.eos = sorted(eos | {self.tokenizer.eos_token})
        self.letter, *self.closers = (self._single(tokenizer, text) for text in ("z", "}", "]", '"', ","))

    def matcher(self, grammar: Grammar) -> Matcher:
        """Where an answer begins."""
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self.tokenizer, LLMatcher.grammar_from_lark(grammar.lark))
        except UnicodeEncodeError as error:
            raise SettingsError(f"The grammar cannot be used: {error}") from None
        if matcher.is_error():
            raise SettingsError(f"The grammar cannot be used: {matcher.get_error().strip()}")
        return Matcher(matcher)

    def allowed(self, matchers: Sequence[Matcher]) -> torch.Tensor:
        """The tokens that may come next, (n, vocabulary) bool; end-of-sequence where the text may end."""
        from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(len(matchers), self.vocabulary)
        for row, matcher in enumerate(matchers):
            fill_next_token_bitmask(matcher.state, bits, row)
            matcher.check()
        unpacked = np.unpackbits(bits.numpy().view(np.uint8), axis=-1, bitorder="little")[:, : self.vocabulary]
        allowed = torch.from_numpy(unpacked).bool()
        allowed[:, self.eos] = allowed[:, [self.tokenizer.eos_token]]
        return allowed

    def close(self, allowed: torch.Tensor) -> bool:
        """Of the tokens that may come next, (vocabulary,) bool, leave only one that closes what is open.

        JSON ends so within a few tokens, whatever the model would have liked to say. Free text is left
        alone where it may end, and ended by a quotation mark where it may not, as that is what a string of
        JSON ends with. True if tokens were taken away.
        """
        free = bool(allowed[self.letter])
        may_end = bool(allowed[self.eos[0]])
        closers = self.eos if may_end else [self.closers[2]] if free else self.closers
        found = [token for token in closers if allowed[token]][:1]
        if not found or (free and may_end) or int(allowed.sum()) == 1:
            return False
        allowed[:] = False
        allowed[found] = True
        return True

    @staticmethod
    def _single(tokenizer: Any, text: str) -> int:
        """The token of a single character; 0, a padding token as a rule, where there is none."""
        found = tokenizer.convert_tokens_to_ids(text)
        return found if found is not None and found != tokenizer.unk_token_id else 0


def _without_names(tokenizer: Any) -> str:
    """The tokenizer as JSON, its added tokens under names that no text has: a text is never one of them.

    A grammar means them by their ids. Otherwise the text "<tool_call>", which may stand in any JSON, would
    be forced to be the token of that name, and then refused because a special token is no text.
    """
    found = json.loads(tokenizer.backend_tokenizer.to_str())
    found |= {"post_processor": None, "padding": None, "truncation": None}  # they have their names, too
    names = {added["content"]: f"<|added {added['id']}|>" for added in found["added_tokens"]}
    for added in found["added_tokens"]:
        added.update(content=names[added["content"]], special=True)
    vocabulary = found["model"].get("vocab")
    if isinstance(vocabulary, dict):
        found["model"]["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    if isinstance(vocabulary, list):
        found["model"]["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if unknown := found["model"].get("unk_token"):
        found["model"]["unk_token"] = names.get(unknown, unknown)
    return json.dumps(found)


def _end(tokenizer: Any, eos: set[int]) -> int:
    return int(tokenizer.eos_token_id) if tokenizer.eos_token_id is not None else min(eos)


class Matcher:
    """A text so far, and what its grammar lets follow; `closed` if it was made to end what was open."""

    def __init__(self, state: Any, closed: bool = False) -> None:
        self.state = state
        self.closed = closed

    def fork(self) -> Matcher:
        """For a candidate; what it takes does not touch the text that it follows."""
        return Matcher(self.state.deep_copy(), self.closed)

    def take(self, token: int) -> None:
        self.state.consume_token(token)
        self.check()

    @property
    def complete(self) -> bool:
        """Nothing can follow any more."""
        return bool(self.state.is_stopped())

    def check(self) -> None:
        if self.state.is_error():
            raise ModelError(f"The grammar failed: {self.state.get_error().strip()}")
