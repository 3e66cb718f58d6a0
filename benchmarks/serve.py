"""What the server costs: segments through it against the same ones without it, then many things at once for a while.

    python benchmarks/serve.py                                         # SmolLM2; five minutes of load or more
    python benchmarks/serve.py --model ../shared/models/stories260k --reward ../shared/models/rm-sentiment-stories260k \
        --seconds 60
    python benchmarks/serve.py --requests 0 --clients 6 --kv-memory 128    # MiB; the load alone

The server is a process of its own. For the latency, one request after the other goes to it and, with the same seed, to
an engine in this process, in turns, by a method whose segments come one after the other (those of a search come
together); the ratio is that of the median times between two segments, and of the times to the first one. For the load,
`--clients` clients ask for streams, whole answers, plain ones, the paper's method, calls of a tool, several answers and
JSON; some leave in the middle, and some ask for what is refused. Memory is that of the server's process, every second;
finished texts, which it keeps for prompts that begin like them, are a part of it that grows up to `--kv-memory`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from cards_integrations import CardsLLM
from cards_integrations.trace import Alignment

NAME = "served"
PROMPTS = ["How was your day?", "Tell me about the sea.", "What is a good breakfast?", "Write a line about rain."]
METHOD = "cards"  # of the requests whose latency is compared
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
COUNT = {"name": "count", "description": "Counts.", "parameters": SCHEMA}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "stream": (4, {"stream": True}),
    "leave": (3, {"stream": True}),
    "whole": (2, {}),
    "plain": (2, {"cards": {"decoding": "sampling"}}),
    "cards": (2, {"cards": {"decoding": "cards"}}),
    "tool": (2, {"tools": [{"type": "function", "function": COUNT}], "tool_choice": "required"}),
    "several": (1, {"n": 3}),
    "json": (1, {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}),
    "refused": (1, {"cards": {"reward": {"kind": "function", "function": "os.system"}}}),
}
"""The requests of the load: how often each is made among the others, and what it asks for."""
PARTS = 5  # in which the time of the load is told


@contextmanager
def server(options: dict[str, Any]) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server in a process of its own, and the process."""
    command = [sys.executable, "-c", "from cards_integrations.cli import main; main()", "serve", "--port", "0"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with subprocess.Popen([*command, "--served-name", NAME], stderr=subprocess.PIPE, text=True) as process:
        errors = process.stderr
        assert errors is not None
        line = next(line for line in errors if "running on" in line)
        threading.Thread(target=errors.read, daemon=True).start()  # so that it never waits to be read
        try:
            yield line.split("running on ")[1].split()[0], psutil.Process(process.pid)
        finally:
            process.terminate()


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": prompt}], **fields}


# --- latency ---


def direct(llm: CardsLLM, prompt: str, seed: int) -> tuple[list[float], str]:
    """Seconds to the first segment and between segments, and the text."""
    times, text, last = [], "", time.perf_counter()
    for item in llm.align_stream([{"role": "user", "content": prompt}], seed=seed, decoding=METHOD):
        if isinstance(item, Alignment):
            break
        if item.text:
            times.append(time.perf_counter() - last)
            last = time.perf_counter()
            text += item.text
    return times, text


def through(client: httpx.Client, prompt: str, seed: int) -> tuple[list[float], str]:
    """The same through the server."""
    times, text, last = [], "", time.perf_counter()
    asked = body(prompt, seed=seed, stream=True, cards={"decoding": METHOD})
    with client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            delta = json.loads(line[6:])["choices"][0]["delta"]
            if delta.get("content"):
                times.append(time.perf_counter() - last)
                last = time.perf_counter()
                text += delta["content"]
    return times, text


def latency(url: str, llm: CardsLLM, requests: int) -> dict[str, Any]:
    """Both in turns."""
    found: dict[str, list[list[float]]] = {"direct": [], "server": []}
    same = 0
    with httpx.Client(base_url=url, timeout=3600) as client:
        for seed in range(-2, requests):  # the first ones warm up
            prompt = PROMPTS[seed % len(PROMPTS)]
            pair = {"direct": direct(llm, prompt, abs(seed)), "server": through(client, prompt, abs(seed))}
            if seed >= 0:
                same += pair["direct"][1] == pair["server"][1]
                for name, (times, _) in pair.items():
                    found[name].append(times)
    first = {name: median(times[0] for times in each) for name, each in found.items()}
    between = {name: median(t for times in each for t in times[1:]) for name, each in found.items()}
    whole = {name: sum(map(sum, each)) for name, each in found.items()}
    return {
        "requests": requests,
        "same texts": f"{same} of {requests}",
        "milliseconds to the first segment": {name: round(1000 * value, 2) for name, value in first.items()},
        "milliseconds between segments": {name: round(1000 * value, 2) for name, value in between.items()},
        "ratio, first segment": round(first["server"] / first["direct"], 3),
        "ratio, between segments": round(between["server"] / between["direct"], 3),
        "ratio, whole answers": round(whole["server"] / whole["direct"], 3),
    }


# --- load ---


async def one(client: httpx.AsyncClient, rng: random.Random) -> str:
    """One request of a mixed load, and what became of it."""
    kind = rng.choices(list(KINDS), [often for often, _ in KINDS.values()])[0]
    prompt = f"{rng.choice(PROMPTS)} I ask for the {rng.randrange(1000)}th time."
    asked = body(prompt, seed=rng.randrange(2**31), **KINDS[kind][1])
    if asked.get("stream"):
        async with client.stream("POST", "/v1/chat/completions", json=asked) as reply:
            lines = 0
            async for line in reply.aiter_lines():
                lines += line.startswith("data:")
                if kind == "leave" and lines > 2:
                    return kind
            return f"{kind} {reply.status_code}"
    if kind == "whole" and rng.random() < 0.3:
        try:
            await client.post("/v1/chat/completions", json=asked, timeout=0.2)
        except httpx.TimeoutException:
            return "left before the answer"
    reply = await client.post("/v1/chat/completions", json=asked)
    return f"{kind} {reply.status_code}"


async def numbers(client: httpx.AsyncClient) -> dict[str, float]:
    """Those of /metrics, by their names."""
    lines = (await client.get("/metrics")).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


async def load(url: str, process: psutil.Process, clients: int, seconds: int) -> dict[str, Any]:
    """Many clients for a while; the memory of the server every second."""
    outcomes, over, began = Counter[str](), asyncio.Event(), time.monotonic()
    memory: list[float] = []
    texts: list[float] = []

    async def ask(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=3600) as client:
            while not over.is_set():
                outcomes[await one(client, rng)] += 1

    async def watch() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=3600) as client:
            for _ in range(seconds):  # a time in which the machine stands still is none of them
                texts.append((await numbers(client))["cards_prefix_bytes"] / 2**20)
                memory.append(process.memory_info().rss / 2**20)
                await asyncio.sleep(1)
        over.set()

    await asyncio.gather(watch(), *map(ask, range(clients)))
    minutes = (time.monotonic() - began) / 60
    await asyncio.sleep(2)
    async with httpx.AsyncClient(base_url=url) as client:
        metrics = await numbers(client)
    return {
        "times that memory was looked at, a second or more apart": seconds,
        "minutes, until the last answer": round(minutes, 1),
        "clients": clients,
        "requests": outcomes.total(),
        "outcomes": dict(sorted(outcomes.items())),
        "segments": int(metrics["cards_segments_total"]),
        "tokens kept": int(metrics['cards_tokens_total{kind="kept"}']),
        "rows afterwards": int(metrics["cards_rows"]),
        "answers afterwards": int(metrics["cards_answers"]),
        "MiB, mean of each fifth": _means(memory),
        "MiB, first and last": [round(memory[0]), round(memory[-1])],
        "MiB of finished texts, mean of each fifth": _means(texts),
        "MiB of KV caches, most of it and of finished texts": round(metrics["cards_memory_limit_bytes"] / 2**20),
    }


def _means(values: list[float], parts: int = PARTS) -> list[int]:
    """The mean of each part of a series."""
    ends = [len(values) * part // parts for part in range(parts + 1)]
    return [round(sum(values[a:b]) / max(1, b - a)) for a, b in pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--reward", default="sentiment")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=20, help="whose latency is compared; 0 for the load alone")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=300, help="of the load; 0 for the latency alone")
    parser.add_argument("--kv-memory", type=int, help="MiB of the server's KV caches and finished texts")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("CARDS_ENGINE__THREADS", "1")
    options = {"model": args.model, "reward": args.reward, "max_tokens": args.max_tokens}
    found: dict[str, Any] = {"model": Path(args.model).name, "max_tokens": args.max_tokens}
    if args.kv_memory is not None:
        os.environ["CARDS_ENGINE__KV_MEMORY"] = str(args.kv_memory * 2**20)
    with server(options) as (url, process):
        if args.requests:
            with CardsLLM(**options) as llm:
                found["latency"] = latency(url, llm, args.requests)
            print(json.dumps(found["latency"], indent=2), flush=True)
        if args.seconds:
            found["load"] = asyncio.run(load(url, process, args.clients, args.seconds))
            print(json.dumps(found["load"], indent=2))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
