# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · A reward of your own
#
# A reward scores beginnings of answers, higher is better. That is all that is asked of it. Whatever you can measure, you can
# guide with, from the next call on: nothing is trained.

# %%
from cards_integrations import CardsLLM
from cards_integrations.decoding import Cards

llm = CardsLLM(max_tokens=32, seed=0)
QUESTION = "How do I keep a tomato plant healthy?"
print(llm.align(QUESTION, decoding="sampling").text)

# %% [markdown]
# ## A function
#
# From a prompt and several (partial) answers to as many numbers; sync or async. Here: short words.


# %%
def short_words(prompt, answers):
    return [-sum(map(len, answer.split())) / max(1, len(answer.split())) for answer in answers]


for name, options in (("plain", {"decoding": "sampling"}), ("short words", {"reward": short_words})):
    answers = llm.align_batch([QUESTION] * 4, seeds=range(4), **options)
    lengths = [-score for score in short_words(QUESTION, [answer.text for answer in answers])]
    print(f"{name}: mean word length {sum(lengths) / len(lengths):.2f}\n  {answers[0].text}\n")

# %% [markdown]
# `Cards()` aims at a target. Nobody told it which word length is good: on "auto" it measures the reward on plain answers once, and
# takes their mean plus one and a half standard deviations.

# %%
answer = llm.align(QUESTION, reward=short_words, decoding=Cards())
print(answer.text)
answer.guidance

# %% [markdown]
# ## Settings, so that it can go into a file
#
# A class with a `kind` can go into YAML, JSON and `CARDS_REWARD`, in a process that has imported it. The `cards` command finds
# those of installed packages, through the entry point group `cards_integrations.rewards`.

# %%
from typing import Literal

from cards_integrations.rewards import Reward, register_reward


@register_reward
class Starts(Reward):
    """1 for an answer that starts with a word, 0 otherwise."""

    kind: Literal["starts"] = "starts"
    word: str

    def score(self, prompt, responses):
        return [float(self.word.startswith(r[: len(self.word)]) or r.startswith(self.word)) for r in responses]


from cards_integrations.rewards import as_reward

as_reward({"kind": "starts", "word": "First"})

# %% [markdown]
# ## Several at once
#
# Parts are standardised by their own scale, so weights mean what they say. A gate is a hard constraint in front.

# %%
from cards_integrations.rewards import GateReward, PatternReward, WeightedReward

friendly = WeightedReward(rewards=("sentiment", short_words), weights=(1.0, 0.5))
answer = llm.align(QUESTION, reward=friendly)
print(answer.rewards)
answer  # each part along the answer; what was rejected is folded under each segment

# %%
no_lists = GateReward(gate=PatternReward(forbidden=(r"\d\.", r"\n-", r"\*")), reward="sentiment")
print(llm.align(QUESTION, reward=no_lists).text)

# %% [markdown]
# ## YAML
#
# All settings of a model, its reward and its method in one file; `cards generate --config cards.yaml` reads it, too.

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

from cards_integrations import CardsSettings

with TemporaryDirectory() as folder:
    file = Path(folder) / "cards.yaml"
    file.write_text(CardsSettings(reward=no_lists, max_tokens=24, seed=3).to_yaml())
    print(file.read_text())
    same = CardsLLM.from_settings(file)

print(same.align("How was your day?").text)

# %%
llm.close()
same.close()
