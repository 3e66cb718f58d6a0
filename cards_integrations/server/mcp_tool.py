"""`cards mcp`: a tool of the Model Context Protocol that answers with a reward. Needs the extra `mcp`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from cards_integrations.chat.message import as_prompt
from cards_integrations.errors import CardsError
from cards_integrations.server.choices import Choices
from cards_integrations.server.errors import ApiError
from cards_integrations.server.settings import ServerSettings
from cards_integrations.settings import Options

Reward = Annotated[str | None, Field(description="Name of the reward that guides the answer; see the tool's text.")]
Method = Annotated[str | None, Field(description="Name of the decoding method, such as cards or best_of_n.")]
MaxTokens = Annotated[int | None, Field(description="Length limit of the answer, in tokens.")]
Seed = Annotated[int | None, Field(description="One seed gives one answer.")]


@dataclass(frozen=True)
class Answer:
    """An answer and what guided it."""

    text: str
    reward: float | None
    """The reward of the whole answer; higher is better."""
    finish_reason: str
    drafts: int
    """Candidates that were examined."""
    seed: int


def create_mcp(options: Options, settings: ServerSettings) -> MCPServer:
    """Make an MCP server with the tool `answer`. The models are loaded at its first call.

    Args:
        options: The model, the method, the reward and further options of all answers.
        settings: The rewards and methods that a call may choose, and the time it may take.
    """
    choices = Choices(settings, options.decoding)
    about = "A local language model whose answers a reward model guides."
    server = MCPServer("cards", instructions=about, log_level="WARNING")
    description = (
        "Answer a prompt with a local language model, guided by a reward model while it writes. "
        f"Rewards: {', '.join(sorted(settings.rewards))}. Methods: {', '.join(settings.methods)}."
    )

    async def answer(
        prompt: str, reward: Reward = None, method: Method = None, max_tokens: MaxTokens = None, seed: Seed = None
    ) -> Answer:
        try:
            chosen = {
                "reward": None if reward is None else choices.reward(reward),
                "decoding": None if method is None else choices.decoding(method),
                "max_tokens": max_tokens,
                "seed": seed,
            }
            request = options.request(
                as_prompt(prompt), {name: value for name, value in chosen.items() if value is not None}
            )
            limit = settings.timeout
            request = replace(request, timeout=min(request.timeout or limit, limit))
            found = await options.engine_for({}, server).arun(request)
        except (CardsError, ApiError) as error:
            raise ToolError(str(error)) from error
        return Answer(found.text, found.reward, found.finish_reason, found.usage.drafts, found.seed)

    server.add_tool(answer, description=description, structured_output=True)
    return server
