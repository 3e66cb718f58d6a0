"""Pairs of texts, as a tokenizer joins them; of the first one is read what fits beside the second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cards_integrations.errors import RewardError


@dataclass(frozen=True)
class PairEncoder:
    """Encodes pairs within a window.

    Attributes:
        name: What errors call the reward.
        tokenizer: Joins two texts; other rewards may use it, too.
        window: Tokens of a pair at most.
        cut: Where the first text is cut if it is too long.
        first: What errors call the first text.
        second: What they call the second.
    """

    name: str
    tokenizer: Any
    window: int
    cut: Literal["left", "right"]
    first: str
    second: str

    def __call__(self, firsts: Sequence[str], seconds: Sequence[str]) -> Any:
        """Return what the tokenizer makes of pairs, without padding.

        Raises:
            RewardError: A second text fills the window alone.
        """
        around = self.tokenizer.num_special_tokens_to_add(pair=True)
        longest = max(map(len, self.tokenizer(list(seconds), add_special_tokens=False)["input_ids"]))
        if longest + around >= self.window:
            raise RewardError(
                f"reward {self.name!r}: the {self.second} takes {longest} tokens, and the {self.first} has no room in "
                f"the {self.window} of its window; use a smaller max_tokens."
            )
        self.tokenizer.truncation_side = self.cut
        return self.tokenizer(list(firsts), list(seconds), truncation="only_first", max_length=self.window)
