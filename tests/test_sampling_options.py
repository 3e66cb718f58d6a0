"""Samplers, several answers, log-probabilities, and answers that end with a sentence."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import faces
import naive
import numpy as np
import pytest
import torch
from conftest import Start
from langchain_core.caches import InMemoryCache
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from llama_index.core.llms import ChatMessage
from scripted import scripted
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from typer.testing import CliRunner

from cards_integrations import CardsLLM, CardsSettings
from cards_integrations.chat.grammar import Grammar
from cards_integrations.chat.stop_strings import StopStrings
from cards_integrations.cli import app
from cards_integrations.decoding import Cards, FixedLength, Sampling, Uncertainty
from cards_integrations.engine import Engine, Request
from cards_integrations.engine.sentence_end import certain_sentences, cut_after_sentence, last_sentence_end
from cards_integrations.errors import SettingsError
from cards_integrations.langchain import CardsCompletion
from cards_integrations.models.base import Candidate, Context
from cards_integrations.models.local.drawing import TokenDrawer
from cards_integrations.models.local.penalties import Penalties
from cards_integrations.models.randomness import answer_seeds
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import FunctionReward, LengthReward
from cards_integrations.trace import Alignment, Usage

MESSAGES = [ChatMessage(role="user", content="Hello")]
VOCABULARY, EOS, PROMPT, STOP_ID = 120, 1, "w9 w20 w31", 17


@pytest.fixture(autouse=True)
def end_engines() -> Iterator[None]:
    yield
    for engine in list(Engine._shared.values()):
        engine.close()


# --- the law is that of transformers ---


def random_sampler(dice: Random) -> Sampler:
    """Each setting in use half of the time."""

    def either(used: Any, default: Any) -> Any:
        return used if dice.random() < 0.5 else default

    return Sampler(
        temperature=either(dice.uniform(0.3, 2), dice.choice([0.0, 1.0])),
        top_k=either(dice.randint(1, VOCABULARY + 5), 0),
        top_p=either(dice.uniform(0.05, 0.99), 1.0),
        min_p=either(dice.uniform(0.001, 0.5), 0.0),
        repetition_penalty=either(dice.uniform(0.7, 1.8), 1.0),
        presence_penalty=either(dice.uniform(-1, 2), 0.0),
        frequency_penalty=either(dice.uniform(-0.5, 1), 0.0),
        logit_bias=either({dice.randrange(VOCABULARY): dice.uniform(-5, 5) for _ in range(9)}, {}),
        min_tokens=either(dice.randint(1, 20), 0),
        stop_token_ids=either((STOP_ID,), ()),
    )


def processed(sampler: Sampler, prompts: torch.Tensor, answers: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """What transformers' own processors make of the logits, in the order of `generate`; OpenAI's two between them."""
    whole = torch.cat([prompts, answers], 1)
    before, after = LogitsProcessorList(), LogitsProcessorList()
    if sampler.logit_bias:
        before.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in sampler.logit_bias}))
    before.append(RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty))
    if sampler.min_tokens:
        ends = [EOS, *sampler.stop_token_ids]
        after.append(MinNewTokensLengthLogitsProcessor(prompts.shape[1], sampler.min_tokens, ends))
    if sampler.temperature > 0:
        after.append(TemperatureLogitsWarper(float(sampler.temperature)))
        if sampler.top_k:
            after.append(TopKLogitsWarper(sampler.top_k))
        after += [TopPLogitsWarper(sampler.top_p), MinPLogitsWarper(sampler.min_p)]
    scores = before(whole, scores)
    counts = torch.nn.functional.one_hot(answers, VOCABULARY).sum(1)
    scores = scores - sampler.frequency_penalty * counts - sampler.presence_penalty * (counts > 0)
    return torch.as_tensor(after(whole, scores))


def candidate_with(sampler: Sampler, prompt: list[int], answer: list[int], uniform: float, kept: int) -> Candidate:
    context = Context("", prompt, 64, sampler, StopStrings(), Usage(), ids=answer[:kept])
    uniforms: Any = [uniform] * 64
    return Candidate(context, FixedLength(length=32), uniforms, 0, ids=answer[kept:])


def test_samplers_are_those_of_transformers_on_ten_thousand_cases() -> None:
    """In one draw for all of a kind, each with its own prompt, answer and uniform."""
    generator, dice = torch.Generator().manual_seed(5), Random(5)
    drawer = TokenDrawer(lambda: pytest.fail("there is no grammar"), {EOS})
    together: list[tuple[list[Candidate], torch.Tensor, torch.Tensor]] = []
    for _ in range(100):
        sampler, rows = random_sampler(dice), 100
        logits = 3 * torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.double)
        ids = torch.randint(VOCABULARY, (rows, dice.randint(1, 30) + 12), generator=generator)
        prompts, answers = ids.split([ids.shape[1] - 12, 12], 1)
        answers = answers[:, : dice.randint(0, 12)]
        uniforms = torch.rand(rows, generator=generator, dtype=torch.double)
        scores = processed(sampler, prompts, answers, logits.clone())
        cumulative = scores.softmax(-1).cumsum(-1)
        expected = (cumulative <= (uniforms * cumulative[:, -1])[:, None]).sum(-1)
        if sampler.temperature == 0:
            expected = scores.argmax(-1)
        candidates = [
            candidate_with(sampler, *each, kept=dice.randint(0, answers.shape[1]))
            for each in zip(prompts.tolist(), answers.tolist(), uniforms.tolist(), strict=True)
        ]
        assert torch.equal(drawer.tokens(candidates, logits, range(rows))[0], expected), sampler
        together.append((candidates[:4], logits[:4], expected[:4]))
    mixed = [candidate for candidates, _, _ in together for candidate in candidates]
    drawn, _ = drawer.tokens(mixed, torch.cat([each for _, each, _ in together]), range(400))
    assert torch.equal(drawn, torch.cat([each for *_, each in together]))  # in whatever company


def test_plain_samplers_change_no_logits(
    models: Callable[..., str], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Penalties, "apply", lambda *_: pytest.fail("for nothing"))
    engine = start(models("llama"))
    answer = engine.run(Request(PROMPT, Sampling(), None, Sampler(), 8, seed=1))
    assert (
        answer.token_ids
        == engine.run(Request(PROMPT, Sampling(), None, Sampler(top_p=1, min_p=0), 8, seed=1)).token_ids
    )


def test_a_copy_with_other_settings_is_drawn_from_by_these() -> None:
    plain = Sampler()
    assert plain.plain
    assert plain.kind == (40, False)
    copied = plain.model_copy(update={"logit_bias": ((3, 1.0),), "top_k": 7})
    assert copied.penalizes
    assert not copied.plain
    assert copied.kind == (7, False)


GREEDY: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4},
    "bias": {"logit_bias": {9: 4.0, 20: -100.0}},
    "minimum": {"logit_bias": {EOS: 30.0}, "min_tokens": 9},
    "all": {"repetition_penalty": 1.2, "logit_bias": {EOS: 25.0}, "min_tokens": 5},
}


@pytest.mark.parametrize("kind", GREEDY)
def test_greedy_answers_are_those_of_generate(models: Callable[..., str], start: Start, kind: str) -> None:
    """Over several segments: what was kept is part of the answer."""
    folder, settings = models("llama"), GREEDY[kind]
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]])
    bias = {(token,): value for token, value in settings.get("logit_bias", {}).items()}
    written = plain.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=14, sequence_bias=bias or None,
        repetition_penalty=settings.get("repetition_penalty", 1.0), min_new_tokens=settings.get("min_tokens", 0),
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    sampler = Sampler(temperature=0, **settings)
    answer = start(folder).run(Request(PROMPT, Sampling(chunk=4), None, sampler, 14))
    assert list(answer.token_ids) == [token for token in written if token != EOS]
    assert (answer.finish_reason == "stop") == (EOS in written)


def test_rewards_uncertainty_and_likelihood_see_the_raw_logits(models: Callable[..., str], start: Start) -> None:
    folder, boundary = models("llama"), Uncertainty(threshold=2.9, min_length=1, max_length=6)
    sampler = Sampler(temperature=1.0, repetition_penalty=1.5, logit_bias={9: 6.0}, top_p=0.9, presence_penalty=1.0)
    decoding = Cards(target_reward=0.0, beta=1.0, boundary=boundary)
    answer = start(folder).run(Request(PROMPT, decoding, LengthReward(target=9), sampler, 40, seed=3, logprobs=2))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert answer.log_likelihood == pytest.approx(naive.log_p(model, answer.prompt_ids, answer.token_ids), abs=1e-3)
    with torch.inference_mode():
        logits = model(torch.tensor([[*answer.prompt_ids, *answer.token_ids]])).logits[0].double()
    log_p = logits[len(answer.prompt_ids) - 1 :].log_softmax(-1)
    rises = (-(log_p.exp() * log_p).sum(-1) >= 2.9).tolist()
    at = 0
    for segment in answer.segments[:-1]:
        length = len(segment.token_ids)
        assert not any(rises[at + 1 : at + length])
        assert length == 6 or rises[at + length]
        at += length
    assert 9 in answer.token_ids


def test_tokens_that_end_an_answer(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))
    ends = Sampler(temperature=1.0, logit_bias={20: 50.0}, stop_token_ids=20, min_tokens=3)
    answer = engine.run(Request(PROMPT, Sampling(chunk=2), None, ends, 12, seed=1))
    assert (len(answer.token_ids), answer.finish_reason) == (3, "stop")
    assert not {20, EOS} & {*answer.token_ids}
    assert (
        len(engine.run(Request(PROMPT, Sampling(), None, Sampler(logit_bias={20: 50.0}), 12, seed=1)).token_ids) == 12
    )


@pytest.mark.parametrize("settings", [{"logit_bias": {48: 1.0}}, {"stop_token_ids": (7, 4800)}])
def test_tokens_that_the_model_does_not_have(models: Callable[..., str], start: Start, settings: Any) -> None:
    engine = start(models("llama"))
    with pytest.raises(SettingsError, match=f"{next(iter(settings))}: token 48"):
        engine.run(Request(PROMPT, Sampling(), None, Sampler(**settings), 4))
    assert engine.inspect().idle


def test_a_grammar_goes_together_with_all_of_them(tmp_path: Path) -> None:
    """What it forbids stays forbidden, and where it allows the end alone, a text may be too short."""
    with scripted(tmp_path, lambda _: "xyz", decoding="sampling", reward=None, seed=1) as options:
        llm = CardsLLM(**options)
        more: dict[str, Any] = {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "top_p": 0.9, "min_tokens": 9}
        assert llm.align("a", grammar=Grammar.regex("[0-9]{4}"), **more).text.isdigit()
        ends = llm.engine_for({}, llm).loaded().chat.encode("7")
        answer = llm.align("a", grammar=Grammar.regex("7{5}"), stop_token_ids=ends)
        assert (answer.text, answer.finish_reason) == ("77777", "stop")


# --- settings ---


def test_settings_are_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "top_p": 0.9, "min_p": 0.1, "logit_bias": {"5": -1, 7: 2.5}, "stop_token_ids": 3, "min_tokens": 2, "n": 2,
        "finish_at": "sentence", "logprobs": True, "top_logprobs": 3, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": -0.5,
    }  # fmt: skip
    settings, file = CardsSettings(**given), tmp_path / "cards.yaml"
    file.write_text(settings.to_yaml())
    assert CardsSettings.from_yaml(file) == settings
    assert (settings.logit_bias, settings.stop_token_ids) == (((5, -1.0), (7, 2.5)), (3,))
    monkeypatch.setenv("CARDS_LOGIT_BIAS", '{"5": -1, "7": 2.5}')
    monkeypatch.setenv("CARDS_STOP_TOKEN_IDS", "[3]")
    assert CardsSettings(**{name: value for name, value in given.items() if "_token" not in name}).stop_token_ids == (
        3,
    )
    assert CardsSettings().logit_bias == settings.logit_bias
    [one, two] = settings.requests("hello", {"seed": 4})
    assert one.sampler == Sampler(**{name: given[name] for name in Sampler.model_fields if name in given})
    assert (one.logprobs, one.finish_at, [one.seed, two.seed]) == (3, "sentence", answer_seeds(4, 2))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"top_p": 1.2}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {5: math.inf}}, "logit_bias"),
        ({"min_tokens": 40}, "min_tokens=40 is more than max_tokens=20"),
        ({"finish_at": "word"}, "finish_at"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"n": 3}, "n=3: this call has one answer"),
    ],
)
def test_what_cannot_be_used_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        faces.cards_llm().align("Hello", **wrong)


def test_the_command_sets_any_option(tmp_path: Path) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text(CardsSettings(**faces.options(max_tokens=8)).to_yaml())
    words = ["generate", "Hello", "--config", str(file), "--json", "--set", "n=2", "--set", "logit_bias={20: 80}"]
    found = CliRunner().invoke(app, [*words, "--set", "top_logprobs=1"])
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["seed"] for row in rows] == answer_seeds(7, 2)
    assert {token["token_id"] for row in rows for token in row["logprobs"]} == {20}
    refused = CliRunner().invoke(app, ["generate", "Hello", "--set", "top_p"])
    assert isinstance(refused.exception, SettingsError)


# --- several answers ---


def test_several_answers_are_those_of_their_seeds() -> None:
    llm, chat = faces.cards_llm(), faces.chat_cards(n=3)
    result: Any = chat.generate([[HumanMessage("Hello")], [HumanMessage("You")]])
    assert [len(each) for each in result.generations] == [3, 3]
    alone = [llm.align("Hello", seed=seed) for seed in answer_seeds(7, 3)]
    assert [each.text for each in result.generations[0]] == [answer.content for answer in alone]
    assert len({each.text for each in result.generations[0]}) == 3
    messages = [each.message for several in result.generations for each in several]
    spent = sum(message.usage_metadata["output_tokens"] for message in messages)
    assert result.llm_output["token_usage"]["completion_tokens"] == spent
    assert chat.invoke("Hello").content == llm.align("Hello").content
    [again] = asyncio.run(chat.agenerate([[HumanMessage("Hello")]])).generations
    assert [each.text for each in again] == [answer.content for answer in alone]


def test_several_answers_from_a_cache_and_without_a_seed() -> None:
    chat = faces.chat_cards(cache=InMemoryCache())
    first = chat.generate([[HumanMessage("Hello")]], n=2)
    assert chat.generate([[HumanMessage("Hello")]], n=2).generations == first.generations
    several: Any = faces.chat_cards(seed=None).generate([[HumanMessage("Hello")]], n=2).generations[0]
    assert len({each.message.response_metadata["cards"]["seed"] for each in several}) == 2


def test_several_completions() -> None:
    llm = CardsCompletion(**faces.options())
    result = llm.generate(["Hello", "You"], n=2)
    assert [len(each) for each in result.generations] == [2, 2]
    assert [each[0].text for each in result.generations] == llm.batch(["Hello", "You"])
    with pytest.raises(SettingsError, match="n=2: a stream has one answer"):
        list(llm.stream("Hello", n=2))


async def test_a_stream_has_one_answer() -> None:
    chat = faces.chat_cards(n=2)
    with pytest.raises(SettingsError, match="n=2: a stream has one answer"):
        list(chat.stream("Hello"))
    with pytest.raises(SettingsError, match="n=2: a stream has one answer"):
        [_ async for _ in chat.astream("Hello")]
    node: Any = RunnableLambda(lambda text: chat.invoke(text))
    events = [event async for event in node.astream_events("Hello", version="v2")]
    assert events[-1]["data"]["output"].content == faces.chat_cards().invoke("Hello").content
    for call in (faces.cards_llm(n=2).complete, faces.cards_llm(n=2).stream_complete):
        with pytest.raises(SettingsError, match="n=2: this call has one answer"):
            call("Hello")


# --- log-probabilities ---


def test_log_probabilities_are_those_of_the_model() -> None:
    llm = faces.cards_llm(temperature=0.5, top_k=3, repetition_penalty=1.3)
    answer = llm.align("Hello", top_logprobs=4)
    plain = llm.align("Hello")
    assert (plain.logprobs, plain.token_ids) == ((), answer.token_ids)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(faces.chat_model())
        logits = model(torch.tensor([[*answer.prompt_ids, *answer.token_ids]])).logits[0]
    log_p = logits[len(answer.prompt_ids) - 1 : -1].log_softmax(-1)
    assert [each.token_id for each in answer.logprobs] == list(answer.token_ids)
    assert "".join(each.token for each in answer.logprobs) == answer.text
    assert sum(each.logprob for each in answer.logprobs) == pytest.approx(answer.log_likelihood)
    for row, each in zip(log_p, answer.logprobs, strict=True):
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-3)
        assert [top.logprob for top in each.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-3)
    bare = llm.align("Hello", logprobs=True)
    assert [each.top for each in bare.logprobs] == [()] * len(bare.token_ids)


def test_log_probabilities_in_both_frameworks() -> None:
    answer = faces.cards_llm().align("Hello", top_logprobs=2)
    message = faces.chat_cards(logprobs=True, top_logprobs=2).invoke("Hello")
    content = message.response_metadata["logprobs"]["content"]
    assert [each["token"] for each in content] == [each.token for each in answer.logprobs]
    assert [each["logprob"] for each in content] == [each.logprob for each in answer.logprobs]
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    assert [len(each["top_logprobs"]) for each in content] == [2] * len(content)
    *_, last = faces.chat_cards(top_logprobs=2).stream("Hello")
    assert last.response_metadata["logprobs"]["content"] == content
    completion: Any = CardsCompletion(**faces.options()).generate(["Hello"], logprobs=True).generations[0][0]
    assert completion.generation_info["logprobs"]["content"]
    assert "logprobs" not in faces.chat_cards().invoke("Hello").response_metadata
    for response in (
        faces.cards_llm().complete("Hello", top_logprobs=2),
        faces.cards_llm(top_logprobs=2).complete("Hello"),
    ):
        assert [each[0].logprob for each in response.logprobs] == [each.logprob for each in answer.logprobs]
        assert [len(each) for each in response.logprobs] == [3] * len(content)
    assert faces.cards_llm().complete("Hello").logprobs is None


# --- the last whole sentence ---

STORY = 'She came. "Is it 3.14?" he asked.\n\n1. Tea is hot.\n2. Coffee is'


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (STORY, STORY.index("\n2.")),
        (STORY[:60], STORY.index("\n2.")),
        ("It costs 3.14", 0),
        ("No end", 0),
        ("One. Two.", 9),
        ("Here is a list:\n\n- one\n- tw", 22),
        ("1. Tea", 0),
    ],
)
def test_where_the_last_sentence_ends(text: str, end: int) -> None:
    assert last_sentence_end(text) == end


def test_what_of_a_growing_text_is_certain() -> None:
    assert certain_sentences("It is 3.") == ""
    assert certain_sentences("It is 3. ") == "It is 3."
    assert certain_sentences("") == ""


def test_text_and_ids_are_cut_together() -> None:
    """Tokens of two characters: one may reach beyond the end of the sentence."""

    def decode(ids: Any) -> str:
        return "".join(text[2 * i : 2 * i + 2] for i in ids)

    for text, expected in (
        ("It is. And no", "It is. "[:6]),
        ("It was. And", "It was. "),
        ("It is", None),
        ("It.", None),
    ):
        ids = range((len(text) + 1) // 2)
        found = cut_after_sentence(text, ids, decode)
        assert (found and found[0]) == expected
        if found:
            assert decode(ids[: found[1]]) == found[0]


def counted(prompt: str, answers: list[str]) -> list[float]:
    """Another number for each text."""
    return [len(answer) + sum(answer.encode()) / 1000 for answer in answers]


@pytest.fixture
def cut(tmp_path: Path) -> Iterator[dict[str, Any]]:
    decoding = Cards(target_reward=0.0, beta=1.0, boundary=FixedLength(length=7))
    reward = FunctionReward(function=counted)
    with scripted(tmp_path, lambda _: STORY + " bitter.", decoding=decoding, reward=reward, seed=1) as options:
        yield {**options, "max_tokens": 35}


def test_an_answer_ends_with_its_last_sentence(cut: dict[str, Any]) -> None:
    llm = CardsLLM(**cut)
    whole, answer = llm.align("a"), llm.align("a", finish_at="sentence", logprobs=True)
    text = 'She came. "Is it 3.14?" he asked.'
    assert whole.text.startswith(text) and len(whole.text) > len(text)  # noqa: PT018
    assert (answer.text.rstrip(), answer.finish_reason) == (text, "length")
    assert llm.tokenizer(answer.text) == list(answer.token_ids) == [each.token_id for each in answer.logprobs]
    assert answer.reward == counted("", [answer.text])[0] == answer.segments[-1].reward
    assert "".join(segment.text for segment in answer.segments) == answer.text
    assert sum(len(segment.token_ids) for segment in answer.segments) == answer.usage.completion_tokens
    assert answer.log_likelihood == pytest.approx(sum(each.logprob for each in answer.logprobs))
    assert answer.usage.rm_forwards == whole.usage.rm_forwards + 1
    assert llm.align("a", finish_at="sentence", max_tokens=400).text == STORY + " bitter."


def test_a_stream_holds_half_a_sentence_back(cut: dict[str, Any]) -> None:
    llm = CardsLLM(**cut, finish_at="sentence")
    *chunks, answer = llm.align_stream("a")
    assert isinstance(answer, Alignment)
    assert "".join(chunk.text for chunk in chunks) == answer.text
    *chunks, answer = llm.align_stream("a", max_tokens=400)
    assert "".join(chunk.text for chunk in chunks) == answer.text == STORY + " bitter."
    assert "".join(chunk.text for chunk in llm.as_langchain().stream("a")) == llm.complete("a").text


def test_objects_calls_and_plain_answers_are_not_cut(tmp_path: Path) -> None:
    said = '{"text": "One. Two and'
    options: dict[str, Any] = {"decoding": "sampling", "reward": None, "seed": 1, "finish_at": "sentence"}
    with scripted(tmp_path, lambda prompt: "No end here" if prompt == "b" else said + " so on", **options) as given:
        llm = CardsLLM(**{**given, "max_tokens": 12})

        def get_weather(city: str) -> str:
            """Say how it is."""
            return city

        assert llm.align("b", max_tokens=2).text
        for call in ({"grammar": Grammar.regex('\\{"text": "[a-zA-Z. ]*"\\}')}, {"tools": [get_weather]}):
            answer = llm.align("a", **call)
            assert len(answer.token_ids) == answer.usage.completion_tokens >= 11
            assert answer.text.startswith('{"text": "On')


def test_seeds_of_answers() -> None:
    found = answer_seeds(3, 50)
    assert found[0] == 3
    assert len({*found}) == 50
    assert found == answer_seeds(3, 60)[:50]
    assert all(0 <= seed < 2**63 for seed in found)
    assert np.array(found).dtype == np.int64
