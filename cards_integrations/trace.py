"""What happened: segments, drafts, rewards, thresholds, and what was paid for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Verdict = Literal["accepted", "rejected", "best", "unscored"]
FinishReason = Literal["stop", "length"]


@dataclass
class Usage:
    """Everything a request paid for. A forward that served several requests counts once in each.

    `cached_tokens` are those of the prompt that an earlier request had read.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    drafts: int = 0
    lm_forwards: int = 0
    lm_tokens: int = 0
    rm_forwards: int = 0
    rm_tokens: int = 0
    seconds: float = 0.0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class DraftTrace:
    """One candidate that the method looked at; `parts` are the scores that a composite reward is made of."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    reward: float | None
    threshold: float | None
    verdict: Verdict
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """A kept segment and the candidates that were looked at for it, in order."""

    text: str
    token_ids: tuple[int, ...]
    reward: float | None
    threshold: float | None
    drafts: tuple[DraftTrace, ...]
    parts: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What observers are told of it: each draft with its verdict, but no tokens."""
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
    """A call of a tool, with its arguments."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class InvalidToolCall:
    """What should have been one: the name if there is one, the text of what was written, and what is wrong."""

    id: str
    name: str | None
    arguments: str
    error: str


@dataclass(frozen=True)
class Alignment:
    """A finished answer.

    `text` is all of it; `content` is what it says beside its tool calls.

    `reward` is the reward of the whole answer (None where nothing was scored), `log_likelihood` the
    sum of log p over its tokens in nats under the language model itself (temperature 1, full
    vocabulary), and `seed` reproduces it. `rewards` are the scores that a composite reward is made of;
    the log speaks of the answer as `request_id`.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    reward: float | None
    segments: tuple[Segment, ...]
    usage: Usage
    finish_reason: FinishReason
    log_likelihood: float
    seed: int
    prompt_reward: float | None = None
    model: str = ""
    method: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()

    request_id: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def rewards(self) -> dict[str, float]:
        """By name: parts of the reward of the whole answer, and what single sources give it."""
        return self.segments[-1].parts if self.segments else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """In a notebook: the text as blue as its rewards are high, every candidate, and the cost."""
        from cards_integrations import picture

        return picture.fragment(self)

    def to_html(self, path: str | Path) -> Path:
        """Write what a notebook shows as a page that opens offline; the path."""
        from cards_integrations import picture

        path = Path(path)
        path.write_text(picture.page(self), encoding="utf-8")
        return path

    def plot(self, axes: Axes | None = None) -> Axes:
        """Rewards and thresholds over tokens with matplotlib, on these axes or on new ones."""
        from cards_integrations import picture

        return picture.draw(self, axes)

    def summary(self) -> dict[str, Any]:
        """What the frameworks carry in their metadata: all but the tokens and the rejected text."""
        return {
            "request_id": self.request_id,
            "reward": self.reward,
            "rewards": self.rewards,
            "prompt_reward": self.prompt_reward,
            "log_likelihood": self.log_likelihood,
            "seed": self.seed,
            "method": self.method,
            "finish_reason": self.finish_reason,
            "segments": [
                {"text": s.text, "reward": s.reward, "threshold": s.threshold, "drafts": len(s.drafts)}
                for s in self.segments
            ],
            "usage": asdict(self.usage),
        }
