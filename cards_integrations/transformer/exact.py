"""A self-test: that a model gives over trees of candidates, and beside others, what it gives alone.

Models differ in what else they go by than positions and a mask: a count of what is in the cache, values that are
rearranged after it, a bias of their own. No list of them is ever complete, so each is tried before it is used.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from cards_integrations.errors import CardsError, ModelError, said
from cards_integrations.transformer.attention import NAME
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import (
    Transformer,
    body,
    cannot_run,
    scoring_head,
    use_tree_attention,
    without_latents,
)
from cards_integrations.transformer.kv_cache import Branch
from cards_integrations.transformer.quantization import is_quantized
from cards_integrations.transformer.rope import rope_switch, short_texts

PATH = 24  # tokens of a path
OWN = 4  # of them, those after the trunk
REACH = 6  # tokens of windows, chunks and short texts while a model is tried, so that its paths go beyond
WHOLE = 80  # tokens of a text that is read as a whole: more than the chunks in which some encoders read
EXACT, ROUNDED = 1e-3, 0.2  # errors over the spread: the largest in float32, in half precision the median of all

_faults: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # of models that were tried; "" of those that are exact
_lock = threading.Lock()


def _renew() -> None:
    """Replace the lock in a forked child, which has no thread that would release it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def check_exact(model: Any) -> None:
    """Compare a small tree, and a short row beside a long one, with plain forwards of the same tokens.

    Of a model with a language-modeling head the logits are compared, of others the last hidden states. The tree
    has branches of the trunk, one of them kept in part, and a branch of a branch.

    A model is tried once, by one thread at a time: meanwhile it has another attention, and rewards may share it.

    Args:
        model: A transformers model. If it fails, it has its own attention again.

    Raises:
        ModelError: They differ, or the model cannot be run so.
    """
    with _lock:
        if (fault := _faults.get(model)) is None:
            try:
                _check(model)
            except ModelError as error:
                _faults[model] = str(error)
                raise
            _faults[model] = ""
    if fault:
        raise ModelError(fault)


@torch.inference_mode()
def _check(model: Any) -> None:
    """Try a model, and give it its own attention again if it fails."""
    config, native = model.config.get_text_config(), model.config._attn_implementation
    most = getattr(config, "max_position_embeddings", None) or PATH
    length = min(PATH, most) if most > 0 else PATH  # XLNet says -1
    ids = _ids(model, length)
    try:
        with _short_reach(model, config):
            model.set_attn_implementation("eager")
            plain = _plain(model, torch.tensor(ids, device=model.device))
            _check_scores(model, ids, plain)
            if rope_switch(config):
                plain[3, : OWN + 1] = _plain(model, torch.tensor([ids[3][: OWN + 1]], device=model.device))[0]
            use_tree_attention(model)
            _try(model, ids, plain)
    except Exception as error:
        model.set_attn_implementation("eager" if native == NAME else native)
        if isinstance(error, ModelError):
            raise
        raise cannot_run(model, error) from error


