"""Any `AutoModelForSequenceClassification` as a reward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from cards_integrations.chat.template import ChatTokenizer, same_vocabulary
from cards_integrations.errors import ModelError, SettingsError
from cards_integrations.models.local.settings import DType, LocalModel
from cards_integrations.rewards.base import Reward, RewardLoader, RewardModel
from cards_integrations.rewards.registry import register_reward
from cards_integrations.rewards.scorers.layout import Layout
from cards_integrations.transformer.forward import Transformer

if TYPE_CHECKING:
    import torch

ADAPTERS = Path(__file__).parent / "adapters"


@register_reward
class ClassifierReward(Reward):
    """A sequence classifier: a decoder scores incrementally, an encoder by batched rescoring.

    `label` (index or name) chooses the score of a model with several labels. `output` is the raw
    logit, the probability (softmax, or sigmoid for one label) or its log-odds. `prompt_format` is
    "chat" (the reward model's own template), a string with `{prompt}` and `{response}`, or None:
    "chat" if the tokenizer has a template, else "{prompt}{response}". `end_of_turn` also feeds what
    the template writes after an answer. An adapter's name may be one that comes with this package.
    `device` and `dtype` are the engine's unless given.
    """

    kind: Literal["classifier"] = "classifier"
    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False
    device: str | None = None
    dtype: DType | None = None
    label: int | str | None = None
    output: Literal["logit", "probability", "log_odds"] = "logit"
    prompt_format: str | None = None
    end_of_turn: bool = True

    @field_validator("prompt_format")
    @classmethod
    def _has_response(cls, value: str | None) -> str | None:
        if value not in (None, "chat") and "{response}" not in str(value):
            raise ValueError("prompt_format must be 'chat' or contain {response}")
        return value

    @property
    def name(self) -> str:
        return f"classifier {self.model}" + (f" + {Path(self.adapter).name}" if self.adapter else "")

    def build(self, loader: RewardLoader) -> RewardModel:
        from cards_integrations.rewards.scorers.incremental import IncrementalClassifier
        from cards_integrations.rewards.scorers.rescoring import RescoringClassifier

        adapter = self.adapter
        if adapter is not None and (ADAPTERS / adapter).is_dir():
            adapter = str(ADAPTERS / adapter)
        spec = LocalModel(
            model=self.model, revision=self.revision, adapter=adapter, trust_remote_code=self.trust_remote_code
        )
        models = loader.models
        model, tokenizer = models.on_device(self.device, self.dtype).classifier(spec)
        layout = Layout(ChatTokenizer(tokenizer), self.prompt_format, self.end_of_turn)
        head = Head(self, model.config)
        same = models.language_model is not None and same_vocabulary(tokenizer, models.language_model[2])
        try:
            if not hasattr(model, "score"):
                raise ModelError(f"{type(model).__name__} has no decoder head")
            Transformer.check(model)
        except ModelError:
            return RescoringClassifier(self.name, model, layout, head)
        return IncrementalClassifier(self.name, model, layout, head, same, models.memory)


class Head:
    """From the logits of all labels to the score."""

    def __init__(self, settings: ClassifierReward, config: object) -> None:
        labels: dict[int, str] = getattr(config, "id2label", None) or {0: "LABEL_0"}
        self.output = settings.output
        self.single = len(labels) == 1
        self.index = self._index(settings, labels)

    @staticmethod
    def _index(settings: ClassifierReward, labels: dict[int, str]) -> int:
        label = settings.label
        names = {name: index for index, name in labels.items()}
        if label is None and len(labels) == 1:
            return 0
        if isinstance(label, int) and label in labels:
            return label
        if isinstance(label, str) and label in names:
            return names[label]
        raise SettingsError(f"reward.label={label!r}: choose one of {labels} for the reward {settings.name!r}.")

    def __call__(self, logits: torch.Tensor) -> list[float]:
        """logits (n, labels) -> n scores."""
        logits = logits.float()
        if self.output == "logit":
            scores = logits[:, self.index]
        elif self.single:
            scores = logits[:, 0].sigmoid() if self.output == "probability" else logits[:, 0]
        else:
            log_p = logits.log_softmax(-1)[:, self.index]
            scores = log_p.exp() if self.output == "probability" else log_p - (-log_p.expm1()).log()
        found: list[float] = scores.tolist()
        return found
