"""Other forms of one conversation, for templates that refuse its order of roles, or the ids of its calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from jinja2.exceptions import TemplateError

from cards_integrations.chat.message import Message
from cards_integrations.chat.thoughts import after_thoughts
from cards_integrations.errors import PromptError

ID_LENGTH = 9  # characters of a call's id, as Mistral's templates demand


def first_whole(forms: Iterable[Sequence[Message]], render: Callable[[list[Message]], str]) -> str:
    """Render the first form of which a template leaves nothing out; failing that, the first that it accepts.

    Args:
        forms: The forms of the conversation, the best one first.
        render: Applies the template.

    Raises:
        TemplateError, PromptError: The template accepts none of them; this is what it raised for the first one.
    """
    accepted: list[str] = []
    refused: list[TemplateError | PromptError] = []
    for form in forms:
        try:
            accepted.append(render(list(form)))
        except (TemplateError, PromptError) as error:
            refused.append(error)
        else:
            if says_all(accepted[-1], form):
                return accepted[-1]
    if not accepted:
        raise refused[0]
    return accepted[0]


def arrangements(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the conversation as it is, and then in orders that more and more templates accept.

    First, later system messages become the user's; then neighbors of one role are merged, and the user begins; then
    there is no system message at all.
    """
    forms: list[list[Message]] = [list(messages)]
    for form in (
        system_first(messages),
        user_first(merged(system_first(messages))),
        user_first(merged(without_system(messages))),
    ):
        if form not in forms:
            forms.append(form)
    yield from forms


def tool_arrangements(messages: Sequence[Message], several: bool = True) -> Iterator[list[Message]]:
    """Yield the same for a conversation with calls: as it is, with ids of nine characters, with one call a turn.

    Args:
        messages: The conversation.
        several: Whether the template shows several calls of one turn; if not, each gets a turn of its own in all forms.
    """
    own = list(messages) if several else single_calls(messages)
    yield from arrangements(own)
    if (short := with_short_ids(own)) != own:
        yield from arrangements(short)
    if (single := single_calls(short)) != short:
        yield from arrangements(single)


def says_all(rendered: str, messages: Iterable[Message]) -> bool:
    """True if a rendered conversation contains what everybody said, and the names of all tools that were called."""
    return all(_is_in(text, rendered) for message in messages for text in _texts(message))


def system_first(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with at most one system message, which begins it; later ones become the user's."""
    begun = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return [*merged(messages[:begun]), *without_system(messages[begun:])]


def without_system(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with its system messages as messages of the user."""
    return [{**message, "role": "user"} if message["role"] == "system" else message for message in messages]


def merged(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with neighbors of one role merged, except results of tools and messages with calls."""
    found: list[Message] = []
    for message in messages:
        if found and _can_follow(found[-1], message):
            texts = [text for text in (found[-1]["content"], message["content"]) if text]
            found[-1] = {**found[-1], "content": "\n\n".join(texts)}
        else:
            found.append(message)
    return found


def user_first(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with an empty message of the user in front, if another role begins it."""
    begun = 1 if messages and messages[0]["role"] == "system" else 0
    if begun < len(messages) and messages[begun]["role"] == "user":
        return list(messages)
    return [*messages[:begun], {"role": "user", "content": ""}, *messages[begun:]]


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with ids of nine letters and digits for all calls."""
    return [_with_short_ids(message) for message in messages]


def single_calls(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with one call a turn, each followed by its result."""
    found: list[Message] = []
    results = {id(message) for message in messages if message["role"] == "tool"}
    for at, message in enumerate(messages):
        if len(message.get("tool_calls") or ()) < 2:
            found += [message] if message["role"] != "tool" or id(message) in results else []
            continue
        following = _results_after(messages, at)
        if message["content"]:  # some templates omit what is said beside a call
            found.append({"role": message["role"], "content": message["content"]})
        for call in message["tool_calls"]:
            found.append({**message, "content": "", "tool_calls": [call]})
            own = [result for result in following if result.get("tool_call_id") == call["id"]]
            found += own
            results -= set(map(id, own))
    return found


def _results_after(messages: Sequence[Message], at: int) -> list[Message]:
    """Return the results that follow the message at this index."""
    end = next((i for i in range(at + 1, len(messages)) if messages[i]["role"] != "tool"), len(messages))
    return list(messages[at + 1 : end])


def _with_short_ids(message: Message) -> Message:
    found = dict(message)
    if message["role"] == "tool":
        found["tool_call_id"] = short_id(message.get("tool_call_id"))
    if message.get("tool_calls"):
        found["tool_calls"] = [{**call, "id": short_id(call.get("id"))} for call in message["tool_calls"]]
    return found


def short_id(call_id: str | None) -> str:
    """Return the id itself if it has nine letters and digits, else a hash of it that has."""
    known = call_id or ""
    if len(known) == ID_LENGTH and known.isascii() and known.isalnum():
        return known
    return hashlib.sha256(known.encode(errors="replace")).hexdigest()[:ID_LENGTH]


def _can_follow(message: Message, other: Message) -> bool:
    """True if the second message can be merged into the first one."""
    plain = message["role"] != "tool" and not (message.get("tool_calls") or other.get("tool_calls"))
    return plain and message["role"] == other["role"]


def _texts(message: Message) -> list[str]:
    """Return what a template must show of a message; it may leave out thoughts, and text beside calls."""
    if calls := message.get("tool_calls"):
        return [call["function"]["name"] for call in calls]
    content: str = message["content"]
    return [after_thoughts(content).strip() if message["role"] == "assistant" else content.strip()]


def _is_in(text: str, rendered: str) -> bool:
    """True if a text is in a rendered conversation, as it is or as part of a JSON string."""
    if text in rendered:
        return True
    with suppress(UnicodeEncodeError):
        return any(json.dumps(text, ensure_ascii=ascii_)[1:-1] in rendered for ascii_ in (False, True))
    return False
