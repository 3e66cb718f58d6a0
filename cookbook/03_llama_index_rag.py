# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · LlamaIndex: retrieval with answers that stay with their sources
#
# A small model likes to answer from what it believes. `GroundednessReward` scores how far the retrieved context supports
# an answer, while it is written.

# %%
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode
from sentence_transformers import SentenceTransformer

from cards_integrations import CardsLLM, RetrievedContext
from cards_integrations.decoding import Cards
from cards_integrations.models.local.resolve import resolve_model
from cards_integrations.rewards import GroundednessReward

FACTS = [
    "The town museum opens at noon on weekdays. Entry is free for children.",
    "In this story, France has moved its capital. The capital of France is Lyon.",
    "The ridge trail is nine miles long and climbs steeply at the end.",
    "Mrs Bell makes her soup with lentils, carrots and cumin.",
    "Jonas plays the bassoon in the city orchestra.",
]

# %% [markdown]
# MiniLM, which comes in a wheel, embeds (by sentence-transformers, the extra `embeddings`). In your own work take any
# embedding of LlamaIndex.

# %%
minilm = SentenceTransformer(resolve_model("minilm"), device="cpu")


class MiniLM(BaseEmbedding):
    def _get_text_embedding(self, text):
        return minilm.encode(text, normalize_embeddings=True).tolist()

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query):
        return self._get_query_embedding(query)


index = VectorStoreIndex([TextNode(text=fact) for fact in FACTS], embed_model=MiniLM())

# %% [markdown]
# ## Plain, and guided
#
# One line: the reward finds the context in the prompt. With `RetrievedContext()` it is told the retrieved nodes one by
# one, so that each source is scored in the trace.

# %%
plain = CardsLLM(decoding="sampling", reward=None, max_tokens=32)
guided = CardsLLM(reward=GroundednessReward(), decoding=Cards(), max_tokens=32)
QUESTIONS = {  # with a word of the right answer, by the documents
    "What is the capital of France?": "Lyon",
    "How long is the ridge trail?": "nine",
    "What does Jonas play?": "bassoon",
    "What is in the soup of Mrs Bell?": "lentils",
    "When does the museum open?": "noon",
}


def answer(llm, question, seed):
    llm.seed = seed
    engine = index.as_query_engine(llm=llm, similarity_top_k=1, node_postprocessors=[RetrievedContext()])
    return str(engine.query(question)).strip()


right = {"plain": 0, "guided": 0}
for question, word in QUESTIONS.items():
    print(question)
    for name, llm in (("plain", plain), ("guided", guided)):
        for seed in range(3):
            text = answer(llm, question, seed)
            right[name] += word in text
            print(f"  {name:6}  {text}")

# %%
print({name: f"{count} of {3 * len(QUESTIONS)}" for name, count in right.items()})

# %% [markdown]
# ## Source by source
#
# The reward by embeddings says which source supports an answer; it scores any text, whoever wrote it. Here an answer from one
# source, against all documents:

# %%
question = "What is in the soup of Mrs Bell?"
engine = index.as_query_engine(llm=guided, similarity_top_k=1, node_postprocessors=[RetrievedContext()])
response = engine.query(question)
print(response, "\n")
for fact in FACTS:
    [support] = guided.score(question, [str(response)], reward=GroundednessReward(by="embedding"), context=[fact])
    print(f"{support:5.2f}  {fact}")

# %% [markdown]
# ## A chat engine
#
# The same reward in a conversation. (In the mode "condense_plus_context" the model also rephrases questions, without a context:
# `GroundednessReward(without_context="plain")` lets those calls through.)

# %%
from llama_index.core.memory import ChatMemoryBuffer

chatty = CardsLLM(reward=GroundednessReward(), decoding=Cards(), max_tokens=32, seed=2)
chat = index.as_chat_engine(
    chat_mode="context",
    llm=chatty,
    memory=ChatMemoryBuffer.from_defaults(token_limit=1000),
    node_postprocessors=[RetrievedContext()],
    similarity_top_k=1,
)
print(chat.chat("What is in the soup of Mrs Bell?"))

# %%
for llm in (plain, guided, chatty):
    llm.close()
