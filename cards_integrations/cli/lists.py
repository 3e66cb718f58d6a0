"""`cards rewards` and `cards models`"""

from __future__ import annotations

import inspect
import json
from typing import Annotated

import typer

from cards_integrations.cli.options import JsonOption
from cards_integrations.errors import SettingsError


def rewards(
    kind: Annotated[str | None, typer.Argument(help="Print the settings of this kind, as a JSON schema.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the kinds of rewards, those of plug-ins included; with a name, print its settings."""
    from rich.console import Console
    from rich.table import Table

    from cards_integrations.rewards.registry import known_rewards, reward_class

    if kind is not None:
        print(json.dumps(reward_class(kind).model_json_schema(), indent=2))
        return
    kinds = {name: _summary(name) for name in known_rewards()}
    if as_json:
        print(json.dumps(kinds))
        return
    table = Table("kind", "what it scores", box=None)
    for name, summary in kinds.items():
        table.add_row(name, summary)
    Console().print(table)


def _summary(kind: str) -> str:
    """Return the first paragraph of the documentation of a kind, or why its plug-in does not load."""
    from cards_integrations.rewards.registry import reward_class

    try:
        summary = (inspect.getdoc(reward_class(kind)) or "").partition("\n\n")[0]
    except SettingsError as error:
        summary = str(error)
    return " ".join(summary.split())


def models(as_json: JsonOption = False) -> None:
    """List what works here without a hub: embedded models, named rewards, the device, and the cache directory."""
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
