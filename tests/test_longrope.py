"""Rope types that go by the length of a text: by its own, whoever is beside it, also when it grows."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import internals
import naive
import pytest
import reference
import tiny
import torch
import transformers
from conftest import Start
from packaging.version import Version
from speculator import Eager, Watch
from transformers import DynamicCache

from cards_integrations.chat.template import ChatTokenizer
from cards_integrations.decoding import BestOfN, Cards, Decoding, FixedLength, Particles, Sampling, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.errors import ModelError, PromptError, SettingsError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, Conversation, ImplicitReward, Response
from cards_integrations.rewards.base import scores
from cards_integrations.rewards.scorers.head import Head
from cards_integrations.rewards.scorers.incremental import IncrementalClassifier
from cards_integrations.rewards.scorers.input_format import InputFormat
from cards_integrations.rewards.scorers.rescoring import RescoringClassifier
from cards_integrations.trace import Alignment, Usage
from cards_integrations.transformer import exact, forward
from cards_integrations.transformer.cache_layers import cache_argument
from cards_integrations.transformer.rope import reads_again, rope_switch

SWITCH, ROOM = 32, 24
SHORT, GROWING, LONG = 3, 20, 60  # tokens of prompts: with an answer below the switch, across it, beyond it
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "factor": 8.0,
}
OTHERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SWITCH},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": SWITCH,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
INSTALLED = Version(transformers.__version__)
NO_GEMMA = pytest.mark.skipif(INSTALLED.release < (5, 22), reason="Gemma 3 with longrope raises in transformers")
OTHER_PHI = pytest.mark.skipif(INSTALLED.release < (5, 20), reason="generate of transformers gives another text")
GEMMA = pytest.param("gemma3_text", marks=NO_GEMMA)
TABLE = [*OTHERS, "phi3", "phi3 with a window", "phimoe", "llama", "qwen3", GEMMA]
GREEDY, DRAWN = Sampler(temperature=0), Sampler(temperature=1.0)
CARDS = Cards(
    target_reward=1.0, beta=0.4, max_rejections=4, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=8)
)
METHODS: list[Decoding] = [CARDS, Sampling(), BestOfN(n=3), Particles(n=4, boundary=FixedLength(length=12))]


def words(count: int, seed: int = 0) -> str:
    return " ".join(f"w{i}" for i in random.Random(seed).choices(range(6, 48), k=count))


def options(kind: str, switch: int = SWITCH) -> tuple[str, dict[str, Any]]:
    """A family, and its config."""
    theta, original = {"rope_theta": 10000.0}, {"original_max_position_embeddings": switch}
    if kind in OTHERS:
        size = {"max_position_embeddings": 96} if kind == "dynamic" else {}
        return "llama", {"rope_parameters": {**OTHERS[kind], **theta}, **size}
    scaling: dict[str, Any] = {**LONGROPE, **original}
    if kind == "gemma3_text":
        scaling = {"full_attention": scaling, "sliding_attention": {"rope_type": "default", **theta}}
    config: dict[str, Any] = {"rope_parameters": scaling}
    if "phi" in kind:
        config |= original if "window" in kind else {**original, "sliding_window": None}
    if kind == "phimoe":
        config["num_local_experts"] = 2
        scaling |= {"short_mscale": 1.1, "long_mscale": 1.5}
    return kind.split()[0], config


def causal(kind: str, switch: int = SWITCH, **more: Any) -> Any:
    family, config = options(kind, switch)
    return tiny.causal(family, eos_token_id=None, **{**config, **more})


def classifier(kind: str, **more: Any) -> Any:
    family, config = options(kind)
    return tiny.classifier(family, **config, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`made("phi3")` is the folder of a model whose texts do not end."""
    known: dict[Any, str] = {}

    def folder(kind: str, maker: Callable[..., Any] = causal, **more: Any) -> str:
        key = (kind, maker, *more.items())
        if key not in known:
            tokenizer = tiny.words(eos_token=None)
            known[key] = tiny.save(tmp_path_factory.mktemp("rope"), maker(kind, **more), tokenizer)
        return known[key]

    return folder


