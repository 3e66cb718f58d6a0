"""A logits processor for vLLM that ends segments where predictive uncertainty rises.

    vllm serve MODEL --logits-processors cards_integrations.vllm_plugin:EntropyStop

It acts only on requests with `cards_threshold` in their `vllm_xargs`.
"""

# mypy: disable-error-code="import-not-found, misc"
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from cards_integrations.uncertainty import Measure, uncertainty

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError:  # older than model runner V2
    LogitsProcessorV2 = object

if TYPE_CHECKING:
    from vllm import SamplingParams


class StopRule(NamedTuple):
    """When to end the segment of one request.

    `output` are the tokens of its output so far, a list to which vLLM appends (model runner V1). `ends` may not end the
    answer before `min_tokens` of output. `bias` is what vLLM has added to logits, `repetition` the penalty by which its
    model runner V2 has changed those of what was written; V1 does so later.
    """

    threshold: float
    measure: Measure
    min_length: int
    sentinel: int
    output: list[int] = []  # noqa: RUF012
    min_tokens: int = 0
    ends: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    repetition: float = 1.0


class Row(NamedTuple):
    """A row of the logits, the rule of its request, and how many tokens of output are before it.

    `penalized` are the tokens of prompt and output, if their logits are penalized by now.
    """

    at: int
    rule: StopRule
    length: int
    penalized: torch.Tensor | None = None


class EntropyStop(LogitsProcessor, LogitsProcessorV2):
    """Forces the sentinel token where the uncertainty of the raw logits reaches the threshold; forbids it elsewhere.

    It is never forced before `cards_min_length` tokens of output, and never where it is masked already: vLLM masks
    what a grammar (or `min_tokens`, or `allowed_token_ids`) forbids before processors run, and a grammar fails on any
    such token. Where a grammar allows the sentinel alone, it is not forbidden. `cards_min_tokens` does what vLLM's
    `min_tokens` would do, which forbids the sentinel with all other stop tokens. What vLLM has made of the logits by
    `logit_bias` and `repetition_penalty` is undone where uncertainty is measured.

    One class serves both of vLLM's model runners: V1 maps rows of the batch to requests in `update_state`, V2 in the
    context that it passes to `apply`.
    """

    def __init__(self, vllm_config: Any, *placement: Any) -> None:
        self.vocabulary = vllm_config.model_config.get_vocab_size()
        self.request_states = placement[0]  # a device with runner V1
        self.rules: dict[int, StopRule] = {}  # by row with runner V1, by request index with V2

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse invalid values; by that, a client recognises that the plug-in is installed.

        Raises:
            ValueError: A value of `vllm_xargs` is invalid.
        """
        asked = sampling_params.extra_args or {}
        if "cards_threshold" not in asked:
            return
        threshold, sentinel = asked["cards_threshold"], asked.get("cards_sentinel")
        if not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
            raise ValueError(f"cards_threshold={threshold!r} must be a finite number")
        if asked.get("cards_measure", "entropy") not in get_args(Measure):
            raise ValueError(f"cards_measure={asked['cards_measure']!r} must be one of {get_args(Measure)}")
        if not isinstance(asked.get("cards_min_length", 1), int):
            raise ValueError(f"cards_min_length={asked['cards_min_length']!r} must be an integer")
        if not isinstance(asked.get("cards_min_tokens", 0), int):
            raise ValueError(f"cards_min_tokens={asked['cards_min_tokens']!r} must be an integer")
        if not isinstance(sentinel, int) or sentinel < 0:
            raise ValueError(f"cards_sentinel={sentinel!r} must be the id of a token")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rules, batch_update, lambda params, _, output: self._rule(params, output))

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        rule = self._rule(sampling_params, [])
        if rule is None:
            self.rules.pop(req_idx, None)
            return False
        self.rules[req_idx] = rule
        return True

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        if not self.rules:
            return logits
        rows = self._rows() if ctx is None else self._rows_of_requests(ctx, len(logits))
        for measure in {row.rule.measure for row in rows}:
            self._end_segments(logits, measure, [row for row in rows if row.rule.measure == measure])
        return logits

    def _rule(self, params: SamplingParams, output: list[int]) -> StopRule | None:
        asked = params.extra_args or {}
        if "cards_threshold" not in asked or asked["cards_sentinel"] >= self.vocabulary:
            return None
        return StopRule(
            asked["cards_threshold"],
            asked.get("cards_measure", "entropy"),
            asked.get("cards_min_length", 1),
            asked["cards_sentinel"],
            output,
            least := asked.get("cards_min_tokens", 0),
            tuple(params.all_stop_token_ids - {asked["cards_sentinel"]}) if least else (),
            tuple((params.logit_bias or {}).items()),
            params.repetition_penalty,
        )

    def _rows(self) -> list[Row]:
        return [Row(row, rule, len(rule.output)) for row, rule in self.rules.items()]

    def _rows_of_requests(self, ctx: Any, rows: int) -> list[Row]:
        if rows == len(ctx.idx_mapping_np):
            requests, lengths = ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np  # on the host
        else:  # several rows of a request: tokens that a speculative model has proposed
            requests, lengths = ctx.expanded_idx_mapping.cpu().numpy(), (ctx.pos + 1).cpu().numpy()
        prompt = self.request_states.prompt_len.np
        found = []
        for row, request in enumerate(requests[:rows].tolist()):
            if rule := self.rules.get(request):
                length = int(lengths[row])
                penalized = None if rule.repetition == 1 else self._written(ctx, row, request, length)
                found.append(Row(row, rule, length - int(prompt[request]), penalized))
        return found

    def _written(self, ctx: Any, row: int, request: int, length: int) -> torch.Tensor:
        """The tokens before a row: those that are settled, and those that a speculative model has proposed since."""
        proposed = int(ctx.expanded_local_pos[row])
        settled = self.request_states.all_token_ids.gpu[request, : length - proposed]
        return torch.cat([settled, ctx.input_ids[row + 1 - proposed : row + 1]]).long()

    @staticmethod
    def _end_segments(logits: torch.Tensor, measure: Measure, rows: list[Row]) -> None:
        """Change these rows of the logits, in place."""
        thresholds = [row.rule.threshold if row.length >= row.rule.min_length else math.inf for row in rows]
        at = torch.tensor([row.at for row in rows], device=logits.device)
        limit = torch.tensor(thresholds, device=logits.device)
        sentinels = torch.tensor([[row.rule.sentinel] for row in rows], device=logits.device)
        own = logits[at]
        raw = own.clone()
        for values, row in zip(raw, rows, strict=True):
            if row.penalized is not None:
                old, penalty = values[row.penalized], row.rule.repetition
                values[row.penalized] = torch.where(old < 0, old / penalty, old * penalty)
            for token, bias in row.rule.bias:
                values[token] -= bias
        log_p = raw.log_softmax(-1).clamp_min(torch.finfo(own.dtype).min)  # p log p of a masked token is 0, and not NaN
        masked = own.gather(1, sentinels) == -math.inf
        risen = (uncertainty(measure, raw, log_p) >= limit).unsqueeze(1) & ~masked
        forbidden = own.scatter(1, sentinels, -math.inf)
        for values, row in zip(forbidden, rows, strict=True):
            if row.length < row.rule.min_tokens:
                values[list(row.rule.ends)] = -math.inf
        left = forbidden.amax(1, keepdim=True) > -math.inf  # it may be all that a grammar allows
        forced = torch.full_like(own, -math.inf).scatter_(1, sentinels, 0.0)
        logits[at] = torch.where(risen, forced, torch.where(left, forbidden, own))
