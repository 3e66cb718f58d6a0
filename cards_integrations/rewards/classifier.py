"""Any `AutoModelForSequenceClassification` as a reward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, FiniteFloat, field_validator, model_validator

from cards_integrations.chat.template import ChatTokenizer, same_vocabulary
from cards_integrations.models.local.checks import embedding_rows
from cards_integrations.rewards.base import Loader, RewardModel
from cards_integrations.rewards.head_reward import HeadReward
from cards_integrations.rewards.registry import register_reward


def _by_text(weights: Any) -> Any:
    """Return the mapping with text keys, as in JSON."""
    return {str(key): weight for key, weight in weights.items()} if isinstance(weights, Mapping) else weights


@register_reward
class ClassifierReward(HeadReward):
    """A sequence classifier. A decoder reads the new tokens of an answer only, an encoder all of it, in batches."""

    kind: Literal["classifier"] = "classifier"
    """Names this class in settings files."""
    label: int | str | None = None
    """Index or name of the label that is the score, for a model with several labels."""
    weights: Annotated[dict[str, FiniteFloat] | None, BeforeValidator(_by_text)] = None
    """Weights of labels, by index or name: the score is the weighted sum, and the trace shows each label's part."""
    output: Literal["logit", "probability", "log_odds"] = "logit"
    """The raw logit, the probability (softmax; sigmoid for a single label and for a model that was trained on several
    labels at once, by its `problem_type`), or its log-odds."""
    prompt_format: str | None = None
    """"chat" (the reward model's own template), "pair" (two texts that its tokenizer joins, as for cross-encoders), or
    a text with `{prompt}` and `{response}`. None: "chat" if the tokenizer has a template, else "pair" for an encoder
    whose tokenizer has tokens that join two texts, else "{prompt}{response}"."""
    end_of_turn: bool = True
    """Whether what the template writes after an answer is read as well."""

    @field_validator("prompt_format")
    @classmethod
    def _has_response(cls, value: str | None) -> str | None:
        if value not in (None, "chat", "pair") and "{response}" not in str(value):
            raise ValueError("prompt_format must be 'chat', 'pair' or contain {response}")
        return value

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.weights is not None and (self.label is not None or not self.weights):
            raise ValueError("weights: name at least one label, and leave label= out")
        return self

    @property
    def name(self) -> str:
        return f"classifier {self.model}" + (f" + {Path(self.adapter).name}" if self.adapter else "")

    def build(self, loader: Loader) -> RewardModel:
        from cards_integrations.rewards.scorers.gated import GatedClassifier
        from cards_integrations.rewards.scorers.head import Head
        from cards_integrations.rewards.scorers.incremental import IncrementalClassifier, reads_incrementally
        from cards_integrations.rewards.scorers.input_format import InputFormat
        from cards_integrations.rewards.scorers.rescoring import RescoringClassifier, reads_pairs

        models = loader.models
        model, tokenizer = models.on_device(self.device, self.dtype).classifier(self.local_model)
        chat = ChatTokenizer(tokenizer, rows=embedding_rows(model))
        otherwise = "pair" if reads_pairs(model, tokenizer) else "{prompt}{response}"
        input_format = InputFormat(chat, self.prompt_format, self.end_of_turn, otherwise)
        same = models.language_model is not None and same_vocabulary(tokenizer, models.language_model[2])
        if hasattr(model, "gate") and self.label is None and self.weights is None:
            return GatedClassifier(self.name, model, input_format, same, models.memory)
        exclusive = getattr(model.config, "problem_type", None) != "multi_label_classification"
        head = Head(self.label, self.output, getattr(model.config, "id2label", None), self.weights, exclusive)
        if input_format.is_pair or not reads_incrementally(model):
            return RescoringClassifier(self.name, model, input_format, head)
        return IncrementalClassifier(self.name, model, input_format, head, same, models.memory)
