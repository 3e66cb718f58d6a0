"""Options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cards_integrations.errors import SettingsError, short_repr

if TYPE_CHECKING:
    from cards_integrations.llm import CardsLLM


@contextmanager
def imports_from_here() -> Iterator[None]:
    """Let settings name code to import, from the working directory, too, where Python itself would look."""
    from cards_integrations.rewards.function import imports_allowed

    if "" not in sys.path:
        sys.path.append("")  # last, so that nothing there hides a library
    with imports_allowed():
        yield


def _allow_imports(context: typer.Context, allowed: bool) -> bool:
    if allowed:
        context.with_resource(imports_from_here())  # as long as the command runs
    return allowed


ConfigOption = Annotated[Path | None, typer.Option(help="Settings as YAML; the other options override it.")]
AllowImportsOption = Annotated[
    bool,
    typer.Option(
        help="Let the settings, --reward included, import the reward function that they name.", callback=_allow_imports
    ),
]
ModelOption = Annotated[str | None, typer.Option(help="Name, hub id or directory of the language model.")]
RewardOption = Annotated[
    str | None, typer.Option("--reward", help="Name, kind, hub id, directory or JSON of the reward.")
]
DecodingOption = Annotated[
    str | None, typer.Option("--decoding", help="The method, as a name, name:setting=value,..., or JSON.")
]
MaxTokensOption = Annotated[int | None, typer.Option(help="Length limit of an answer, in tokens.")]
TemperatureOption = Annotated[float | None, typer.Option(help="Temperature of the language model.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the answer; by default each has a new one.")]
ThinkingOption = Annotated[
    str | None, typer.Option("--thinking", help="off, free or aligned; by default as the model's chat template does.")
]
TopKOption = Annotated[int | None, typer.Option(help="Draw among so many most probable tokens.")]
TopPOption = Annotated[float | None, typer.Option(help="Draw among the most probable tokens up to this probability.")]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="A text at which the answer ends; repeat it for each.")
]
SystemOption = Annotated[str | None, typer.Option(help="The system message.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any other option, such as min_p=0.05; repeat it for each.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def file_to_write(help: str) -> Any:
    """Return an option for a file to write; a file that cannot be written is refused before the work begins."""
    return typer.Option(help=help, dir_okay=False, writable=True, callback=_check_folder)


def _check_folder(path: Path | None) -> Path | None:
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"There is no folder '{path.parent}'.")
    return path


def llm_from(config: Path | None, allow_imports: bool, assigned: list[str] | None = None, **options: Any) -> CardsLLM:
    """Build an LLM from a settings file and the options of the command line.

    Args:
        config: The settings file.
        allow_imports: Let it import the reward function that it names.
        assigned: Further options as name=value, the value as in YAML.
        options: Options of `CardsLLM`; None leaves that of the file, or the default.
    """
    from cards_integrations.llm import CardsLLM

    return CardsLLM(**options_from(config, allow_imports, assigned, **options))


def options_from(
    config: Path | None, allow_imports: bool, assigned: list[str] | None = None, **options: Any
) -> dict[str, Any]:
    """The options of a settings file and of the command line, as for `llm_from`."""
    from cards_integrations.settings import CardsSettings

    settings = CardsSettings.from_yaml(config, allow_imports=allow_imports).options() if config else {}
    given = {name: value for name, value in options.items() if value is not None}
    if "decoding" in given:
        given["decoding"] = decoding_from(given["decoding"])
    return {**settings, **_assignments("--set", assigned or ()), **given}


def after_system(prompt: Any, system: str | None) -> Any:
    """What is asked, after the message of `--system` if there is one.

    Args:
        prompt: A text, or the messages of a conversation; none of them yet is fine.
        system: The system message.

    Returns:
        The prompt as it is without a system message, otherwise messages.
    """
    if not system:
        return prompt
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *asked]


def decoding_from(text: str) -> Any:
    """Read a decoding method from the command line.

    Args:
        text: `cards`, `best_of_n:n=8`, `cards:target_reward=1.2,beta=0.1`, or JSON.

    Raises:
        SettingsError: If it is none.
    """
    from cards_integrations.decoding import as_decoding

    if text.lstrip().startswith("{"):
        return as_decoding(text)
    name, _, settings = text.partition(":")
    return as_decoding({"method": name, **_assignments(f"--decoding {text!r}", filter(None, settings.split(",")))})


def _assignments(option: str, parts: Iterable[str]) -> dict[str, Any]:
    """The settings of texts such as `beta=0.1`, whose values are YAML."""
    import yaml

    fields: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise SettingsError(f"{option}: {part!r} is not setting=value.")
        try:
            fields[key.strip()] = yaml.safe_load(value)
        except Exception:  # PyYAML raises errors of many types for a bad scalar
            raise SettingsError(f"{option}: {short_repr(value)} is not a value.") from None
    return fields
