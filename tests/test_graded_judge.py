"""Grades and criteria: what a judge says of an answer that it reads once is what plain forwards of each rubric say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from internals import is_idle, wait_until
from naive import causal, drafts, ids, margin, said
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cards_integrations import CardsSettings
from cards_integrations.decoding import Cards, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.errors import PromptError, RewardError, SettingsError
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import Criterion, GradedJudgeReward, JudgeReward

PROMPT = "w9 w20 w31 w5"
RUBRIC = "w30 {prompt} w31 {response} w32 w33 {criterion} ."
STOP = ("5 w1", "w45")
GUIDED = Cards(
    target_reward=6.0, beta=1.0, max_rejections=4, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=6)
)
WORDS, PIECES = tiny.words(), tiny.byte_pairs()
CRITERIA = (Criterion(question="w40 w41", name="first", weight=2.0), Criterion(question="w42", rewordings=("w43 w44",)))
WORDINGS = (("w40 w41",), ("w42", "w43 w44"))
WEIGHTS = (2 / 3, 1 / 3)
GRADES = {"w6": 1.0, "w6 w7": 8.0, "w8": 3.0}  # the second begins with the first
SELF = GradedJudgeReward(rubric=RUBRIC, criteria=CRITERIA, grades=GRADES)
Naive = Callable[[str, list[int] | None], list[float]]


@cache
@torch.inference_mode()
def log_p(model: Any, text: tuple[int, ...]) -> list[float]:
    return model(torch.tensor([text])).logits[0, -1].double().log_softmax(-1).tolist()


def mean_grade(model: Any, before: Sequence[int], grades: dict[tuple[int, ...], float]) -> float:
    """The expectation over grades none of which is counted where a longer one goes on from it."""
    p = {
        grade: math.exp(sum(log_p(model, (*before, *grade[:i]))[token] for i, token in enumerate(grade)))
        for grade in grades
    }
    for grade in sorted(grades, key=len):
        p[grade] -= sum(p[longer] for longer in grades if longer != grade and longer[: len(grade)] == grade)
    return sum(p[grade] * value for grade, value in grades.items()) / sum(p.values())


def requests(judge: Any, count: int, **options: Any) -> list[Request]:
    settings = {"sampler": Sampler(temperature=1.0), "max_tokens": 12, "stop": STOP, **options}
    return [Request(PROMPT, GUIDED, judge, seed=seed, **settings) for seed in range(count)]


def at_once(width: int) -> int:
    """Eight requests together, and fewer where each has a single candidate: their texts are the same."""
    return 8 if width > 1 else 2


def weighted(found: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(WEIGHTS, found, strict=True))


def assert_exact(alignments: list[Any], naive: Naive) -> None:
    """All rewards and their parts are those of `naive(text, ids)`; ids are None where a stop string cut the text."""
    seen = 0
    for alignment in alignments:
        assert alignment.prompt_reward == pytest.approx(weighted(naive("", [])), abs=1e-4)
        for draft, whole in drafts(alignment):
            text, cut = said(WORDS, whole, STOP)
            found = naive(text, None if cut else whole)
            assert draft.reward == pytest.approx(weighted(found), abs=1e-4)
            assert draft.parts == pytest.approx(dict(zip(("first", "w42"), found, strict=True)), abs=1e-4)
            seen += 1
        assert [*alignment.rewards] == ["first", "w42"]
    assert seen > 4 * len(alignments)


def by_criterion(score: Callable[[str, list[int] | None, str], float]) -> Naive:
    """The naive scores of all criteria, by that of one wording."""
    return lambda text, whole: [
        sum(score(text, whole, wording) for wording in wordings) / len(wordings) for wordings in WORDINGS
    ]


# --- the value ---


@pytest.mark.parametrize(
    ("family", "chat", "width"), [("llama", True, 1), ("llama", True, 8), ("gemma3_text", False, 8)]
)
def test_the_language_model_grades_itself(
    models: Callable[..., str], start: Start, family: str, chat: bool, width: int
) -> None:
    engine, model = start(models(family, chat_template=tiny.CHAT if chat else None), width=width), causal(family)
    before, after = ("<user> ", " </user>\n<assistant> ") if chat else ("", "")
    grades = {tuple(ids(word)): value for word, value in GRADES.items()}

    def score(text: str, whole: list[int] | None, wording: str) -> float:
        begun = f"{before}w30 {PROMPT} w31 "
        read = ids(begun + text) if whole is None else ids(begun) + whole
        return mean_grade(model, read + ids(f" w32 w33 {wording} .{after}"), grades)

    assert_exact(engine.run_many(requests(SELF, at_once(width))), by_criterion(score))
    texts = ["", "w20 w21 w22 w23 w24 w25", "w7"]
    expected = [weighted(by_criterion(score)(text, None)) for text in texts]
    assert engine.score(SELF, PROMPT, texts) == pytest.approx(expected, abs=1e-4)
    wait_until(lambda: is_idle(engine))


@pytest.mark.parametrize("width", [1, 8])
def test_another_model_with_the_same_tokens(
    models: Callable[..., str], start: Start, tmp_path: Path, width: int
) -> None:
    model = causal("gpt2", 5)
    judge = SELF.model_copy(update={"model": JudgeReward(model=tiny.save(tmp_path, model, tiny.words())).model})
    grades = {tuple(ids(word)): value for word, value in GRADES.items()}

    def score(text: str, whole: list[int] | None, wording: str) -> float:
        read = ids(f"w30 {PROMPT} w31 {text}") if whole is None else ids(f"w30 {PROMPT} w31 ") + whole
        return mean_grade(model, read + ids(f" w32 w33 {wording} ."), grades)

    assert_exact(start(models("llama"), width=width).run_many(requests(judge, at_once(width))), by_criterion(score))


@pytest.mark.parametrize("width", [1, 8])
def test_another_model_with_other_tokens(models: Callable[..., str], start: Start, tmp_path: Path, width: int) -> None:
    """Grades of several tokens, some of which begin alike."""
    tokenizer = tiny.byte_pairs()
    tokenizer.chat_template = tiny.CHAT
    model = causal("mistral", 6, vocab_size=280, max_position_embeddings=1024)
    values = {"1": 1.0, "10": 10.0, "cat": 4.0, "car": 7.0}
    judge = GradedJudgeReward(
        model=tiny.save(tmp_path, model, tokenizer), rubric=RUBRIC, criteria=CRITERIA, grades=values
    )
    grades = {tuple(ids(word, PIECES)): value for word, value in values.items()}
    assert max(map(len, grades)) > 1

    def score(text: str, whole: list[int] | None, wording: str) -> float:
        read = ids(f"<user> w30 {PROMPT} w31 {text}", PIECES)
        return mean_grade(model, read + ids(f" w32 w33 {wording} . </user>\n<assistant> ", PIECES), grades)

    assert_exact(start(models("llama"), width=width).run_many(requests(judge, at_once(width))), by_criterion(score))


def test_tokens_that_merge_with_what_follows_the_answer(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    """The whole text counts, each question's for itself."""
    model = causal("mistral", 6, vocab_size=280, max_position_embeddings=1024)
    judge = GradedJudgeReward(
        model=tiny.save(tmp_path, model, tiny.byte_pairs()), rubric="{prompt} {response}{criterion} ",
        criteria=["he cat", " dog"], grades={"1": 1.0, "10": 10.0},
    )  # fmt: skip
    assert ids("w7 the cat", PIECES) != ids("w7 t", PIECES) + ids("he cat", PIECES)
    grades = {tuple(ids(f" {word}", PIECES)): value for word, value in judge.grades}
    texts = ["w7 t", "t", "w8", ""]
    expected = [
        sum(mean_grade(model, ids(f"{PROMPT} {text}{q} ", PIECES), grades) for q in ("he cat", " dog")) / 2
        for text in texts
    ]
    assert start(models("llama")).score(judge, PROMPT, texts) == pytest.approx(expected, abs=1e-4)


