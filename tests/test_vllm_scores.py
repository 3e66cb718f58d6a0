"""Scores by vLLM's `/score`, `/pooling`, `/generative_scoring` and `/v1/systemone`: those of the plain recipe."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from transformers import AutoModelForTokenClassification
from vllm_server import VllmServer

from cards_integrations.decoding import Cards, FixedLength
from cards_integrations.engine import Request
from cards_integrations.errors import RewardError, SettingsError
from cards_integrations.models.local.loader import ModelLoader
from cards_integrations.models.local.settings import Placement
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import RemoteReward, RewardLoader, as_reward
from cards_integrations.rewards.base import Conversation, Response, scores
from cards_integrations.trace import Usage

PROMPT = "the cat sat on what?"
ANSWERS = ["on the mat", "the dog ran away.\n\non the mat", "", "a\n\n\n\nb\n\nthe cat"]
TAG = "<step>"
RUBRIC = "Is {response} an answer to {prompt}?"
WINDOW = 200


@dataclass
class Served:
    """A server of a language model, of a process reward model and of a classifier, on the same tokenizer."""

    server: VllmServer
    folder: str
    tokenizer: Any
    causal: Any
    steps: Any
    by_step: bool = True
    """Whether `/pooling` returns a row for each tag, or one for each token."""

    def reward(self, protocol: str, **settings: Any) -> RemoteReward:
        return RemoteReward(**{"url": self.server.url, "protocol": protocol, "model": "served", **settings})

    @property
    def asked(self) -> list[Any]:
        return [asked.body for asked in self.server.asked]

    def ids(self, text: str | list[int]) -> list[int]:
        return list(self.tokenizer(text)["input_ids"]) if isinstance(text, str) else text

    @torch.inference_mode()
    def rows(self, ids: list[int]) -> torch.Tensor:
        """The process reward model's logits, (tokens, labels)."""
        found: torch.Tensor = self.steps(torch.tensor([ids])).logits[0]
        return found

    @torch.inference_mode()
    def next(self, ids: list[int]) -> torch.Tensor:
        """The language model's log p after these tokens, (vocabulary,)."""
        found: torch.Tensor = self.causal(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        return found

    # --- what the server answers, by vLLM 0.32's source ---

    def pooled(self, body: Any) -> Any:
        assert body["task"] == "token_classify"
        found = []
        for index, text in enumerate(body["input"]):
            ids = self.ids(text)
            rows = self.rows(ids)
            rows = rows if body["use_activation"] is False else rows.softmax(-1)
            tagged = torch.tensor(ids) == self.tokenizer.convert_tokens_to_ids(TAG)
            found.append({"index": index, "object": "pooling", "data": rows[tagged if self.by_step else ...].tolist()})
        return {"id": "pool-1", "object": "list", "created": 0, "model": "served", "data": found, "usage": {}}

    def scored(self, body: Any) -> Any:
        found = []
        for index, text in enumerate(body["text_2"]):
            logit = float(len(text) - len(body["text_1"]))
            score = logit if body.get("use_activation") is False else 1 / (1 + math.exp(-logit))
            found.append({"index": index, "object": "score", "score": score})
        return {"id": "score-1", "object": "list", "created": 0, "model": "served", "data": found, "usage": {}}

    def labelled(self, body: Any) -> Any:
        found, read = [], 0
        for index, item in enumerate(body["items"]):
            ids = (body["query"] + item)[: WINDOW - 1]
            p = self.next(ids)[body["label_token_ids"]].softmax(-1)
            found.append({"index": index, "object": "score", "score": float(p[0])})
            read += len(ids)
        return {"object": "list", "model": "served", "data": found, "usage": {"prompt_tokens": read}}

    def decided(self, body: Any) -> Any:
        answers: dict[str, Any] = {}
        for name, question in body["questions"].items():
            p = self.options(body["state"], question)
            names = list(question.get("criteria") or ())
            by_type: dict[str, dict[str, Any]] = {
                "noul": {"noul": p[0]},
                "choice": {"choice": "", "probabilities": dict(zip(names, p, strict=False))},
                "score": {"score": sum(level * each for level, each in enumerate(p))},
            }
            answers[name] = {"type": question["type"], **by_type[question["type"]], "confidence": max(p)}
        return {"id": "decision-1", "object": "structured_decision", "model": "served", "answers": answers}

    def options(self, state: Any, question: Any) -> list[float]:
        """Probabilities of the labels as the next token after state and question."""
        text = (state if isinstance(state, str) else json.dumps(state, ensure_ascii=False)) + question["instructions"]
        labels = {"noul": "yn", "choice": "ABC", "score": "012"}[question["type"]]
        labels = labels[: len(question.get("criteria") or labels)]
        chosen = self.next(self.ids(text))[self.tokenizer.convert_tokens_to_ids(list(labels))]
        found: list[float] = chosen.softmax(-1).tolist()
        return found


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("scores")
    tokenizer = tiny.byte_pairs()
    tokenizer.add_special_tokens({"additional_special_tokens": [TAG]})
    tokenizer.chat_template = tiny.CHAT
    causal = tiny.causal(vocab_size=len(tokenizer))
    torch.manual_seed(5)
    config = tiny.config("qwen2", vocab_size=len(tokenizer), num_labels=2)
    steps = AutoModelForTokenClassification.from_config(config).float().eval()
    served = Served(VllmServer(tiny.save(folder, causal, tokenizer)), str(folder), tokenizer, causal, steps)
    served.server.more = {
        "/pooling": served.pooled, "/score": served.scored, "/generative_scoring": served.labelled,
        "/v1/systemone": served.decided,
    }  # fmt: skip
    served.server.start()
    yield served
    served.server.die()


@pytest.fixture
def served(everything: Served) -> Served:
    everything.server.reset()
    everything.by_step = True
    return everything


def built(reward: RemoteReward) -> Any:
    return reward.build(RewardLoader(ModelLoader(Placement(device="cpu", dtype="float32"))))


async def asked(
    reward: RemoteReward, texts: Sequence[str], context: tuple[str, ...] = (), prompt: str = PROMPT
) -> list[float]:
    model, conversation = built(reward), Conversation(prompt, Usage(), context)
    found = await scores(model, [Response(conversation, text) for text in texts])
    assert conversation.usage.rm_forwards > 0
    return found


async def test_a_score_is_a_logit(served: Served) -> None:
    """vLLM puts it through a sigmoid unless it is told not to: far from 0 nothing would guide any more."""
    texts = ["", "a" * 60, "b" * 900]
    assert await asked(served.reward("score"), texts) == [len(text) - len(PROMPT) for text in texts]
    through = await asked(served.reward("score", use_activation=True), texts)
    assert through[1] == through[2] == pytest.approx(1)
    assert [body["use_activation"] for body in served.asked] == [False, True]


# --- steps ---


def tagged(text: str) -> str:
    return "".join(step + TAG for step in text.split("\n\n") if step) or TAG


def steps_of(served: Served, text: str) -> list[float]:
    """The recipe of the authors of Qwen2.5-Math-PRM: the softmax of two labels at each tag."""
    ids = served.ids(text)
    p = served.rows(ids).softmax(-1)[:, 1]
    return [float(p[at]) for at, token in enumerate(ids) if token == served.tokenizer.convert_tokens_to_ids(TAG)]


@pytest.mark.parametrize("by_step", [True, False])
@pytest.mark.parametrize(
    ("aggregate", "joined"),
    [("last", lambda p: p[-1]), ("min", min), ("product", math.prod), ("mean", statistics.fmean)],
)
async def test_steps(served: Served, by_step: bool, aggregate: str, joined: Callable[[list[float]], float]) -> None:
    served.by_step = by_step
    reward = served.reward("pooling", step_tag=TAG, aggregate=aggregate, tokenizer=served.folder)
    talk = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ""}]
    expected = []
    for text in ANSWERS:
        talk[1]["content"] = tagged(text)
        expected.append(joined(steps_of(served, served.tokenizer.apply_chat_template(talk, tokenize=False))))
    assert await asked(reward, ANSWERS) == pytest.approx(expected, abs=1e-5)
    [body] = served.asked
    assert (body["task"], body["use_activation"]) == ("token_classify", False)


