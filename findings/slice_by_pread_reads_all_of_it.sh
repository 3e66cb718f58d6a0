#!/usr/bin/env bash
# A slice of a safetensors file that is opened with `backend="pread"` reads all of its tensor, each time.
#
# safetensors 0.8.0, numpy 2.4.6, Linux (bytes are counted by /proc/self/io). transformers opens files so on Windows and on
#   Apple's GPUs.
# Expected: `get_slice(name)[:k]` reads k rows, as it touches only these with `backend="mmap"`.
# Seen: a hundredth of a table of 64 MB reads 64 MB, and so does the next hundredth. What reads a large table by slices, to
#   convert it or to shard it, reads it once for each slice, and holds a second copy meanwhile.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "safetensors==0.8.0" "numpy==2.4.6"
cd "$work"
"$work/venv/bin/python" - <<'PY'
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

print("safetensors", safetensors.__version__)
table = np.arange(64_000 * 256, dtype=np.float32).reshape(64_000, 256)
save_file({"table": table}, "table.safetensors")


def read_so_far():
    return int(Path("/proc/self/io").read_text().split()[1])


share = {}
for backend in ("mmap", "pread"):
    with safetensors.safe_open("table.safetensors", "np", backend=backend) as file:
        rows = file.get_slice("table")
        for begin in (0, 640):
            before = read_so_far()
            assert (rows[begin : begin + 640] == table[begin : begin + 640]).all()
            share[backend, begin] = (read_so_far() - before) / table.nbytes
for (backend, begin), read in share.items():
    print(f"{backend}: rows {begin} to {begin + 639} of 64,000: {read:.2f} of the table's bytes are read")
assert share["mmap", 0] < 0.01 and share["mmap", 640] < 0.01
assert share["pread", 0] > 0.99 and share["pread", 640] > 0.99, "changed: a slice used to read all of its tensor"
PY
