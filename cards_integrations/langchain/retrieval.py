"""Retrieval-augmented answers in one line: the reward sees what was retrieved.

`GroundednessReward` alone finds the context in the prompts that both frameworks bring along. These tell it
the documents one by one, whatever the prompt looks like, so that the trace scores each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from langchain_core.language_models import LanguageModelLike
from langchain_core.output_parsers import BaseOutputParser
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableLambda
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

DOCUMENT = PromptTemplate.from_template("{page_content}")


def documents_chain(
    llm: LanguageModelLike,
    prompt: BasePromptTemplate[Any],
    *,
    output_parser: BaseOutputParser[Any] | None = None,
    document_prompt: BasePromptTemplate[str] = DOCUMENT,
    document_separator: str = "\n\n",
    document_variable_name: str = "context",
) -> Runnable[dict[str, Any], Any]:
    """LangChain: documents into the prompt, and as `context=` to the reward.

    Takes what `create_stuff_documents_chain` takes, and can stand in its place; without a parser the
    answer is a message, with its rewards:
    `{"context": retriever, "question": RunnablePassthrough()} | documents_chain(llm, prompt)`.
    """

    def answer(inputs: dict[str, Any]) -> Runnable[Any, Any]:
        documents = inputs[document_variable_name]
        texts = [format_document(document, document_prompt) for document in documents]
        filled = {**inputs, document_variable_name: document_separator.join(texts)}
        chain: Runnable[Any, Any] = RunnableLambda(lambda _: filled) | prompt | llm.bind(context=texts)
        return chain | output_parser if output_parser is not None else chain

    return RunnableLambda(answer).with_config(run_name="documents_chain")


class RetrievedContext(BaseNodePostprocessor):
    """LlamaIndex: what was retrieved is the context of the answers whose prompt holds it.

    `index.as_query_engine(llm=llm, node_postprocessors=[RetrievedContext()])`; chat engines take it, too.
    """

    @classmethod
    def class_name(cls) -> str:
        return "RetrievedContext"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        _retrieved.set(tuple(nodes))
        return nodes

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return self._postprocess_nodes(nodes, query_bundle)  # in this task, not in a thread


_retrieved: ContextVar[tuple[NodeWithScore, ...]] = ContextVar("retrieved", default=())


def retrieved_in(texts: Sequence[str]) -> list[str]:
    """The contents of the nodes retrieved last that these texts hold: none of what another answer is about."""
    found = []
    for node in _retrieved.get():
        versions = (node.get_content(metadata_mode=mode).strip() for mode in (MetadataMode.LLM, MetadataMode.NONE))
        found += [next((v for v in versions if v and any(v in text for text in texts)), "")]
    return [content for content in found if content]
