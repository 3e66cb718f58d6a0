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
guided = CardsLLM(reward=GroundednessReward(), max_tokens=32)
QUESTIONS = ["What is the capital of France?", "How long is the ridge trail?", "What does Jonas play?"]


def answer(llm, question, seed):
    llm.seed = seed
    engine = index.as_query_engine(llm=llm, similarity_top_k=1, node_postprocessors=[RetrievedContext()])
    return str(engine.query(question)).strip()


for question in QUESTIONS:
    print(question)
    for name, llm in (("plain ", plain), ("guided", guided)):
        for seed in (0, 1):
            print(f"  {name}  {answer(llm, question, seed)}")

# %% [markdown]
# ## Source by source
#
# The reward by embeddings says which source supports an answer. Everything is in `raw["cards"]`, here of a direct call.
# (What a model of 135M parameters does not draft, no reward can choose: mind the answer.)

# %%
by_embedding = GroundednessReward(by="embedding")
response = guided.complete("When does the museum open?", context=FACTS[:2], reward=by_embedding)
print(response.text)
response.raw["cards"]["rewards"]

# %% [markdown]
# ## A chat engine
#
# It also asks the model to rephrase questions, without a context: `without_context="plain"` lets those calls through.

# %%
from llama_index.core.memory import ChatMemoryBuffer

chatty = CardsLLM(reward=GroundednessReward(without_context="plain"), max_tokens=32, seed=2)
chat = index.as_chat_engine(
    chat_mode="condense_plus_context",
    llm=chatty,
    memory=ChatMemoryBuffer.from_defaults(token_limit=1000),
    node_postprocessors=[RetrievedContext()],
    similarity_top_k=1,
)
print(chat.chat("What is in the soup of Mrs Bell?"))
print(chat.chat("And when does the museum open?"))

# %%
for llm in (plain, guided, chatty):
    llm.close()