@torch.inference_mode()
def reads_padded(
    model: Any, tokenizer: Any, window: int, read: Callable[[list[str]], torch.Tensor] | None = None
) -> bool:
    """Return True if a model gives a text that is padded, beside a longer one, what it gives it alone.

    Args:
        model: A transformers model that reads whole texts.
        tokenizer: Its tokenizer.
        window: Tokens that it can read.
        read: What is made of n texts, (n, ...); the logits of a classifier by default.

    Raises:
        ModelError: It gives a text something else each time, or cannot be run.
    """
    longest = min(WHOLE, window)
    text = tokenizer.decode(_ids(model, longest)[0])
    texts = [text[: max(1, len(text) // 3)], text]

    def logits(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
        found: torch.Tensor = model(**inputs.to(model.device)).logits
        return found.float()

    read = read or logits
    try:
        alone, again = (torch.cat([read([text]) for text in texts]) for _ in range(2))
        if _alike(model, again, alone):
            return _alike(model, read(texts), alone)
    except Exception as error:
        raise ModelError(f"model type {model.config.model_type!r} cannot score texts here: {said(error)}") from error
    raise ModelError(f"model type {model.config.model_type!r} gives one text another score each time: it is no reward.")


def _alike(model: Any, one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if the logits of whole texts differ by rounding alone; those that are no numbers are told by the scores."""
    most = ROUNDED if _rounds(model) else EXACT
    return torch.allclose(one, other, rtol=most, atol=most, equal_nan=True)


def _try(model: Any, ids: list[list[int]], plain: torch.Tensor) -> None:
    try:
        _compare(model, _TriedModel(model, ids).outputs(), plain)
    except ModelError:
        if not without_latents(model):
            raise
        _try(model, ids, plain)  # it may do something else to the keys that it makes of latents


def _ids(model: Any, length: int) -> list[list[int]]:
    """Four texts of ordinary tokens: three with a trunk in common, and one of their own."""
    config = model.config.get_text_config()
    named = [value for name, value in config.to_dict().items() if name.endswith("token_id")]
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    ordinary = [i for i in range(min(1000, model.get_input_embeddings().weight.shape[0])) if i not in special]
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ordinary), (4, length), generator=draw).tolist()
    one, two, three, other = ([ordinary[i] for i in text] for text in drawn)
    trunk = one[: length - OWN]
    return [one, trunk + two[-OWN:], trunk + one[-OWN : -OWN + 2] + three[-OWN + 2 :], other]


@contextmanager
def _short_reach(model: Any, config: Any) -> Iterator[None]:
    """Make windows, chunks and short texts shorter than the texts, and steps of scales that go by the length."""
    places = [(config, "sliding_window"), (config, "attention_chunk_size")]
    places += [(layer, "floor_scale") for layer in model.modules()]
    before = [(at, name, reach) for at, name in places if (reach := getattr(at, name, None) or 0) > REACH]
    try:
        for at, name, _ in before:
            setattr(at, name, REACH)
        with short_texts(config, REACH):
            yield
    finally:
        for at, name, reach in before:
            setattr(at, name, reach)


def _rounds(model: Any) -> bool:
    """True for weights of less than float32."""
    return model.dtype != torch.float32 or is_quantized(model)


def _has_head(model: Any) -> bool:
    return model.get_output_embeddings() is not None


def _check_scores(model: Any, ids: list[list[int]], states: torch.Tensor) -> None:
    """Check that a classifier makes its scores of the hidden states by its head alone.

    Args:
        model: A model, of any kind.
        ids: Texts.
        states: The hidden states of these, (texts, tokens, size).

    Raises:
        ModelError: It makes something else of them, as a model with code of its own may.
    """
    head = scoring_head(model)
    if head is None or _has_head(model):
        return
    own = model(input_ids=torch.tensor(ids[:1], device=model.device), use_cache=False).logits
    found = head(states[:1].to(model.dtype))
    if not _alike(model, (found if own.dim() == found.dim() else found[:, -1]).float(), own.float()):
        raise cannot_run(model, "its scores are not what its head makes of the hidden states.")


def _plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(texts, tokens) -> what the model gives after each token, (texts, tokens, ...)."""
    found: torch.Tensor
    if _has_head(model):
        found = model(input_ids=ids, use_cache=False).logits
    else:
        found = body(model)(input_ids=ids, use_cache=False).last_hidden_state
    return found.float()


class _TriedModel:
    """The engine's forwards of four texts: a tree of three, and a short one."""

    def __init__(self, model: Any, ids: list[list[int]]) -> None:
        self.transformer = Transformer(model, trial=True)
        self.run = self.transformer.logits if _has_head(model) else self.transformer.hidden
        self.ids = ids
        self.found: dict[tuple[int, int], torch.Tensor] = {}

    def outputs(self) -> dict[tuple[int, int], torch.Tensor]:
        """Return what comes after some tokens, by (text, token)."""
        cache, end = self.transformer.cache, len(self.ids[0])
        tree, short = (cache.open(long=self.transformer.is_long(tokens)) for tokens in (end, OWN + 1))
        trunk, other = tree.branch(), short.branch()
        kept, two = end - OWN, end - OWN + 2
        self._read((trunk, 0, 0, kept), (other, 3, 0, OWN))
        tree.keep(trunk)
        short.keep(other)
        one, second = tree.branch(), tree.branch()
        if self.transformer.recurrent:  # nothing of theirs is kept in part
            self._read((one, 0, kept, two), (second, 1, kept, two))
            rest = one.branch()
            self._read((rest, 0, two, two + 1))
            self._read((rest, 0, two + 1, end))
            tree.keep(one)
        else:
            self._read((one, 0, kept, end), (second, 1, kept, two))
            tree.keep(one, two - kept)
        self._read((tree.branch(), 2, two, end), (second.branch(), 1, two, end), (short.branch(), 3, OWN, OWN + 1))
        return self.found

    def _read(self, *parts: tuple[Branch, int, int, int]) -> None:
        """Run one forward over some tokens of some texts."""
        inputs = [ForwardInput(branch, self.ids[text][start:end]) for branch, text, start, end in parts]
        for (_, text, _, end), output in zip(parts, self.run(inputs), strict=True):
            if isinstance(output, CardsError):
                raise output.__cause__ or output
            self.found[text, end - 1] = output.value.float()


def _compare(model: Any, found: dict[tuple[int, int], torch.Tensor], plain: torch.Tensor) -> None:
    expected = [plain[at] for at in found]
    if not all(each.isfinite().all() for each in expected):
        return  # the numbers are too large for the model's dtype, which its first answer tells
    off = [float((a - b).norm() / (b - b.mean()).norm()) for a, b in zip(found.values(), expected, strict=True)]
    off = sorted(math.inf if math.isnan(each) else each for each in off)
    error, most = (off[len(off) // 2], ROUNDED) if _rounds(model) else (off[-1], EXACT)
    if not error <= most:
        raise cannot_run(model, f"what it gives beside other texts is {error:.1%} off from what it gives alone.")
