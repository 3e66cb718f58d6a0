"""What is paid for is exactly what the method needs: every token of a candidate once, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import tiny
from conftest import Start
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cards_integrations.decoding import Cards, FixedLength, Uncertainty
from cards_integrations.engine import Request
from cards_integrations.models.sampling import Sampler
from cards_integrations.rewards import ClassifierReward
from cards_integrations.trace import Alignment

PROMPT = "w9 w20 w31 w5"
PROMPT_TOKENS = 4
ROOM = 20
LONGEST = 6
UNCERTAIN = Cards(target_reward=0.5, beta=0.3, boundary=Uncertainty(threshold=2.95, min_length=2, max_length=LONGEST))


def request(
    models: Callable[..., str], decoding: Cards, seed: int, reward: ClassifierReward | None = None, top_k: int = 40
) -> Request:
    reward = reward or ClassifierReward(model=models("llama", classifier=True))
    return Request(PROMPT, decoding, reward, Sampler(temperature=1.0, top_k=top_k), ROOM, seed=seed)


def lm_tokens(alignment: Alignment) -> int:
    """What the trace says the language model must have read at width 1.

    A candidate that ended before an uncertain token, or at end-of-sequence, has read all its tokens:
    the logits after the last one ended it, and are carried over. One that ended by its length has
    not read its last token; if it is kept and the answer goes on, that is read once.
    """
    tokens, written = PROMPT_TOKENS, 0
    for segment in alignment.segments:
        limit = min(LONGEST, ROOM - written)
        tokens += sum(len(draft.token_ids) - (len(draft.token_ids) == limit) for draft in segment.drafts)
        written += len(segment.token_ids)
        tokens += len(segment.token_ids) == limit and segment is not alignment.segments[-1]
    return tokens


@pytest.mark.parametrize("seed", range(6))
def test_width_1(models: Callable[..., str], start: Start, seed: int) -> None:
    asked = request(models, UNCERTAIN, seed)
    engine = start(models("llama"), width=1)
    alignment = engine.run(asked)
    drafts = [draft for segment in alignment.segments for draft in segment.drafts]
    usage = alignment.usage
    assert usage.prompt_tokens == PROMPT_TOKENS
    assert usage.completion_tokens == len(alignment.token_ids) == sum(len(s.token_ids) for s in alignment.segments)
    assert usage.drafts == len(drafts)
    assert usage.lm_tokens == lm_tokens(alignment) == engine.inspect().tokens
    assert usage.lm_forwards == 1 + usage.lm_tokens - PROMPT_TOKENS  # the prompt, then one token each
    # An empty candidate (end-of-sequence at once) is scored where the kept text ends.
    assert usage.rm_tokens == PROMPT_TOKENS + sum(max(1, len(draft.token_ids)) for draft in drafts)
    assert usage.rm_forwards == 1 + len(drafts)


def test_drafted_tokens_count_each_end_of_sequence(models: Callable[..., str], start: Start) -> None:
    model, judge = models("llama"), models("llama", classifier=True)
    engine, tokenizer = start(model, width=1), AutoTokenizer.from_pretrained(model)
    plain = (
        AutoModelForCausalLM.from_pretrained(model),
        tokenizer,
        AutoModelForSequenceClassification.from_pretrained(judge),
    )
    ends = 0
    for seed in range(3):
        loop = reference.plain(*plain, tokenizer(PROMPT)["input_ids"], temperature=1.0)
        loop.generate(tokenizer(PROMPT)["input_ids"], UNCERTAIN, ROOM, seed)
        drafts = [draft for segment in loop.segments for draft in segment]
        drafted = sum(len(draft.ids) + (draft.ended == "eos") for draft in drafts)
        assert engine.run(request(models, UNCERTAIN, seed)).usage.drafted_tokens == drafted
        ends += sum(draft.ended == "eos" for draft in drafts)
    assert ends > 0


LENGTH, SEGMENTS = 5, 4  # with top-k 3, no candidate of seed 2 meets end-of-sequence


def test_width_4_with_every_first_candidate_kept(models: Callable[..., str], start: Start) -> None:
    decoding = Cards(target_reward=-50.0, beta=0.7, boundary=FixedLength(length=LENGTH))
    usage = start(models("llama"), width=4).run(request(models, decoding, 2, top_k=3)).usage
    assert usage.drafted_tokens == SEGMENTS * 4 * LENGTH
    assert usage.drafts == SEGMENTS
    # The last token of a candidate is read only if it is kept and the answer goes on.
    assert usage.lm_tokens == PROMPT_TOKENS + SEGMENTS * 4 * (LENGTH - 1) + (SEGMENTS - 1)
    assert usage.lm_forwards == 1 + SEGMENTS * (LENGTH - 1) + (SEGMENTS - 1)
    assert usage.rm_tokens == PROMPT_TOKENS + SEGMENTS * 4 * LENGTH
    assert usage.rm_forwards == 1 + SEGMENTS


def test_width_4_with_every_candidate_looked_at(models: Callable[..., str], start: Start) -> None:
    unreachable = Cards(
        target_reward=50.0, acceptance="hard", max_rejections=7, boundary=FixedLength(length=LENGTH)
    )  # 8 candidates a segment: two rounds of 4
    asked = request(models, unreachable, 2, top_k=3)
    one, four = (start(models("llama"), width=width).run(asked) for width in (1, 4))
    assert one.token_ids == four.token_ids
    assert four.usage.lm_tokens == PROMPT_TOKENS + SEGMENTS * 8 * (LENGTH - 1) + (SEGMENTS - 1) == one.usage.lm_tokens
    assert four.usage.lm_forwards == 1 + SEGMENTS * 2 * (LENGTH - 1) + (SEGMENTS - 1)
    assert four.usage.rm_tokens == PROMPT_TOKENS + SEGMENTS * 8 * LENGTH == one.usage.rm_tokens
    assert four.usage.rm_forwards == 1 + SEGMENTS * 2


@pytest.mark.parametrize(("end_of_turn", "suffix"), [(True, 1), (False, 0)])
def test_a_template_costs_its_suffix(models: Callable[..., str], start: Start, end_of_turn: bool, suffix: int) -> None:
    judge = models("llama", classifier=True, chat_template=tiny.CHAT)
    reward = ClassifierReward(model=judge, end_of_turn=end_of_turn)
    alignment = start(models("llama"), width=1).run(request(models, UNCERTAIN, 3, reward))
    drafts = [draft for segment in alignment.segments for draft in segment.drafts]
    before = len(AutoTokenizer.from_pretrained(judge)(f"<user> {PROMPT} </user>\n<assistant> ")["input_ids"])
    assert len(drafts) > len(alignment.segments) > 1
    assert alignment.usage.rm_tokens == before + suffix + sum(max(1, len(d.token_ids) + suffix) for d in drafts)
