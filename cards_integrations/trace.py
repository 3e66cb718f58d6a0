"""The trace of an answer: its segments and drafts, their rewards and thresholds, and what they cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Alignment",
    "DraftTrace",
    "FinishReason",
    "Guidance",
    "GuidanceOrigin",
    "InvalidToolCall",
    "ScaleOrigin",
    "SearchPlan",
    "SearchRound",
    "Segment",
    "Thinking",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "Verdict",
]

Verdict = Literal["accepted", "rejected", "best", "unscored"]
"""What a method decided about a draft: "accepted" (kept), "rejected" (not kept), "best" (kept as the best one, as none
was accepted), or "unscored" (kept without a reward)."""
FinishReason = Literal["stop", "length"]
"""Why a text ended: the model or a stop string ended it, or the length limit did."""
ScaleOrigin = Literal["published", "remembered", "measured"]
"""Where a reward's scale came from: its settings, the cache directory, or a measurement by this engine."""
GuidanceOrigin = Literal["given", "calibrated", "default"] | ScaleOrigin
"""Where a target or a beta came from: the method's settings, a calibration, the reward's scale, or none of them."""


@dataclass
class Usage:
    """Everything that a request cost. A forward that served several requests counts once in each."""

    prompt_tokens: int = 0
    """Tokens of the prompt."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not read again, as an earlier request had read them."""
    completion_tokens: int = 0
    """Tokens of the answer."""
    reasoning_tokens: int = 0
    """Tokens of the thoughts before the answer."""
    drafted_tokens: int = 0
    """Tokens that were sampled for candidates, finished or not."""
    drafts: int = 0
    """Candidates that the method examined."""
    lm_forwards: int = 0
    """Forwards of the language model."""
    lm_tokens: int = 0
    """Tokens that the language model read."""
    rm_forwards: int = 0
    """Forwards of the reward model."""
    rm_tokens: int = 0
    """Tokens that the reward model read."""
    seconds: float = 0.0
    """Wall time from the request to the answer."""

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt, of the thoughts and of the answer."""
        return self.prompt_tokens + self.output_tokens

    @property
    def output_tokens(self) -> int:
        """Tokens of the thoughts and of the answer."""
        return self.reasoning_tokens + self.completion_tokens


@dataclass(frozen=True)
class DraftTrace:
    """A candidate that the method examined."""

    index: int
    """Its index among the candidates of its segment."""
    text: str
    """Its text, without the answer before it."""
    token_ids: tuple[int, ...]
    """Its tokens, without those of the answer before it."""
    reward: float | None
    """The reward of the answer up to its end; None if it was not scored."""
    threshold: float | None
    """What the reward was compared with; None for methods without a threshold."""
    verdict: Verdict
    """What the method decided."""
    parts: dict[str, float] = field(default_factory=dict)
    """The scores that a composite reward consists of, by name."""
    parent: int | None = None
    """The index of the candidate of the segment before that it follows; None if that is the kept one."""


@dataclass(frozen=True)
class Segment:
    """A kept segment."""

    text: str
    """Its text, without the answer before it."""
    token_ids: tuple[int, ...]
    """Its tokens, without those of the answer before it."""
    reward: float | None
    """The reward of the answer up to its end; None if it was not scored."""
    threshold: float | None
    """What the reward was compared with; None for methods without a threshold."""
    drafts: tuple[DraftTrace, ...]
    """The candidates that were examined for it, in order."""
    parts: dict[str, float] = field(default_factory=dict)
    """The scores that a composite reward consists of, by name."""

    def summary(self) -> dict[str, Any]:
        """Return the segment as observers receive it: with each draft and its verdict, but without tokens."""
        return {
            "text": self.text,
            "reward": self.reward,
            "threshold": self.threshold,
            "drafts": [
                {"text": d.text, "reward": d.reward, "threshold": d.threshold, "verdict": d.verdict}
                for d in self.drafts
            ],
        }


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool."""

    id: str
    """The id of the call, to which the tool's result refers."""
    name: str
    """The name of the tool."""
    arguments: dict[str, Any]
    """The arguments by name."""


@dataclass(frozen=True)
class InvalidToolCall:
    """A text in the place of a tool call that is not one."""

    id: str
    """An id as that of a call."""
    name: str | None
    """The name of the tool; None if there is none in the text."""
    arguments: str
    """The text as the model wrote it."""
    error: str
    """What is wrong with it."""


@dataclass(frozen=True)
class Thinking:
    """What the model thought before it answered."""

    text: str
    """The thoughts, without the marks around them."""
    token_ids: tuple[int, ...]
    """The tokens of the thoughts, which are part of the answer's `prompt_ids`."""
    segments: tuple[Segment, ...]
    """The segments of the thoughts, in order."""
    finish_reason: FinishReason
    """"stop" if the model ended the thoughts, "length" if `max_thinking_tokens` did."""


