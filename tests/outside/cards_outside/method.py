"""A decoding method that another package brings: all that it needs is a name and one coroutine."""

from typing import Literal

from cards_integrations.decoding import Decoding, FixedLength, Session


class Climb(Decoding):
    """Keep the first draft that raises the reward, or the best of `tries`."""

    method: Literal["climb"] = "climb"
    tries: int = 4

    async def generate(self, session: Session) -> None:
        reward = await session.prompt_reward()
        while not session.finished:
            async for draft in session.drafts(until=FixedLength(length=8), limit=self.tries):
                if draft.reward > reward:
                    draft.verdict = "accepted"
                    await session.keep(draft)
                    break
                session.reject(draft)
            else:
                draft = await session.keep_best()
            reward = draft.reward
