"""A logits processor for vLLM that ends segments where predictive uncertainty rises.

    vllm serve MODEL --logits-processors cards_integrations.vllm_plugin:EntropyStop

It acts on requests with `cards_threshold` in their `vllm_xargs`, and on no others.
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
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor
except ImportError:  # older than model runner V2
    SlotLogitsProcessor = object

if TYPE_CHECKING:
    from vllm import SamplingParams


class Stop(NamedTuple):
    """What one request asks for; `written` are the tokens of its output so far, as vLLM adds to them (runner V1)."""

    threshold: float
    measure: Measure
    min_length: int
    sentinel: int
    written: list[int] = []  # noqa: RUF012


class EntropyStop(LogitsProcessor, SlotLogitsProcessor):
    """Forces the sentinel where the uncertainty of the raw logits reaches the threshold, and forbids it elsewhere.

    From `cards_min_length` tokens of output on. One class for both of vLLM's model runners: V1 says which row
    of the batch is whose in `update_state`, V2 in the context that it passes to `apply`.
    """

    def __init__(self, vllm_config: Any, *placement: Any) -> None:
        self.vocabulary = vllm_config.model_config.get_vocab_size()
        self.requests = placement[0]  # a device with runner V1
        self.stops: dict[int, Stop] = {}  # by row with runner V1, by slot with V2

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what cannot be meant; a client tells by it that the plug-in is there."""
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
        if not isinstance(sentinel, int) or sentinel < 0:
            raise ValueError(f"cards_sentinel={sentinel!r} must be the id of a token")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.stops, batch_update, lambda params, _, written: self._stop(params, written))

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        stop = self._stop(sampling_params, [])
        if stop is None:
            self.stops.pop(req_idx, None)
            return False
        self.stops[req_idx] = stop
        return True

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        if not self.stops:
            return logits
        rows = self._rows() if ctx is None else self._rows_of_slots(ctx, len(logits))
        for measure in {stop.measure for _, stop, _ in rows}:
            self._end(logits, measure, [row for row in rows if row[1].measure == measure])
        return logits

    def _stop(self, params: SamplingParams, written: list[int]) -> Stop | None:
        asked = params.extra_args or {}
        if "cards_threshold" not in asked or asked["cards_sentinel"] >= self.vocabulary:
            return None
        return Stop(
            asked["cards_threshold"],
            asked.get("cards_measure", "entropy"),
            asked.get("cards_min_length", 1),
            asked["cards_sentinel"],
            written,
        )

    def _rows(self) -> list[tuple[int, Stop, int]]:
        """Row of the logits, what is asked of it, tokens of output before it."""
        return [(row, stop, len(stop.written)) for row, stop in self.stops.items()]

    def _rows_of_slots(self, ctx: Any, rows: int) -> list[tuple[int, Stop, int]]:
        if rows == len(ctx.idx_mapping_np):
            slots, seen = ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np  # on the host
        else:  # several rows of a request: tokens that a speculator has guessed
            slots, seen = ctx.expanded_idx_mapping.cpu().numpy(), (ctx.pos + 1).cpu().numpy()
        prompt = self.requests.prompt_len.np
        return [
            (row, self.stops[slot], int(seen[row] - prompt[slot]))
            for row, slot in enumerate(slots[:rows].tolist())
            if slot in self.stops
        ]

    @staticmethod
    def _end(logits: torch.Tensor, measure: Measure, rows: list[tuple[int, Stop, int]]) -> None:
        """Change these rows, in place."""
        thresholds = [stop.threshold if length >= stop.min_length else math.inf for _, stop, length in rows]
        at = torch.tensor([row for row, *_ in rows], device=logits.device)
        limit = torch.tensor(thresholds, device=logits.device)
        sentinels = torch.tensor([[stop.sentinel] for _, stop, _ in rows], device=logits.device)
        own = logits[at]
        risen = uncertainty(measure, own, own.log_softmax(-1)) >= limit
        forced = torch.full_like(own, -math.inf).scatter_(1, sentinels, 0.0)
        logits[at] = torch.where(risen.unsqueeze(1), forced, own.scatter(1, sentinels, -math.inf))
