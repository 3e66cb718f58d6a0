"""A value head scores what a plain forward of the whole text gives, and costs no forward of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import pytest
import tiny
import torch
from conftest import Start
from internals import assert_idle
from naive import Freed, drafts, ids, said
from safetensors.torch import save_file

from cards_integrations import CardsLLM
from cards_integrations.decoding import (
    BestOfN,
    Cards,
    FixedLength,
    Particles,
    Punctuation,
    SegmentBestOfN,
    TreeBoN,
    Uncertainty,
)
from cards_integrations.engine import Engine, EngineSettings, Request
from cards_integrations.errors import ModelError, RewardError, SettingsError
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.models.sampling import Sampler
from cards_integrations.models.vllm.settings import VllmModel
from cards_integrations.rewards import (
    LengthReward,
    Loader,
    MinReward,
    Response,
    Reward,
    RewardLoader,
    RewardModel,
    ValueReward,
    WeightedReward,
)
from cards_integrations.rewards.base import Instant
from cards_integrations.rewards.scorers.sentences import whole_sentences
from cards_integrations.rewards.value_head import PROBE, ValueCard, ValueHead
from cards_integrations.study.prefixes import ScoredPrefixes
from cards_integrations.trace import Alignment
from cards_integrations.transformer.forward import Transformer

PROMPT = "w9 w20 w31 w5"
WORDS = tiny.words()
RISES = Uncertainty(threshold=2.95, min_length=2, max_length=6)
GUIDED = Cards(target_reward=1.0, beta=0.7, boundary=RISES, max_rejections=4)
STOP = ("5 w1", "w45")


class Plain:
    """The plain recipe: a forward of the whole text by transformers, and the head on its states."""

    def __init__(self, model: Any, made: ValueHead, prompt: str = PROMPT) -> None:
        self.model, self.made, self.prompt = model, made, ids(prompt)
        self.known: dict[tuple[int, ...], float] = {}

    def __call__(self, answer: Sequence[int]) -> float:
        key = tuple(answer)
        if key not in self.known:
            found = states(self.model, [*self.prompt, *key])
            mean = found[len(self.prompt) :].mean(0) if key else torch.zeros(found.shape[1])
            last, whole = self.made.weight
            self.known[key] = float(found[-1] @ last + mean @ whole) + self.made.bias
        return self.known[key]


@torch.inference_mode()
def states(model: Any, text: Sequence[int]) -> torch.Tensor:
    """After each token of a text, (tokens, hidden size)."""
    found: torch.Tensor = model(torch.tensor([list(text)]), output_hidden_states=True).hidden_states[-1][0]
    return found.float()


def head(folder: Path, reads: Any, seed: int = 0, **card: Any) -> tuple[ValueReward, ValueHead]:
    """A random head on a model, as `train_value` would write it."""
    probe_ids = ids(PROBE)
    probe = states(reads, probe_ids)
    torch.manual_seed(seed)
    known = {
        "model": "tiny", "probe_ids": probe_ids, "teacher": "a reward", "target": "prefix", "max_tokens": 24,
        "scale": (0.0, 1.0), "prompts": (1, 1), "prefixes": (1, 1), "pearson": 0.5, "spearman": 0.5, "penalty": 1.0,
    }  # fmt: skip
    made = ValueHead(0.2 * torch.randn(2, probe.shape[1]), 0.3, probe, ValueCard.model_validate({**known, **card}))
    path = folder / f"{seed}.safetensors"
    made.save(path)
    return ValueReward(path=str(path)), made


def request(reward: Any, seed: int, prompt: str = PROMPT, **options: Any) -> Request:
    settings = {"sampler": Sampler(temperature=1.0), "max_tokens": 24, "decoding": GUIDED, **options}
    return Request(prompt, reward=reward, seed=seed, **settings)


def assert_exact(answers: Sequence[Alignment], plain: Plain, stop: Sequence[str] = (), fewest: int = 40) -> None:
    """All rewards in the traces are those of the plain recipe."""
    seen = 0
    for answer in answers:
        if answer.prompt_reward is not None:
            assert answer.prompt_reward == pytest.approx(plain([]), abs=1e-4)
        for draft, whole in drafts(answer):
            text, cut = said(WORDS, whole, stop)
            assert draft.reward == pytest.approx(plain(ids(text) if cut else whole), abs=1e-4)
            seen += 1
    assert seen > fewest


class Told(Reward):
    """The same as a head, without the states: a plain forward for each answer."""

    kind: Literal["told"] = "told"
    plain: Any

    def build(self, loader: Loader) -> RewardModel:
        return Instant("told", self.value)

    def value(self, response: Response) -> float:
        prompt = str(response.conversation.prompt)
        return Plain(self.plain.model, self.plain.made, prompt)(response.ids or ())


# --- the score ---


@pytest.mark.parametrize(
    ("family", "width", "boundary"),
    [
        ("llama", 1, RISES), ("llama", 8, FixedLength(length=5)), ("gpt2", 8, RISES),
        ("mistral", 8, Punctuation(max_length=8)), ("lfm2", 8, RISES),
    ],
)  # fmt: skip
def test_the_score_is_that_of_a_plain_forward(
    models: Callable[..., str], start: Start, tmp_path: Path, family: str, width: int, boundary: Any
) -> None:
    """At each draft's end, and at the prompt's; for eight requests at once."""
    model, engine = tiny.causal(family), start(models(family), width=width)
    reward, made = head(tmp_path, model)
    plain, decoding = Plain(model, made), GUIDED.model_copy(update={"boundary": boundary})
    assert_exact(engine.run_many([request(reward, seed, decoding=decoding) for seed in range(8)]), plain)
    texts = ["w7", "", "w8 w9 w10 w11 w12 w13 w14 w15", "w7 w8"]
    assert engine.score(reward, PROMPT, texts) == pytest.approx([plain(ids(text)) for text in texts], abs=1e-4)
    assert_idle(engine)


@pytest.mark.parametrize(
    "decoding",
    [BestOfN(n=3), TreeBoN(n=4, children=2, boundary=FixedLength(length=6)), Particles(n=3, boundary=RISES)],
    ids=lambda decoding: decoding.method,
)
def test_whatever_the_method(models: Callable[..., str], start: Start, tmp_path: Path, decoding: Any) -> None:
    model, engine = tiny.causal(), start(models("llama"), width=8)
    reward, made = head(tmp_path, model)
    plain = Plain(model, made)
    for answer in engine.run_many([request(reward, seed, decoding=decoding) for seed in range(4)]):
        whole: list[int] = []
        for segment in answer.segments:
            whole += segment.token_ids
            assert segment.reward == pytest.approx(plain(whole), abs=1e-4)
    assert_idle(engine)


def test_a_text_that_a_stop_string_cuts_is_read(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    model, engine = tiny.causal(), start(models("llama"), width=4)
    reward, made = head(tmp_path, model)
    answers = engine.run_many([request(reward, seed, stop=STOP, max_tokens=40) for seed in range(6)])
    assert_exact(answers, Plain(model, made), STOP)
    assert sum(answer.usage.rm_tokens for answer in answers) > 0
    assert_idle(engine)


def test_in_half_precision_it_reads_the_states_of_the_model_as_it_drafts(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    engine = start(models("llama"), width=4, dtype="bfloat16")
    model = tiny.causal().bfloat16()
    reward, made = head(tmp_path, model)
    plain = Plain(model, made)
    for answer in engine.run_many([request(reward, seed) for seed in range(3)]):
        assert all(draft.reward == pytest.approx(plain(whole), abs=0.15) for draft, whole in drafts(answer))


def test_a_text_that_outgrows_the_frequencies_of_short_ones(start: Start, tmp_path: Path) -> None:
    """Its states are others then, and are read."""
    original = {"original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "factor": 8.0, **original}
    config: dict[str, Any] = {
        **original,
        "rope_parameters": {**rope, "long_factor": [2.0, 3.0, 4.0, 5.0]},
        "sliding_window": None,
    }
    model, same = (tiny.causal("phi3", eos_token_id=None, **config) for _ in range(2))
    engine = start(tiny.save(tmp_path / "model", same, tiny.words(eos_token=None)), width=4)
    reward, made = head(tmp_path, model)
    answers = engine.run_many([request(reward, seed, max_tokens=20) for seed in range(3)])
    assert_exact(answers, Plain(model, made), fewest=20)
    assert_idle(engine)


def test_preempted_requests_have_the_same_scores(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    """What is read again is not counted twice."""
    model = tiny.causal()
    reward, made = head(tmp_path, model)
    boundary = Uncertainty(threshold=2.95, min_length=4, max_length=8)  # some end before a token, some with one
    decoding, sampler = SegmentBestOfN(n=2, boundary=boundary), Sampler(temperature=1.0, min_tokens=70)
    requests = [request(reward, seed, decoding=decoding, max_tokens=70, sampler=sampler) for seed in range(5)]
    engine = start(models("llama"), width=2, kv_memory=90_000)
    found = engine.run_many(requests)
    assert engine.inspect().preempted > 0
    assert_exact(found, Plain(model, made))
    assert sum(answer.usage.rm_tokens for answer in found) == 0
    assert_idle(engine)


async def test_nothing_is_left_of_cancelled_requests(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    reward, _ = head(tmp_path, tiny.causal())
    engine = start(models("llama"), width=4)
    decoding = GUIDED.model_copy(update={"boundary": FixedLength(length=4)})
    requests = [request(reward, seed, decoding=decoding, max_tokens=200) for seed in range(4)]
    await Freed(engine).after("a cancellation", [replace(each, sampler=Sampler(min_tokens=200)) for each in requests])


# --- what it costs ---


def test_it_costs_nothing_where_segments_end_before_a_token(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    """The same answers as with a function that says the same, with as many tokens read."""
    model, engine = tiny.causal(), start(models("llama"), width=2)
    reward, made = head(tmp_path, model)
    plain = Plain(model, made)
    told = Told(plain=plain)
    decoding = GUIDED.model_copy(update={"boundary": Uncertainty(threshold=2.9, min_length=1, max_length=64)})
    sampler = Sampler(temperature=1.0, stop_token_ids=(7, 8, 9))
    for seed in range(2):
        one, other = (
            engine.run(request(each, seed, decoding=decoding, sampler=sampler, max_tokens=64))
            for each in (reward, told)
        )
        assert one.token_ids == other.token_ids
        assert [s.reward for s in one.segments] == pytest.approx([s.reward for s in other.segments], abs=1e-4)
        assert one.finish_reason == "stop"
        assert one.usage.rm_forwards == one.usage.rm_tokens == 0
        assert one.usage.lm_tokens == other.usage.lm_tokens


def test_a_segment_that_ends_with_a_token_costs_that_token_if_it_is_rejected(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    """One that is kept would have its last token read at the next step anyway, unless the answer ends with it."""
    model, engine = tiny.causal(eos_token_id=None), start(models("llama"), width=1)
    reward, made = head(tmp_path, model)
    decoding = SegmentBestOfN(n=3, boundary=FixedLength(length=4))
    sampler = Sampler(temperature=1.0, min_tokens=12)
    answer = engine.run(request(reward, 5, decoding=decoding, max_tokens=12, sampler=sampler))
    assert [len(segment.drafts) for segment in answer.segments] == [3, 3, 3]
    assert answer.usage.lm_tokens == len(ids(PROMPT)) + answer.usage.drafted_tokens == 4 + 36
    assert answer.usage.rm_forwards == 0
    assert_exact([answer], Plain(model, made), fewest=8)


def test_no_request_without_it_asks_for_states(
    models: Callable[..., str], start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    given = Transformer.logits_and_states

    def counted(self: Transformer, inputs: Any) -> Any:
        asked.append(len(inputs))
        return given(self, inputs)

    monkeypatch.setattr(Transformer, "logits_and_states", counted)
    engine = start(models("llama"), width=2)
    engine.run(request(LengthReward(target=20), 1))
    assert not asked
    reward, _ = head(tmp_path, tiny.causal())
    engine.run(request(reward, 1))
    assert asked


# --- with others ---


def test_within_other_rewards(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    model, engine = tiny.causal(), start(models("llama"), width=4)
    (one, first), (two, second) = head(tmp_path, model), head(tmp_path, model, 1)
    plain, other = Plain(model, first), Plain(model, second)
    joined = WeightedReward(rewards=[one, MinReward(rewards=[two, LengthReward(target=20)])], weights=[1.0, 0.5])
    for answer in engine.run_many([request(joined, seed) for seed in range(2)]):
        for draft, whole in drafts(answer):
            assert draft.parts[one.name] == pytest.approx(plain(whole), abs=1e-4)
            [value] = [value for name, value in draft.parts.items() if name.endswith(two.name)]
            assert value == pytest.approx(other(whole), abs=1e-4)
        assert answer.usage.rm_tokens == 0
    assert_idle(engine)


def test_up_to_the_last_whole_sentence(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    model, engine = tiny.causal(), start(models("llama"), width=4)
    reward, made = head(tmp_path, model)
    reward = reward.model_copy(update={"granularity": "sentence"})
    plain, seen = Plain(model, made), 0
    for answer in engine.run_many([request(reward, seed, max_tokens=40) for seed in range(4)]):
        whole: list[int] = []
        for segment in answer.segments[:-1]:  # the last one is finished, and scored as it is
            whole += segment.token_ids
            text, _ = said(WORDS, whole)
            if (sentences := whole_sentences(text)) != text:
                assert segment.reward == pytest.approx(plain(ids(sentences)), abs=1e-4)
                seen += bool(sentences)
    assert seen > 3
    assert_idle(engine)


# --- which models and heads ---


def test_a_head_of_another_model_is_refused(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    engine = start(models("llama"))
    other, _ = head(tmp_path, tiny.causal(seed=5), 5, model="other/model", revision="abc")
    with pytest.raises(RewardError, match=r"was trained on 'other/model' at revision abc, and .* other weights"):
        engine.score(other, PROMPT, ["w7"])
    wider, _ = head(tmp_path, tiny.causal(hidden_size=64), 6)
    with pytest.raises(RewardError, match="hidden states of 32 numbers in place of 64"):
        engine.score(wider, PROMPT, ["w7"])
    words, _ = head(tmp_path, tiny.causal(), 7, probe_ids=ids("w7 w8"))
    with pytest.raises(RewardError):
        engine.score(words, PROMPT, ["w7"])
    assert_idle(engine)


@pytest.mark.parametrize("quantization", ["float16", "int8"])
def test_the_same_model_with_fewer_bits_is_not_refused(
    models: Callable[..., str], tmp_path: Path, quantization: str
) -> None:
    reward, made = head(tmp_path, tiny.causal())
    settings = EngineSettings(dtype="auto")
    engine = Engine(LocalModel.model_validate({"model": models("llama"), "quantization": quantization}), settings)
    plain = Plain(tiny.causal(), made)
    try:
        assert engine.score(reward, PROMPT, ["w7 w8"]) == pytest.approx([plain(ids("w7 w8"))], abs=0.5)
    finally:
        engine.close()


def test_files_that_are_no_heads(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    engine, missing, other = start(models("llama")), tmp_path / "none.safetensors", tmp_path / "other.safetensors"
    with pytest.raises(RewardError, match="There is no value head"):
        engine.score(ValueReward(path=str(missing)), PROMPT, ["w7"])
    save_file({"weight": torch.zeros(32)}, other)
    with pytest.raises(RewardError, match="is no value head"):
        engine.score(ValueReward(path=str(other)), PROMPT, ["w7"])
    other.write_text("not safetensors")
    with pytest.raises(RewardError, match="is no value head"):
        engine.score(ValueReward(path=str(other)), PROMPT, ["w7"])
    _, made = head(tmp_path, tiny.causal(), 3)
    replace(made, weight=torch.full((2, 32), torch.nan)).save(other)
    with pytest.raises(RewardError, match="NaN"):
        engine.score(ValueReward(path=str(other)), PROMPT, ["w7"])


def test_a_model_without_hidden_states_is_refused(tmp_path: Path) -> None:
    """By its name: what a server computes stays there."""
    reward, _ = head(tmp_path, tiny.causal())
    loader = RewardLoader(ModelLoader(Placement(device="cpu")))
    with pytest.raises(ModelError, match=r"reward 'value 0.safetensors' needs a local language model"):
        loader[reward]


def test_a_model_whose_drafting_shows_other_states_is_refused(
    models: Callable[..., str], start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def others(self: Transformer, inputs: Any) -> Any:
        return [each._replace(states=each.batch[:, :32]) for each in self.logits(inputs)]  # type: ignore[union-attr]

    monkeypatch.setattr(Transformer, "logits_and_states", others)
    reward, _ = head(tmp_path, tiny.causal())
    with pytest.raises(ModelError, match="model type 'llama' cannot have a value head"):
        start(models("llama")).score(reward, PROMPT, ["w7"])


# --- training ---


@pytest.fixture
def teacher(tmp_path: Path) -> Told:
    """What a head can learn: a hidden one."""
    model = tiny.causal()
    _, made = head(tmp_path, model, 9)
    return Told(plain=Plain(model, made))


@pytest.fixture
def llm(models: Callable[..., str], teacher: Told) -> Iterator[CardsLLM]:
    engine = EngineSettings(dtype="float32", width=4)
    with CardsLLM(model=models("llama"), reward=teacher, max_tokens=16, temperature=1.0, engine=engine) as llm:
        yield llm


def prompts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{i}" for i in draw.choices(range(6, 48), k=4)) for _ in range(count)]


def test_a_trained_head_knows_its_teacher_and_guides(llm: CardsLLM, teacher: Told, tmp_path: Path) -> None:
    found = llm.train_value([PROMPT] * 4 + prompts(44), path=tmp_path / "head.safetensors", progress=False)
    card = found.card
    assert (card.model, card.teacher, card.max_tokens) == (llm.model.model, "told", 16)
    assert (card.prompts, sum(card.prefixes) > 150) == ((34, 11), True)
    assert card.pearson > 0.95
    assert card.spearman > 0.9
    assert "Pearson" in str(found)
    asked, seeds = [PROMPT] * 12, range(12)
    guided = llm.align_batch(asked, seeds, decoding=Cards(boundary=RISES), reward=found.reward)
    assert guided[0].guidance is not None
    assert guided[0].guidance.target_origin == "published"
    plain = llm.align_batch(asked, seeds, decoding=ScoredPrefixes(boundary=RISES))
    told = [teacher.plain(answer.token_ids) for answer in guided]
    assert fmean(told) > fmean(answer.reward or 0.0 for answer in plain) + card.scale[1] / 2
    assert [answer.reward for answer in guided] == pytest.approx(told, abs=card.scale[1])


def test_it_can_foretell_the_finished_answer(llm: CardsLLM, tmp_path: Path) -> None:
    """All beginnings of an answer have the same target."""
    path = tmp_path / "head.safetensors"
    found = llm.train_value(prompts(24), path=path, target="value", progress=False, held_out=0.5)
    assert (found.card.target, found.card.prompts) == ("value", (12, 12))
    assert found.card.scale[1] > 0
    assert found.card.pearson < 0.9  # nobody knows what comes


def test_prompts_that_are_equal_are_not_on_both_sides(llm: CardsLLM, tmp_path: Path) -> None:
    found = llm.train_value(prompts(20) + prompts(4), path=tmp_path / "head.safetensors", progress=False)
    assert found.card.prompts == (15, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["w7"]}, "1 prompts are too few"),
        ({"reward": None}, "no reward to learn from"),
        ({"held_out": 1.0}, "held_out=1 leaves 20 of 20"),
        ({"target": "both"}, "pass 'value' or 'prefix'"),
        ({"model": VllmModel(model="served", base_url="http://127.0.0.1:9/v1")}, "'served' is not a local model"),
    ],
)
def test_what_cannot_be_trained(
    models: Callable[..., str], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    asked, own = options.pop("prompts", prompts(20)), {"model": models("llama"), "reward": LengthReward(target=9)}
    own |= {name: options.pop(name) for name in ("model", "reward") if name in options}
    with CardsLLM(**own) as llm, pytest.raises(SettingsError, match=message):
        llm.train_value(asked, path=tmp_path / "head.safetensors", **options)
