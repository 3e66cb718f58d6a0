"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cards_integrations.errors import SettingsError, short_repr

if TYPE_CHECKING:
    from cards_integrations.llm import CardsLLM

Config = Annotated[Path | None, typer.Option(help="Settings as YAML; the other options override it.")]
AllowImports = Annotated[bool, typer.Option(help="The settings may name a reward function to import.")]
Model = Annotated[str | None, typer.Option(help="Name, hub id or directory of the language model.")]
RewardOption = Annotated[str | None, typer.Option("--reward", help="Name, hub id, directory, or JSON of the reward.")]
Method = Annotated[str | None, typer.Option("--decoding", help="A method: its name, name:setting=value,..., or JSON.")]
MaxTokens = Annotated[int | None, typer.Option(help="Length limit of an answer.")]
Temperature = Annotated[float | None, typer.Option(help="Of the language model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def file_to_write(help: str) -> Any:
    """An option for a file to write: refused before anything is loaded, and not after the work."""
    return typer.Option(help=help, dir_okay=False, writable=True, callback=_in_a_folder)


def _in_a_folder(path: Path | None) -> Path | None:
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"There is no folder '{path.parent}'.")
    return path


def llm_from(config: Path | None, allow_imports: bool, **options: Any) -> CardsLLM:
    """An LLM from a settings file and the options of the command line."""
    import transformers

    from cards_integrations.llm import CardsLLM
    from cards_integrations.settings import CardsSettings

    transformers.utils.logging.disable_progress_bar()
    settings = CardsSettings.from_yaml(config, allow_imports=allow_imports).options() if config else {}
    given = {name: value for name, value in options.items() if value is not None}
    if "decoding" in given:
        given["decoding"] = decoding_from(given["decoding"])
    return CardsLLM(**{**settings, **given})


def decoding_from(text: str) -> Any:
    """`cards`, `best_of_n:n=8`, `cards:target_reward=1.2,beta=0.1`, or JSON."""
    import yaml

    from cards_integrations.decoding import as_decoding

    if text.lstrip().startswith("{"):
        return as_decoding(text)
    name, _, settings = text.partition(":")
    found: dict[str, Any] = {"method": name}
    for part in filter(None, settings.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise SettingsError(f"--decoding {text!r}: {part!r} is not setting=value.")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except Exception:  # PyYAML has errors of many types for one bad scalar
            raise SettingsError(f"--decoding {text!r}: {short_repr(value)} is no value.") from None
    return as_decoding(found)
