"""GGUF files as models: converted once into the cache directory, and from there on like any other model."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from cards_integrations.errors import ModelError
from cards_integrations.models.local.embedded import convert_once
from cards_integrations.models.local.load_lock import load_lock
from cards_integrations.paths import cache_dir, is_directory

log = logging.getLogger("cards_integrations")
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
WHOLE = {"F32": "float32", "F16": "float16"}  # the dtype that holds weights of a type as they are


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a path names, or that is the only model in a folder; None for another model.

    Raises:
        ModelError: A folder has several, or the file is one part of a model.
    """
    path = Path(name).expanduser()
    if not name.endswith(".gguf"):
        found = _models_in(path) if is_directory(str(path)) and not (path / "config.json").exists() else []
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:5])
            raise ModelError(f"model={name!r} has {len(found)} GGUF files ({names}): pass the path of one of them.")
        if not found:
            return None
        [path] = found
    elif not path.is_file():
        return None
    if SPLIT.search(path.name):
        raise ModelError(
            f"model={name!r} is one part of a GGUF file that was split: join the parts with "
            "`llama-gguf-split --merge` of llama.cpp."
        )
    return path


def _models_in(folder: Path) -> list[Path]:
    """Return the files with language models, without those for images."""
    return sorted(file for file in folder.glob("*.gguf") if not file.name.startswith("mmproj"))


def converted(file: Path) -> Path:
    """Return the directory with the weights of a GGUF file in safetensors, written at its first use.

    A file that has changed since is converted anew.

    Raises:
        ModelError: transformers cannot read it.
    """
    state = file.stat()
    which = hashlib.sha256(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    return convert_once(cache_dir() / "gguf" / f"{file.stem}-{which}", lambda to: _convert(file, to))


def _convert(file: Path, target: Path) -> None:
    dtype = _dtype(file)
    log.info("converting %s into %s, in %s, once", file, target.parent, dtype)
    try:
        with load_lock():
            _model(file, dtype).save_pretrained(target)
            _tokenizer(file).save_pretrained(target)
    except Exception as error:
        raise ModelError(f"model={str(file)!r}: transformers cannot read this GGUF file: {error}") from error


def _dtype(file: Path) -> str:
    """That of the weights once they are unpacked: of most of them, if they are not packed.

    Raises:
        ModelError: It is no GGUF file.
    """
    from gguf import GGUFReader

    try:
        sizes: dict[str, int] = {}
        for tensor in GGUFReader(file).tensors:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
        return WHOLE.get(max(sizes, key=sizes.__getitem__), "bfloat16")
    except Exception as error:
        raise ModelError(
            f"model={str(file)!r} is no whole GGUF file ({type(error).__name__}): download it again."
        ) from error


def _model(file: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=getattr(torch, dtype), **_unpacked()
    )


def _unpacked() -> dict[str, Any]:
    """The option with which transformers unpacks weights, where it would leave them as they are."""
    try:
        from transformers import GgufConfig
    except ImportError:  # unpacks all
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _tokenizer(file: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
