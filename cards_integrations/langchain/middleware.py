"""Middleware for LangChain's `create_agent`; needs the package `langchain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langchain.agents.middleware import AgentMiddleware, AgentState, hook_config
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from cards_integrations.chat.message import Message
from cards_integrations.engine.engine import Engine
from cards_integrations.errors import SettingsError
from cards_integrations.langchain.convert import as_message, as_prompt
from cards_integrations.rewards import Reward, as_reward
from cards_integrations.settings import Options, OptionsFromEnvironment, as_context

__all__ = ["InvalidCallsAnswered", "RewardMiddleware"]

MARK = "cards_reward"
"""The key of the score in the `response_metadata` of a message, and of the mark on the middleware's own messages."""
FEEDBACK = (
    "Your answer is not good enough: {reward} gave it {score}, and {threshold} is needed. {parts}"
    "Write a better answer to my last question, and only that."
)
"""The default message to the model about an answer that did not pass."""


class InvalidCallsAnswered(AgentMiddleware):
    """Tells the model what is wrong with invalid tool calls, which an agent ignores.

    An agent whose model writes nothing but invalid calls ends silently, as it looks at `tool_calls` only. With this
    middleware each invalid call is answered with its error, and the model goes on:

        create_agent(llm.as_langchain(), tools, middleware=[InvalidCallsAnswered()])

    The agent's recursion limit ends the loop if the model does not learn from the errors.
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


class RewardMiddleware(AgentMiddleware):
    """Scores the final answers of an agent with any reward, whatever its model, and retries or flags bad ones.

    The score is in the answer's `response_metadata["cards_reward"]`: `name`, `score`, `threshold`, `passed` and
    `retries`. An answer below the threshold is sent back with what fell short, up to `max_retries` times. If none
    passes, the agent's last message is the best of them, with `passed` False. Answers that call tools are not final:

        create_agent(
            model, [search], middleware=[RewardMiddleware(GroundednessReward(), threshold=1.0)]
        )

    The reward sees the question with all messages before it, and as context what the tools have returned since. A
    retry is a step of the agent: mind its recursion limit.

    Args:
        reward: As in `CardsLLM`.
        threshold: The score that an answer needs, in the reward's own units.
        on_low: "retry", or "flag" to leave the answer as it is, with `passed` False.
        max_retries: How often one question is answered anew.
        context: Texts or documents that replace what the tools have returned.
        feedback: The message to the model, with `{reward}`, `{score}`, `{threshold}` and `{parts}`, which are the
            scores of a composite's parts.
        llm: The `ChatCards` or `CardsLLM` on whose engine the reward runs; by default that of `ChatCards()`.

    Raises:
        SettingsError: A setting cannot be used as given.
    """

    def __init__(
        self,
        reward: Any,
        *,
        threshold: float,
        on_low: Literal["retry", "flag"] = "retry",
        max_retries: int = 2,
        context: Any = None,
        feedback: str = FEEDBACK,
        llm: Options | None = None,
    ) -> None:
        super().__init__()
        if on_low not in ("retry", "flag"):
            raise SettingsError(f"on_low={on_low!r}: one of 'retry' and 'flag'.")
        if max_retries < 0:
            raise SettingsError(f"max_retries={max_retries}: must be 0 or more.")
        self.reward = as_reward(reward)
        self.threshold = threshold
        self.max_retries = max_retries if on_low == "retry" else 0
        self.context = None if context is None else as_context(context)
        self.feedback = feedback
        self.llm = llm

    @hook_config(can_jump_to=["model"])
    def after_model(self, state: AgentState[Any], runtime: Any) -> dict[str, Any] | None:
        """Score the model's last message, if it is an answer."""
        turn = Turn.of(state)
        if turn is None:
            return None
        [score] = self._engine().score(self.reward, *self._asked(turn))
        parts = self._parts(turn, score)
        return self._verdict(turn, score, [self._engine().score(part, *self._asked(turn))[0] for part in parts])

    @hook_config(can_jump_to=["model"])
    async def aafter_model(self, state: AgentState[Any], runtime: Any) -> dict[str, Any] | None:
        """Async version of `after_model`."""
        turn = Turn.of(state)
        if turn is None:
            return None
        [score] = await self._engine().ascore(self.reward, *self._asked(turn))
        parts = self._parts(turn, score)
        return self._verdict(turn, score, [(await self._engine().ascore(p, *self._asked(turn)))[0] for p in parts])

    def close(self) -> None:
        """Free the models, unless another object uses them; the next answer loads them again."""
        Engine.release(self)

    def _engine(self) -> Engine:
        return (self.llm or OptionsFromEnvironment()).engine_for({}, self)

    def _asked(self, turn: Turn) -> tuple[str | list[Message], list[str], tuple[str, ...]]:
        context = turn.results if self.context is None else self.context
        return as_prompt(turn.question), [turn.text], context

    def _parts(self, turn: Turn, score: float) -> Sequence[Reward]:
        """Return the parts of the reward whose scores the model is told."""
        retries = score < self.threshold and len(turn.attempts) < self.max_retries
        return self.reward.parts if retries and "{parts}" in self.feedback else ()

    def _verdict(self, turn: Turn, score: float, parts: Sequence[float]) -> dict[str, Any]:
        """Return the answer with its score, and what the agent does next."""
        passed = score >= self.threshold
        found = {"name": self.reward.name, "score": score, "threshold": self.threshold, "passed": passed}
        scored = _with_score(turn.answer, {**found, "retries": len(turn.attempts)})
        if passed or len(turn.attempts) >= self.max_retries:
            return {"messages": [scored if passed else turn.best(scored)]}
        names = zip(self.reward.parts, parts, strict=False)
        told = {
            "{reward}": self.reward.name, "{score}": f"{score:.3g}", "{threshold}": f"{self.threshold:.3g}",
            "{parts}": "".join(f"{part.name}: {value:.3g}. " for part, value in names),
        }  # fmt: skip
        feedback = self.feedback
        for name, value in told.items():
            feedback = feedback.replace(name, value)
        return {
            "messages": [scored, HumanMessage(feedback, additional_kwargs={MARK: True})],
            "jump_to": "model",
        }


