"""Retrieval-augmented answers over this project's own documentation, plain and guided by their groundedness.

    python benchmarks/rag.py [--seeds 5] [--frameworks langchain llama_index]

Twelve questions, MiniLM embeddings, two paragraphs retrieved for each, in a LangChain chain and in a
LlamaIndex query engine, both in one line. How many answers hold the fact that it states, and
what they cost. Writes results/rag.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from langchain_core.embeddings import Embeddings
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.schema import TextNode
from rich.console import Console
from sentence_transformers import SentenceTransformer

from cards_integrations import CardsLLM, RetrievedContext, documents_chain
from cards_integrations.decoding import Cards, Sampling
from cards_integrations.models.local.resolve import resolve_model
from cards_integrations.rewards import GroundednessReward

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rag.json"
ASKED = {
    "Which model does the demo run?": "SmolLM2",
    "What is the arXiv number of the method?": r"2406\.16306",
    "Which library do the masks of grammars come from?": "llguidance",
    "What does kv_memory bound?": r"KV cache|memory|all models",
    "What happens to requests that do not fit into memory?": r"\bwait|refused",
    "What does temperature 0 mean?": "greedy",
    "On whose ratings were the adapters trained?": "Hutto|Gilbert|human",
    "What does the judge reward compare after a rubric?": r"logit|two words",
    "Which command writes the answers side by side?": "make demo|demo",
    "What does optimal stopping not need?": "target",
    "Where does best-of-N win?": r"idle|single request|small",
    "What do seeds depend on in bf16?": r"shape|batch|rounding|load",
}
WAYS = {
    "plain": {"decoding": Sampling()},
    "guided by likelihood": {"decoding": Cards(), "reward": GroundednessReward()},
    "guided by embedding": {"decoding": Cards(), "reward": GroundednessReward(by="embedding")},
}


def paragraphs(markdown: str) -> list[str]:
    """Text paragraphs of a README: no code, no tables, no headings."""
    text = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n|\n(?=- )", text)]
    return [block for block in blocks if len(block) > 60 and not block.startswith(("|", "#", "!"))]


class MiniLM(Embeddings):
    """all-MiniLM-L6-v2, which comes in a wheel."""

    def __init__(self) -> None:
        self.model = SentenceTransformer(resolve_model("minilm"), device="cpu")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return np.asarray(self.model.encode(texts, normalize_embeddings=True)).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


class MiniLMIndex(BaseEmbedding):
    """The same for LlamaIndex."""

    model: Any

    def _get_text_embedding(self, text: str) -> list[float]:
        return self.model.embed_query(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self.model.embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self.model.embed_query(query)


class Answers(BaseEventHandler):
    """What the LLM said of each answer, by instrumentation."""

    seen: list[dict[str, Any]]

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, LLMChatEndEvent) and event.response is not None:
            self.seen.append({"text": event.response.message.content, **event.response.raw["cards"]})


def langchain(embedding: MiniLM, texts: Sequence[str]) -> Callable[[CardsLLM], list[dict[str, Any]]]:
    retriever = InMemoryVectorStore.from_texts(list(texts), embedding).as_retriever(search_kwargs={"k": 2})
    prompt = ChatPromptTemplate.from_template(
        "Answer in one sentence from the context.\n\nContext: {context}\n\nQuestion: {question}"
    )

    def run(llm: CardsLLM) -> list[dict[str, Any]]:
        chain = {"context": retriever, "question": RunnablePassthrough()} | documents_chain(llm, prompt)
        return [{"text": m.content, **m.response_metadata["cards"]} for m in chain.batch(list(ASKED))]

    return run


def llama_index(embedding: MiniLM, texts: Sequence[str]) -> Callable[[CardsLLM], list[dict[str, Any]]]:
    index = VectorStoreIndex([TextNode(text=text) for text in texts], embed_model=MiniLMIndex(model=embedding))

    def run(llm: CardsLLM) -> list[dict[str, Any]]:
        handler = Answers(seen=[])
        get_dispatcher().add_event_handler(handler)
        try:
            engine = index.as_query_engine(llm=llm, node_postprocessors=[RetrievedContext()], similarity_top_k=2)

            async def every() -> list[Any]:
                return await asyncio.gather(*(engine.aquery(question) for question in ASKED))

            texts = [str(response) for response in asyncio.run(every())]
        finally:
            get_dispatcher().event_handlers.remove(handler)
        by_text = {each["text"]: each for each in handler.seen}
        return [by_text[text] for text in texts]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--frameworks", nargs="+", default=["langchain", "llama_index"])
    options, console = parser.parse_args(), Console()
    pages = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
    embedding, texts = MiniLM(), [text for page in pages for text in paragraphs(page.read_text(encoding="utf-8"))]
    results: dict[str, Any] = {"paragraphs": len(texts), "questions": len(ASKED), "seeds": options.seeds}
    for framework in options.frameworks:
        run = {"langchain": langchain, "llama_index": llama_index}[framework](embedding, texts)
        for way, settings in WAYS.items():
            answers = []
            for seed in range(options.seeds):
                answers += run(CardsLLM(max_tokens=48, seed=seed, **settings))
            facts = list(ASKED.values()) * options.seeds
            usages = [answer["usage"] for answer in answers]
            results[f"{framework}, {way}"] = found = {
                "answers": len(answers),
                "hold the fact": sum(bool(re.search(f, a["text"])) for f, a in zip(facts, answers, strict=True)),
                "reward": None if answers[0]["reward"] is None else float(np.mean([a["reward"] for a in answers])),
                "by name": {
                    name: float(np.mean([a["rewards"][name] for a in answers if name in a["rewards"]]))
                    for name in answers[0]["rewards"]
                },
                **{
                    name: float(np.mean([usage[name] for usage in usages]))
                    for name in ("drafted_tokens", "drafts", "lm_forwards", "rm_forwards", "rm_tokens")
                },
            }
            console.print(framework, way, found)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
