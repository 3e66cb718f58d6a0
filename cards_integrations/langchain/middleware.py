"""Middleware for LangChain's `create_agent`; needs the package `langchain`."""

from __future__ import annotations

from typing import Any

from langchain.agents.middleware import AgentMiddleware, AgentState, hook_config
from langchain_core.messages import AIMessage, ToolMessage


class InvalidCallsAnswered(AgentMiddleware):
    """Tells the model what is wrong with calls that cannot be read, where an agent would pass over them.

    An agent whose model writes nothing but invalid calls ends without a word: it looks at `tool_calls` only. With
    this, each invalid call is answered with its error, and the model goes on::

        create_agent(llm.as_langchain(), tools, middleware=[InvalidCallsAnswered()])

    The agent's recursion limit ends a model that does not learn from it.
    """

    @hook_config(can_jump_to=["model"])
    def after_model(self, state: AgentState[Any], runtime: Any) -> dict[str, Any] | None:
        """Answer the invalid calls of the model's last message."""
        last = state["messages"][-1]
        if not isinstance(last, AIMessage) or not last.invalid_tool_calls:
            return None
        answers = [_answer(call) for call in last.invalid_tool_calls]
        return {"messages": answers} if last.tool_calls else {"messages": answers, "jump_to": "model"}

    @hook_config(can_jump_to=["model"])
    async def aafter_model(self, state: AgentState[Any], runtime: Any) -> dict[str, Any] | None:
        """Async version of `after_model`."""
        return self.after_model(state, runtime)


def _answer(call: Any) -> ToolMessage:
    text = f"Error: this call could not be read: {call['error']}. Write it again, with arguments that are valid JSON."
    return ToolMessage(text, tool_call_id=call["id"] or "", name=call["name"] or "tool", status="error")
