"""`CardsCompletion`: raw text in, text out, many prompts in one batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import faces
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate

from cards_integrations import CardsCompletion, CardsLLM
from cards_integrations.chat.template import FormattedPrompt
from cards_integrations.engine import EngineSettings
from cards_integrations.errors import PromptError, SettingsError
from cards_integrations.progress import Phase

PROMPTS = ["Once upon", "The end", "A cat"]


@pytest.fixture(scope="module")
def llm() -> Iterator[CardsCompletion]:
    made = CardsCompletion(**faces.options(engine=EngineSettings(device="cpu", width=2, max_rows=7)))
    yield made
    made.close()


@pytest.fixture(scope="module")
def same(llm: CardsCompletion) -> CardsLLM:
    return CardsLLM(**llm.options())


def test_the_prompt_is_read_as_it_is(llm, same):
    expected = same.align(FormattedPrompt("Once upon"))
    result = llm.generate(["Once upon"])
    (generation,) = result.generations[0]
    assert generation.text == expected.text == same.complete("Once upon", formatted=True).text
    assert expected.usage.prompt_tokens == len("Once upon")  # no template
    assert generation.generation_info["finish_reason"] == expected.finish_reason
    assert generation.generation_info["cards"]["reward"] == expected.reward
    assert result.llm_output["token_usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": len(expected.token_ids),
        "total_tokens": 9 + len(expected.token_ids),
    }


def test_many_prompts_share_one_batch(llm, same):
    alone = [same.align(FormattedPrompt(prompt)).text for prompt in PROMPTS]
    model = llm._engine({}).loaded()
    before = model.steps
    assert [g[0].text for g in llm.generate(PROMPTS).generations] == alone
    together, before = model.steps - before, model.steps
    for prompt in PROMPTS:
        llm.invoke(prompt)
    assert together < model.steps - before
    assert llm.batch(PROMPTS) == alone
    assert [g[0].text for g in asyncio.run(llm.agenerate(PROMPTS)).generations] == alone


class Tokens(BaseCallbackHandler):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.seen.append(token)


def test_streams_give_the_same_text(llm):
    expected = llm.invoke("A cat")
    tokens = Tokens()
    pieces = list(llm.stream("A cat", {"callbacks": [tokens]}))
    assert "".join(pieces) == expected
    assert len(pieces) > 2
    assert "".join(tokens.seen) == expected

    async def pieces_of() -> list[str]:
        return [piece async for piece in llm.astream("A cat")]

    assert "".join(asyncio.run(pieces_of())) == expected


def test_chains_stop_strings_and_arguments_of_a_call(llm):
    chain = PromptTemplate.from_template("{what} cat") | llm | StrOutputParser()
    text = chain.invoke({"what": "A"})
    assert text == llm.invoke("A cat")
    plain = llm.invoke("A cat", decoding="sampling")
    assert llm.invoke("A cat", decoding="sampling", stop=[plain[6:8]]) == plain[: plain.index(plain[6:8])]
    assert llm.invoke("A cat", max_tokens=3, decoding="sampling") == llm.bind(max_tokens=3, decoding="sampling").invoke(
        "A cat"
    )
    assert llm.get_num_tokens("A cat") == 5
    with pytest.raises(SettingsError, match="max_token"):
        llm.invoke("A cat", max_token=3)
    with pytest.raises(PromptError, match="empty"):
        llm.invoke("")


async def test_the_cache_knows_the_arguments_of_a_call(llm):
    short = llm.invoke("Once upon", max_tokens=2)
    set_llm_cache(InMemoryCache())
    try:
        whole = [llm.invoke("Once upon"), await llm.ainvoke("Once upon")]
        assert [llm.invoke("Once upon", max_tokens=2), await llm.bind(max_tokens=2).ainvoke("Once upon")] == [short] * 2
        begun = llm.inspect().steps
        assert [llm.invoke("Once upon"), *whole] == [whole[0]] * 3 != [short] * 3
        assert llm.inspect().steps == begun
    finally:
        set_llm_cache(None)


def test_tools_are_refused_where_nobody_tells_of_them(llm):
    tool = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}
    with pytest.raises(SettingsError, match="tools= would not be told"):
        llm.invoke("Once upon", tools=[tool])


def test_what_langsmith_is_told(llm):
    told = llm._get_ls_params(stop=["x"], temperature=0.1)
    assert told["ls_provider"] == "cards"
    assert (told["ls_model_type"], told["ls_temperature"], told["ls_stop"]) == ("llm", 0.1, ["x"])
    assert not llm.is_lc_serializable()


# --- the log and the progress bar ---


def test_the_log_follows_a_request_by_its_id(same, caplog):
    with caplog.at_level(logging.DEBUG, "cards_integrations"):
        answer = same.align("Hello")
    assert len(answer.request_id) == 8
    assert answer.summary()["request_id"] == answer.request_id
    mine = [record for record in caplog.records if answer.request_id in record.getMessage()]
    assert len(mine) == len(answer.segments) + 2  # it begins, and it ends
    assert {record.levelno for record in mine} == {logging.DEBUG, logging.INFO}
    assert f"prompt of {answer.usage.prompt_tokens} tokens" in mine[0].getMessage()
    assert f"after {answer.usage.completion_tokens} tokens" in mine[-1].getMessage()


def test_a_request_that_fails_says_so_in_the_log(same, caplog):
    def fails(prompt: str, responses: list[str]) -> list[float]:
        raise ValueError("out of order")

    with caplog.at_level(logging.INFO, "cards_integrations"), pytest.raises(Exception, match="out of order"):
        same.align("Hello", reward=fails, decoding={"method": "cards", "target_reward": 0.0, "beta": 1.0})
    assert any("ended by RewardError" in record.getMessage() for record in caplog.records)


def test_a_progress_bar_counts_the_answers(same, monkeypatch):
    advanced: list[str] = []
    monkeypatch.setattr(Phase, "advance", lambda phase: advanced.append(phase.what))
    quiet = same.align_batch(["Hello"] * 3, range(3), progress=False)
    assert not advanced
    shown = same.align_batch(["Hello"] * 3, range(3), progress="greetings")
    assert [answer.text for answer in shown] == [answer.text for answer in quiet]
    assert advanced == ["greetings"] * 3
