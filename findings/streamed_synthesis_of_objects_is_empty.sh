#!/usr/bin/env bash
# A LlamaIndex query that streams an object answers "Empty Response", although the model has written the object.
#
# llama-index-core 0.14.25.
# Expected: `get_response_synthesizer(output_cls=Song, streaming=True)` gives the same object as without streaming, piece
#   by piece or at once: both options are documented, and nothing refuses the two together.
# Seen: without streaming the response is the song. With it the model is asked as well, and the text that comes out is
#   "Empty Response"; there is no error and no warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "llama-index-core==0.14.25"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version
from typing import Any

from llama_index.core import Settings, get_response_synthesizer
from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import BaseModel

TEXT = '{"title": "Rain", "verses": 3}'


class Song(BaseModel):
    """A song."""

    title: str
    verses: int


class Writer(CustomLLM):
    """Writes one song, at once or letter by letter."""

    asked: int = 0

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    def complete(self, prompt: str, formatted: bool = False, **more: Any) -> CompletionResponse:
        self.asked += 1
        return CompletionResponse(text=TEXT)

    def stream_complete(self, prompt: str, formatted: bool = False, **more: Any) -> Any:
        self.asked += 1
        return (CompletionResponse(text=TEXT[:end], delta=TEXT[end - 1]) for end in range(1, len(TEXT) + 1))


print("llama-index-core", version("llama-index-core"))
Settings.embed_model = MockEmbedding(embed_dim=2)
nodes = [NodeWithScore(node=TextNode(text="It rains."), score=1.0)]
found = {}
for streaming in (False, True):
    llm = Writer()
    synthesizer = get_response_synthesizer(llm=llm, response_mode="compact", output_cls=Song, streaming=streaming)
    response = synthesizer.synthesize("Write a song.", nodes)
    text = "".join(response.response_gen) if isinstance(response, StreamingResponse) else str(response)
    found[streaming] = text
    print(f"streaming={streaming}: {type(response).__name__}: {text!r}, the model was asked {llm.asked} time(s)")
assert "Rain" in found[False], "changed: an object used to come without streaming"
assert found[True] == "Empty Response", "changed: the streamed object used to be lost"
PY
