"""Answers to a file of prompts with Ray Data: a `CardsLLM` in each worker, a batch of prompts at a time.

    pip install "ray[data]"
    python cookbook/ray_data.py prompts.jsonl answers --config cards.yaml --workers 8 --gpus 1

Each line of the input is {"prompt": ..., "seed": ...}; the seed makes an answer the same wherever it is written. With a
local model a worker has a GPU, or its share of the CPUs, to itself. With `VllmModel` it needs neither (`--gpus 0`), and
the workers share the servers.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from cards_integrations import CardsLLM

Batch = dict[str, NDArray[Any]]


class Align:
    """A worker: its models are loaded once, and all prompts of a batch are drafted together."""

    def __init__(self, config: str) -> None:
        self.llm = CardsLLM.from_settings(config)

    def __call__(self, batch: Batch) -> Batch:
        prompts, seeds = batch["prompt"].tolist(), batch["seed"].tolist()
        answers = self.llm.align_batch(prompts, seeds=seeds)
        return {
            **batch,
            "answer": np.array([answer.text for answer in answers], dtype=object),
            "reward": np.array([answer.reward for answer in answers], dtype=float),
            "tokens": np.array([answer.usage.completion_tokens for answer in answers]),
        }


def align(
    prompts: ray.data.Dataset, config: str, workers: int = 1, gpus: float = 0, cpus: float = 1, batch_size: int = 64
) -> ray.data.Dataset:
    """The prompts with their answers; nothing runs before the result is read or written."""
    return prompts.map_batches(
        Align,
        fn_constructor_args=(config,),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
        num_cpus=cpus,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Answers to a file of prompts with Ray Data.")
    parser.add_argument("prompts", help="JSON lines with prompt and seed")
    parser.add_argument("answers", help="a folder, for JSON lines")
    parser.add_argument("--config", required=True, help="settings, as for `cards generate`")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="for each worker")
    parser.add_argument("--cpus", type=float, default=1, help="for each worker")
    given = parser.parse_args()
    found = align(ray.data.read_json(given.prompts, lines=True), given.config, given.workers, given.gpus, given.cpus)
    found.write_json(given.answers)
