"""The self-test of models: what it accepts, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch

from cards_integrations.errors import CardsError, ModelError
from cards_integrations.transformer.cache_layers import cache_argument
from cards_integrations.transformer.exact import check_exact
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Output, Transformer


def test_a_model_may_have_several_ends_of_sequence() -> None:
    """As Llama 3 and others have in their configs."""
    check_exact(tiny.causal(eos_token_id=[1, 2]))


def test_no_number_in_place_of_one_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the outputs it is."""
    given = Transformer.logits

    def spoiled(self: Transformer, inputs: Sequence[ForwardInput]) -> list[Output | CardsError]:
        outputs = given(self, inputs)
        if inputs[0].branch.base == 0:
            outputs[0] = Output(torch.full((1, 48), torch.nan), 0)
        return outputs

    monkeypatch.setattr(Transformer, "logits", spoiled)
    with pytest.raises(ModelError, match="off from what it gives alone"):
        check_exact(tiny.causal())


def test_a_cache_is_passed_by_the_name_of_the_installed_transformers() -> None:
    def newest(input_ids: object, cache: object = None, **kwargs: object) -> None: ...
    def of_mamba(input_ids: object, cache_params: object = None, **kwargs: object) -> None: ...
    def older(input_ids: object, past_key_values: object = None, **kwargs: object) -> None: ...

    assert [*map(cache_argument, (newest, of_mamba, older))] == ["cache", "cache_params", "past_key_values"]
    model = tiny.causal()
    found = model(torch.tensor([[5, 6]]), use_cache=True)
    assert cache_argument(model.forward) in found