def test_words_of_a_tokenizer_that_puts_a_space_before_a_text(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    """As SentencePiece does: a word after a space is that word, and not a space that all words would begin with."""
    names = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581w{i}" for i in range(6, 48))]
    fast = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    fast.pre_tokenizer = Metaspace(prepend_scheme="always")
    fast.decoder = MetaspaceDecoder(prepend_scheme="always")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer, model = PreTrainedTokenizerFast(tokenizer_object=fast, **special), causal("gpt2", 5)
    judge = JudgeReward(model=tiny.save(tmp_path, model, tokenizer), rubric="w30 {response} w32", words=("w6", "w7"))
    expected = margin(model, ids("w30 w9 w32", tokenizer), *ids("w6 w7", tokenizer))
    assert start(models("llama")).score(judge, PROMPT, ["w9"]) == pytest.approx([expected], abs=1e-4)


def test_a_judge_reads_no_end_of_text_that_its_tokenizer_appends(
    models: Callable[..., str], start: Start, tmp_path: Path
) -> None:
    tokenizer, model = tiny.words(), causal("gpt2", 5)
    ending = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tiny.EOS)])
    tokenizer.backend_tokenizer.post_processor = ending
    assert tokenizer("w9")["input_ids"] == [*ids("w9"), tiny.EOS]
    judge = JudgeReward(model=tiny.save(tmp_path, model, tokenizer), rubric="w30 {response} w32", words=("w6", "w7"))
    expected = margin(model, ids("w30 w9 w32"), *ids("w6 w7"))
    assert start(models("llama")).score(judge, PROMPT, ["w9"]) == pytest.approx([expected], abs=1e-4)


