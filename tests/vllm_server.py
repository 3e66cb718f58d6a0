"""A server that speaks vLLM's protocol, drafts with a tiny model, counts what it does, and fails on demand."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

COMPLETIONS, CLASSIFY, MODELS, TOKENIZE, HEALTH = "/v1/completions", "/classify", "/v1/models", "/tokenize", "/health"
MEASURES = ("entropy", "max_probability", "evidential")
PERMISSION = {
    "id": "modelperm-1", "object": "model_permission", "created": 0, "allow_create_engine": False,
    "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False, "allow_view": True,
    "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
}  # fmt: skip
BLOCK = 4  # tokens that the prefix cache keeps together


class Refused(Exception):
    """HTTP 400, and which parameter is at fault."""


class Gone(Exception):
    """The client has closed its connection."""


class Killed(Exception):
    """The server closes the connection in the middle of its answer."""


@dataclass
class Asked:
    """One request, and what became of it."""

    path: str
    body: Any
    key: str | None
    reply: Any = None
    aborted: bool = False


@dataclass
class Fault:
    """What the next `times` requests of this path meet: a status, or one of "hang", "malformed", "killed", "echo"."""

    kind: int | str
    times: float
    path: str


@dataclass(frozen=True)
class Rule:
    """What `EntropyStop` is told by a request."""

    measure: str
    threshold: float
    min_length: int
    sentinel: int
    min_tokens: int = 0

    @classmethod
    def of(cls, asked: Mapping[str, Any], vocabulary: int) -> Rule | None:
        """What a request asks for, refused where `EntropyStop` refuses it, and in its words."""
        if "cards_threshold" not in asked:
            return None
        threshold, measure = asked["cards_threshold"], asked.get("cards_measure", "entropy")
        least, sentinel = asked.get("cards_min_length", 1), asked.get("cards_sentinel")
        if not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
            raise Refused(f"cards_threshold={threshold!r} must be a finite number")
        if measure not in MEASURES:
            raise Refused(f"cards_measure={measure!r} must be one of {MEASURES}")
        if not isinstance(least, int):
            raise Refused(f"cards_min_length={least!r} must be an integer")
        if not isinstance(sentinel, int) or sentinel < 0:
            raise Refused(f"cards_sentinel={sentinel!r} must be the id of a token")
        return (
            None
            if sentinel >= vocabulary
            else cls(measure, threshold, least, sentinel, asked.get("cards_min_tokens", 0))
        )

    def ends(self, logits: torch.Tensor) -> bool:
        """Section 3.2 of the paper, written anew from its words."""
        p = logits.double().softmax(-1)
        if self.measure == "entropy":
            value = -(p * p.log()).nansum()
        elif self.measure == "max_probability":
            value = 1 - p.max()
        else:
            value = len(logits) / (logits.double().clamp(min=0) + 1).sum()
        return float(value) >= self.threshold


@dataclass
class VllmServer:
    """One replica on 127.0.0.1; `folder` holds the drafting model, `judge` the reward model.

    `pace` are seconds that a token takes at least; `spoil` changes a completion before it is sent; `more` are further
    paths, and what they answer.
    """

    folder: str
    judge: str | None = None
    name: str = "served"
    plugin: bool = True
    details: bool = True
    key: str | None = None
    pace: float = 0.0
    port: int = 0
    wrong_tokenizer: bool = False
    healthy: bool = True
    spoil: Callable[[dict[str, Any]], None] | None = None
    more: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    in_flight: int = 0
    peak: int = 0
    tokens: int = 0
    forwards: int = 0

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.folder).float().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.classifier: Any = None
        if self.judge:
            self.classifier = AutoModelForSequenceClassification.from_pretrained(self.judge).float().eval()
        self.logits: dict[tuple[int, ...], torch.Tensor] = {}
        self.cache: set[tuple[int, ...]] = set()
        self.healths = 0
        self.number = 0

    # --- from the test's thread ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> VllmServer:
        config = uvicorn.Config(
            self, host="127.0.0.1", port=self.port, log_config=None, access_log=False, lifespan="off", ws="none",
            http="h11", loop="asyncio",
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, name="vllm-server", daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            threading.Event().wait(0.002)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def die(self) -> None:
        """Close the port and cut all connections, in the middle of whatever they carry."""
        loop = self.server.servers[0].get_loop()

        def now() -> None:
            for listening in self.server.servers:
                listening.close()
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()
            self.server.should_exit = self.server.force_exit = True

        loop.call_soon_threadsafe(now)
        self.thread.join()

    def wait_until_idle(self) -> None:
        """Until nothing is in flight."""
        for _ in range(5000):
            if self.in_flight == 0:
                return
            threading.Event().wait(0.002)
        raise AssertionError(f"{self.in_flight} requests are still in flight")

    def reset(self) -> None:
        """As if it had just been started."""
        self.asked, self.faults, self.cache = [], [], set()
        self.peak = self.tokens = self.healths = 0
        self.pace, self.key, self.plugin, self.details = 0.0, None, True, True
        self.wrong_tokenizer, self.healthy, self.spoil = False, True, None

    def fail(self, kind: int | str, times: float = math.inf, path: str = COMPLETIONS) -> None:
        self.faults.append(Fault(kind, times, path))

    def of(self, path: str) -> list[Asked]:
        """All requests of this path."""
        return [asked for asked in self.asked if asked.path == path]

    @property
    def drafted(self) -> list[Asked]:
        """Completions that a client asked for, without its question about the plug-in."""
        return [asked for asked in self.of(COMPLETIONS) if asked.body.get("return_token_ids")]

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self.server.server_state.connections)

    @property
    def aborted(self) -> int:
        return sum(asked.aborted for asked in self.asked)

    # --- in the server's thread ---

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return  # given up before it was asked
            body, more = body + message.get("body", b""), message.get("more_body", False)
        key = dict(scope["headers"]).get(b"authorization", b"").decode() or None
        asked = Asked(scope["path"], json.loads(body) if body else None, key)
        self.asked.append(asked)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        inside = True
        gone = asyncio.ensure_future(receive())  # what comes after the body is the end of the connection
        try:
            status, found = await self._answered(asked, gone)
            if gone.done():
                raise Gone
            asked.reply = found
            text = found if isinstance(found, bytes) else b"" if found is None else json.dumps(found).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
            self.in_flight -= 1
            inside = False
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": text})
        except Gone:
            asked.aborted = True
        except Killed:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b'{"id": ', "more_body": True})
            raise
        finally:
            gone.cancel()
            self.in_flight -= inside

    async def _answered(self, asked: Asked, gone: asyncio.Future[Any]) -> tuple[int, Any]:
        if asked.path == HEALTH:
            self.healths += 1
            return (200 if self.healthy else 503), None
        kind = self._fault(asked.path)
        if kind == "hang":
            await asyncio.wait([gone])
            raise Gone
        if kind == "killed":
            raise Killed
        if kind == "malformed":
            return 200, b'{"id": "cmpl-1", "choi'
        if kind == "echo":
            return 200, {"detail": f"no such key: {asked.key}"}
        if isinstance(kind, int):
            return kind, _error(kind, f"its   own words, for {asked.key}")
        if self.key is not None and asked.key != f"Bearer {self.key}":
            return 401, {"error": f"no such key: {asked.key}"}
        served = (asked.body or {}).get("model", self.name)
        if served != self.name:
            return 404, _error(404, f"The model `{served}` does not exist.", "model")
        try:
            if asked.path == MODELS:
                return 200, self._models()
            if asked.path == TOKENIZE:
                return 200, self._tokenized(asked.body)
            if asked.path == COMPLETIONS:
                found = await self._completed(asked.body, gone)
                if self.spoil is not None:
                    self.spoil(found)
                return 200, found
            if asked.path == CLASSIFY and self.classifier is not None:
                return 200, self._classified(asked.body)
            if asked.path in self.more:
                return 200, self.more[asked.path](asked.body)
        except Refused as error:
            return 400, _error(400, *error.args)
        return 404, {"detail": "Not Found"}

    def _fault(self, path: str) -> int | str | None:
        for fault in self.faults:
            if fault.path == path and fault.times > 0:
                fault.times -= 1
                return fault.kind
        return None

    @property
    def window(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def _models(self) -> dict[str, Any]:
        card = {
            "id": self.name, "object": "model", "created": 0, "owned_by": "vllm", "root": self.name, "parent": None,
            "max_model_len": self.window, "permission": [PERMISSION],
        }  # fmt: skip
        return {"object": "list", "data": [card]}

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _tokenized(self, body: Mapping[str, Any]) -> dict[str, Any]:
        tokens = self._ids(body["prompt"], body.get("add_special_tokens", True))
        tokens = [token + 1 for token in tokens] if self.wrong_tokenizer else tokens
        return {"count": len(tokens), "max_model_len": self.window, "tokens": tokens, "token_strs": None}

    async def _completed(self, body: Mapping[str, Any], gone: asyncio.Future[Any]) -> dict[str, Any]:
        prompt = body["prompt"] if isinstance(body["prompt"], list) else self._ids(body["prompt"])
        room, stop = body.get("max_tokens", 16), body.get("stop") or []
        if len(prompt) + room > self.window:
            raise Refused(f"max_tokens={room} cannot be greater than max_model_len={self.window}.", "max_tokens")
        rule = Rule.of(body.get("vllm_xargs") or {}, self.model.config.vocab_size) if self.plugin else None
        cached = self._cached(prompt)
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        ids: list[int] = []
        log_p: list[float] = []
        raw: list[torch.Tensor] = []
        offsets = [0]
        text, finish, reason = "", "length", None
        while len(ids) < room:
            await asyncio.sleep(self.pace)
            if gone.done():
                raise Gone
            logits = self._next((*prompt, *ids))
            token = self._token(logits, rule, [*prompt, *ids], len(ids), body, generator)
            ids.append(token)
            raw.append(logits.log_softmax(-1))
            log_p.append(float(logits.log_softmax(-1)[token]))
            self.tokens += 1
            if token == self.model.config.eos_token_id:
                finish = "stop"
                break
            if token in body.get("stop_token_ids", ()):
                finish, reason = "stop", token
                break
            text = self._text(prompt, ids)
            offsets.append(len(text))
            if found := [each for each in stop if each in text]:
                reason = min(found, key=text.index)
                finish, text = "stop", text[: text.index(reason)]
                break
        self._remember([*prompt, *ids])
        self.number += 1
        choice = {
            "index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": reason,
            "token_ids": ids if body.get("return_token_ids") else None, "prompt_logprobs": None,
            "prompt_token_ids": prompt if body.get("return_token_ids") else None, "routed_experts": None,
        }  # fmt: skip
        if body.get("logprobs") is not None:
            strings = [self.tokenizer.decode([token]) for token in ids]
            if body.get("return_tokens_as_token_ids"):
                strings = [f"token_id:{token}" for token in ids]
            top = [{string: value} for string, value in zip(strings, log_p, strict=True)]
            for each, values in zip(top, raw, strict=True):
                best = values.topk(body["logprobs"])
                each.update({f"token_id:{int(i)}": float(values[i]) for i in best.indices})
            choice["logprobs"] = {
                "text_offset": offsets[: len(ids)], "token_logprobs": log_p, "tokens": strings, "top_logprobs": top
            }  # fmt: skip
        details = {"cached_tokens": cached, "created_cache_tokens": None, "multimodal_tokens": None}
        usage = {
            "prompt_tokens": len(prompt), "total_tokens": len(prompt) + len(ids), "completion_tokens": len(ids),
            "prompt_tokens_details": details if self.details else None, "completion_tokens_details": None,
        }  # fmt: skip
        return {
            "id": f"cmpl-{self.number}", "object": "text_completion", "created": 0, "model": self.name,
            "choices": [choice], "service_tier": None, "system_fingerprint": "vllm-tiny", "usage": usage,
            "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip

    def _text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """As it goes on from the prompt, a space before its first word included."""
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        return str(self.tokenizer.decode([*prompt, *ids], skip_special_tokens=True))[len(before) :]

    def _token(
        self,
        logits: torch.Tensor,
        rule: Rule | None,
        before: Sequence[int],
        at: int,
        body: Mapping[str, Any],
        generator: torch.Generator,
    ) -> int:
        """Biases before the plug-in, penalties after it, as vLLM has them."""
        raw, logits = logits, logits.clone()
        for token, bias in (body.get("logit_bias") or {}).items():
            logits[int(token)] += bias
        ends = [self.model.config.eos_token_id, *body.get("stop_token_ids", ())]
        if at < body.get("min_tokens", 0):
            logits[ends] = -math.inf
        if rule is not None:
            if at >= rule.min_length and rule.ends(raw):
                return rule.sentinel
            logits[rule.sentinel] = -math.inf
            if at < rule.min_tokens:
                logits[ends] = -math.inf
        return self._drawn(logits, before, at, body, generator)

    @staticmethod
    def _drawn(
        logits: torch.Tensor, before: Sequence[int], at: int, body: Mapping[str, Any], generator: torch.Generator
    ) -> int:
        """Two of the penalties are for the `at` tokens of this call alone."""
        scores, ids = logits[None].double(), torch.tensor([[*before]])
        if (penalty := body.get("repetition_penalty", 1.0)) != 1:
            scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
        counts = torch.bincount(ids[0, len(before) - at :], minlength=len(logits))
        scores = scores - body.get("frequency_penalty", 0.0) * counts - body.get("presence_penalty", 0.0) * (counts > 0)
        if body.get("temperature", 1.0) == 0:
            return int(scores.argmax())
        scores = scores / body.get("temperature", 1.0)
        if 0 < body.get("top_k", 0) < len(logits):
            scores = TopKLogitsWarper(body["top_k"])(ids, scores)
        if body.get("top_p", 1.0) < 1:
            scores = TopPLogitsWarper(body["top_p"])(ids, scores)
        if body.get("min_p", 0.0) > 0:
            scores = MinPLogitsWarper(body["min_p"])(ids, scores)
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=generator))

    @torch.inference_mode()
    def _next(self, ids: tuple[int, ...]) -> torch.Tensor:
        """The raw logits after these tokens, of one forward or from before."""
        if ids not in self.logits:
            self.logits[ids] = self.model(torch.tensor([ids])).logits[0, -1]
            self.forwards += 1
        return self.logits[ids]

    def _cached(self, prompt: Sequence[int]) -> int:
        """Whole blocks of the prompt that an earlier request had; never all of it."""
        ends = range(BLOCK, len(prompt), BLOCK)
        return max((end for end in ends if tuple(prompt[:end]) in self.cache), default=0)

    def _remember(self, ids: Sequence[int]) -> None:
        self.cache.update(tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK))

    @torch.inference_mode()
    def _classified(self, body: Mapping[str, Any]) -> dict[str, Any]:
        given = body["input"] if isinstance(body["input"], list) else [body["input"]]
        if given and isinstance(given[0], int):
            given = [given]
        data, paid = [], 0
        for index, each in enumerate(given):
            ids = self._ids(each) if isinstance(each, str) else each
            logits = self.classifier(torch.tensor([ids])).logits[0]
            raw = body.get("use_activation") is False
            probs = (logits if raw else logits.sigmoid() if len(logits) == 1 else logits.softmax(-1)).tolist()
            data.append({"index": index, "label": "LABEL_0", "probs": probs, "num_classes": len(probs)})
            paid += len(ids)
        usage = {
            "prompt_tokens": paid, "total_tokens": paid, "completion_tokens": 0, "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }  # fmt: skip
        self.number += 1
        return {
            "id": f"classify-{self.number}", "object": "list", "created": 0, "model": self.name, "data": data,
            "usage": usage,
        }  # fmt: skip


def _error(status: int, message: str, parameter: str | None = None) -> dict[str, Any]:
    kind = {400: "BadRequestError", 404: "NotFoundError", 429: "TooManyRequests"}.get(status, "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": status}}
