"""The heads of reward models, as their files have them: those that transformers would drop or misread."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cards_integrations.errors import ModelError
from cards_integrations.models.local.load_lock import load_errors
from cards_integrations.models.local.resolve import resolve_model
from cards_integrations.models.local.settings import LocalModel

if TYPE_CHECKING:
    import torch

HEADS = {
    "LlamaForScore": "score_head.",  # Beaver
    "LlamaRewardModel": "regression_head.",  # UltraRM
    "EurusRewardModel": "regression_head.",
    "Qwen2ForRewardModel": "score.",  # Qwen2.5-Math-RM: two layers
    "Qwen2ForProcessRewardModel": "score.",
    "LlamaForRewardModelWithGating": "regression_layer.",  # ArmoRM
}
"""What config.json calls a model of which transformers knows only the body, and how its head's weights are called."""
OF_STEPS = {"Qwen2ForProcessRewardModel"}
GATED = {"LlamaForRewardModelWithGating"}
GATE = ("gating.", "reward_transform_matrix")
_LIKE_A_HEAD = re.compile(r"(^|[._])(score|head|classifier|reward|regression|gating|v_head|value)")
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def check_kind(spec: LocalModel, config: Any, of_steps: bool) -> None:
    """Refuse a model of answers where one of steps is meant, and the other way round.

    Raises:
        ModelError: It names the reward for such a model.
    """
    name = _architecture(config)
    scores_steps = name.endswith("ForTokenClassification") or name in OF_STEPS
    scores_answers = name.endswith("ForSequenceClassification") or name in HEADS
    if scores_steps and not of_steps:
        raise ModelError(f"model={spec.model!r} ({name}) scores the steps of an answer: use ProcessReward(model=...).")
    if scores_answers and of_steps and not scores_steps:
        raise ModelError(f"model={spec.model!r} ({name}) scores whole answers: use ClassifierReward(model=...).")


def put_own_head(spec: LocalModel, model: Any, unexpected: Collection[str]) -> set[str]:
    """Give a classifier the head of its files, if transformers made another one.

    Args:
        spec: The model.
        model: The classifier as transformers loaded it.
        unexpected: Names of weights in its files that it has no place for.

    Returns:
        Names of the weights of that head, in the files and in the model.

    Raises:
        ModelError: There is a head that is not known.
    """
    architecture = _architecture(model.config)
    prefix, gate = HEADS.get(architecture, "score."), GATE if architecture in GATED else ()
    own = [name for name in unexpected if name.startswith((prefix, *gate))]
    rest = [name for name in unexpected if name not in own and _LIKE_A_HEAD.search(name) and "lm_head" not in name]
    if rest or getattr(model.config, "do_normalize", False):
        what = f"has {min(rest)!r}, which {type(model).__name__} does not know" if rest else "normalizes its scores"
        raise ModelError(
            f"model={spec.model!r} {what}: its scores would be other ones than its authors'. Serve it with their code, "
            "and ask it by a FunctionReward."
        )
    if not own:
        return set()
    model.score = _head(_weights(spec, (prefix,)), prefix).to(model.dtype)
    if gate:
        from cards_integrations.models.local.gating import Gate

        model.gate = Gate(_weights(spec, gate), model.config)
    model.config.num_labels = list(model.score.parameters())[-1].shape[0]
    return {"score.weight", "score.bias", *own}


def _head(weights: dict[str, torch.Tensor], prefix: str) -> torch.nn.Module:
    """A linear layer, or several that are numbered."""
    from cards_integrations.models.local.gating import linear_layer, numbered_layers

    return linear_layer(weights, prefix) if f"{prefix}weight" in weights else numbered_layers(weights, prefix)


def _weights(spec: LocalModel, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The weights of a model's files whose names begin with one of these."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def file(name: str, optional: bool = False) -> Any:
        return cached_file(
            resolve_model(spec.model), name, revision=spec.revision, _raise_exceptions_for_missing_entries=not optional
        )

    found = {}
    with load_errors(spec.model):
        index = file(_INDEX, optional=True)
        names = {_FILE}
        if index is not None:
            places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            names = {place for weight, place in places.items() if weight.startswith(prefixes)}
        for name in names:
            with safe_open(file(name), framework="pt") as tensors:
                keys = [key for key in tensors.keys() if key.startswith(prefixes)]  # noqa: SIM118 - not iterable
                found.update({key: tensors.get_tensor(key) for key in keys})
    return found


def _architecture(config: Any) -> str:
    return str((getattr(config, "architectures", None) or [""])[0])
