"""`cards serve`"""

from __future__ import annotations

import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cards_integrations.cli.options import (
    AllowImportsOption,
    ConfigOption,
    DecodingOption,
    MaxTokensOption,
    ModelOption,
    RewardOption,
    SeedOption,
    SetOption,
    TemperatureOption,
    ThinkingOption,
    options_from,
)
from cards_integrations.errors import SettingsError

if TYPE_CHECKING:
    from cards_integrations.server import ServerSettings

NEEDED = {
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "sse_starlette": "sse-starlette",
    "prometheus_client": "prometheus-client",
}
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MEMORY_SECONDS = 20.0  # between two times that memory which nothing uses goes back to the operating system
ANSWERS, LISTENING, REQUESTS = "Answers", "Listening", "What a request may ask for"


def serve(
    config: ConfigOption = None,
    allow_imports: AllowImportsOption = False,
    model: ModelOption = None,
    reward: RewardOption = None,
    decoding: DecodingOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    thinking: ThinkingOption = None,
    assigned: SetOption = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.", rich_help_panel=LISTENING)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port to listen on; 0 for a free one; 8000 by default.", rich_help_panel=LISTENING),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with an API key on each line. Without it, the environment variable CARDS_SERVER_API_KEY.",
            rich_help_panel=LISTENING,
        ),
    ] = None,
    grace: Annotated[
        int | None,
        typer.Option(help="Seconds that answers may take after SIGTERM; 30 by default.", rich_help_panel=LISTENING),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.", rich_help_panel=LISTENING)] = "info",
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log a line for each request.", rich_help_panel=LISTENING)
    ] = False,
    served_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", rich_help_panel=REQUESTS)
    ] = None,
    allow_reward: Annotated[
        list[str] | None,
        typer.Option(
            help="A reward that requests may choose, besides the embedded ones: NAME, or NAME=REWARD with a hub id, a "
            "directory or JSON. Repeat it for each.",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    only_allowed_rewards: Annotated[
        bool,
        typer.Option(
            "--only-allowed-rewards",
            help="Requests may choose those of --allow-reward only: no embedded ones, no settings of their own.",
            rich_help_panel=REQUESTS,
        ),
    ] = False,
    allow_method: Annotated[
        list[str] | None,
        typer.Option(help="Methods that requests may choose; by default all.", rich_help_panel=REQUESTS),
    ] = None,
    max_candidates: Annotated[
        int | None,
        typer.Option(help="Largest number in a request's method; 128 by default.", rich_help_panel=REQUESTS),
    ] = None,
    max_choices: Annotated[
        int | None, typer.Option(help="Most answers of one request; 16 by default.", rich_help_panel=REQUESTS)
    ] = None,
    max_answers: Annotated[
        int | None,
        typer.Option(help="Most answers at once, waiting ones included; 256 by default.", rich_help_panel=REQUESTS),
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Largest request, in bytes; 4 MiB by default.", rich_help_panel=REQUESTS)
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that an answer may take; 600 by default.", rich_help_panel=REQUESTS)
    ] = None,
) -> None:
    """Serve the model with OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics."""
    if missing := [name for module, name in NEEDED.items() if find_spec(module) is None]:
        raise SettingsError(f"cards serve needs {', '.join(missing)}: pip install 'cards-integrations[server]'.")
    from cards_integrations.settings import CardsSettings

    options = CardsSettings(
        **options_from(
            config, allow_imports, assigned, model=model, reward=reward, decoding=decoding, max_tokens=max_tokens,
            temperature=temperature, seed=seed, thinking=thinking,
        )
    )  # fmt: skip
    given = {
        "host": host, "port": port, "grace": grace, "served_name": served_name, "methods": allow_method or None,
        "max_candidates": max_candidates, "max_choices": max_choices, "max_answers": max_answers,
        "max_body_bytes": max_body_bytes, "timeout": timeout,
    }  # fmt: skip
    rewards = allowed_rewards(allow_reward or [], only_allowed_rewards)
    run(options, _settings(api_key_file, {**given, **rewards}), log_level, access_log)


def run(options: Any, settings: ServerSettings, log_level: str = "info", access_log: bool = False) -> None:
    """Load the models, then serve until SIGTERM or Ctrl-C."""
    import uvicorn

    from cards_integrations.server.app import create_app
    from cards_integrations.server.memory import give_back_unused, giving_back, share_one_heap

    share_one_heap()
    app = create_app(options, settings)
    if not settings.api_keys and settings.host not in LOOPBACK:
        typer.echo(f"warning: anybody who reaches {settings.host} may ask: set CARDS_SERVER_API_KEY.", err=True)
    _check_free(settings.host, settings.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # process 1 of a container would ignore it
    app.state.service.load()
    give_back_unused()
    with giving_back(MEMORY_SECONDS):
        uvicorn.run(
            app,
            host=settings.host,
            port=settings.port,
            log_level=log_level,
            access_log=access_log,
            timeout_graceful_shutdown=settings.grace + 1,  # after `grace`, when streams end, the rest is cut off
            server_header=False,
        )


def _check_free(host: str, port: int) -> None:
    """Raise a `SettingsError` if the address is taken, before the model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise SettingsError(f"cards serve cannot listen on {host} port {port}: {error.strerror or error}.") from None


def _settings(api_key_file: Path | None, given: dict[str, Any]) -> ServerSettings:
    from cards_integrations.server.settings import ServerSettings, read_keys

    found = {name: value for name, value in given.items() if value is not None}
    return ServerSettings(api_keys=read_keys(api_key_file), **found)


def allowed_rewards(allowed: list[str], only: bool = False) -> dict[str, Any]:
    """Return the rewards that a request may choose, as arguments of `ServerSettings`.

    Args:
        allowed: NAME, or NAME=REWARD, from the command line.
        only: Allow these alone: no embedded ones, and no settings in a request.
    """
    from cards_integrations.rewards import NAMED

    pairs = [text.partition("=") for text in allowed]
    rewards = {name: reward or name for name, _, reward in pairs}
    return {"rewards": rewards, "inline_rewards": ()} if only else {"rewards": {**NAMED, **rewards}}
