"""Options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cards_integrations.llm import CardsLLM


@contextmanager
def imports_from_here() -> Iterator[None]:
    """Let settings import the functions that they name inside the block, also from the working directory."""
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
ModelOption = Annotated[
    str | None, typer.Option(help="Name, hub id, directory or GGUF file of the language model; by default smollm2.")
]
RewardOption = Annotated[
    str | None,
    typer.Option("--reward", help="Name, kind, hub id, directory or JSON of the reward; by default sentiment."),
]
DecodingOption = Annotated[
    str | None,
    typer.Option("--decoding", help="The method, as a name, name:setting=value,..., or JSON; by default cascade."),
]
MaxTokensOption = Annotated[int | None, typer.Option(help="Length limit of an answer, in tokens; by default 128.")]
TemperatureOption = Annotated[float | None, typer.Option(help="Temperature of the language model; by default 0.7.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the answer; by default each has a new one.")]
ThinkingOption = Annotated[
    str | None, typer.Option("--thinking", help="off, free or aligned; by default as the model's chat template does.")
]
TopKOption = Annotated[int | None, typer.Option(help="Draw among so many most probable tokens; by default 40.")]
TopPOption = Annotated[
    float | None, typer.Option(help="Draw among the most probable tokens up to this probability; by default 1.")
]
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
    """Return the options of a settings file and of the command line, which takes precedence; see `llm_from`."""
    from cards_integrations.registry import assignments
    from cards_integrations.settings import CardsSettings

    settings = CardsSettings.from_yaml(config, allow_imports=allow_imports).options() if config else {}
    given = {name: value for name, value in options.items() if value is not None}
    return {**settings, **assignments("--set", assigned or ()), **given}


def after_system(prompt: Any, system: str | None) -> Any:
    """Put the system message of `--system` before a prompt.

    Args:
        prompt: A text, or the messages of a conversation, which may be empty.
        system: The system message; None for none.

    Returns:
        Messages; without a system message, the prompt as it is.
    """
    if not system:
        return prompt
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *asked]
