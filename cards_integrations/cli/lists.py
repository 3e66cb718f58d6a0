"""`cards rewards` and `cards models`"""

from __future__ import annotations

import inspect
import json
from typing import Annotated

import typer

from cards_integrations.cli.options import Json
from cards_integrations.errors import SettingsError


def rewards(
    kind: Annotated[str | None, typer.Argument(help="Show the settings of this kind, as a JSON schema.")] = None,
    as_json: Json = False,
) -> None:
    """The kinds of rewards, those of plug-ins included; with a name, its settings."""
    from rich.console import Console
    from rich.table import Table

    from cards_integrations.rewards.registry import known_rewards, reward_class

    if kind is not None:
        print(json.dumps(reward_class(kind).model_json_schema(), indent=2))
        return
    kinds = {name: _said_of(name) for name in known_rewards()}
    if as_json:
        print(json.dumps(kinds))
        return
    table = Table("kind", "what it scores", box=None)
    for name, said in kinds.items():
        table.add_row(name, said)
    Console().print(table)


def _said_of(kind: str) -> str:
    """The first lines of its own documentation; of a plug-in that does not load, why not."""
    from cards_integrations.rewards.registry import reward_class

    try:
        said = (inspect.getdoc(reward_class(kind)) or "").partition("\n\n")[0]
    except SettingsError as error:
        said = str(error)
    return " ".join(said.split())


def models(as_json: Json = False) -> None:
    """What works here without a hub: embedded models, named rewards, and the device that would be used."""
    from rich.console import Console

    from cards_integrations.models.local.embedded import MINILM, SMOLLM2
    from cards_integrations.models.local.loader import ModelLoader
    from cards_integrations.models.local.settings import Placement
    from cards_integrations.paths import cache_dir
    from cards_integrations.rewards import NAMED

    loader = ModelLoader(Placement())
    found = {
        "embedded": [SMOLLM2, MINILM],
        "rewards": sorted(NAMED),
        "device": str(loader.device),
        "cache": str(cache_dir()),
    }
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        Console().print(f"[bold]{name}[/bold]: {', '.join(value) if isinstance(value, list) else value}")
