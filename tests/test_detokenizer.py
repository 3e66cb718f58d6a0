"""A text that is decoded piece by piece is, after every piece, the one that all its ids give."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cards_integrations.chat.answer_start import NOTHING_BEFORE, AnswerStart
from cards_integrations.chat.detokenizer import LONGEST, Detokenizer, decodes_locally
from cards_integrations.chat.template import ChatTokenizer, FormattedPrompt

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁▁▁", "▁the", "▁cat", "s", "é", "日", ".", "n", "'t", "▁.", "\ufffd", " "]
PARTS = ["run", "##s", "##ing", "the", ".", ",", "'", "##'", "##t", "not", "日"]
SPECIAL = ["<s>", "</s>", "<unk>", "<tool_call>", "</tool_call>"]


def tokenizer(model: Any, decoder: Any, special: list[str] | None = None) -> PreTrainedTokenizerFast:
    fast = Tokenizer(model)
    if decoder is not None:
        fast.decoder = decoder
    found = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found.add_special_tokens({"additional_special_tokens": (special or SPECIAL)[3:]})
    found.add_tokens(["<added>"])
    return found


def pieces(decoder: Any, known: list[str] = BYTES) -> PreTrainedTokenizerFast:
    """As sentencepiece has them, with byte fallback."""
    vocabulary = {name: i for i, name in enumerate([*SPECIAL[:3], *known, *PIECES])}
    return tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True), decoder)


def parts(cleanup: bool) -> PreTrainedTokenizerFast:
    vocabulary = {name: i for i, name in enumerate([*SPECIAL[:3], *PARTS])}
    return tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"), decoders.WordPiece("##", cleanup))


def pairs() -> PreTrainedTokenizerFast:
    found = tiny.byte_pairs()
    found.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    return found


SPACE = decoders.Replace("▁", " ")
LLAMA = [SPACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": pairs,
    "word-level": tiny.words,
    "byte fallback": lambda: tiny.fallback("cat "),
    "like Llama": lambda: pieces(decoders.Sequence(LLAMA)),
    "like Gemma": lambda: pieces(decoders.Sequence(LLAMA[:3])),
    "Metaspace": lambda: pieces(decoders.Metaspace()),
    "some bytes": lambda: pieces(decoders.Sequence(LLAMA), BYTES[60:]),
    "WordPiece": lambda: parts(cleanup=False),
    "WordPiece, cleaned up": lambda: parts(cleanup=True),
}


def texts(tokenizer: PreTrainedTokenizerFast, dice: Random) -> list[int]:
    """Ids of all kinds, of bytes, of a few tokens, with many special ones, or of real text; some are of no token."""
    every = range(len(tokenizer) + 2)
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    of_bytes = [i for name, i in tokenizer.get_vocab().items() if name in BYTES] or list(every)
    real = tokenizer("日本é the cat \U0001f44d\U0001f3fd" * 2, add_special_tokens=False)["input_ids"]
    kinds = [every, of_bytes, dice.choices(every, k=3), [*special, *dice.choices(every, k=2)]]
    return [*dice.choices(kinds[dice.randrange(4)], k=20), *real[: dice.randrange(40)], *dice.choices(every, k=20)]


@pytest.mark.parametrize("form", [None, "hermes"], ids=["no markers", "markers"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_prefix_has_the_text_of_all_its_ids(name: str, form: Any) -> None:
    chat, dice = ChatTokenizer(TOKENIZERS[name](), form), Random(0)
    assert decodes_locally(chat)
    for _ in range(12):
        ids, forks, start = texts(chat.tokenizer, dice), [], NOTHING_BEFORE
        if dice.random() < 0.7:
            stop = dice.choice([(), ("</s>\n",)])
            start = chat.answer_start(FormattedPrompt("x"), dice.choices(texts(chat.tokenizer, dice), k=9), stop)
        growing, n = Detokenizer(chat, start=start), 0
        while n < len(ids):
            if dice.random() < 0.1:
                forks.append((growing.fork(), ids[:n]))
            if dice.random() < 0.1:
                known = chat.decode(ids[:n], start) if dice.random() < 0.5 else None
                growing = Detokenizer(chat, ids[:n], known, start)
            new = ids[n : n + dice.choice([1, 1, 1, 2, 5])]
            n += len(new)
            assert growing.push(new) == growing.text == chat.decode(ids[:n], start)
        for fork, before in forks:
            for token in dice.choices(ids, k=8):
                before.append(token)
                assert fork.push([token]) == chat.decode(before, start)


def test_bytes_around_a_hidden_token_are_one_character() -> None:
    """Whether something else in the text is half a character or not."""
    chat = ChatTokenizer(pieces(decoders.Sequence(LLAMA)))
    first, end, second, half = chat.tokenizer.convert_tokens_to_ids(["<0xC3>", "</s>", "<0xA9>", "<0xE6>"])
    assert chat.decode([first, end, second]) == "é"
    assert chat.decode([first, end, second, half]) == "é\ufffd"


@pytest.mark.parametrize("name", ["byte-level", "like Llama", "WordPiece", "word-level"])
def test_only_the_last_tokens_are_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = ChatTokenizer(TOKENIZERS[name]())
    letters = [i for i in chat.tokenizer.get_vocab().values() if (chat.decode([i]).strip() or "\ufffd").isascii()]
    assert decodes_locally(chat)
    lengths: list[int] = []
    decode = ChatTokenizer.decode

    def counted(self: ChatTokenizer, ids: list[int], *start: AnswerStart) -> str:
        lengths.append(len(ids))
        return decode(self, ids, *start)

    monkeypatch.setattr(ChatTokenizer, "decode", counted)
    growing = Detokenizer(chat)
    for token in Random(0).choices(letters, k=300):
        growing.push([token])
    assert sum(lengths) / 300 < LONGEST + 4


def test_a_tokenizer_that_looks_back_far_is_decoded_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    class Louder(ChatTokenizer):
        """Writes the tokens after the twentieth in capitals."""

        def decode(self, ids: Any, start: Any = None) -> str:
            words = [super(Louder, self).decode([token]) for token in ids]
            return " ".join([*words[:20], *(word.upper() for word in words[20:])])

    chat = Louder(tiny.words())
    assert not decodes_locally(chat)
    growing = Detokenizer(chat)
    for n in range(1, 60):
        assert growing.push([7]) == chat.decode([7] * n)
    assert "decoded as a whole" in caplog.text
