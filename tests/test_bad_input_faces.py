"""What cannot be answered is refused with a typed error that names the setting; the object answers on."""

from __future__ import annotations

import math

import faces
import pytest
from langchain_core.messages import ChatMessage, HumanMessage
from llama_index.core.llms import AudioBlock, ImageBlock, TextBlock
from llama_index.core.llms import ChatMessage as LlamaMessage

from cards_integrations.errors import CardsError, ModelError, PromptError, SettingsError
from cards_integrations.rewards import ClassifierReward

METHODS = [*faces.LANGCHAIN, *faces.LLAMA_INDEX, "align", "aalign"]
PIXEL = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def llm():
    return faces.cards_llm()


@pytest.fixture(autouse=True)
def answers_on(llm):
    yield
    assert llm.align("Hello", max_tokens=1).token_ids


# --- prompts ---


@pytest.mark.parametrize("method", METHODS)
async def test_an_empty_prompt(llm, method):
    with pytest.raises(PromptError, match="empty"):
        await faces.finish(await faces.call(llm, method, ""))


def test_no_messages(llm):
    for call in (llm.invoke, llm.chat, llm.align):
        with pytest.raises(PromptError, match="list of messages is empty"):
            call([])
    with pytest.raises(PromptError, match="empty"):
        llm.batch(["Hello", []])


@pytest.mark.parametrize("prompt", [5, None, [5], [("user", 5)], [{"role": "user"}], [("user", "hi", "there")]])
def test_what_is_no_prompt(llm, prompt):
    with pytest.raises(PromptError):
        llm.align(prompt)


@pytest.mark.parametrize("method", ["align", "complete", "invoke"])
def test_a_lone_surrogate(llm, method):
    """The frameworks' own objects refuse some of them first, and name it a unicode error, too."""
    with pytest.raises((PromptError, SettingsError), match=r"surrogate|unicode"):
        getattr(llm, method)("Hello \ud800")


def test_a_lone_surrogate_in_messages(llm):
    with pytest.raises(PromptError, match="surrogate at position 6"):
        llm.align([("user", "Hello \udfff")])


def test_a_prompt_that_is_too_long(llm):
    with pytest.raises(PromptError, match=str(faces.WINDOW)):
        llm.complete("x" * faces.WINDOW)


IMAGES = [
    [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
    [{"type": "text", "text": "What is this?"}, {"type": "image", "base64": "AAAA", "mime_type": "image/png"}],
]


@pytest.mark.parametrize("content", IMAGES)
async def test_an_image_in_langchain(llm, content):
    for method in faces.LANGCHAIN:
        with pytest.raises(PromptError, match="image"):
            await faces.finish(await faces.call(llm, method, [HumanMessage(content)]))


def test_an_image_in_llama_index(llm):
    for block, name in ((ImageBlock(image=PIXEL), "image"), (AudioBlock(audio=b"RIFF"), "audio")):
        with pytest.raises(PromptError, match=name):
            llm.chat([LlamaMessage(blocks=[TextBlock(text="What is this?"), block])])


def test_an_unknown_role(llm):
    for call, message in (
        (llm.align, {"role": "critic", "content": "Hm."}),
        (llm.align, ("critic", "Hm.")),
        (llm.invoke, ChatMessage(role="critic", content="Hm.")),
    ):
        with pytest.raises(PromptError, match=r"'critic'.*assistant, system, tool, user"):
            call([message])


# --- settings ---

WRONG = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2.5),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_k", -1),
    ("seed", "x"),
    ("stop", [""]),
    ("stop", [3]),
    ("timeout", 0),
    ("decoding", {"method": "cards", "alpha": 2}),
    ("decoding", {"method": "cards", "beta": 0}),
    ("decoding", {"method": "cards", "boundary": {"kind": "fixed_length", "length": 0}}),
    ("decoding", 3),
    ("reward", {"kind": "classifier", "model": ""}),
    ("reward", 3),
    ("model", ""),
    ("model", 3),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value(llm, name, value):
    for face in (faces.cards_llm, faces.chat_cards):
        with pytest.raises(SettingsError, match=name):
            face(**{name: value})
    for call in (llm.align, llm.invoke, llm.complete):
        with pytest.raises(SettingsError, match=name):
            call("Hello", **{name: value})


@pytest.mark.parametrize("method", METHODS)
async def test_a_wrong_value_of_a_call(llm, method):
    with pytest.raises(SettingsError, match=r"max_tokens=0: .* greater than or equal to 1"):
        await faces.finish(await faces.call(llm, method, max_tokens=0))


UNKNOWN = [
    ("temprature", 1, "Did you mean 'temperature'"),
    ("max_new_tokens", 1, "Did you mean 'max_tokens'"),
    ("decoding", "card", "Did you mean 'cards'"),
    ("decoding", {"method": "crads"}, "Did you mean 'cards'"),
    ("decoding", {"method": "cards", "alfa": 1}, "alfa"),
    ("reward", "sentimant", "Did you mean 'sentiment"),
    ("reward", {"kind": "clasifier", "model": "m"}, "Did you mean 'classifier'"),
]


@pytest.mark.parametrize(("name", "value", "says"), UNKNOWN)
def test_an_unknown_name(llm, name, value, says):
    for face in (faces.cards_llm, faces.chat_cards):
        with pytest.raises(SettingsError, match=says):
            face(**{name: value})
    for call in (llm.align, llm.invoke, llm.complete):
        with pytest.raises(SettingsError, match=says):
            call("Hello", **{name: value})


@pytest.mark.parametrize("method", METHODS)
async def test_an_unknown_model(llm, method):
    with pytest.raises(SettingsError, match=r"'smolm2'.*Did you mean 'smollm2'"):
        await faces.finish(await faces.call(llm, method, model="smolm2"))
    with pytest.raises(CardsError, match="'smolm2'"):
        await faces.finish(await faces.call(faces.cards_llm(model="smolm2"), method))


def test_a_model_or_reward_that_cannot_be_loaded(llm, tmp_path):
    for name in (str(tmp_path), "no/such-model"):
        with pytest.raises(ModelError, match=name):
            llm.invoke("Hello", model=name)
        with pytest.raises(ModelError, match=name):
            llm.complete("Hello", reward=ClassifierReward(model=name))


def test_a_reward_without_a_trained_head(llm):
    with pytest.raises(ModelError, match=r"no weights for score\.weight"):
        llm.complete("Hello", reward=ClassifierReward(model=faces.chat_model(), label=0))


def test_more_tokens_than_the_context_has(llm):
    with pytest.raises(SettingsError, match=f"max_tokens={faces.WINDOW} does not fit"):
        llm.complete("Hello", max_tokens=faces.WINDOW)


@pytest.mark.parametrize("method", METHODS)
async def test_cards_without_a_reward(llm, method):
    with pytest.raises(SettingsError, match="decoding='cards' needs a reward"):
        await faces.finish(await faces.call(llm, method, reward=None))
    assert await faces.finish(await faces.call(llm, method, reward=None, decoding="sampling"))


@pytest.mark.parametrize("scores", [[math.nan], [], [0.0, 0.0, 0.0, 0.0], ["x"], None])
def test_a_reward_that_returns_no_score(llm, scores):
    with pytest.raises(CardsError, match="reward 'function <lambda>'"):
        llm.complete("Hello", reward=lambda prompt, texts: scores)