async def test_steps_of_texts(served: Served) -> None:
    reward = served.reward(
        "pooling", step_tag=TAG, separator=" the ", aggregate="last", label=0, prompt_format="{prompt} {response}"
    )
    found = await asked(reward, ["on the mat"])
    assert served.asked[0]["input"] == [f"{PROMPT} on{TAG}mat{TAG}"]
    assert found == [pytest.approx(1 - steps_of(served, served.asked[0]["input"][0])[-1], abs=1e-5)]


@pytest.mark.parametrize(
    ("by_step", "text", "settings", "says"),
    [
        (False, "on the mat", {}, r"scores for 1 steps.*step_tag_id"),  # all tokens, and nobody knows which
        (True, f"on {TAG} mat", {}, r"2 scores for 1 steps.*in no prompt and no answer"),
        (True, "on", {"label": 2}, "there are 2 labels"),
    ],
)
async def test_steps_that_cannot_be_told_apart(
    served: Served, by_step: bool, text: str, settings: dict[str, Any], says: str
) -> None:
    served.by_step = by_step
    with pytest.raises(RewardError, match=says):
        await asked(served.reward("pooling", step_tag=TAG, **settings), [text])


async def test_a_tag_of_several_tokens_is_refused(served: Served) -> None:
    with pytest.raises(SettingsError, match=r"step_tag='<other>' is \d tokens"):
        await asked(served.reward("pooling", step_tag="<other>", tokenizer=served.folder), ["a"])


