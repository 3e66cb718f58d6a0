"""Grammars, which say what an answer may be, and which tokens may come next (by llguidance)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from cards_integrations.chat.pydantic_schema import pydantic_schema
from cards_integrations.chat.schema import held_schema
from cards_integrations.errors import ModelError, SettingsError, short_repr

log = logging.getLogger("cards_integrations")

if TYPE_CHECKING:
    import torch

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as models learned it


@dataclass(frozen=True)
class Grammar:
    """What an answer may be, from its first token to its last: `llm.align(prompt, grammar=...)`.

    The classmethods cover the usual cases; `Grammar(text)` takes any grammar.
    """

    lark: str
    """The grammar in llguidance's variant of Lark, whose rule `start` is the whole answer."""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """Make a grammar of the JSON values that match a schema, with a space after each comma and colon.

        Args:
            schema: A JSON schema. Objects have its properties and no others, unless it sets `additionalProperties`.
                What a grammar cannot express, such as look-ahead in a pattern, is left to validation.

        Raises:
            SettingsError: It is not a schema, or nothing matches it; the message names the field.
        """
        return cls(f"start: {json_rule(schema)}")

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Make a grammar of the texts that a regular expression matches from beginning to end.

        Args:
            pattern: In Rust's syntax, without look-around.
        """
        return cls("start: /" + pattern.replace("\n", r"\n").replace("/", r"\/") + "/")

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Grammar:
        """Make a grammar of these texts, one of which is the answer.

        Raises:
            SettingsError: There are none.
        """
        literals = [json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts)]
        if not literals:
            raise SettingsError("A choice needs at least one text.")
        return cls("start: " + " | ".join(literals))


def as_grammar(value: Any) -> Grammar | None:
    """Make a grammar of a JSON schema or a pydantic class; return a grammar, or None, as it is.

    Raises:
        SettingsError: It is something else, or a schema that no grammar can express.
    """
    if value is None or isinstance(value, Grammar):
        return value
    if isinstance(value, type) and issubclass(value, BaseModel):
        return Grammar.json_schema(pydantic_schema(value))
    if isinstance(value, Mapping):
        return Grammar.json_schema(value)
    raise SettingsError(
        f"grammar={short_repr(value)}: pass Grammar.regex(...), Grammar.choice(...), a JSON schema or a pydantic class."
    )


def json_rule(schema: Mapping[str, Any], what: str = "JSON schema") -> str:
    """Return an expression, for a rule of a grammar, of the JSON values that match a schema.

    Args:
        schema: The schema; what a grammar cannot express is left to validation, and logged.
        what: What errors call the schema.

    Raises:
        SettingsError: It is not a schema, or nothing matches it.
    """
    if not isinstance(schema, Mapping):
        raise SettingsError(f"{short_repr(schema)} is not a JSON schema: pass a mapping.")
    try:
        return _json_rule(as_json(schema, what, ensure_ascii=True))
    except RecursionError:
        raise SettingsError(f"{what} {short_repr(schema)} is nested too deeply.") from None
    except SettingsError as error:
        raise SettingsError(str(error) if str(error).startswith(what) else f"{what}: {error}") from None


@lru_cache(maxsize=256)
def _json_rule(schema: str) -> str:
    held = held_schema(json.loads(schema))
    if held.notes:
        log.info("a grammar leaves to validation: %s", "; ".join(held.notes))
    return "%json " + json.dumps({**held.schema, "x-guidance": COMPACT})


def as_json(value: Any, what: str, ensure_ascii: bool = False) -> str:
    """Return a value as JSON.

    Args:
        value: The value.
        what: What errors call it.
        ensure_ascii: As for `json.dumps`.

    Raises:
        SettingsError: JSON cannot express it.
    """
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii)
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingsError(f"{what} {short_repr(value)} cannot be written as JSON: {error}") from None


class GrammarTokenizer:
    """The vocabulary of a language model, as grammars see it.

    Args:
        tokenizer: The tokenizer of the model, of transformers.
        vocabulary: The number of logits.
        eos: The ids of end-of-sequence.

    Raises:
        ModelError: llguidance is not installed, or cannot use the tokenizer.
    """

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
        """Return a matcher at the beginning of an answer.

        Raises:
            SettingsError: The grammar has an error.
        """
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self.tokenizer, LLMatcher.grammar_from_lark(grammar.lark))
        except UnicodeEncodeError as error:
            raise SettingsError(f"The grammar cannot be used: {error}") from None
        if matcher.is_error():
            raise SettingsError(f"The grammar cannot be used: {matcher.get_error().strip()}")
        return Matcher(matcher)

    def allowed(self, matchers: Sequence[Matcher]) -> torch.Tensor:
        """Return which tokens may come next for each matcher, (n, vocabulary) bool.

        End-of-sequence is among them where the text may end.
        """
        import torch
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
        """Reduce a mask of allowed tokens, (vocabulary,) bool, in place to one token that closes what is open.

        JSON ends within a few such tokens, whatever the model prefers. The mask stays as it is where any text is
        allowed and may end; where any text is allowed and may not end, it is taken for a JSON string, which a
        quotation mark closes.

        Returns:
            True if the mask has changed.
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
        """Return the token of a single character; 0, usually a padding token, if there is none."""
        found = tokenizer.convert_tokens_to_ids(text)
        return found if found is not None and found != tokenizer.unk_token_id else 0


def _without_names(tokenizer: Any) -> str:
    """Return the tokenizer as JSON, its added tokens renamed so that they occur in no text; grammars use their ids.

    Under its own name, the added token "<tool_call>" would stand for that text wherever JSON contains it, and would
    then be refused, as a special token is not text. Added tokens that merges lead to are text, such as the line breaks
    that Gemma adds, and keep their names.
    """
    found = json.loads(tokenizer.backend_tokenizer.to_str())
    found |= {"post_processor": None, "padding": None, "truncation": None}  # they contain the names, too
    merged = {part for pair in found["model"].get("merges") or () for part in (*pair, "".join(pair))}
    named = [added for added in found["added_tokens"] if added["content"] not in merged]
    names = {added["content"]: f"<|added {added['id']}|>" for added in named}
    for added in named:
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
    """Return the id of end-of-sequence that grammars use."""
    return int(tokenizer.eos_token_id) if tokenizer.eos_token_id is not None else min(eos)


class Matcher:
    """The state of a grammar after the text so far.

    Attributes:
        state: The matcher of llguidance.
        closed: True once `GrammarTokenizer.close` has begun to end the text in place of the model.
    """

    def __init__(self, state: Any, closed: bool = False) -> None:
        self.state = state
        self.closed = closed

    def fork(self) -> Matcher:
        """Return a copy for a candidate, whose tokens do not change the original."""
        return Matcher(self.state.deep_copy(), self.closed)

    def take(self, token: int) -> None:
        """Append a token to the text."""
        self.state.consume_token(token)
        self.check()

    @property
    def complete(self) -> bool:
        """True if nothing can follow."""
        return bool(self.state.is_stopped())

    def check(self) -> None:
        """Raise a `ModelError` if the grammar failed."""
        if self.state.is_error():
            raise ModelError(f"The grammar failed: {self.state.get_error().strip()}")
