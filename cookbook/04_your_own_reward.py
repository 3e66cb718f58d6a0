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
# A reward scores beginnings of answers, higher is better. That is all that CARDS asks of it.

# %%
from cards_integrations import CardsLLM

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


answer = llm.align(QUESTION, reward=short_words)
print(answer.text, f"\n\nmean word length {-answer.reward:.2f}")

# %% [markdown]
# Nobody told CARDS which word length is good. On "auto" it measures the reward on plain answers once, and aims at their mean
# plus one and a half standard deviations.
#
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
answer  # what was rejected is folded under each segment

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
