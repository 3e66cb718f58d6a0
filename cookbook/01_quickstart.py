# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Quickstart: aligned text without fine-tuning
#
# A language model writes; a *reward model* says how good a text is. Cascade Reward Sampling (CARDS) puts the two
# together while the text is written: the language model drafts a small segment, the reward model scores it, and the
# segment is kept or drawn again. No training, any model, any reward.
#
# Everything here runs offline on a laptop's CPU: SmolLM2-135M (it comes in a wheel), and a small sentiment reward
# model that comes with this package. It is a toy reward; the point is that you can see it work.

# %%
from cards_integrations import CardsLLM

llm = CardsLLM(model="smollm2", reward="sentiment", max_tokens=48, seed=3)

# %% [markdown]
# `align` returns the answer with everything that happened on the way.

# %%
answer = llm.align("What was the hotel room like?")
print(answer.text)
print(f"\nreward {answer.reward:.2f}, log-likelihood {answer.log_likelihood:.0f} nats, {answer.finish_reason}")

# %% [markdown]
# The same prompt and seed without alignment, for comparison. `decoding` is an option like any other; here it is
# overridden for one call.

# %%
plain = llm.align("What was the hotel room like?", decoding="sampling")
print(plain.text)
[reward] = llm.score("What was the hotel room like?", [plain.text])
print(f"\nreward {reward:.2f}")

# %% [markdown]
# ## How the answer came to be
#
# An answer renders itself: kept segments coloured by their reward, the threshold that drafts had to meet (it rises from near
# the prompt's own reward to the target), and, folded, every draft that was looked at.

# %%
answer

# %% [markdown]
# The same as data:

# %%
for segment in answer.segments[:3]:
    for draft in segment.drafts:
        print(f"reward {draft.reward:5.2f}  threshold {draft.threshold:5.2f}  {draft.verdict:9}{draft.text!r}")
    print()

# %% [markdown]
# What it cost, in tokens and forward passes of both models:

# %%
answer.usage

# %% [markdown]
# ## A reward of your own
#
# Any function of the prompt and a list of (partial) answers. Its scale is measured at first use; here the best score is known,
# 0 for no comma at all, so it is given as the target.

# %%
from cards_integrations.decoding import Cards, FixedLength


def few_commas(prompt: str, answers: list[str]) -> list[float]:
    return [-float(answer.count(",")) for answer in answers]


short_of_commas = llm.align(
    "List what you see in a kitchen.",
    reward=few_commas,
    decoding=Cards(target_reward=0.0, beta=0.2, boundary=FixedLength(length=8)),
)
print(short_of_commas.text)
print(short_of_commas.reward)

# %% [markdown]
# ## In LangChain and in LlamaIndex
#
# The same object is a LangChain Runnable and a LlamaIndex LLM.

# %%
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

chain = ChatPromptTemplate.from_template("Write one sentence about {topic}.") | llm | StrOutputParser()
for piece in chain.stream({"topic": "the sea"}):  # a chunk per kept segment
    print(piece, end="|", flush=True)

# %%
from llama_index.core import Settings
from llama_index.core.chat_engine import SimpleChatEngine

Settings.llm = llm
print(SimpleChatEngine.from_defaults().chat("Tell me about your garden."))

# %%
llm.close()