def next_logits(model: Any, prompt: Sequence[int]) -> Callable[[list[int]], torch.Tensor]:
    """What the family's own `generate` draws from: Phi-3 reads again what has grown long, others go on."""

    known: dict[tuple[int, ...], tuple[torch.Tensor, Any]] = {}

    @torch.inference_mode()
    def step(ids: list[int]) -> tuple[torch.Tensor, Any]:
        if tuple(ids) not in known:
            first = len(ids) == len(prompt)
            new, cache = (ids, DynamicCache(config=model.config)) if first else (ids[-1:], step(ids[:-1])[1])
            cache = copy.deepcopy(cache)
            given = {cache_argument(model.forward): cache}
            known[tuple(ids)] = model(torch.tensor([new]), **given).logits[0, -1], cache
        return known[tuple(ids)]

    @torch.inference_mode()
    def whole(ids: list[int]) -> torch.Tensor:
        if tuple(ids) not in known:
            known[tuple(ids)] = model(torch.tensor([ids])).logits[0, -1], None
        return known[tuple(ids)][0]

    reads_on = rope_switch(model.config) and "phi" not in model.config.model_type
    return (lambda ids: step(ids)[0]) if reads_on else whole


def greedily(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """The tokens, and their log p in nats."""
    after, ids, log_p = next_logits(model, prompt), list(prompt), 0.0
    for _ in range(tokens):
        logits = after(ids).log_softmax(-1)
        ids.append(int(logits.argmax()))
        log_p += float(logits.max())
    return ids[len(prompt) :], log_p


def prompt_ids(prompt: str) -> list[int]:
    return tiny.words(eos_token=None)(prompt)["input_ids"]


def asked(count: int, seed: int = 0, **more: Any) -> Request:
    return Request(words(count, seed), Sampling(), sampler=GREEDY, max_tokens=ROOM, seed=seed, **more)


@pytest.mark.parametrize("kind", TABLE)
def test_a_text_is_the_same_alone_beside_others_and_growing(kind: str, made: Callable[..., str], start: Start) -> None:
    engine, as_on_a_gpu, model = start(made(kind)), start(made(kind)), causal(kind)
    internals.language_model(as_on_a_gpu).transformer._logits.rounding = True
    table = [
        asked(SHORT, 1),
        asked(GROWING, 2),
        asked(LONG, 3),
        asked(SHORT, 4),
        asked(SWITCH, 5),
        asked(SWITCH + 1, 6),
    ]
    written = [*map(engine.run, table), *engine.run_many(table), *as_on_a_gpu.run_many(table[::-1])[::-1]]
    plain = [greedily(model, prompt_ids(str(request.prompt)), ROOM) for request in table]
    for (expected, log_p), found in zip(plain * 3, written, strict=True):
        assert list(found.token_ids) == expected
        assert found.log_likelihood == pytest.approx(log_p, abs=1e-4)
    assert engine.inspect().idle


@pytest.mark.parametrize("kind", [pytest.param("phi3", marks=OTHER_PHI), "llama"])
def test_the_family_s_own_generate_is_what_is_meant(kind: str, made: Callable[..., str], start: Start) -> None:
    engine, model = start(made(kind)), causal(kind)
    assert reads_again(model, SWITCH) == (kind == "phi3")
    texts = set()
    for count in (GROWING, SWITCH - 1, SWITCH, SWITCH + 1, LONG):
        request = asked(count, count)
        ids = torch.tensor([prompt_ids(str(request.prompt))])
        plain = model.generate(ids, max_new_tokens=ROOM, do_sample=False, attention_mask=torch.ones_like(ids))
        found = engine.run(request)
        assert list(found.token_ids) == plain[0, count:].tolist()
        texts.add(found.token_ids)
    assert len(texts) == 5


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_the_frequencies_matter_here(kind: str) -> None:
    ids = torch.tensor([prompt_ids(words(LONG))])
    one, other = (causal(kind, switch)(ids).logits[0, -1] for switch in (SWITCH, 128))
    assert float((one - other).detach().abs().max()) > 0.1


# --- with a method and a reward ---


def by_the_paper(kind: str, prompt: str, seed: int, judge: Any, method: Cards = CARDS) -> reference.Reference:
    model, ids = causal(kind), prompt_ids(prompt)
    loop = reference.plain(model, tiny.words(), judge, ids, temperature=1.0)
    loop.next_logits, loop.eos = next_logits(model, ids), -1
    loop.expected = loop.generate(ids, method, ROOM, seed)  # type: ignore[attr-defined]
    return loop


def assert_same(found: Alignment, expected: Any) -> None:
    assert list(found.token_ids) == expected.expected
    for segment, drafts in zip(found.segments, expected.segments, strict=True):
        assert [list(draft.token_ids) for draft in segment.drafts] == [draft.ids for draft in drafts]
        assert [draft.reward for draft in segment.drafts] == pytest.approx([d.reward for d in drafts], abs=1e-4)


def judging(made: Callable[..., str], kind: str) -> ClassifierReward:
    return ClassifierReward(model=made(kind, classifier), prompt_format="{prompt} {response}")


def guided(made: Callable[..., str], reward: str) -> list[Request]:
    base = Request("", CARDS, judging(made, reward), DRAWN, ROOM, timeout=100)
    return [replace(base, prompt=words(n, n), seed=n) for n in (12, GROWING, 26, SWITCH, LONG)]


@pytest.mark.parametrize(("kind", "reward"), [("phi3", "llama"), ("llama", "phi3"), ("phi3", "phi3")])
def test_guided_texts_are_those_of_the_paper(kind: str, reward: str, made: Callable[..., str], start: Start) -> None:
    requests, judge = guided(made, reward), classifier(reward)
    expected = [by_the_paper(kind, str(request.prompt), request.seed or 0, judge) for request in requests]
    assert any(len(drafts) > 2 for each in expected for drafts in each.segments)
    narrow, wide, ahead = (start(made(kind), width=width) for width in (1, "auto", "auto"))
    eager = Eager(ahead, most=40, wait=3)
    for found in ([narrow.run(request) for request in requests], wide.run_many(requests), ahead.run_many(requests)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    assert eager.adopted
    for engine in (narrow, wide, ahead):
        internals.assert_idle(engine)


# --- rewards ---


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_rewards_are_those_of_the_whole_text_alone(kind: str, made: Callable[..., str], start: Start) -> None:
    texts = [words(count, count) for count in (1, 40, 11, 12, 13, 3, 60)]  # and 20 of the prompt: 32 are short
    prompt, engine = words(GROWING), start(made("llama"))
    judge, causal_judge, other = classifier(kind), causal(kind), causal(kind, seed=3)
    ids = [prompt_ids(f"{prompt} {text}") for text in texts]
    with torch.inference_mode():
        expected = [float(judge(torch.tensor([each])).logits) for each in ids]
    found = engine.score(judging(made, kind), prompt, texts)
    assert found == pytest.approx(expected, abs=1e-4)

    implicit = ImplicitReward(tuned=made(kind), base=made(kind, seed=3))
    split = [(each[:GROWING], each[GROWING:]) for each in ids]
    gains = [0.1 * (naive.log_p(causal_judge, *each) - naive.log_p(other, *each)) for each in split]
    assert engine.score(implicit, prompt, texts) == pytest.approx(gains, abs=1e-3)
    assert engine.inspect().idle


async def test_a_text_that_was_scored_ahead_may_be_long_where_what_it_follows_is_short() -> None:
    model, tokenizer = classifier("phi3"), tiny.words()
    reward = IncrementalClassifier(
        "judge", model, InputFormat(ChatTokenizer(tokenizer), "{prompt} {response}"), Head(None, "logit", {}), True
    )
    conversation = Conversation(words(GROWING), Usage())

    async def scored(ids: list[int], parent: Response | None = None) -> Response:
        response = Response(conversation, "read", ids, parent=parent)
        [found] = await reward.score([response])
        with torch.inference_mode():
            whole = torch.tensor([prompt_ids(words(GROWING)) + ids])
            assert found == pytest.approx(float(model(whole).logits), abs=1e-4)
        return response

    reward.open(conversation)
    begin, rest = prompt_ids(words(8, 1)), prompt_ids(words(30, 2))
    one, other = await scored(begin), await scored(rest)  # for the other one the prompt is read again
    ahead = await scored(begin + rest[:9], one)
    reward.drop(other)
    reward.keep(one)
    further = await scored(begin + rest[:14], ahead)
    reward.keep(ahead)
    reward.keep(further)
    for tokens in (15, 30):
        reward.drop(await scored(begin + rest[:tokens]))
    [cache] = reward.transformer.memory.caches
    internals.balance(cache)
    assert next(iter(cache.trees)).ids == prompt_ids(words(GROWING)) + begin + rest[:14]


async def test_a_rescored_text_is_read_as_if_alone(made: Callable[..., str]) -> None:
    model, form = classifier("phi3"), InputFormat(ChatTokenizer(tiny.words()), "{prompt} {response}")
    reward = RescoringClassifier("judge", model, form, Head(None, "logit", model.config.id2label))
    conversation = Conversation(words(GROWING), Usage())
    texts = [words(count, count) for count in (1, 40, 12, 13)]
    with torch.inference_mode():
        expected = [float(model(torch.tensor([prompt_ids(f"{words(GROWING)} {text}")])).logits) for text in texts]
    reward.open(conversation)
    assert await scores(reward, [Response(conversation, text) for text in texts]) == pytest.approx(expected, abs=1e-4)


# --- memory ---

LATE = 60  # the switch, where texts are to be long


@pytest.mark.parametrize("kind", ["phi3", "llama"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_preempted_requests_write_the_same(kind: str, method: Decoding, made: Callable[..., str], start: Start) -> None:
    folder = made(kind, switch=LATE)
    reward = judging(made, kind) if method.needs_reward else None
    requests = [Request(words(25 + 5 * s, s), method, reward, DRAWN, 60, seed=s, timeout=100) for s in range(4)]
    expected = start(folder, width=4).run_many(requests)
    budget = 110_000 if method.method == "sampling" else 200_000
    engine = start(folder, width=4, kv_memory=budget)
    watch = Watch(engine)
    found = engine.run_many(requests)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.log_likelihood for each in found] == pytest.approx([e.log_likelihood for e in expected], abs=1e-3)
    assert engine.inspect().preempted > 0
    assert watch.bytes <= budget
    assert engine.inspect().idle


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_what_was_read_is_used_again_for_texts_of_the_same_kind(
    kind: str, made: Callable[..., str], start: Start
) -> None:
    """All begin alike, for longer than the switch that the first ones do not reach."""
    engine, model, begin = start(made(kind, switch=90)), causal(kind, switch=90), words(80, 9)
    counts, cached = [0, 5, 30, 40, 3, 35], []
    for seed, count in enumerate(counts):
        prompt = f"{begin} {words(count, seed)}".strip()
        answer = engine.run(Request(prompt, Sampling(), sampler=GREEDY, max_tokens=ROOM))
        expected, log_p = greedily(model, prompt_ids(prompt), ROOM)
        assert list(answer.token_ids) == expected
        assert answer.log_likelihood == pytest.approx(log_p, abs=1e-4)
        cached.append(answer.usage.cached_tokens)
    first_long = 0 if kind == "llama" else 80  # Phi-3 has read the first two texts again when they had grown
    assert [min(80, each) for each in cached] == [0, 80, first_long, 80, 80, 80]


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_rows_that_share_a_beginning(kind: str, made: Callable[..., str], start: Start) -> None:
    folder = made(kind, switch=340, max_position_embeddings=1024)
    model = causal(kind, switch=340, max_position_embeddings=1024)
    begin = words(320, 9)
    requests = [
        Request(f"{begin} {words(count, seed)}", Sampling(), sampler=GREEDY, max_tokens=ROOM, seed=seed)
        for seed, count in enumerate([4, 8, 30, 40, 12, 50])
    ]
    expected = [greedily(model, prompt_ids(str(request.prompt)), ROOM)[0] for request in requests]
    engine = start(folder)
    watch = Watch(engine)
    assert [list(each.token_ids) for each in engine.run_many(requests)] == expected
    assert watch.shared > 0


def test_all_that_is_read_is_counted(made: Callable[..., str], start: Start) -> None:
    for kind, again in (("phi3", SWITCH + 1), ("llama", 1)):
        engine = start(made(kind))
        usage = engine.run(asked(GROWING)).usage
        assert usage.lm_tokens == SWITCH + again + (GROWING + ROOM - 1) - (SWITCH + 1)
        assert engine.inspect().tokens == usage.lm_tokens


@pytest.mark.parametrize("kind", ["phi3", "llama", "phimoe"])
def test_a_whole_answer_is_read_as_it_was_written(kind: str, made: Callable[..., str], start: Start) -> None:
    engine, model = start(made(kind)), causal(kind)
    answers = engine.run_many([asked(count, count) for count in (SHORT, GROWING, SWITCH, SWITCH + 1, LONG)])
    for answer, found in zip(answers, engine.uncertainties("entropy", answers), strict=True):
        prompt, ids = list(answer.prompt_ids), list(answer.token_ids)
        after = next_logits(model, prompt)
        log_p = torch.stack([after(prompt + ids[:n]) for n in range(ROOM)]).log_softmax(-1)
        assert found == pytest.approx((-log_p.exp() * log_p).sum(-1).tolist(), abs=1e-4)


def test_an_error_while_the_text_is_read_again_is_that_of_its_request(
    made: Callable[..., str], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(made("phi3"))
    before, read = engine.run(asked(SHORT)), forward.Transformer.logits

    def fails(self: Any, inputs: Any) -> Any:
        bad = [each.branch.long and len(each.ids) > 1 for each in inputs]
        found = zip(bad, read(self, inputs), strict=True)
        return [ModelError("no") if failed else output for failed, output in found]

    monkeypatch.setattr(forward.Transformer, "logits", fails)
    cards = replace(guided(made, "llama")[1], timeout=20)
    requests = [asked(SHORT), asked(GROWING), cards]
    good, *bad = engine.run_many(requests, return_exceptions=True)
    assert isinstance(good, Alignment)
    assert good.token_ids == before.token_ids
    assert [str(each) for each in bad] == ["no", "no"]
    assert engine.inspect().idle


# --- what is not exact is refused ---


def test_a_dynamic_text_ends_where_its_frequencies_would_change(made: Callable[..., str], start: Start) -> None:
    engine = start(made("dynamic"))
    with pytest.raises(SettingsError, match="context is 96"):
        engine.run(asked(90))
    with pytest.raises(PromptError, match="context is 96"):
        engine.run(asked(100))


def test_a_model_whose_frequencies_cannot_be_chosen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exact.check_exact(causal("phi3"))
    monkeypatch.setattr(forward, "use_tokenwise_rotary", lambda model: rope_switch(model.config))
    with pytest.raises(ModelError, match=r"phi3.*beside other texts"):
        exact.check_exact(causal("phi3"))
    with pytest.raises(ModelError, match=r"llama.*beside other texts"):
        exact.check_exact(causal("llama"))


def test_one_switch_for_all_layers() -> None:
    kinds = {"full_attention": 32, "sliding_attention": 64}
    scaling = {kind: {**LONGROPE, "original_max_position_embeddings": switch} for kind, switch in kinds.items()}
    with pytest.raises(ModelError, match="several switches"):
        exact.check_exact(tiny.causal("gemma3_text", rope_parameters=scaling))


@pytest.mark.parametrize("kind", ["phi3", "llama", GEMMA])
def test_the_config_is_as_before_after_the_trial(kind: str) -> None:
    model = causal(kind)
    before = model.config.to_dict()
    exact.check_exact(model)
    assert {**model.config.to_dict(), "_attn_implementation": ""} == {**before, "_attn_implementation": ""}