@dataclass(frozen=True)
class Turn:
    """The last question of a conversation, and what came of it.

    Attributes:
        question: All messages up to the question, without attempts at earlier questions.
        results: What tools have returned since the question.
        attempts: Earlier answers to it that were sent back.
        answer: The last answer.
        is_parsed: Whether the agent has parsed it into an object.
    """

    question: list[BaseMessage]
    results: tuple[str, ...]
    attempts: tuple[AIMessage, ...]
    answer: AIMessage
    is_parsed: bool

    @classmethod
    def of(cls, state: AgentState[Any]) -> Turn | None:
        """Return the turn of a state; None if the last message is no final answer."""
        messages = state["messages"]
        last = messages[-1]
        if not isinstance(last, AIMessage) or last.tool_calls:
            return None
        asked = [at for at, each in enumerate(messages) if isinstance(each, HumanMessage) and not _is_feedback(each)]
        start = asked[-1] + 1 if asked else 0
        since = messages[start:-1]
        return cls(
            question=_without_attempts(messages[:start]),
            results=tuple(as_message(each)["content"] for each in since if isinstance(each, ToolMessage)),
            attempts=tuple(each for each in since if isinstance(each, AIMessage) and MARK in each.response_metadata),
            answer=last,
            is_parsed=state.get("structured_response") is not None,
        )

    @property
    def text(self) -> str:
        """The text that is scored: the answer without thoughts."""
        return str(as_message(self.answer)["content"])

    def best(self, scored: AIMessage) -> AIMessage:
        """Return the best of all attempts, the earliest in a tie, as a replacement of the last.

        An answer that the agent has parsed into an object stays, so that both say the same.
        """
        if self.is_parsed:
            return scored
        found = max((*self.attempts, scored), key=_rank)
        retries = scored.response_metadata[MARK]["retries"]
        return _with_score(
            found.model_copy(update={"id": scored.id}), {**found.response_metadata[MARK], "retries": retries}
        )


def _rank(answer: AIMessage) -> tuple[bool, float]:
    """Return what tells how good a scored answer is: a call that cannot be read is worse than any answer."""
    return not answer.invalid_tool_calls, answer.response_metadata[MARK]["score"]


def _without_attempts(messages: Sequence[BaseMessage]) -> list[BaseMessage]:
    """Leave out attempts at earlier questions, and the feedback on them."""
    pairs = zip(messages, [*messages[1:], None], strict=True)
    return [each for each, after in pairs if not _is_feedback(each) and (after is None or not _is_feedback(after))]


def _is_feedback(message: BaseMessage) -> bool:
    return MARK in message.additional_kwargs


def _with_score(message: AIMessage, found: dict[str, Any]) -> AIMessage:
    return message.model_copy(update={"response_metadata": {**message.response_metadata, MARK: found}})
