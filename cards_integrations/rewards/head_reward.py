"""What rewards have in common that are a transformers model with a head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from cards_integrations.models.local.settings import Bits, DType, LocalModel
from cards_integrations.rewards.base import Reward

ADAPTERS = Path(__file__).parent / "adapters"


class HeadReward(Reward):
    """Settings of a model that scores: which one, where, and in which form."""

    model: Annotated[str, Field(min_length=1)]
    """An embedded name ("smollm2"), a hub id or a local directory."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: str | None = None
    """A peft adapter on the model: the name of one in this package, a directory or a hub id."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    device: str | None = None
    """A torch device; None is the engine's."""
    dtype: DType | None = None
    """Number format of the weights; None is the engine's."""
    quantization: Bits | None = None
    """Bits of the weights, as for `LocalModel`. An adapter shares the language model's weights if their bits agree."""

    @property
    def local_model(self) -> LocalModel:
        """The model with its adapter."""
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
