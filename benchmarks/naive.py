"""CARDS the way its authors' script runs it, and best-of-N the way `generate` runs it: what speed.py compares with.

The CARDS transcription recomputes everything: every token is a forward of the whole text, every
candidate's reward one of the whole conversation, one candidate at a time. Unlike the authors' script
it stops at end-of-sequence, draws from the package's own random numbers (so it writes the same text
where rounding allows), and computes the logits of the last position only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.decoding import Cards, Threshold
from cards_integrations.decoding.segmentation import Uncertainty
from cards_integrations.models.local.loader import ModelLoader, fast_bfloat16
from cards_integrations.models.local.resolve import resolve_model
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.models.randomness import Uniforms
from cards_integrations.models.sampling import Sampler, draw
from cards_integrations.rewards import ClassifierReward
from cards_integrations.rewards.base import Conversation
from cards_integrations.rewards.head_reward import ADAPTERS
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.trace import Usage
from cards_integrations.uncertainty import uncertainty


@dataclass
class Plain:
    """The language model and the reward model as transformers loads them."""

    model: Any
    judge: Any
    chat: ChatTokenizer
    input_format: InputFormat
    eos: int
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))

    @classmethod
    def load(cls, spec: LocalModel, reward: ClassifierReward) -> Plain:
        """Load both in bf16 if this CPU is fast at it, else in float32: the fastest that transformers has."""
        loader = ModelLoader(Placement(dtype="bfloat16" if fast_bfloat16() else "float32"))
        adapter = str(ADAPTERS / reward.adapter) if reward.adapter else None
        judge, tokenizer = loader.classifier(LocalModel(model=reward.model, adapter=adapter))
        model = (
            AutoModelForCausalLM.from_pretrained(resolve_model(spec.model), dtype=judge.dtype).to(loader.device).eval()
        )
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        chat = ChatTokenizer(tokenizer)
        input_format = InputFormat(chat, reward.prompt_format, reward.end_of_turn)
        return cls(model, judge, chat, input_format, tokenizer.eos_token_id)

    def around(self, prompt: str) -> tuple[list[int], list[int]]:
        """What the reward model reads before an answer and after it."""
        frame = self.input_format.around(Conversation(prompt, Usage()))
        before = self.chat.encode(frame.before, special=self.input_format.adds_special_tokens)
        return before, self.chat.encode(frame.after)

    @torch.inference_mode()
    def rewards(self, prompt: str, answers: list[list[int]]) -> list[float]:
        before, after = self.around(prompt)
        rows = [before + answer + after for answer in answers]
        longest = max(map(len, rows))
        pad = self.chat.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=self.judge.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.judge.device)
        hidden = self.judge.base_model(ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(rows)), mask.sum(1) - 1]
        self.counts["RM forwards"] += 1
        self.counts["RM tokens"] += sum(map(len, rows))
        return [float(x) for x in self.judge.score(last.to(self.judge.score.weight.dtype))[:, 0].float()]

    @torch.inference_mode()
    def next_logits(self, ids: list[int]) -> torch.Tensor:
        self.counts["LM forwards"] += 1
        self.counts["LM tokens"] += len(ids)
        logits: torch.Tensor = self.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1:].float()
        return logits

    def cards(
        self, prompt: str, method: Cards, scale: tuple[float, float], sampler: Sampler, n: int, seed: int
    ) -> list[int]:
        """Algorithm 1, one candidate after another."""
        assert isinstance(method.boundary, Uncertainty)
        boundary, (mean, spread) = method.boundary, scale
        target = mean + 1.5 * spread if method.target_reward == "auto" else method.target_reward
        beta = spread / 5 if method.beta == "auto" else method.beta
        _, prompt_ids = self.chat.prompt(prompt)
        threshold = Threshold.adaptive(self.rewards(prompt, [[]])[0], target, method.alpha, n)
        answer: list[int] = []
        segment, ended = 0, False
        while len(answer) < n and not ended:
            best: tuple[float, list[int], bool] = (-math.inf, [], False)
            for index in range(method.max_rejections + 1):
                uniforms = Uniforms(seed, segment, index)
                ids, finish = self._draft(prompt_ids + answer, boundary, sampler, min(64, n - len(answer)), uniforms)
                reward = self.rewards(prompt, [answer + ids])[0]
                tau = threshold.at(len(answer) + len(ids))
                best = max(best, (reward, ids, finish), key=lambda found: found[0])
                if index < method.max_rejections and uniforms.verdict < math.exp(min(0.0, (reward - tau) / beta)):
                    best = (reward, ids, finish)
                    break
            answer, ended, segment = answer + best[1], best[2], segment + 1
        return answer

    def _draft(
        self, text: list[int], boundary: Uncertainty, sampler: Sampler, room: int, uniforms: Uniforms
    ) -> tuple[list[int], bool]:
        ids: list[int] = []
        while len(ids) < room:
            logits = self.next_logits(text + ids)
            rises = float(uncertainty(boundary.measure, logits, logits.log_softmax(-1))) >= boundary.threshold
            if len(ids) >= boundary.min_length and rises:
                break
            token = int(draw([sampler], logits, [0], [uniforms[len(ids)]]))
            if token == self.eos:
                return ids, True
            ids.append(token)
        return ids, False

    @torch.inference_mode()
    def generate(
        self, prompts: list[str], sampler: Sampler, max_tokens: int, answers: int, seed: int
    ) -> list[list[list[int]]]:
        """`generate` of transformers, left-padded, `answers` for each prompt."""
        torch.manual_seed(seed)
        rows = [self.chat.prompt(prompt)[1] for prompt in prompts]
        longest = max(map(len, rows))
        pad = self.chat.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        made = self.model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=sampler.temperature, top_k=sampler.top_k, top_p=1.0,
            max_new_tokens=max_tokens, num_return_sequences=answers,
        )[:, longest:].tolist()  # fmt: skip
        found = [row[: row.index(self.eos)] if self.eos in row else row for row in made]
        steps = max(map(len, made))
        self.counts["LM forwards"] += steps
        self.counts["LM tokens"] += sum(map(len, rows)) * answers + len(made) * (steps - 1)
        return [found[i : i + answers] for i in range(0, len(found), answers)]

    def best_of_n(self, prompts: list[str], sampler: Sampler, max_tokens: int, n: int, seed: int) -> list[list[int]]:
        best = []
        for prompt, answers in zip(prompts, self.generate(prompts, sampler, max_tokens, n, seed), strict=True):
            rewards = self.rewards(prompt, answers)
            best.append(answers[rewards.index(max(rewards))])
        return best


COUNTED = ("LM forwards", "LM tokens", "RM forwards", "RM tokens")
