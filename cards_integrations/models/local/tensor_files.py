"""Files of weights that are read piece by piece, while transformers converts them or sends them to a device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

if TYPE_CHECKING:
    import torch

PIECE = 2**21  # numbers that are read at once
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # torch's names of dtypes, by those in a file


@contextmanager
def read_piece_by_piece() -> Iterator[None]:
    """Have transformers read a tensor when it is converted, and no more of it at once than a piece.

    Mapped files would stay in memory, whole, until the last of their weights has been converted or sent to a device;
    and the table of embeddings, read as a whole, may be more than half of a small model.
    """
    from transformers import core_model_loading, modeling_utils

    before = modeling_utils.safe_open, core_model_loading._materialize_copy
    modeling_utils.safe_open, core_model_loading._materialize_copy = TensorFile, _read
    try:
        yield
    finally:
        modeling_utils.safe_open, core_model_loading._materialize_copy = before


def _read(tensor: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor, or what is yet to be read of one, on a device and in a dtype; None leaves it as it is."""
    import torch

    name = FLOATS.get(tensor.get_dtype()) if isinstance(tensor, TensorSlice) else None
    stored = getattr(torch, name) if name else None
    on_host = device is None or torch.device(device).type == "cpu"
    if stored is None or (on_host and dtype in (None, stored)):
        whole: torch.Tensor = tensor[...]
        return whole.to(device=device, dtype=dtype)
    made = torch.empty(tensor.get_shape(), device=device, dtype=dtype or stored)
    left = made.view(-1)
    for piece in tensor.pieces(stored.itemsize):
        read = torch.frombuffer(piece, dtype=stored)
        left[: len(read)] = read
        left = left[len(read) :]
    return made


class TensorFile:
    """A safetensors file that is not mapped; its arguments are those of `safetensors.safe_open`."""

    def __init__(self, path: Any, *args: Any, **options: Any) -> None:
        self.path = Path(path)
        self.file: Any
        try:
            self.file = safetensors.safe_open(path, *args, **{**options, "backend": "pread"})
        except TypeError:  # an older safetensors, which only maps
            self.file = safetensors.safe_open(path, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def get_slice(self, name: str) -> TensorSlice:
        return TensorSlice(self, name)

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """The first byte of each tensor, and the one after its last."""
        with self.path.open("rb") as file:
            begun = 8 + (length := int.from_bytes(file.read(8), "little"))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: tuple(begun + at for at in tensor["data_offsets"]) for name, tensor in header.items()}


class TensorSlice:
    """A tensor that is yet to be read: by pieces, or as a whole, for safetensors cuts a slice from a second copy."""

    def __init__(self, file: TensorFile, name: str) -> None:
        self.file = file
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file.file.get_slice(self.name), name)

    def __getitem__(self, index: Any) -> Any:
        return self.file.get_tensor(self.name) if index is ... else self.file.file.get_slice(self.name)[index]

    def pieces(self, itemsize: int) -> Iterator[bytearray]:
        """Yield the bytes of the tensor, some of its numbers at a time."""
        at, end = self.file.places[self.name]
        with self.file.path.open("rb") as file:
            file.seek(at)
            for begun in range(at, end, PIECE * itemsize):
                piece = bytearray(min(PIECE * itemsize, end - begun))
                if file.readinto(piece) < len(piece):
                    raise OSError(f"{self.file.path} ends within {self.name!r}.")
                yield piece
