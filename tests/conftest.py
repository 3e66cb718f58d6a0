"""Fixtures that all tests share; the network is off."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # the models here are too small to share among threads

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:  # the quick tests need no torch
    from cards_integrations.engine import Engine

settings.register_profile("here", deadline=None, derandomize=True)
settings.load_profile("here")

SHARED = Path(__file__).parents[2] / "shared"
Start = Callable[..., "Engine"]


@pytest.fixture(scope="session", autouse=True)
def cache_of_these_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of earlier runs is known, nothing of this one is remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARDS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Small models that are not part of the project."""
    folder = SHARED / "models"
    if not folder.is_dir():
        pytest.skip("../shared/models is not here")
    return folder


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(folder, width=..., ...)` is an engine of this test's own."""
    from cards_integrations.engine import Engine, EngineSettings
    from cards_integrations.models.local.settings import LocalModel

    engines: list[Engine] = []

    def start(model: str | Path, **settings: object) -> Engine:
        spec = LocalModel(model=str(model))
        engines.append(Engine(spec, EngineSettings.model_validate({"dtype": "float32", **settings})))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`models("llama")` is the folder of a tiny random model with the word tokenizer."""
    import tiny

    made: dict[tuple[object, ...], str] = {}

    def folder(family: str = "llama", classifier: bool = False, chat_template: str | None = None) -> str:
        key = (family, classifier, chat_template)
        if key not in made:
            tokenizer = tiny.words()
            tokenizer.chat_template = chat_template
            model = tiny.classifier(family) if classifier else tiny.causal(family)
            made[key] = tiny.save(tmp_path_factory.mktemp(family), model, tokenizer)
        return made[key]

    return folder
