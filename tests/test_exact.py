"""The self-test of models: what it accepts, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch

from cards_integrations.errors import CardsError, ModelError
from cards_integrations.transformer import exact
from cards_integrations.transformer.attention import NAME
from cards_integrations.transformer.cache_layers import cache_argument
from cards_integrations.transformer.exact import PATH, check_exact
from cards_integrations.transformer.flat_batch import ForwardInput
from cards_integrations.transformer.forward import Output, Transformer


def test_a_model_may_have_several_ends_of_sequence() -> None:
    """As Llama 3 and others have in their configs."""
    check_exact(tiny.causal(eos_token_id=[1, 2]))


def test_scales_by_the_length_go_by_that_of_each_text() -> None:
    """Llama 4 has a step after 8,192 tokens by default, and counts what is in the cache and in the forward before."""
    options: dict[str, Any] = {"floor_scale": 40, "attn_scale": 5.0}
    model, ids = tiny.causal("llama4_text", **options), [list(range(6, 36)) * 2, list(range(20, 29))]
    check_exact(model)  # with shorter steps
    with torch.inference_mode():
        plain = [tiny.causal("llama4_text", **options)(torch.tensor([text])).logits[0] for text in ids]
    transformer = Transformer(model)
    branches = [transformer.cache.open().branch() for _ in ids]
    for piece in (slice(0, 5), slice(5, 30), slice(30, 59), slice(59, None)):
        read = [i for i, text in enumerate(ids) if text[piece]]
        for i, output in zip(
            read, transformer.logits([ForwardInput(branches[i], ids[i][piece]) for i in read]), strict=True
        ):
            assert isinstance(output, Output)
            torch.testing.assert_close(output.value, plain[i][branches[i].length - 1], atol=1e-4, rtol=1e-4)


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


def test_one_thread_tries_a_model_and_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is tried it has another attention: whoever uses it meanwhile would get other numbers."""
    model, plain, trials = tiny.classifier(), exact._plain, list[str]()
    begun, others = threading.Event(), threading.Event()

    def slow(*args: Any) -> torch.Tensor:
        trials.append(threading.current_thread().name)
        begun.set()
        others.wait(0.3)  # a second one would begin here
        return plain(*args)

    monkeypatch.setattr(exact, "_plain", slow)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(check_exact, model)
        assert begun.wait(40)
        rest = [pool.submit(check_exact, model) for _ in range(2)]
        for done in (first, *rest):
            done.result(40)
            assert model.config._attn_implementation == NAME
    assert len(trials) == 1


def test_a_model_that_failed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be in use by then, as a model that reads whole texts."""
    model, trials = tiny.classifier(), list[int]()

    def another(*args: Any) -> torch.Tensor:
        trials.append(1)
        return torch.randn(4, PATH, 32)

    monkeypatch.setattr(exact, "_plain", another)
    messages = []
    for _ in range(2):
        with pytest.raises(ModelError, match="cannot read trees of candidates here") as error:
            check_exact(model)
        messages.append(str(error.value))
    assert trials == [1]
    assert messages[0] == messages[1]
    assert model.config._attn_implementation != NAME