# --- words ---


@pytest.mark.parametrize("batch_size", [1, 32])
async def test_the_margin_of_two_words(served: Served, batch_size: int) -> None:
    """logit(yes) - logit(no) after the rubric, of transformers' own forward."""
    reward = served.reward(
        "generative_scoring", tokenizer=served.folder, prompt_format=RUBRIC, words=("yes", "no"), batch_size=batch_size
    )
    expected, tokens = [], []
    for text in ANSWERS:
        asked_of = [{"role": "user", "content": RUBRIC.replace("{response}", text).replace("{prompt}", PROMPT)}]
        ids = served.tokenizer.apply_chat_template(asked_of, add_generation_prompt=True, return_dict=False)
        log_p = served.next(ids)
        yes, no = (served.ids(word)[0] for word in ("yes", "no"))
        expected.append(float(log_p[yes] - log_p[no]))
        tokens.append(ids)
    assert await asked(reward, ANSWERS) == pytest.approx(expected, abs=1e-4)
    assert sorted(body["query"] + item for body in served.asked for item in body["items"]) == sorted(tokens)


async def test_a_text_that_the_server_cuts_is_no_score(served: Served) -> None:
    with pytest.raises(RewardError, match=rf"read {WINDOW - 1} of \d+ tokens. Use a larger --max-model-len"):
        await asked(served.reward("generative_scoring", tokenizer=served.folder), ["x" * 300])


# --- questions ---

CHOICE = {
    "type": "choice",
    "instructions": "Which?",
    "criteria": {"bad": None, "good": "It is true."},
    "wanted": "good",
}
LEVELS = {"type": "score", "instructions": "How good?", "criteria": ["bad", "fair", "good"]}


async def test_a_question_of_yes_or_no(served: Served) -> None:
    reward = served.reward("systemone", question="Is it true?")
    found = await asked(reward, ANSWERS, context=("The mat is red.",))
    states = [{"message": PROMPT, "answer": text, "context": ["The mat is red."]} for text in ANSWERS]
    question = {"type": "noul", "instructions": "Is it true?"}
    p = [served.options(state, question)[0] for state in states]
    assert found == pytest.approx([math.log(each / (1 - each)) for each in p], abs=1e-5)
    assert sorted(json.dumps(body["state"]) for body in served.asked) == sorted(map(json.dumps, states))
    assert served.asked[0]["questions"] == {"answer": question}


async def test_a_choice_and_a_scale(served: Served) -> None:
    form = "{prompt} -> {response}"
    states = [f"{PROMPT} -> {text}" for text in ANSWERS]
    found = await asked(served.reward("systemone", question=CHOICE, prompt_format=form), ANSWERS)
    good = [served.options(state, CHOICE)[1] for state in states]
    assert found == pytest.approx([math.log(p / (1 - p)) for p in good], abs=1e-5)
    found = await asked(served.reward("systemone", question=LEVELS, prompt_format=form), ANSWERS)
    assert found == pytest.approx([p[1] + 2 * p[2] for p in (served.options(each, LEVELS) for each in states)])


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ({}, "answers"),
        ({"answers": {}}, "no answer"),
        ({"answers": {"answer": {"type": "score", "score": 1.0}}}, "'noul' was answered with 'score'"),
        ({"answers": {"answer": {"type": "noul"}}}, "number"),
        ({"answers": {"answer": {"type": "noul", "noul": 1.5}}}, "less than or equal to 1"),
    ],
)
async def test_a_reply_that_answers_something_else(served: Served, reply: Any, says: str) -> None:
    served.server.more["/v1/systemone"] = lambda body: reply
    try:
        with pytest.raises(RewardError, match=says):
            await asked(served.reward("systemone"), ["a"])
    finally:
        served.server.more["/v1/systemone"] = served.decided