def test_a_judge_with_recurrent_layers(models: Callable[..., str], start: Start) -> None:
    engine, model = start(models("lfm2"), width=4), causal("lfm2")
    grades = {tuple(ids(word)): value for word, value in GRADES.items()}

    def score(text: str, whole: list[int] | None, wording: str) -> float:
        read = ids(f"w30 {PROMPT} w31 {text}") if whole is None else ids(f"w30 {PROMPT} w31 ") + whole
        return mean_grade(model, read + ids(f" w32 w33 {wording} ."), grades)

    assert_exact(engine.run_many(requests(SELF, 4)), by_criterion(score))
    wait_until(lambda: is_idle(engine))


PRINCIPLES = ("w40 w41", "w42 w43 w44")
PRINCIPLE_CHAT = tiny.CHAT.replace("m.role }}> {{", "m.role }}> {{ '' if m.role != 'principle' else 'w36 ' }}{{")


@pytest.mark.parametrize("width", [1, 8])
def test_principles_after_the_answer_in_the_template(models: Callable[..., str], start: Start, width: int) -> None:
    """The conversation, the answer and each principle in the judge's own roles: the margin of yes over no for each."""
    engine, model = start(models("llama", chat_template=PRINCIPLE_CHAT), width=width), causal()
    judge = JudgeReward(rubric="chat", criterion_role="principle", criteria=PRINCIPLES, words=("w6", "w7"))
    tokenizer = tiny.words()
    tokenizer.chat_template = PRINCIPLE_CHAT

    def principled(text: str, principle: str) -> float:
        talk = [("user", PROMPT), ("assistant", text), ("principle", principle)]
        messages = [{"role": role, "content": content} for role, content in talk]
        read = ids(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        assert ids("w36")[0] in read
        return margin(model, read, *ids("w6 w7"))

    texts = ["w20 w21", "w22", "w23 w24 w25"]
    expected = [sum(principled(text, each) for each in PRINCIPLES) / 2 for text in texts]
    assert engine.score(judge, PROMPT, texts) == pytest.approx(expected, abs=1e-4)
    answers = engine.run_many(requests(judge, at_once(width), stop=()))
    for answer in answers:
        for draft, whole in drafts(answer):
            if len(ids(text := said(WORDS, whole)[0])) == len(whole):  # no special tokens
                found = {each: principled(text, each) for each in PRINCIPLES}
                assert draft.parts == pytest.approx(found, abs=1e-4)
                assert draft.reward == pytest.approx(sum(found.values()) / 2, abs=1e-4)


def test_a_negative_weight_and_slots_in_texts(models: Callable[..., str], start: Start) -> None:
    """What looks like a slot in the prompt or in a question is text, and less of a criterion is better."""
    criteria = [Criterion(question="w40 {prompt} w41"), Criterion(question="w42", weight=-3.0)]
    judge = JudgeReward(rubric=RUBRIC, criteria=criteria, words=("w6", "w7"))
    read = "w30 w9 {criterion} {response} w31 w20 w32 w33 "
    one, two = (margin(causal(), ids(f"{read}{each.question} ."), *ids("w6 w7")) for each in criteria)
    found = start(models("llama")).score(judge, "w9 {criterion} {response}", ["w20"])
    assert found == pytest.approx([(one - 3 * two) / 4], abs=1e-4)


# --- the price ---


def test_a_criterion_costs_its_own_tokens(models: Callable[..., str], start: Start) -> None:
    """The answer, and all of the rubric before the criterion, is read once, however many criteria there are."""
    engine = start(models("llama"), width=1)
    for criteria in (("w40 w41",), ("w40 w41", "w42", "w43 w44 w45")):
        judge = JudgeReward(rubric=RUBRIC, criteria=criteria, words=("w6", "w7"))
        rests = sum(len(ids(each)) + 1 for each in criteria)  # and the full stop after it
        for asked in requests(judge, 2, stop=()):
            alignment = engine.run(asked)
            new = [len(draft.token_ids) + len(ids("w32 w33")) + rests for draft, _ in drafts(alignment)]
            assert len(new) > len(alignment.segments) > 1
            assert alignment.usage.rm_tokens == len(ids(f"w30 {PROMPT} w31 w32 w33")) + rests + sum(new)
            assert alignment.usage.rm_forwards == 1 + len(new) * (1 if len(criteria) == 1 else 2) + (len(criteria) > 1)


def test_a_grade_of_two_tokens_costs_one_more(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"), width=1)  # nothing is scored ahead of its turn
    for grades, more in (({"w6": 1.0, "w8": 3.0}, 0), (GRADES, 1)):
        judge = GradedJudgeReward(rubric=RUBRIC, grades=grades)
        answer = engine.run(requests(judge, 1, stop=())[0])
        suffix = len(ids("w32 w33 How helpful, honest and harmless is this answer? .")) + more
        read = sum(len(draft.token_ids) + suffix for draft, _ in drafts(answer))
        assert answer.usage.rm_tokens == len(ids(f"w30 {PROMPT} w31")) + suffix + read


def test_a_window_that_is_too_small(models: Callable[..., str], start: Start, tmp_path: Path) -> None:
    """The longest question decides what of the prompt is left out, for all of them."""
    model = tiny.causal(seed=6, max_position_embeddings=16)
    judge = JudgeReward(
        model=tiny.save(tmp_path, model, tiny.words()), rubric=RUBRIC, words=("w6", "w7"),
        criteria=["w40", "w41 w42 w43"],
    )  # fmt: skip
    engine = start(models("llama"), width=4)
    for length in (4, 5, 8):  # of 6 + n + 2 + 4 tokens
        text = WORDS.decode([*range(20, 20 + length)])
        surplus = max(0, 6 + length + 6 - 16)
        before = ids(f"w30 {PROMPT} w31")[min(-(-surplus // 4) * 4, 5) :]
        found = [margin(model, before + ids(f"{text} w32 w33 {q} ."), *ids("w6 w7")) for q in ("w40", "w41 w42 w43")]
        assert engine.score(judge, PROMPT, [text]) == pytest.approx([sum(found) / 2], abs=1e-4)
    with pytest.raises(RewardError, match=r"judge.*16.*max_tokens"):
        engine.score(judge, PROMPT, [WORDS.decode([*range(20, 34)])])
    wait_until(lambda: is_idle(engine))


def test_its_branches_count_where_memory_ends(models: Callable[..., str], start: Start) -> None:
    """Requests that are preempted for the memory of their criteria are scored as those that are not."""
    criteria = [f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4} w{i + 5}" for i in range(10, 40, 5)]
    judge = JudgeReward(rubric=RUBRIC, criteria=criteria, words=("w6", "w7"))
    asked = requests(judge, 3, stop=(), max_tokens=40)
    expected = start(models("gpt2"), width=4).run_many(asked)
    engine = start(models("gpt2"), width=4, kv_memory=250_000)
    found = engine.run_many(asked)
    assert engine.inspect().preempted
    assert [each.text for each in found] == [each.text for each in expected]
    assert [each.reward for each in found] == pytest.approx([each.reward for each in expected], abs=1e-4)


# --- edges ---


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (JudgeReward, {"criteria": ["w40"], "rubric": "{prompt} {response}"}, "{criterion} after {response}"),
        (JudgeReward, {"rubric": "{criterion} {response}"}, "{criterion} after {response}"),
        (JudgeReward, {"criteria": ["w40", "w40"]}, "the same name"),
        (JudgeReward, {"criteria": [{"question": "w40", "weight": 0}]}, "all weights are zero"),
        (JudgeReward, {"criteria": [{"question": "w40", "rewordings": ["w40"]}]}, "the same words twice"),
        (JudgeReward, {"criterion_role": "principle"}, "for rubric='chat'"),
        (GradedJudgeReward, {"grades": ["A"]}, "at least 2"),
        (GradedJudgeReward, {"grades": {"A": 1, "B": 1}}, "the same value"),
        (GradedJudgeReward, {"grades": ["A", "B", "A"]}, "the same word"),
    ],
)
def test_settings_that_cannot_work(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    ("grades", "message"),
    [({"w6": 1, "some": 2}, "no token for 'some'"), ({"w6": 1, " w6": 2}, "the same tokens")],
)
def test_grades_that_the_tokenizer_cannot_tell_apart(
    models: Callable[..., str], start: Start, grades: dict[str, float], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        start(models("llama")).score(GradedJudgeReward(rubric=RUBRIC, grades=grades), PROMPT, ["w9"])


def test_rubrics_that_do_not_fit_the_judge(models: Callable[..., str], start: Start) -> None:
    engine = start(models("llama"))
    with pytest.raises(SettingsError, match=r"rubric='chat' needs a judge with a chat template"):
        engine.score(JudgeReward(rubric="chat", words=("w6", "w7")), PROMPT, ["w9"])
    with pytest.raises(RewardError, match=r"no tokens after \{response\}"):
        engine.score(GradedJudgeReward(rubric="{prompt} {response}", grades=GRADES), PROMPT, ["w9"])
    template = tiny.CHAT.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' }}")
    silent = start(models("llama", chat_template=template))
    with pytest.raises(PromptError, match="does not write what the assistant answers"):
        silent.score(JudgeReward(rubric="chat", words=("w6", "w7")), PROMPT, ["w9"])
    wait_until(lambda: all(map(is_idle, (engine, silent))))


def test_grades_and_criteria_come_back_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "cards.yaml"
    for reward in (SELF, GradedJudgeReward(grades=["poor", "fair", "good"], criteria=["Is it short?"])):
        settings = CardsSettings(reward=reward)
        file.write_text(settings.to_yaml(), encoding="utf-8")
        assert CardsSettings.from_yaml(file).reward == reward
        assert hash(reward)
    file.write_text("reward: {kind: graded_judge, grades: {1: 0, 2: 1}, criteria: [Is it short, {question: Why}]}")
    expected = GradedJudgeReward(grades={"1": 0, "2": 1}, criteria=["Is it short", "Why"])
    assert CardsSettings.from_yaml(file).reward == expected


def test_a_plain_judge_has_no_parts(models: Callable[..., str], start: Start) -> None:
    judge = JudgeReward(rubric="w30 {response} w32 {criterion} .", words=("w6", "w7"))
    assert not start(models("llama")).run(requests(judge, 1)[0]).rewards
