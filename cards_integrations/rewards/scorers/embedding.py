"""Texts as unit vectors, by sentence-transformers (the extra `embeddings`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cards_integrations.errors import CardsError, ModelError
from cards_integrations.models.local.checks import check_complete, check_finite
from cards_integrations.models.local.load_lock import load_lock
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.quiet import quiet_transformers
from cards_integrations.models.local.resolve import readable_positions, resolve_model
from cards_integrations.models.local.settings import LocalModel
from cards_integrations.rewards.scorers.portions import portions
from cards_integrations.transformer.exact import reads_padded
from cards_integrations.transformer.forward import PREFILL_CHUNK

BATCH = 32  # texts that are read at once
CHARACTERS = 4 * PREFILL_CHUNK  # of such texts; a token has about four


class Embedder:
    """A sentence-transformers model in float32; pooling and prompts are as its directory says.

    A text longer than the model's window loses its beginning. The library would cut the end, where
    an answer grows: from there on all candidates would have one vector, and the same score.

    Raises:
        ModelError: The library is not installed, or the model does not load.
    """

    def __init__(self, spec: LocalModel, device: torch.device) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ModelError(
                f"model={spec.model!r} is read by sentence-transformers: "
                f"install the extra `embeddings` of cards-integrations ({error})."
            ) from error
        try:
            with load_lock():
                self.model: Any = SentenceTransformer(
                    resolve_model(spec.model),
                    device=str(device),
                    revision=spec.revision,
                    trust_remote_code=spec.trust_remote_code,
                    model_kwargs={"dtype": torch.float32, "use_safetensors": True},
                )
                check_complete(f"model={spec.model!r}", _missing(self.model, spec), (), "its transformer")
        except CardsError:
            raise
        except Exception as error:
            raise ModelError(f"model={spec.model!r} cannot be loaded for embeddings: {error}") from error
        check_finite(f"model={spec.model!r}", self.model.state_dict())
        if hasattr(self.model.tokenizer, "truncation_side"):  # that of static embeddings cuts nothing
            self.model.tokenizer.truncation_side = "left"
        self.batch_size = BATCH if self._reads_padded() else 1

    def _reads_padded(self) -> bool:
        """True if a text may be padded; static embeddings pad nothing."""
        body = _body(self.model)
        if body is None:
            return True
        window = self.model.max_seq_length or readable_positions(body)
        return reads_padded(body, self.model.tokenizer, window, self._vectors)

    def _vectors(self, texts: list[str]) -> torch.Tensor:
        found: torch.Tensor = self.model.encode_document(texts, convert_to_tensor=True, show_progress_bar=False)
        return found.float()

    @classmethod
    def of(cls, models: ModelLoader, spec: LocalModel) -> Embedder:
        """Return the engine's embedder of this model, the same one for all rewards."""
        return models.cached((cls, spec), lambda: cls(spec, models.device))

    async def __call__(self, texts: Sequence[str], query: bool = False) -> tuple[torch.Tensor, list[int]]:
        """Embed texts, of which there may be any number: others go on meanwhile.

        Args:
            texts: n texts.
            query: Whether the model's prompt for queries is used, and not the one for documents that
                answer them; some models have both.

        Returns:
            Unit vectors (n, size), and how many tokens of each text were read. A blank text has the zero
            vector, similar to nothing: what a model makes of no word is arbitrary.
        """
        encode = self.model.encode_query if query else self.model.encode_document
        read: dict[int, Any] = {}
        async for rows in portions(list(map(len, texts)), CHARACTERS):
            chosen = [texts[row] for row in rows]
            some = encode(chosen, batch_size=self.batch_size, output_value=None, show_progress_bar=False)
            read |= zip(rows, some, strict=True)
        found = [read[row] for row in range(len(texts))]
        vectors = torch.stack([each["sentence_embedding"] for each in found]).float()
        has_text = torch.tensor([bool(text.strip()) for text in texts], device=vectors.device)
        tokens = [int(each["attention_mask"].sum()) if "attention_mask" in each else 0 for each in found]
        return torch.nn.functional.normalize(vectors, dim=-1) * has_text[:, None], tokens


def _body(model: Any) -> Any:
    """Return the transformers model that reads the texts; None for static embeddings."""
    body = getattr(model[0], "auto_model", None)
    return body if hasattr(body, "from_pretrained") else None


def _missing(model: Any, spec: LocalModel) -> list[str]:
    """Names of weights that the library has left random, from a load without weights; a pooler is not used."""
    body = _body(model)
    if body is None:
        return []
    with quiet_transformers():
        _, report = type(body).from_pretrained(
            resolve_model(spec.model), revision=spec.revision, device_map="meta", use_safetensors=True,
            trust_remote_code=spec.trust_remote_code, output_loading_info=True,
        )  # fmt: skip
    return [name for name in report["missing_keys"] if not name.startswith("pooler.")]


def similarity(ones: torch.Tensor, others: torch.Tensor) -> list[float]:
    """Return the cosines of the rows of two matrices of unit vectors (n, size), each in [-1, 1]."""
    cosines: list[float] = (ones * others).sum(-1).clamp(-1, 1).tolist()  # rounding goes past 1
    return cosines
