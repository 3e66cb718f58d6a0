"""How much memory a machine has left, for this process and all others."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")  # of a container


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be taken now.

    On a CPU that is what the operating system can give without swapping, and a container's limit allows; on a GPU
    what is free there, or held by torch for nothing.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min(int(psutil.virtual_memory().available), _left_in_container())


def _left_in_container() -> int:
    with suppress(OSError, ValueError):  # no limit is "max"
        return int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text()) + _file_pages()
    return 2**62


def _file_pages() -> int:
    """Bytes of cached files that count for a container, and that it gives up when memory is short."""
    for line in (CGROUP / "memory.stat").read_text().splitlines():
        name, _, size = line.partition(" ")
        if name == "inactive_file":
            return int(size)
    return 0
