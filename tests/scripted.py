"""A language model that writes what a script says, behind the same engine.

Only the choice of each token is scripted (and a grammar still has the last word on it): prompts,
KV caches, uncertainty, segments, rewards and batching are those of a tiny random model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from cards_integrations.chat.grammar import GrammarTokenizer
from cards_integrations.chat.message import Message
from cards_integrations.engine import EngineSettings
from cards_integrations.models.base import Candidate
from cards_integrations.models.local import language_model as local
from cards_integrations.models.local.drawing import TokenDrawer
from cards_integrations.models.local.language_model import LocalLanguageModel

Script = Callable[[str | list[Message]], str | list[str]]
LEARNT = '<tool_call>\n{"name": "get_weather", "arguments": {"input": 3, "city": "Paris"}}\n</tool_call> the answer is '
MARGIN = 1e4


class ScriptedDrawer(TokenDrawer):
    """Prefers the tokens of a script."""

    def __init__(
        self, grammars: Callable[[], GrammarTokenizer], eos: Collection[int], script: Callable[[Candidate], int]
    ) -> None:
        super().__init__(grammars, eos)
        self.script = script

    def tokens(
        self, candidates: Sequence[Candidate], logits: torch.Tensor, rows: Sequence[int]
    ) -> tuple[torch.Tensor, Collection[int]]:
        own = logits[rows]
        for row, candidate in enumerate(candidates):
            own[row, self.script(candidate)] += MARGIN
        return super().tokens(candidates, own, range(len(candidates)))


class ScriptedLanguageModel(LocalLanguageModel):
    """`script` makes the answer from the prompt, as messages or as text.

    Of several answers it is the first that a grammar lets through.
    """

    script: Script

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.drawer = ScriptedDrawer(lambda: self.grammars, self.eos, self._next)

    def _next(self, candidate: Candidate) -> int:
        ids, begun = [*candidate.before, *candidate.ids], 0  # bytes of a character that has begun
        while (said := self.chat.decode(ids[: len(ids) - begun])).endswith("\ufffd"):
            begun += 1
        found = self.script(candidate.context.prompt)
        several = [found] if isinstance(found, str) else found
        rests = [whole[len(said) :] for whole in several if whole.startswith(said)] or [""]
        tokens = [self.chat.encode(rest[:40])[begun] if rest else min(self.eos, default=0) for rest in rests]
        if candidate.matcher is None or len(tokens) == 1:
            return tokens[0]
        allowed = self.grammars.allowed([candidate.matcher])[0]
        return next((token for token in tokens if allowed[token]), tokens[0])


def save_model(folder: Path, chat_template: str | None = tiny.CHAT) -> str:
    """A tiny model that reads long prompts of any text."""
    tokenizer = tiny.byte_pairs(LEARNT, 600)
    tokenizer.chat_template = chat_template
    model = tiny.causal(vocab_size=len(tokenizer), max_position_embeddings=4096)
    return tiny.save(folder, model, tokenizer)


@contextmanager
def scripted(folder: Path, script: Script, **options: Any) -> Iterator[dict[str, Any]]:
    """Options for `CardsLLM` or `ChatCards` whose answers a script writes; its engine ends with the context."""
    model = save_model(folder)
    with pytest.MonkeyPatch.context() as patch:
        kind = type("Scripted", (ScriptedLanguageModel,), {"script": staticmethod(script)})
        patch.setattr(local, "LocalLanguageModel", kind)
        yield {"model": model, "engine": EngineSettings(dtype="float32"), "max_tokens": 400, **options}
