"""How well the retrieved context supports an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cards_integrations.chat.message import Message
from cards_integrations.errors import RewardError
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.base import Conversation, Loader, Reward, RewardModel
from cards_integrations.rewards.pattern import regular_expressions
from cards_integrations.rewards.prompts import WITH_CONTEXT
from cards_integrations.rewards.registry import register_reward

PATTERNS = (
    r"-{5,}\n(?P<context>.+?)\n-{5,}",  # LlamaIndex
    r"(?i)following pieces of (?:retrieved )?context.*?\n\n(?P<context>.+?)(?=\n\s*question\b)",  # LangChain's own
    r"(?i)\bcontext(?: information)?:\s*(?P<context>.+?)(?=\n\s*(?:helpful )?(?:question|query|answer)\b|\Z)",
)
JOINED = "Context: {context}\n\nQuestion: {prompt}"


def _patterns(value: Any) -> Any:
    if not isinstance(value, (str, list, tuple)):
        return value  # pydantic refuses it
    for pattern in regular_expressions(value):
        if "context" not in re.compile(pattern).groupindex:
            raise ValueError(f"{pattern!r} has no group (?P<context>...)")
    return value


@register_reward
class GroundednessReward(Reward):
    """How well the context supports an answer, measured in one of three ways.

    - `by="likelihood"`: pointwise mutual information per token, (log p(answer | question, context)
      - log p(answer | question)) / tokens in nats, under the language model itself, which computes one of the two
      while drafting.
    - `by="entailment"`: an NLI model or cross-encoder (`model`) reads (context, sentence). The score is the mean over
      the answer's complete sentences of the highest probability of `label` over the contexts.
    - `by="embedding"`: the mean over complete sentences of the highest cosine similarity with a sentence of the
      contexts, by any sentence-transformers `model` (default MiniLM).

    The context is the call's `context=`, or what `patterns` find in the prompt.
    """

    kind: Literal["groundedness"] = "groundedness"
    """Names this class in settings files."""
    by: Literal["likelihood", "entailment", "embedding"] = "likelihood"
    """How support is measured."""
    model: str | None = None
    """The NLI model, required for entailment, or the embedding model (None: MiniLM); a directory or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    label: int | str = "entailment"
    """Index or name of the NLI model's label that means support; ignored for a cross-encoder with a single label."""
    without_context: Literal["error", "plain"] = "error"
    """What happens if there is no context: an error, or a plain answer. Chat engines, for example, also ask the model
    to rephrase a question, which has none."""
    patterns: Annotated[tuple[str, ...], BeforeValidator(_patterns)] = PATTERNS
    """Regular expressions that find the context in a prompt as the group `context`; by default in the prompts of both
    frameworks."""
    joined: str = Field(JOINED, pattern=r"(?s)\{context\}.*\{prompt\}|\{prompt\}.*\{context\}")
    """A text with `{context}` and `{prompt}` that joins a context to a prompt without it."""

    @model_validator(mode="after")
    def _has_model(self) -> Self:
        if self.by == "entailment" and self.model is None:
            raise ValueError("by='entailment' needs model=: an NLI model or a cross-encoder")
        if self.by == "likelihood" and self.model is not None:
            raise ValueError("by='likelihood' reads the language model itself: leave model= out")
        return self

    @property
    def name(self) -> str:
        return f"groundedness by {self.by}"

    @property
    def prompts(self) -> Sequence[tuple[str, tuple[str, ...]]]:
        joined = JOINED + "\n\nAnswer in one sentence."
        return [(joined.format(context=context, prompt=question), (context,)) for question, context in WITH_CONTEXT]

    @property
    def scores_whole_sentences(self) -> bool:
        return super().scores_whole_sentences or self.by != "likelihood"

    def build(self, loader: Loader) -> RewardModel:
        from cards_integrations.rewards.scorers.embedding import Embedder
        from cards_integrations.rewards.scorers.entailment import Entailment
        from cards_integrations.rewards.scorers.likelihood import MutualInformation
        from cards_integrations.rewards.scorers.nearest import Nearest

        if self.by == "likelihood":
            return MutualInformation(self.name, loader.causal(None, self.name), self.other_prompt)
        spec = LocalModel(model=self.model or "minilm", revision=self.revision)
        if self.by == "embedding":
            return Nearest(self.name, Embedder.of(loader.models, spec), self.context)
        return Entailment(self.name, *loader.models.classifier(spec), self.label, self.context)

    def has_signal_for(self, conversation: Conversation) -> bool:
        return self.without_context == "error" or bool(conversation.context or self._cut_out(conversation)[1])

    def context(self, conversation: Conversation) -> tuple[str, ...]:
        """Return the texts that an answer should be grounded in.

        Raises:
            RewardError: There are none.
        """
        return conversation.context or self._required(conversation)[1]

    def other_prompt(self, conversation: Conversation) -> tuple[str | list[Message], bool]:
        """Return the prompt without its context or, if it contains none, with the context.

        Returns:
            The prompt, and whether it now contains the context.

        Raises:
            RewardError: There is no context.
        """
        without, found = self._required(conversation)
        if found:
            return without, False
        context = "\n\n".join(conversation.context)
        if isinstance(without, str):
            return type(without)(self._joined(context, without)), True
        *earlier, last = without
        return [*earlier, {**last, "content": self._joined(context, last["content"])}], True

    def _joined(self, context: str, prompt: str) -> str:
        parts = {"{context}": context, "{prompt}": prompt}
        return re.sub(r"\{context\}|\{prompt\}", lambda match: parts[match[0]], self.joined)

    def _required(self, conversation: Conversation) -> tuple[str | list[Message], tuple[str, ...]]:
        """Return the prompt without the context in it, and that context; raise a `RewardError` if there is none."""
        without, found = self._cut_out(conversation)
        if not found and not conversation.context:
            raise RewardError(
                f"reward {self.name!r} finds no context in the prompt: pass context=..., or patterns= that find it."
            )
        return without, found

    def _cut_out(self, conversation: Conversation) -> tuple[str | list[Message], tuple[str, ...]]:
        """Return the prompt without the contexts in it, and these contexts."""
        prompt, found = conversation.prompt, list[str]()
        if isinstance(prompt, str):
            text, found = self._cut(prompt, conversation.context)
            without: str | list[Message] = type(prompt)(text)
        else:
            without = []
            for message in prompt:
                text, here = self._cut(message["content"], conversation.context, message["role"] != "assistant")
                without.append({**message, "content": text})
                found += here
        return without, tuple(found)

    def _cut(self, text: str, contexts: Sequence[str], search: bool = True) -> tuple[str, list[str]]:
        """Return a text without the contexts in it, and these; if none are given, look for one by the patterns."""
        found = [context for context in contexts if context and context in text]
        for context in found:
            text = text.replace(context, "", 1)
        if contexts or not search:
            return text, found
        for pattern in self.patterns:
            if match := re.search(pattern, text, re.DOTALL):
                start, end = match.span("context")
                return text[:start] + text[end:], [match["context"]]
        return text, []