@pytest.mark.parametrize("p", [0.0, 1.0])
async def test_a_sure_answer_is_a_number(served: Served, p: float) -> None:
    served.server.more["/v1/systemone"] = lambda body: {"answers": {"answer": {"type": "noul", "noul": p}}}
    try:
        [found] = await asked(served.reward("systemone"), ["a"])
    finally:
        served.server.more["/v1/systemone"] = served.decided
    assert found == pytest.approx(36.7 if p else -36.7, abs=0.1)


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"protocol": "score", "after_tag": " "}, "after_tag=.*leave it out"),
        ({"protocol": "generative_scoring"}, "needs tokenizer="),
        ({"protocol": "score", "step_tag": TAG}, "leave it out; it is for protocol='pooling'"),
        ({"protocol": "classify", "question": "Is it?"}, "question=.*leave it out"),
        ({"protocol": "classify", "use_activation": True}, "use_activation=.*leave it out"),
        ({"protocol": "pooling", "step_tag": TAG, "label": "good"}, "give its index"),
        ({"protocol": "generative_scoring", "tokenizer": "minilm", "words": ("a", "a")}, "the same"),
        ({"protocol": "systemone", "question": {"type": "choice", "instructions": "?"}}, "question.*two options"),
        ({"protocol": "systemone", "question": {**CHOICE, "wanted": "fair"}}, "question.*wanted='fair'"),
        ({"protocol": "systemone", "question": {**LEVELS, "criteria": ["one"]}}, "question.*two levels"),
        ({"protocol": "systemone", "question": {"instructions": "?", "criterai": {}}}, "Did you mean 'criteria'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        RemoteReward(url="http://host", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"protocol": "pooling", "step_tag": TAG, "aggregate": "product", "label": 1},
        {"protocol": "generative_scoring", "tokenizer": "minilm", "words": ("good", "bad")},
        {"protocol": "systemone", "question": CHOICE},
        {"protocol": "systemone", "question": LEVELS},
        {"protocol": "score", "use_activation": True},
    ],
)
def test_settings_come_back(settings: dict[str, Any]) -> None:
    reward = RemoteReward(url="http://host", model="served", **settings)
    again = as_reward(json.loads(reward.model_dump_json()))
    assert again == reward
    assert hash(again) == hash(reward)


# --- in the engine ---


@pytest.mark.parametrize("protocol", ["pooling", "generative_scoring", "systemone"])
def test_it_guides(served: Served, start: Start, protocol: str) -> None:
    more: dict[str, dict[str, Any]] = {
        "pooling": {"step_tag": TAG, "separator": " ", "tokenizer": served.folder},
        "generative_scoring": {"tokenizer": served.folder, "prompt_format": "{response}?"},
        "systemone": {"prompt_format": "{response}"},
    }
    reward = served.reward(protocol, **more[protocol])
    engine = start(served.folder)
    guided = Cards(target_reward=40.0, beta=0.3, acceptance="hard", boundary=FixedLength(length=4), max_rejections=3)
    answers = engine.run_many([Request(PROMPT, guided, reward, Sampler(), 8, seed=seed) for seed in range(3)])
    for answer in answers:
        assert engine.score(reward, PROMPT, [answer.text]) == [pytest.approx(answer.reward, abs=1e-4)]
        for segment in answer.segments:  # none reaches the target: the best of them is kept
            assert segment.reward == max(draft.reward or 0.0 for draft in segment.drafts)
            assert len(segment.drafts) == 4


# --- the server itself ---

RECORDED = json.loads((Path(__file__).parent / "vllm_scores_recorded.json").read_text())


@pytest.mark.parametrize("exchange", RECORDED["exchanges"], ids=lambda exchange: exchange["name"])
async def test_a_real_server_s_replies_are_the_plain_recipe_s_scores(served: Served, exchange: dict[str, Any]) -> None:
    """What vLLM was asked by this client, what it answered, and what transformers computed of the same weights."""
    path, before = exchange["path"], dict(served.server.more)
    served.server.more[path] = lambda body: exchange["response"]
    try:
        reward = served.reward(exchange["protocol"], **exchange["settings"])
        if exchange["protocol"] == "generative_scoring":  # its request is made by the tokenizer of the recorded model
            model = built(reward.model_copy(update={"tokenizer": served.folder}))
            found = model.read(json.dumps(exchange["response"]).encode(), exchange["request"], [])
        else:
            found = await asked(reward, exchange["answers"], prompt=RECORDED["prompt"])
            assert served.asked == [{**exchange["request"], "model": "served"}]
    finally:
        served.server.more = before
    assert found == pytest.approx(exchange["scores"], abs=1e-4)