@dataclass(frozen=True)
class Guidance:
    """What the rewards of an answer were compared with."""

    target: float | None
    """The reward that finished answers should reach; None for a method without a target."""
    beta: float | None
    """The temperature of the reward, in its units; None if it makes no difference."""
    target_origin: GuidanceOrigin | None = None
    """Where the target came from: "given" in the settings of the method, "calibrated", or computed from the scale of
    the reward, which was "published" with it, "remembered" in the cache directory, or "measured" by this engine."""
    beta_origin: GuidanceOrigin | None = None
    """Where beta came from, in the same words; "default" if nothing was known."""


@dataclass(frozen=True)
class SearchRound:
    """A round of a search: `width` drafts of `tokens` tokens each, of which `survivors` go on."""

    tokens: int
    """Tokens of a draft."""
    width: int
    """Drafts of all prefixes together."""
    survivors: int
    """Drafts that are kept: for the next round or, after the last one, as the answer."""


@dataclass(frozen=True)
class SearchPlan:
    """The rounds of a search, chosen when it begins. The same plan with the same seed gives the same text."""

    rounds: tuple[SearchRound, ...]
    """The rounds, in order."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token, and its log p under the language model itself: full vocabulary, temperature 1."""

    token: str
    """Its text; U+FFFD for bytes that are not a whole character."""
    token_id: int
    """Its id in the model's vocabulary."""
    logprob: float
    """Its log p, in nats."""
    top: tuple[TokenLogprob, ...] = ()
    """The most probable tokens in its place, the most probable one first."""


@dataclass(frozen=True)
class Alignment:
    """A finished answer."""

    text: str
    """The whole answer, its tool calls included."""
    token_ids: tuple[int, ...]
    """The tokens of the answer."""
    prompt_ids: tuple[int, ...]
    """The tokens before the answer: those of the prompt and of the thoughts."""
    reward: float | None
    """The reward of the whole answer; None if nothing was scored."""
    segments: tuple[Segment, ...]
    """The kept segments, in order."""
    usage: Usage
    """What the answer cost."""
    finish_reason: FinishReason
    """"stop" if the model or a stop string ended it, "length" if `max_tokens` did."""
    log_likelihood: float
    """The sum of log p over the answer's tokens in nats, under the language model itself (temperature 1, full
    vocabulary)."""
    seed: int
    """The seed that reproduces the answer."""
    prompt_reward: float | None = None
    """The reward of the prompt with an empty answer; None if the method did not ask for it."""
    model: str = ""
    """The name of the language model."""
    method: str = ""
    """The name of the decoding method."""
    content: str = ""
    """The answer without its tool calls."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The tool calls of the answer."""
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()
    """Texts in the place of tool calls that are not calls."""
    request_id: str = ""
    """The id of the request in the log."""
    guidance: Guidance | None = None
    """The target and the beta that the method used, and where they came from; None for a method without them."""
    plan: SearchPlan | None = None
    """The rounds that the method planned, for `Cascade(plan=...)`; None for a method without a plan."""
    thinking: Thinking | None = None
    """The thoughts before the answer; None if there were none."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """The answer's tokens with their log p; empty unless asked for."""
    kept_at: tuple[float, ...] = ()
    """Seconds from the request until each segment was kept; a search may keep several at once."""

    def __str__(self) -> str:
        return self.text

    @property
    def out_of_reach(self) -> bool:
        """True if a method with a target accepted no segment: each one is the best of its rejected candidates."""
        if self.guidance is None or self.guidance.target is None or not self.segments:
            return False
        return all(any(draft.verdict == "best" for draft in segment.drafts) for segment in self.segments)

    @property
    def thoughts(self) -> str:
        """The thoughts before the answer; "" if there were none."""
        return self.thinking.text if self.thinking else ""

    @property
    def rewards(self) -> dict[str, float]:
        """The scores that the reward of the whole answer consists of, and those of single sources, by name."""
        return self.segments[-1].parts if self.segments else {}

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as plain dicts, lists, strings and numbers."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """Return the answer as a notebook shows it: the text, bluer where rewards are higher, candidates, and cost."""
        from cards_integrations import picture

        return picture.fragment(self)

    def to_html(self, path: str | Path) -> Path:
        """Write what a notebook shows as a page that opens offline.

        Args:
            path: The file to write.

        Returns:
            Its path.
        """
        from cards_integrations import picture

        path = Path(path)
        path.write_text(picture.page(self), encoding="utf-8")
        return path

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw rewards and thresholds over tokens with matplotlib (the extra `study`).

        Args:
            axes: Where to draw; None for new axes.

        Returns:
            The axes.
        """
        from cards_integrations import picture

        return picture.draw(self, axes)

    def summary(self) -> dict[str, Any]:
        """Return the metadata that frameworks receive: all but the tokens and the rejected text."""
        return {
            "request_id": self.request_id,
            "reward": self.reward,
            "rewards": self.rewards,
            "prompt_reward": self.prompt_reward,
            "log_likelihood": self.log_likelihood,
            "seed": self.seed,
            "method": self.method,
            "finish_reason": self.finish_reason,
            "out_of_reach": self.out_of_reach,
            "segments": [
                {"text": s.text, "reward": s.reward, "threshold": s.threshold, "drafts": len(s.drafts)}
                for s in self.segments
            ],
            "usage": asdict(self.usage),
        }
