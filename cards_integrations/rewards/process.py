"""Process reward models: how good each step of an answer is."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.models.local.checks import embedding_rows
from cards_integrations.rewards.base import Loader, RewardModel
from cards_integrations.rewards.head_reward import HeadReward
from cards_integrations.rewards.registry import register_reward
from cards_integrations.rewards.steps import Aggregate, Steps


@register_reward
class ProcessReward(HeadReward):
    """The probability that the steps of an answer are good, each read at a tag behind it; in [0, 1].

    The model is a token classifier, or a causal model if there are `words`.
    Qwen2.5-Math-PRM and its kin: the defaults. Models of TRL's `PRMTrainer`: `step_tag="\\n"`. Math-Shepherd:
    `step_tag=" ки"`, `after_tag="\\n"`, `words=("+", "-")`, `separator="\\n"`, `prompt_format="{prompt} {response}"`.
    Segments that are steps: `Cards(boundary=Punctuation(marks=["\\n\\n"], max_length=256))`.
    """

    kind: Literal["process"] = "process"
    """Names this class in settings files."""
    separator: Annotated[str, Field(min_length=1)] | None = "\n\n"
    """What ends a step in an answer's text, and is left out of it. None: each kept segment is a step."""
    step_tag: Annotated[str, Field(min_length=1)] = "<extra_0>"
    """What the model was trained to read behind each step; the score is read at its last token."""
    after_tag: str = ""
    """What stands between a tag and the next step."""
    label: int | str | None = None
    """Index or name of the label for a good step; None is the last of them."""
    words: tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] | None = None
    """For a causal model: the words for a good step and for a bad one, whose first tokens are compared."""
    aggregate: Aggregate = "min"
    """How the scores of the steps become one: that of the last, the least, the product or the mean."""
    prompt_format: str | None = None
    """"chat" (the model's own template), or a text with `{prompt}` and `{response}`.
    None: "chat" if the tokenizer has a template, else "{prompt}{response}"."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.prompt_format not in (None, "chat") and "{response}" not in str(self.prompt_format):
            raise ValueError("prompt_format must be 'chat' or contain {response}")
        if self.words is not None and (self.label is not None or self.words[0] == self.words[1]):
            raise ValueError("words must be two different ones, and leave label= out")
        if self.words is not None and (self.device, self.dtype) != (None, None):
            raise ValueError("a causal model with words runs where the engine does: leave device= and dtype= out")
        return self

    @property
    def name(self) -> str:
        return f"process {self.model}"

    def build(self, loader: Loader) -> RewardModel:
        steps = Steps(self.separator, self.step_tag, self.after_tag)
        return self._causal(loader, steps, self.words) if self.words else self._classifier(loader, steps)

    def _classifier(self, loader: Loader, steps: Steps) -> RewardModel:
        from cards_integrations.rewards.scorers.head import Head
        from cards_integrations.rewards.scorers.input_format import InputFormat
        from cards_integrations.rewards.scorers.process import TokenHead
        from cards_integrations.transformer.exact import check_exact

        models = loader.models
        model, tokenizer = models.on_device(self.device, self.dtype).classifier(self.local_model, of_steps=True)
        check_exact(model)
        form = InputFormat(ChatTokenizer(tokenizer, rows=embedding_rows(model)), self.prompt_format)
        label = max(model.config.id2label) if self.label is None else self.label
        head = Head(label, "probability", model.config.id2label)
        return TokenHead(head, self.name, model, form, steps, self.aggregate, models.memory)

    def _causal(self, loader: Loader, steps: Steps, words: tuple[str, str]) -> RewardModel:
        from cards_integrations.rewards.scorers.input_format import InputFormat
        from cards_integrations.rewards.scorers.process import CausalWords
        from cards_integrations.rewards.scorers.verdict import Margin

        causal = loader.causal(self.local_model, self.name)
        form = InputFormat(causal.chat, self.prompt_format)
        tokens = Margin.of(words, causal.chat).words
        return CausalWords(tokens, self.name, causal.model, form, steps, self.aggregate, causal.memory)
