"""LangChain's decision models, both ways: rewards that answer typed questions, and answers that serve as rewards.

Needs langchain-core 1.8 or later, where decision models are a beta: their names may still change.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

from langchain_core.messages import AIMessage, BaseMessage
from pydantic import ConfigDict, Field, FiniteFloat, InstanceOf, TypeAdapter, model_validator

try:
    from langchain_core.decisions import (
        BaseDecisionModel,
        Box,
        Choice,
        ChoiceAnswer,
        ClassifierResponse,
        Noul,
        NoulAnswer,
        ScoreAnswer,
    )
    from langchain_core.decisions import Question as LangChainQuestion
    from langchain_core.decisions import Score as LangChainScore
except ImportError as error:
    from langchain_core.version import VERSION

    raise ImportError(
        f"Decision models need langchain-core 1.8 or later, and {VERSION} is installed: pip install -U langchain-core"
    ) from error

from cards_integrations.chat.message import Message
from cards_integrations.chat.template import as_text
from cards_integrations.engine.engine import Engine
from cards_integrations.errors import SettingsError
from cards_integrations.langchain.convert import PROVIDER, as_message, as_prompt
from cards_integrations.rewards import AnyReward, Loader, Response, RewardModel
from cards_integrations.rewards.base import ObjectReward
from cards_integrations.rewards.question import HELPFUL, AnyQuestion
from cards_integrations.rewards.scorers.state import as_state
from cards_integrations.settings import Options, OptionsFromEnvironment
from cards_integrations.settings_model import SettingsModel

__all__ = ["DecisionReward", "RewardDecisionModel"]

ID = "answer"


class Asked(NamedTuple):
    """What a reward is asked to score: answers to one prompt, with their context."""

    prompt: str | list[Message]
    texts: list[str]
    context: tuple[str, ...] = ()


class RewardDecisionModel(SettingsModel, BaseDecisionModel):  # type: ignore[misc, unused-ignore]
    """Any reward as a decision model, for LangChain's `ModelRouterMiddleware` and `AutoModeMiddleware`.

    Each option of a question (of a `Noul`: yes and no) is scored as an answer to the question, with the state as its
    context, and the probabilities are the softmax of the scores over `temperature`. With `reads="state"` the state
    itself is scored instead, and the words of the question are not read: the reward is the question. Then only a `Noul`
    can be asked, and p(yes) is the sigmoid of (score - `threshold`) / `temperature`.

    Examples:
        >>> router = ModelRouterMiddleware(
        ...     choices={"fast": ModelChoice("openai:gpt-5-mini", "Small talk."), "strong": ...},
        ...     instructions="Which model suits the task?",
        ...     classifier=RewardDecisionModel(reward="relevance", prompt_format="{state}", temperature=0.05),
        ... )
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, use_attribute_docstrings=True)

    reward: AnyReward
    """The reward that scores, as in `CardsLLM`."""
    model: str = ""
    """The name of the model in answers; by default that of the reward."""
    llm: InstanceOf[Options] | None = Field(default=None, exclude=True)
    """The `ChatCards` or `CardsLLM` on whose engine the reward runs; by default that of `ChatCards()`."""
    reads: Literal["options", "state"] = "options"
    """What is scored: the options of a question, or the state."""
    prompt_format: str = "{instructions}\n\n{state}"
    """The prompt that the options answer. Rewards that compare meanings need "{state}" alone."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The difference in reward that is worth a factor e in probability. None: the standard deviation of the reward's
    `scale` if that is set, else 1."""
    threshold: FiniteFloat = 0.0
    """With `reads="state"`, the score at which yes and no are equally probable."""

    @model_validator(mode="after")
    def _is_named(self) -> Self:
        self.model = self.model or self.reward.name
        return self

    @property
    def _provider(self) -> str:
        return PROVIDER

    def close(self) -> None:
        """Free the models, unless another object uses them; the next call loads them again."""
        Engine.release(self)

    def _classify(self, state: Any, questions: dict[str, Any]) -> ClassifierResponse:
        engine, asked = self._engine(), [self._asked(state, question) for question in questions.values()]
        futures = [engine.submit_score(self.reward, *each) for each in asked]
        return self._response(questions, [future.result() for future in futures])

    async def _aclassify(self, state: Any, questions: dict[str, Any]) -> ClassifierResponse:
        engine, asked = self._engine(), [self._asked(state, question) for question in questions.values()]
        return self._response(questions, await asyncio.gather(*(engine.ascore(self.reward, *each) for each in asked)))

    def _engine(self) -> Engine:
        return (self.llm or OptionsFromEnvironment()).engine_for({}, self)

    def _asked(self, state: Any, question: Any) -> Asked:
        """Return what the reward scores for a question.

        Raises:
            SettingsError: It cannot answer such a question.
        """
        if isinstance(question, Box):
            raise SettingsError("A reward reads text: it cannot answer a Box question. Ask a Noul, Choice or Score.")
        if self.reads == "options":
            shown, instructions = _shown(state), _shown(question.instructions)
            parts = {"{state}": shown, "{instructions}": instructions}
            prompt = re.sub(r"\{state\}|\{instructions\}", lambda found: parts[found[0]], self.prompt_format)
            return Asked(prompt, _options(question), (shown,))
        if not isinstance(question, Noul):
            kind = type(question).__name__
            raise SettingsError(
                f"reads='state' has one score, which cannot answer a {kind} question: use reads='options', or a Noul."
            )
        return _of_state(state, _shown(question.instructions))

    def _response(self, questions: Mapping[str, Any], scores: Sequence[list[float]]) -> ClassifierResponse:
        given = zip(questions.items(), scores, strict=True)
        answers = {name: self._answer(question, found) for (name, question), found in given}
        return ClassifierResponse(model=self.model, answers=answers)

    def _answer(self, question: Any, scores: list[float]) -> NoulAnswer | ChoiceAnswer | ScoreAnswer:
        scale = self.reward.scale
        temperature = self.temperature or (scale[1] if scale is not None else 0.0) or 1.0
        if self.reads == "state":
            scores = [*scores, self.threshold]
        p = _softmax([score / temperature for score in scores])
        if isinstance(question, Noul):
            return NoulAnswer(type="noul", noul=p[0])
        best = max(range(len(p)), key=p.__getitem__)
        if isinstance(question, Choice):
            labels = list(question.criteria)
            return ChoiceAnswer(
                type="choice", choice=labels[best], probabilities=dict(zip(labels, p, strict=True)), confidence=p[best]
            )
        expected = sum(level * each for level, each in enumerate(p))
        legend = dict(enumerate(question.criteria))
        return ScoreAnswer(
            type="score", score=expected, legend=legend, probabilities=dict(enumerate(p)), confidence=p[best]
        )


