"""`cards mcp`"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from cards_integrations.cli.options import (
    AllowImportsOption,
    ConfigOption,
    DecodingOption,
    MaxTokensOption,
    ModelOption,
    RewardOption,
    SetOption,
    TemperatureOption,
    ThinkingOption,
    options_from,
)
from cards_integrations.cli.serve import allowed_rewards
from cards_integrations.errors import SettingsError


def mcp(
    config: ConfigOption = None,
    allow_imports: AllowImportsOption = False,
    model: ModelOption = None,
    reward: RewardOption = None,
    decoding: DecodingOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    thinking: ThinkingOption = None,
    assigned: SetOption = None,
    allow_reward: Annotated[
        list[str] | None,
        typer.Option(help="A reward that calls may choose, besides the embedded ones: NAME, or NAME=REWARD."),
    ] = None,
) -> None:
    """Offer the model as a tool of the Model Context Protocol, on standard input and output."""
    if find_spec("mcp") is None:
        raise SettingsError("cards mcp needs the MCP SDK: pip install 'cards-integrations[mcp]'.")
    from cards_integrations.server.mcp_tool import create_mcp
    from cards_integrations.server.settings import ServerSettings
    from cards_integrations.settings import CardsSettings

    options = CardsSettings(
        **options_from(
            config, allow_imports, assigned, model=model, reward=reward, decoding=decoding, max_tokens=max_tokens,
            temperature=temperature, thinking=thinking,
        )
    )  # fmt: skip
    create_mcp(options, ServerSettings.model_validate(allowed_rewards(allow_reward or []))).run("stdio")
