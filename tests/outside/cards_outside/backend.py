"""A language model that another package brings: each character depends on the one before it. No logits, no torch."""

import math
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Literal

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.errors import SettingsError
from cards_integrations.models import CustomModel
from cards_integrations.models.base import Boundary, Candidate, LanguageModel


class BigramModel(CustomModel):
    kind: Literal["bigram"] = "bigram"
    model: str = "bigram"
    text: str = "the cat sat on the mat. the dog ran to the cat. a mat is a rug."

    def build(self, wake: Callable[[], None]) -> "Bigrams":
        return Bigrams(self)  # type: ignore[abstract]


class Bigrams(LanguageModel):
    def __init__(self, settings: BigramModel) -> None:
        vocabulary = {letter: i for i, letter in enumerate(["</s>", *map(chr, range(32, 127))])}
        fast = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
        fast.decoder = decoders.Fuse()
        self.chat = ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="?"))
        self.name, self.context_window = settings.model, settings.context_window()
        self.follow: defaultdict[int, Counter[int]] = defaultdict(lambda: Counter(vocabulary.values()))
        for one, other in pairwise([*self.chat.encode(settings.text), 0]):
            self.follow[one] = self.follow.get(one, Counter()) + Counter([other])
        self.begun: dict[Candidate, None] = {}

    def begin(self, candidate: Candidate) -> None:
        self.begun[candidate] = None

    def drop(self, candidate: Candidate) -> None:
        self.begun.pop(candidate, None)

    def keep(self, candidate: Candidate) -> None:
        candidate.context.ids, candidate.context.text = candidate.before + candidate.ids, candidate.response

    def sample(self) -> list[Candidate]:
        begun, self.begun = list(self.begun), {}
        for candidate in begun:
            self._write(candidate)
        return begun

    def _write(self, c: Candidate) -> None:
        if c.rank is not None or type(c.boundary).ends_before is not Boundary.ends_before:
            c.error = SettingsError("Bigrams have no logits: take FixedLength or Punctuation, and not Args.")
        while c.error is None and c.finish is None and c.remaining_tokens > 0:
            token, log_p = self._draw(c)
            c.context.usage.drafted_tokens += 1
            if token == 0:
                c.finish, c.end_log_p = "stop", log_p
                return
            c.ids.append(token)
            c.log_likelihood += log_p
            c.response = c.before_text + self.chat.decode(c.ids)
            at = c.context.stop.find(c.response, len(c.before_text))
            if at is not None:
                c.response, c.whole, c.finish = c.response[:at], False, "stop"
            elif c.end == c.context.max_tokens:
                c.finish = "length"
            elif len(c.ids) >= c.boundary.min_tokens and c.boundary.ends_after(c.text):
                return

    def _draw(self, c: Candidate) -> tuple[int, float]:
        found, sampler = self.follow[[*c.context.prompt_ids, *c.before, *c.ids][-1]], c.context.sampler
        ranked = [token for token, _ in found.most_common(1 if sampler.greedy else sampler.top_k or None)]
        upto = list(accumulate(found[token] ** (1 / (sampler.temperature or 1)) for token in ranked))
        token = ranked[bisect(upto[:-1], c.uniforms[len(c.ids)] * upto[-1])]
        return token, math.log(found[token] / found.total())
