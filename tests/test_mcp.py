"""`cards mcp`, asked by the SDK's own clients: within the process, and over standard input and output."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import faces
import pytest
from mcp import StdioServerParameters
from mcp.client import Client
from mcp.client.stdio import stdio_client

from cards_integrations import CardsLLM, CardsSettings
from cards_integrations.engine import Engine
from cards_integrations.rewards import LengthReward
from cards_integrations.server import ServerSettings
from cards_integrations.server.mcp_tool import create_mcp


@asynccontextmanager
async def connected() -> AsyncIterator[Client]:
    options = CardsSettings(**faces.options())
    server = create_mcp(options, ServerSettings(rewards={"short": LengthReward(target=3)}))
    async with Client(server) as found:
        yield found
    Engine.release(server)


async def test_the_tool_names_its_rewards() -> None:
    async with connected() as client:
        [tool] = (await client.list_tools()).tools
    assert tool.name == "answer"
    assert "Rewards: short." in str(tool.description)
    assert set(tool.input_schema["properties"]) == {"prompt", "reward", "method", "max_tokens", "seed"}


async def test_it_answers_with_that_reward() -> None:
    given: dict[str, Any] = {"prompt": "Hello", "reward": "short", "method": "best_of_n", "max_tokens": 10, "seed": 3}
    async with connected() as client:
        found = (await client.call_tool("answer", given)).structured_content
    with CardsLLM(**faces.options()) as llm:
        own = llm.align("Hello", reward=LengthReward(target=3), decoding="best_of_n", max_tokens=10, seed=3)
    assert found == {
        "text": own.text,
        "reward": own.reward,
        "finish_reason": own.finish_reason,
        "drafts": 16,
        "seed": 3,
    }


@pytest.mark.parametrize(
    "given", [{"reward": "/etc"}, {"reward": "sentiment"}, {"method": "none"}, {"max_tokens": 10**6}, {"prompt": ""}]
)
async def test_what_it_cannot_do_is_an_error_of_the_tool(given: dict[str, Any]) -> None:
    async with connected() as client:
        found = await client.call_tool("answer", {"prompt": "Hello", **given})
    assert found.is_error
    assert "Traceback" not in str(found.content)


@pytest.mark.slow
async def test_over_standard_input_and_output() -> None:
    command = "from cards_integrations.cli import main; main()"
    options = ["mcp", "--model", faces.chat_model(), "--decoding", "sampling", "--max-tokens", "5"]
    env = {**os.environ, "CARDS_ENGINE__DEVICE": "cpu"}
    server = StdioServerParameters(command=sys.executable, args=["-c", command, *options], env=env)
    async with Client(stdio_client(server)) as client:
        found = (await client.call_tool("answer", {"prompt": "Hello", "seed": 1})).structured_content
    assert found is not None
    assert (found["finish_reason"], found["reward"], found["drafts"]) == ("length", None, 1)
