"""Any `AutoModelForSequenceClassification` as a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, field_validator, model_validator

from cards_integrations.chat.template import ChatTokenizer, same_vocabulary
from cards_integrations.models.local.checks import embedding_rows
from cards_integrations.models.local.settings import Bits, DType, LocalModel
from cards_integrations.rewards.base import Loader, Reward, RewardModel
from cards_integrations.rewards.registry import register_reward

ADAPTERS = Path(__file__).parent / "adapters"


@register_reward
class ClassifierReward(Reward):
    """A sequence classifier: a decoder scores incrementally, an encoder by batched rescoring."""

    kind: Literal["classifier"] = "classifier"
    """Names this class in settings files."""
    model: Annotated[str, Field(min_length=1)]
    """An embedded name ("smollm2"), a hub id or a local directory."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: str | None = None
    """A peft adapter on top of the model: one that comes with this package, by name, a directory or a hub id."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    device: str | None = None
    """A torch device; None is the engine's."""
    dtype: DType | None = None
    """Number format of the weights; None is the engine's."""
    quantization: Bits | None = None
    """Bits of the weights, as for `LocalModel`; an adapter shares the language model's if they have the same."""
    label: int | str | None = None
    """Index or name of the label that is the score, for a model with several labels."""
    weights: dict[str | int, FiniteFloat] | None = None
    """Labels, by index or name, and the weights of their sum, which is then the score; the trace has each of them."""
    output: Literal["logit", "probability", "log_odds"] = "logit"
    """The raw logit, the probability (softmax, or sigmoid for a single label), or its log-odds."""
    prompt_format: str | None = None
    """"chat" (the reward model's own template), "pair" (two texts, which its tokenizer joins, as cross-encoders have
    them), or one text with `{prompt}` and `{response}`. None: "chat" if the tokenizer has a template, else "pair" for
    an encoder whose tokenizer has a way to join two texts, else "{prompt}{response}"."""
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
        from cards_integrations.rewards.scorers.head import Head
        from cards_integrations.rewards.scorers.incremental import IncrementalClassifier, reads_incrementally
        from cards_integrations.rewards.scorers.input_format import InputFormat
        from cards_integrations.rewards.scorers.rescoring import RescoringClassifier, reads_pairs

        models = loader.models
        model, tokenizer = models.on_device(self.device, self.dtype).classifier(self._spec())
        chat = ChatTokenizer(tokenizer, rows=embedding_rows(model))
        otherwise = "pair" if reads_pairs(model, tokenizer) else "{prompt}{response}"
        input_format = InputFormat(chat, self.prompt_format, self.end_of_turn, otherwise)
        head = Head(self.label, self.output, getattr(model.config, "id2label", None), self.weights)
        if input_format.is_pair or not reads_incrementally(model):
            return RescoringClassifier(self.name, model, input_format, head)
        same = models.language_model is not None and same_vocabulary(tokenizer, models.language_model[2])
        return IncrementalClassifier(self.name, model, input_format, head, same, models.memory)

    def _spec(self) -> LocalModel:
        adapter = self.adapter
        if adapter is not None and (ADAPTERS / adapter).is_dir():
            adapter = str(ADAPTERS / adapter)
        return LocalModel(
            model=self.model,
            revision=self.revision,
            adapter=adapter,
            trust_remote_code=self.trust_remote_code,
            quantization=self.quantization,
        )
