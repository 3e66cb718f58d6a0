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
# A language model writes; a *reward model* says how good a text is. Here the two work together while the text is written:
# the language model drafts beginnings of an answer, the reward model scores them, and only good ones go on. No training, any
# model, any reward.
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
# One answer proves nothing. Eight, with the same prompts and seeds:

# %%
PROMPTS = [
    "How was the film?",
    "Tell me about your weekend.",
    "How is the food here?",
    "Describe your new neighbour.",
] * 2
for decoding in ("sampling", None):  # None is the method of `llm`
    options = {"decoding": decoding} if decoding else {}
    texts = [each.text for each in llm.align_batch(PROMPTS, seeds=range(8), **options)]
    scores = [llm.score(prompt, [text])[0] for prompt, text in zip(PROMPTS, texts, strict=True)]
    print(f"{decoding or 'aligned':9} mean reward {sum(scores) / len(scores):5.2f}")

# %% [markdown]
# ## How an answer comes to be
#
# An answer renders itself. `Cards()` is the method of the paper, Cascade Reward Sampling: segment by segment, a candidate is kept if
# its reward reaches a threshold, which rises from near the prompt's own reward to a target, and drawn again if not. Every
# candidate that was looked at is folded below its segment.

# %%
from cards_integrations.decoding import Cards, Cascade

by_threshold = llm.align("What was the hotel room like?", decoding=Cards())
by_threshold

# %% [markdown]
# `Cascade` keeps several beginnings at once, in rounds, and needs no threshold: the best of a round go on. It is planned by what it
# may cost, here six times the drafted tokens of a plain answer.

# %%
llm.align("What was the hotel room like?", decoding=Cascade(budget="tokens:6"))

# %% [markdown]
# `answer.to_html("answer.html")` writes the same as a page, in which every segment leads to its candidates.

# %% [markdown]
# The same as data:

# %%
for segment in by_threshold.segments[:3]:
    for draft in segment.drafts:
        print(f"reward {draft.reward:5.2f}  threshold {draft.threshold:5.2f}  {draft.verdict:9}{draft.text!r}")
    print()

# %% [markdown]
# What it cost, in tokens and forward passes of both models:

# %%
by_threshold.usage

# %% [markdown]
# ## A reward of your own
#
# Any function of the prompt and a list of (partial) answers. Here the best score is known, 0 for no comma at all, so it is given
# as the target.

# %%
from cards_integrations.decoding import FixedLength


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
for piece in chain.stream({"topic": "the sea"}):  # what is kept comes at once
    print(piece, end="|", flush=True)

# %%
from llama_index.core import Settings
from llama_index.core.chat_engine import SimpleChatEngine

Settings.llm = llm
print(SimpleChatEngine.from_defaults().chat("Tell me about your garden."))

# %%
llm.close()
