"""Files of weights that are read tensor by tensor, while transformers converts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors


@contextmanager
def read_piece_by_piece() -> Iterator[None]:
    """Have transformers read a tensor when it is converted, and free it then.

    Mapped files stay in memory, whole, until the last of their weights has been converted or sent to a device.
    """
    from transformers import modeling_utils

    before = modeling_utils.safe_open
    modeling_utils.safe_open = TensorFile
    try:
        yield
    finally:
        modeling_utils.safe_open = before


class TensorFile:
    """A safetensors file that is not mapped; its arguments are those of `safetensors.safe_open`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.file: Any
        try:
            self.file = safetensors.safe_open(*args, **{**options, "backend": "pread"})
        except TypeError:  # an older safetensors, which only maps
            self.file = safetensors.safe_open(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def get_slice(self, name: str) -> TensorSlice:
        return TensorSlice(self.file, name)


class TensorSlice:
    """A tensor that is yet to be read: as a whole at once, for safetensors cuts a slice from a second copy."""

    def __init__(self, file: Any, name: str) -> None:
        self.file = file
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file.get_slice(self.name), name)

    def __getitem__(self, index: Any) -> Any:
        return self.file.get_tensor(self.name) if index is ... else self.file.get_slice(self.name)[index]
