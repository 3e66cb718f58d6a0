"""Which rows of a batch `EntropyStop` changes, in the forms of both of vLLM's model runners.

V2 needs Triton and so does not run on a CPU: its processor is called here with vLLM's own types, not by vLLM.
"""

from __future__ import annotations

import os
import subprocess

from conftest import ENVIRONMENT, PYTHON

SCRIPT = r"""
from types import SimpleNamespace as Some

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

from cards_integrations.uncertainty import uncertainty
from cards_integrations.vllm_plugin import EntropyStop

V, SENTINEL = 48, 2
config = Some(model_config=Some(get_vocab_size=lambda: V))
torch.manual_seed(0)
logits = torch.randn(6, V) * torch.tensor([[0.1], [3.0], [0.1], [3.0], [0.1], [0.1]])
measures = ["entropy", "entropy", "max_probability", "evidential", None, "entropy"]
values = [float(uncertainty(m, r[None], r[None].log_softmax(-1))) if m else 0.0 for m, r in zip(measures, logits)]
above = [True, False, True, False, True, True]
lengths = [4, 4, 9, 4, 4, 1]  # the last one is too short to end


def params(i):
    if measures[i] is None:
        return SamplingParams()
    asked = {"cards_threshold": values[i] - 1e-3 if above[i] else values[i] + 1e-3, "cards_measure": measures[i]}
    return SamplingParams(extra_args={**asked, "cards_min_length": 2, "cards_sentinel": SENTINEL})


expected = logits.clone()
for i in range(6):
    if measures[i] is not None:
        if above[i] and lengths[i] >= 2:
            expected[i] = -torch.inf
            expected[i, SENTINEL] = 0.0
        else:
            expected[i, SENTINEL] = -torch.inf

one = EntropyStop(config, torch.device("cpu"), False)
written = [[7] * n for n in lengths]
one.update_state(BatchUpdate(6, [], [(i, params(i), [9], written[i]) for i in range(6)], []))
assert torch.equal(one.apply(logits.clone()), expected)
one.update_state(None)
one.update_state(BatchUpdate(5, [1], [], [(5, 1, MoveDirectionality.UNIDIRECTIONAL), (0, 2, MoveDirectionality.SWAP)]))
moved = [2, 5, 0, 3, 4]
assert torch.equal(one.apply(logits[moved].clone()), expected[moved])
written[5].append(7)  # vLLM adds to the list that it gave
assert one.apply(logits[moved].clone())[1, SENTINEL] == 0.0
one.update_state(BatchUpdate(0, [0, 1, 2, 3, 4], [], []))
assert one.rules == {}

slots = [3, 0, 7, 5, 1, 2]  # of the six requests
prompt = np.zeros(8, dtype=np.int32)
prompt[slots] = [10, 11, 12, 13, 14, 15]
two = EntropyStop(config, Some(prompt_len=Some(np=prompt)))
assert two.add_request(1, params(0))  # who was there before does not matter
assert [two.add_request(slot, params(i)) for i, slot in enumerate(slots)] == [m is not None for m in measures]
seen = prompt[slots] + lengths


def context(rows):
    index = torch.tensor(slots, dtype=torch.int32)
    return LogitsContext(
        expanded_idx_mapping=index[rows], idx_mapping=index, idx_mapping_np=index.numpy(),
        expanded_local_pos=torch.zeros(len(rows)), input_ids=torch.zeros(len(rows)),
        pos=torch.tensor(seen)[rows] - 1, seq_lens_upper_bound_np=seen,
    )


assert torch.equal(two.apply(logits.clone(), context(list(range(6)))), expected)
guessed = [0, 0, 1, 2, 3, 4, 5, 5]  # two rows for some
assert torch.equal(two.apply(logits[guessed].clone(), context(guessed)), expected[guessed])
written[0] = [7] * 4
held = EntropyStop(config, torch.device("cpu"), False)
held.update_state(BatchUpdate(2, [], [(i, params(0), [9], written[0]) for i in range(2)], []))
masked = logits[[0, 0]].clone()
masked[0, SENTINEL] = -torch.inf  # by a grammar: the row is left alone
masked[1, :SENTINEL] = masked[1, SENTINEL + 1 :] = -torch.inf  # by a grammar that allows nothing else
assert torch.equal(held.apply(masked.clone()), masked)
print("as expected")
"""


def test_both_runners_change_the_same_rows() -> None:
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "as expected"
