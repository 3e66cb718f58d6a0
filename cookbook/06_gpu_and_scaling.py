# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · A hub model on a GPU
#
# The cells that need a GPU and the hub are skipped where there is none. The settings are the ones to start from; we have not
# run this notebook on a GPU.

# %%
import os

import torch

READY = torch.cuda.is_available() and not os.environ.get("HF_HUB_OFFLINE")
print("a GPU and the hub are here" if READY else "no GPU, or no hub: the next cells are skipped")

# %% [markdown]
# A chat model and a reward model with the same tokenizer: candidates are scored by their own tokens, without tokenizing
# again. bf16 is chosen on a GPU; `kv_memory` is the share of the free memory that KV caches may take.

# %% tags=["gpu"]
if READY:
    from cards_integrations import CardsLLM
    from cards_integrations.engine import EngineSettings
    from cards_integrations.rewards import ClassifierReward

    llm = CardsLLM(
        model="meta-llama/Llama-3.1-8B-Instruct",
        reward=ClassifierReward(model="Skywork/Skywork-Reward-V2-Llama-3.1-8B"),
        max_tokens=256,
        engine=EngineSettings(kv_memory=0.8, max_rows=64),
    )
    print(llm.align("How do I make friends in a new city?").text)

# %% [markdown]
# `Cards()` has a target, and an unknown reward has an unknown scale: calibrate once, on your prompts, and `decoding=Cards()` takes
# the target from then on, in every process.

# %% tags=["gpu"]
if READY:
    print(llm.calibrate(budget=6))

# %% [markdown]
# Many prompts are answered in one running batch, and a file of them by the command line:
#
# ```bash
# cards generate --prompts in.jsonl --out out.jsonl --config cards.yaml --concurrency 64
# ```
#
# Reward models may live elsewhere: `RemoteReward(url="http://...:8000", protocol="classify")` asks a vLLM server.

# %% tags=["gpu"]
if READY:
    answers = llm.align_batch([f"Name a use of {thing}." for thing in ("a brick", "a spoon")], progress=True)
    print([answer.reward for answer in answers])
    llm.close()

# %% [markdown]
# ## A model that thinks
#
# Thoughts are written before the answer and apart from it: no reward, stop string or tool call sees them, unless you guide them as
# well (`thinking="aligned"`). No such model comes in a wheel, so this cell shows the settings, and no output of ours.

# %% tags=["gpu"]
if READY:
    thinker = CardsLLM(model="Qwen/Qwen3-4B", thinking="free", max_thinking_tokens=512, max_tokens=256)
    message = thinker.invoke("How many r are in strawberry?")
    print(message.content_blocks)  # a reasoning block, then the text
    print(thinker.align("How many r are in strawberry?", thinking="off").text)
    thinker.close()
