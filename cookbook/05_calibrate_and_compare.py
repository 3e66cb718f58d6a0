# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · What does it buy? Calibrate, and compare
#
# Before you believe our charts, draw your own: on your model, your reward and your prompts. Here on a small scale, so that it
# runs in three minutes on a laptop; the same with a hundred prompts is in `benchmarks/`.

# %%
from cards_integrations import CardsLLM
from cards_integrations.decoding import BestOfN, Cards, Cascade, Sampling, SegmentBestOfN
from cards_integrations.study import compare

llm = CardsLLM(reward="sentiment", max_tokens=32)
PROMPTS = [
    "How was the hotel?", "Tell me about your weekend.", "What was the film like?", "Describe your new neighbour.",
    "How is the food here?", "What do you think of the new park?", "Tell me about the trip.", "How did the exam go?",
]  # fmt: skip

# %% [markdown]
# ## Calibrate
#
# `Cards` has a target. Scored drafts of plain answers show how this reward moves along an answer. From them CARDS is simulated for many targets,
# and one is chosen: here the best that four times the tokens of a plain answer can buy.

# %%
found = llm.calibrate(PROMPTS, budget=4, candidates=2, remember=False, progress=False)
print(found)

# %%
found.plot()

# %% [markdown]
# ## Compare
#
# The same prompts and seeds for every method, on one engine. `judge` is a held-out reward, which guides nothing: the reward
# that is searched for is overestimated. (This one learned from the same ratings as the guide.)

# %%
arms = {
    "plain": Sampling(),
    "best-of-4": BestOfN(n=4),
    "best-of-8": BestOfN(n=8),
    "segment best-of-4": SegmentBestOfN(n=4),
    "Cascade, 8 times the tokens": Cascade(budget="tokens:8"),
    "CARDS": Cards(),
    "CARDS, calibrated": found.decoding,
}
result = compare(llm, arms, PROMPTS, judge="sentiment-minilm", progress=False)
result.table()

# %%
result.plot()

# %% [markdown]
# Eight prompts leave wide intervals. `result.difference("CARDS", "best-of-8", "judged")` gives the paired one:

# %%
print(result.difference("CARDS", "best-of-8", "judged"))

# %% [markdown]
# On the command line: `cards compare prompts.txt --method cards --method best_of_n:n=8 --judge sentiment-minilm --out
# answers.jsonl --report report.html`, which goes on where it was interrupted, because of `--out`; and `cards judge a.jsonl
# b.jsonl --llm provider:model` asks a model which of two answers is better, in both orders.

# %%
llm.close()
