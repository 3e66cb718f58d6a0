"""From the name of a model to what transformers can load, and to its config."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from cards_integrations.errors import ModelError, SettingsError, nearest, unknown_name
from cards_integrations.models.local.embedded import MINILM, SMOLLM2, embedded_model
from cards_integrations.models.local.gguf_files import converted, gguf_file
from cards_integrations.models.local.load_lock import load_errors
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.paths import is_directory, names_beside

UNLIMITED = 2**31


def resolve_model(name: str) -> str:
    """Return the directory or the hub id that transformers can load.

    Args:
        name: An embedded name, a directory, a GGUF file or a hub id.

    Raises:
        SettingsError: The name is none of them.
        ModelError: The wheel of an embedded model is not installed, there is no such path, or its GGUF file cannot
            be read.
    """
    embedded = embedded_model(name)
    if embedded is not None:
        return str(embedded)
    gguf = gguf_file(name)
    if gguf is not None:
        return str(converted(gguf))
    found = _directory_or_hub_id("model", name)
    if found is None:
        hint = " Or pass a hub id (owner/name) or a local directory."
        raise unknown_name("model", name, [SMOLLM2, MINILM], hint, _beside(name))
    return found


def resolve_adapter(name: str) -> str:
    """Return the directory or the hub id that peft can load.

    Raises:
        SettingsError: The name is neither.
        ModelError: There is no such path, or no adapter in it.
    """
    found = _directory_or_hub_id("adapter", name)
    if found is None:
        near = nearest(name, (), _beside(name))
        raise SettingsError(f"adapter={name!r}: pass a hub id (owner/name) or a local directory.{near}")
    if is_directory(found) and not (Path(found) / "adapter_config.json").exists():
        raise ModelError(f"adapter={name!r}: there is no adapter_config.json in this directory. Check the path.")
    return found


def _directory_or_hub_id(setting: str, name: str) -> str | None:
    """Return the directory or hub id of a name; None for a single word that is no directory here.

    Raises:
        ModelError: It is a path that does not exist.
    """
    folder = Path(name).expanduser()
    for directory in (name, str(folder)):
        if is_directory(directory):
            return directory
    if _is_path(name):
        raise ModelError(f"{setting}={name!r}: {_what_is_there(folder)}")
    return name if "/" in name else None


def _beside(name: str) -> dict[str, str]:
    """Return the folders that a single word may mean, and how to name each."""
    return {found: repr(f"./{found}") for found in names_beside(Path(name))}


def _is_path(name: str) -> bool:
    """True for a name that cannot be a hub id (owner/name)."""
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith(("/", ".gguf"))


def _what_is_there(path: Path) -> str:
    """Return why a path that is no directory cannot be a model."""
    if path.is_file():
        return "this is a file; pass the directory that it is in (or a .gguf file, as a model)."
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if there == Path():
        return "there is no such path."
    return f"there is no such file or directory ({there} is there).{nearest(path.name, names_beside(path))}"


def load_config(spec: LocalModel) -> Any:
    """Return the transformers config of a model.

    Raises:
        ModelError: It cannot be read, or the directory has none.
    """
    from transformers import AutoConfig

    with load_errors(spec.model):
        found = resolve_model(spec.model)
        if is_directory(found) and not (Path(found) / "config.json").exists():
            adapter = (Path(found) / "adapter_config.json").exists()
            mend = "It is an adapter: pass it as adapter=, and its base as model=." if adapter else "Check the path."
            raise ModelError(f"model={spec.model!r}: there is no config.json in this directory. {mend}")
        return AutoConfig.from_pretrained(found, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


def with_config_here(spec: LocalModel) -> LocalModel | None:
    """Return the model at the local directory of its config; None if that takes network, conversion or remote code."""
    if spec.trust_remote_code or gguf_file(spec.model) is not None:
        return None
    found = resolve_model(spec.model)
    if not is_directory(found):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(found, "config.json", revision=spec.revision)
        found = str(Path(cached).parent) if isinstance(cached, str) else ""
    return LocalModel(model=found) if found else None


def chat_template_here(spec: LocalModel) -> str:
    """Return the source of a model's chat template from the files in its directory; "" if there is none."""
    folder = Path(resolve_model(spec.model))
    try:
        if (alone := folder / "chat_template.jinja").exists():
            return alone.read_text(encoding="utf-8")
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return str(found.get("chat_template") or "")
    except (OSError, ValueError, AttributeError):
        return ""


read_config = lru_cache(load_config)


def max_positions(config: Any) -> int:
    """Return how many positions a model's config allows; practically unlimited if it names no number."""
    named = int(getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)
    return named if named > 0 else UNLIMITED  # XLNet says -1


def readable_positions(model: Any) -> int:
    """Return how many tokens a model reads. In models like RoBERTa positions begin after that of padding."""
    named = max_positions(model.config)
    embeddings = getattr(model.base_model, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return named if padding is None else named - padding - 1
