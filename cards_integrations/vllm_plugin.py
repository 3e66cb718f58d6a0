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
    answer before `min_tokens` of output. `bias` is what vLLM has added to logits.
    """

    threshold: float
    measure: Measure
    min_length: int
    sentinel: int
    output: list[int] = []  # noqa: RUF012
    min_tokens: int = 0
    ends: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()


class EntropyStop(LogitsProcessor, LogitsProcessorV2):
    """Forces the sentinel token where the uncertainty of the raw logits reaches the threshold; forbids it elsewhere.

    It is never forced before `cards_min_length` tokens of output, and never where it is masked already: vLLM masks
    what a grammar (or `min_tokens`, or `allowed_token_ids`) forbids before processors run, and a grammar fails on any
    such token. Where a grammar allows the sentinel alone, it is not forbidden. `cards_min_tokens` does what vLLM's
    `min_tokens` would do, which forbids the sentinel with all other stop tokens. A `logit_bias`, which vLLM has added,
    is taken off where uncertainty is measured.

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
        for measure in {rule.measure for _, rule, _ in rows}:
            self._end_segments(logits, measure, [row for row in rows if row[1].measure == measure])
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
        )

    def _rows(self) -> list[tuple[int, StopRule, int]]:
        """Row of the logits, its rule, and the tokens of output before it."""
        return [(row, rule, len(rule.output)) for row, rule in self.rules.items()]

    def _rows_of_requests(self, ctx: Any, rows: int) -> list[tuple[int, StopRule, int]]:
        if rows == len(ctx.idx_mapping_np):
            requests, lengths = ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np  # on the host
        else:  # several rows of a request: tokens that a speculative model has proposed
            requests, lengths = ctx.expanded_idx_mapping.cpu().numpy(), (ctx.pos + 1).cpu().numpy()
        prompt = self.request_states.prompt_len.np
        return [
            (row, self.rules[request], int(lengths[row] - prompt[request]))
            for row, request in enumerate(requests[:rows].tolist())
            if request in self.rules
        ]

    @staticmethod
    def _end_segments(logits: torch.Tensor, measure: Measure, rows: list[tuple[int, StopRule, int]]) -> None:
        """Change these rows of the logits, in place."""
        thresholds = [rule.threshold if length >= rule.min_length else math.inf for _, rule, length in rows]
        at = torch.tensor([row for row, *_ in rows], device=logits.device)
        limit = torch.tensor(thresholds, device=logits.device)
        sentinels = torch.tensor([[rule.sentinel] for _, rule, _ in rows], device=logits.device)
        own = logits[at]
        raw = own.clone()
        for row, (_, rule, _) in enumerate(rows):
            for token, bias in rule.bias:
                raw[row, token] -= bias
        log_p = raw.log_softmax(-1).clamp_min(torch.finfo(own.dtype).min)  # p log p of a masked token is 0, and not NaN
        masked = own.gather(1, sentinels) == -math.inf
        risen = (uncertainty(measure, raw, log_p) >= limit).unsqueeze(1) & ~masked
        forbidden = own.scatter(1, sentinels, -math.inf)
        for row, (_, rule, length) in enumerate(rows):
            if length < rule.min_tokens:
                forbidden[row, list(rule.ends)] = -math.inf
        left = forbidden.amax(1, keepdim=True) > -math.inf  # it may be all that a grammar allows
        forced = torch.full_like(own, -math.inf).scatter_(1, sentinels, 0.0)
        logits[at] = torch.where(risen, forced, torch.where(left, forbidden, own))
