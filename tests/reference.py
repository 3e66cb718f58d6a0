"""The CARDS loop as the paper writes it: no cache, no batch, one candidate at a time.

Every token is a full forward of the plain transformers model, every reward a full forward of the
plain classifier. Only the random numbers and the settings objects are the package's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from cards_integrations.decoding import Boundary, Cards, FixedLength, Punctuation, Uncertainty
from cards_integrations.models.randomness import Uniforms

Ids = list[int]


@dataclass
class Draft:
    ids: Ids
    ended: Literal["boundary", "length", "eos", "stop"]
    reward: float = math.nan
    verdict: str = "rejected"


@dataclass
class Reference:
    """`next_logits(ids)` are the plain model's, `reward(answer ids)` the plain classifier's."""

    next_logits: Callable[[Ids], torch.Tensor]
    reward: Callable[[Ids], float]
    decode: Callable[[Ids], str]
    eos: int
    temperature: float = 0.7
    top_k: int = 40
    stop: tuple[str, ...] = ()
    segments: list[list[Draft]] = field(default_factory=list)  # all drafts looked at, by segment

    def generate(self, prompt: Ids, method: Cards, max_tokens: int, seed: int) -> Ids:
        target, beta = float(method.target_reward), float(method.beta if method.beta != "auto" else 0.7)
        r0 = (1 - method.alpha) * self.reward([]) + method.alpha * target
        answer: Ids = []
        while len(answer) < max_tokens:
            drafts: list[Draft] = []
            self.segments.append(drafts)
            while True:
                uniforms = Uniforms(seed, len(self.segments) - 1, len(drafts))
                draft = self.draft(prompt, answer, method.boundary, max_tokens, uniforms)
                draft.reward = self.reward(answer + draft.ids)
                drafts.append(draft)
                if len(drafts) == method.max_rejections + 1:
                    draft = max(drafts, key=lambda d: d.reward)  # the first of equals
                    draft.verdict = "best"
                    break
                tau = min(r0 + len(answer + draft.ids) * (target - r0) / max_tokens, target)
                if method.acceptance == "hard":
                    accepted = draft.reward >= tau
                else:
                    accepted = uniforms.verdict < math.exp(min(0.0, (draft.reward - tau) / beta))
                if accepted:
                    draft.verdict = "accepted"
                    break
            answer += draft.ids
            if draft.ended in ("eos", "stop"):
                break
        return answer

    def draft(self, prompt: Ids, answer: Ids, boundary: Boundary, max_tokens: int, uniforms: Uniforms) -> Draft:
        ids: Ids = []
        while True:
            logits = self.next_logits(prompt + answer + ids)
            if isinstance(boundary, Uncertainty) and len(ids) >= boundary.min_length and rises(boundary, logits):
                return Draft(ids, "boundary")
            token = self.sample(logits, uniforms[len(ids)])
            if token == self.eos:
                return Draft(ids, "eos")
            ids.append(token)
            if any(stop in self.decode(answer + ids) for stop in self.stop):
                return Draft(ids, "stop")
            longest = boundary.length if isinstance(boundary, FixedLength) else boundary.max_tokens
            if len(ids) == min(longest, max_tokens - len(answer)):
                return Draft(ids, "length")
            if isinstance(boundary, Punctuation) and len(ids) >= boundary.min_length:
                text = self.decode(answer + ids)[len(self.decode(answer)) :]
                if text.endswith(boundary.marks):
                    return Draft(ids, "boundary")

    def sample(self, logits: torch.Tensor, uniform: float) -> int:
        """Top-k, temperature, and the inverse of the distribution function in order of token id."""
        values = logits.tolist()
        by_logit = sorted(range(len(values)), key=lambda i: -values[i])
        kept = sorted(by_logit[: self.top_k] if self.top_k else by_logit)
        weights = [math.exp((values[i] - max(values)) / self.temperature) for i in kept]
        below = 0.0
        for token, weight in zip(kept, weights, strict=True):
            below += weight / sum(weights)
            if uniform < below:
                return token
        return kept[-1]


def rises(boundary: Uncertainty, logits: torch.Tensor) -> bool:
    p = logits.double().softmax(-1).tolist()
    measured = {
        "entropy": lambda: -sum(x * math.log(x) for x in p if x > 0),
        "max_probability": lambda: 1 - max(p),
        "evidential": lambda: len(p) / sum(max(0.0, x) + 1 for x in logits.tolist()),
    }[boundary.measure]()
    return measured >= boundary.threshold


def plain(model: Any, tokenizer: Any, classifier: Any, prompt: Ids, **sampling: Any) -> Reference:
    """The reference on a plain causal model and a plain classifier with the same tokenizer."""

    @torch.inference_mode()
    def next_logits(ids: Ids) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0, -1]

    @torch.inference_mode()
    def reward(answer: Ids) -> float:
        ids = torch.tensor([prompt + answer])
        return float(classifier(ids, attention_mask=torch.ones_like(ids)).logits[0, 0])

    def decode(ids: Ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return Reference(next_logits, reward, decode, tokenizer.eos_token_id, **sampling)
