"""Answer or call: gpt-oss announces each with a mark of its own (a channel), which is written before anything else.

The answer begins after the mark, so that its reward, stop strings and JSON never see one. A call is held to its schema.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cards_integrations.chat.grammar import Grammar
from cards_integrations.chat.template import ChatTokenizer, FormattedPrompt
from cards_integrations.chat.tools import Tools
from cards_integrations.decoding.sampling import Sampling
from cards_integrations.engine.request import Request
from cards_integrations.engine.thinking import LONGEST_OPENING, BeginsWith, Begun, OpenSession, phase_of
from cards_integrations.models.randomness import derived_seed


@dataclass(frozen=True)
class Channels:
    """The marks before an answer and before a call.

    Attributes:
        chat: The model's tokenizer.
        constrained: Whether the model can be held to a grammar; if not, it calls no tool of its own accord.
        session: Opens a session of the engine.
    """

    chat: ChatTokenizer
    constrained: bool
    session: OpenSession

    async def enter(self, begun: Begun, seed: int) -> Begun:
        """Write the mark, if the model has any.

        Args:
            begun: The request after its thoughts.
            seed: The seed of the request.
        """
        answer = self.chat.thinking.channel if self.chat.thinking else ""
        if not answer or isinstance(begun.request.prompt, FormattedPrompt):
            return begun
        call, tools = self.chat.tool_format.channel, begun.request.tools
        if tools is None or not call:
            return self._after(begun, answer, begun.request)
        if tools.forced or (self.constrained and not await self._answers(begun, answer, call, seed)):
            return self._after(begun, call, replace(begun.request, grammar=None, tools=_one_call(tools)))
        return self._after(begun, answer, replace(begun.request, tools=None))

    def _after(self, begun: Begun, mark: str, request: Request) -> Begun:
        return replace(begun, request=request, ids=[*begun.ids, *self.chat.encode(mark)])

    async def _answers(self, begun: Begun, answer: str, call: str, seed: int) -> bool:
        """Let the model decide between the two."""
        marks = Grammar(f"start: {self.chat.grammar_literals(answer)} | {self.chat.grammar_literals(call)}")
        phase = phase_of(begun.request, decoding=Sampling(), max_tokens=LONGEST_OPENING, stop=(), grammar=marks)
        async with self.session(phase, begun.ids, derived_seed(seed, "channel"), False, None) as session:
            async for draft in session.drafts(until=BeginsWith(mark=answer), limit=1, scored=False):
                return draft.text.startswith(answer)
        return True


def _one_call(tools: Tools) -> Tools:
    """Return the tools, one of which must be called."""
    return replace(tools, choice=tools.choice if tools.forced else "any", parallel=False)
