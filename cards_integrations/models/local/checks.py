"""What is checked of a model when it is loaded: that its weights are numbers, and all there, and fit its tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cards_integrations.errors import ModelError

if TYPE_CHECKING:
    import torch

PROBES = 50  # tokens of a vocabulary that are read again


def check_finite(name: str, tensors: Mapping[str, Any]) -> None:
    """Read all weights once, without a copy of them.

    Args:
        name: What the error calls the model or the adapter.
        tensors: As `state_dict` gives them; the parts of quantized ones are looked at each.

    Raises:
        ModelError: One of them holds NaN or infinity.
    """
    seen = set()
    for tensor_name, tensor in _parts(tensors.items()):
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen and not _is_finite(tensor):
            raise ModelError(
                f"{name}: the weights {tensor_name!r} hold NaN or infinity in {str(tensor.dtype)[6:]}. Download the "
                "model again or, if the numbers in its files are too large for this dtype, use dtype='float32'."
            )
        seen.add(place)


def check_complete(name: str, missing: Collection[str], brought: Collection[str], kind: str) -> None:
    """Check that nothing was left random.

    Args:
        name: What the error calls the model or the adapter.
        missing: Names of weights that its files do not have.
        brought: Names of weights that an adapter brings.
        kind: What lacks them.

    Raises:
        ModelError: Weights are missing; it names the first of them.
    """
    random = sorted(set(missing) - set(brought))
    if random:
        more = f" and {len(random) - 3} more" if len(random) > 3 else ""
        raise ModelError(f"{name} has no weights for {', '.join(random[:3])}{more} of {kind}.")


def check_biases(name: str, unused: Collection[str], model: Any) -> None:
    """Check that no layer lost its bias, as one does of which config.json says nothing.

    Args:
        name: What the error calls the model.
        unused: Names of weights in its files that have no place in the model.
        model: The model.

    Raises:
        ModelError: A layer has its weights, and not the bias that the files have for it.
    """
    prefix = f"{model.base_model_prefix}."
    layers = {
        at.removeprefix(prefix) for at, layer in model.named_modules() if getattr(layer, "weight", None) is not None
    }
    lost = sorted(
        each for each in unused if each.endswith(".bias") and each.removesuffix(".bias").removeprefix(prefix) in layers
    )
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelError(
            f"{name} has weights for {lost[0]}{more}, for which {type(model).__name__} has no place by its "
            "config.json: it would give something else. Check the settings of its biases there, such as attention_bias."
        )


def check_vocabulary(name: str, tokenizer: Any, rows: int) -> None:
    """Check that the model has a row for every ordinary token.

    Tokens that were added to a vocabulary may have none: they are ids of a text only where somebody writes their
    name, and then `ChatTokenizer` refuses that text.

    Raises:
        ModelError: Texts would have ids that the model has no row for.
    """
    added = tokenizer.added_tokens_decoder
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= rows and i not in added]
    if beyond:
        raise ModelError(
            f"{name}: {len(beyond)} tokens of its tokenizer, such as {min(beyond)!r}, lie beyond the {rows} rows of "
            "its embedding. The tokenizer is that of another model: check the files."
        )


def check_encoding(name: str, tokenizer: Any, rows: int) -> None:
    """Check that the tokenizer reads what its own vocabulary writes.

    transformers builds the tokenizers of some model types by the type, whatever pipeline their files describe: of
    another vocabulary these read nothing, without an error.

    Raises:
        ModelError: Most of its own tokens are read as nothing, or what it adds to each text is beyond the embedding.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = [i for _, i in sorted(tokenizer.get_vocab().items()) if i not in special]
    texts = [tokenizer.decode([i]) for i in ordinary[:: len(ordinary) // PROBES + 1]]
    read = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts if text.strip()]
    if sum(not ids for ids in read) * 2 > len(read):
        raise ModelError(
            f"{name}: its tokenizer, which transformers reads as a {type(tokenizer).__name__}, encodes words of its "
            "own vocabulary to nothing. Check tokenizer.json, and the model_type of config.json."
        )
    beyond = [i for i in tokenizer("")["input_ids"] if i >= rows]
    if beyond:
        raise ModelError(
            f"{name}: its tokenizer begins or ends every text with {tokenizer.convert_ids_to_tokens(beyond[0])!r}, "
            f"which lies beyond the {rows} rows of its embedding. Check the files."
        )


def embedding_rows(model: Any) -> int:
    """Return how many token ids a model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def _parts(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the plain floating-point tensors, those inside of quantized ones included."""
    import torch

    for name, tensor in named:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _parts((f"{name}.{part}", getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
        elif isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            yield name, tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    import torch

    if tensor.dtype.itemsize == 1:  # float8 has no minimum
        tensor = tensor.half()
    low, high = torch.aminmax(tensor)  # NaN if one is; ten times faster than isfinite
    return bool(torch.isfinite(low) & torch.isfinite(high))
