"""Retrieval-augmented answers in LangChain: the reward sees the documents that were retrieved."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import LanguageModelLike
from langchain_core.output_parsers import BaseOutputParser
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableLambda

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
    """Make a chain that puts documents into the prompt and passes them to the reward as `context=`.

    It takes the arguments of LangChain's `create_stuff_documents_chain` and can replace it. `GroundednessReward` finds
    the context in most prompts by itself; this chain gives it the documents one by one, whatever the prompt looks like,
    so that the trace has a score for each of them:

        {"context": retriever, "question": RunnablePassthrough()} | documents_chain(llm, prompt)

    Args:
        llm: `CardsLLM`, `ChatCards` or `CardsCompletion`.
        prompt: A template with a variable for the documents, and any others.
        output_parser: Parses the answer. Without one the chain returns the message, with its rewards.
        document_prompt: Formats one document.
        document_separator: Stands between two documents.
        document_variable_name: The input, and the variable of the prompt, that holds the documents.

    Returns:
        A chain whose input is a dict of the prompt's variables, with a list of documents under
        `document_variable_name`.
    """

    def answer(inputs: dict[str, Any]) -> Runnable[Any, Any]:
        documents = inputs[document_variable_name]
        texts = [format_document(document, document_prompt) for document in documents]
        filled = {**inputs, document_variable_name: document_separator.join(texts)}
        chain: Runnable[Any, Any] = RunnableLambda(lambda _: filled) | prompt | llm.bind(context=texts)
        return chain | output_parser if output_parser is not None else chain

    return RunnableLambda(answer).with_config(run_name="documents_chain")
