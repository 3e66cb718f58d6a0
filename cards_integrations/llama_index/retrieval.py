"""Retrieval-augmented answers in LlamaIndex: the reward sees the nodes that were retrieved."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

_retrieved: ContextVar[tuple[NodeWithScore, ...]] = ContextVar("retrieved", default=())


class RetrievedContext(BaseNodePostprocessor):
    """Makes the retrieved nodes the `context=` of the answers whose prompts contain them.

    It changes no nodes. Query engines and chat engines take it; put it last, so that it sees the nodes that the
    other postprocessors leave:

        index.as_query_engine(llm=llm, node_postprocessors=[RetrievedContext()])

    The context of an answer is made of those nodes, of the ones retrieved last in its task or thread, that its prompt
    contains, with or without their metadata. A `context=` of the call takes precedence.
    """

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serializes it."""
        return "RetrievedContext"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        _retrieved.set(tuple(nodes))
        return nodes

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return self._postprocess_nodes(nodes, query_bundle)  # in this task: a thread has a context of its own


def retrieved_in(texts: Sequence[str]) -> list[str]:
    """Return the contents of the nodes retrieved last that occur in these texts, and so belong to this answer."""
    found = []
    for node in _retrieved.get():
        versions = (node.get_content(metadata_mode=mode).strip() for mode in (MetadataMode.LLM, MetadataMode.NONE))
        found += [next((v for v in versions if v and any(v in text for text in texts)), "")]
    return [content for content in found if content]