class DecisionReward(ObjectReward):
    """A LangChain decision model as a reward: its answer to a question about the response.

    It holds an object, and so cannot be in a settings file; a decision model behind vLLM can, as
    `RemoteReward(protocol="systemone")`. Measuring its scale takes some tens of calls, unless `scale=` is given.
    """

    kind: Literal["decision"] = "decision"
    """Names this class in errors and metadata."""
    model: InstanceOf[BaseDecisionModel]
    """The decision model."""
    question: AnyQuestion = HELPFUL
    """The question about a response. A text is a yes-or-no question."""
    prompt_format: str | None = None
    """What the decision model reads: a text with `{response}` and usually `{prompt}`. None: JSON with message, answer
    and context."""

    @model_validator(mode="after")
    def _has_response(self) -> Self:
        if self.prompt_format is not None and "{response}" not in self.prompt_format:
            raise ValueError("prompt_format must contain {response}")
        return self

    @property
    def name(self) -> str:
        return f"decision {self.model.model}"

    @property
    def held(self) -> tuple[Any, ...]:
        return (self.model,)

    def build(self, loader: Loader) -> RewardModel:
        return Decided(self)


class Decided(RewardModel):
    """Asks a decision model about all responses at once."""

    across_requests = True

    def __init__(self, settings: DecisionReward) -> None:
        self.name = settings.name
        self.settings = settings
        self.questions = {ID: _any_question.validate_python(settings.question.sent)}

    async def score(self, responses: Sequence[Response]) -> list[float]:
        settings = self.settings
        asked: list[Any] = [
            {"state": as_state(each, settings.prompt_format), "questions": self.questions} for each in responses
        ]
        found = await settings.model.abatch(asked)
        for response, reply in zip(responses, found, strict=True):
            usage = response.conversation.usage
            usage.rm_forwards += 1
            usage.rm_tokens += reply.usage["input_tokens"] if reply.usage else 0
        return [settings.question.score(reply.answers[ID].model_dump()) for reply in found]


_any_question: TypeAdapter[Any] = TypeAdapter(LangChainQuestion)


def _options(question: Noul | Choice | LangChainScore) -> list[str]:
    """Return the options as answers to the question."""
    if isinstance(question, LangChainScore):
        return [_shown(level) for level in question.criteria]
    if isinstance(question, Choice):
        return [_option(*each) for each in question.criteria.items()]
    criteria = question.criteria
    return [_option("yes", criteria and criteria.true), _option("no", criteria and criteria.false)]


def _option(label: str, description: Any) -> str:
    return label if description is None else f"{label}: {_shown(description)}"


def _of_state(state: Any, instructions: str) -> Asked:
    """Return a state as a prompt and an answer: the last message of a conversation, or else the whole state."""
    if isinstance(state, Mapping) and {"message", "answer"} <= state.keys():  # as `DecisionReward` asks
        return Asked(state["message"], [state["answer"]], tuple(state.get("context", ())))
    if _is_talk(state) and isinstance(state[-1], AIMessage) and len(state) > 1:
        return Asked(as_prompt(list(state[:-1])), [as_message(state[-1])["content"]])
    if isinstance(state, Mapping) and _is_talk(state.get("messages")):
        rest = {name: value for name, value in state.items() if name != "messages"}
        return Asked(_shown(state["messages"]), [_shown(rest)])
    return Asked(instructions, [_shown(state)])


def _is_talk(state: Any) -> bool:
    return isinstance(state, (list, tuple)) and bool(state) and all(isinstance(each, BaseMessage) for each in state)


def _shown(value: Any) -> str:
    """Return a text as it is, messages with their roles, and anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseMessage):
        return str(as_message(value)["content"])
    if _is_talk(value):
        return as_text(as_prompt(list(value)))
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseMessage):
        return {"role": value.type, "content": value.content, "tool_calls": getattr(value, "tool_calls", [])}
    return str(value)


def _softmax(values: list[float]) -> list[float]:
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    return [weight / sum(weights) for weight in weights]
