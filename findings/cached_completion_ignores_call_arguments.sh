#!/usr/bin/env bash
# A cache of completions answers a call with the text of another call that had other arguments; one of chats does not.
#
# langchain-core 1.7.2.
# Expected: with `set_llm_cache`, a text is found again for the same prompt and the same arguments. The arguments of a
#   call, such as `max_tokens`, change the text, and `BaseChatModel` has them in the key.
# Seen: `BaseLLM` makes its key of the model's own parameters and `stop` only. The second call asks for one word and
#   gets the four of the first one. `llm.bind(max_tokens=1)` gets them, too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "langchain-core==1.7.2"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version
from typing import Any

from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import LLM, SimpleChatModel

WORDS = "one two three four".split()


class Completion(LLM):
    """Writes `max_tokens` words."""

    calls: int = 0

    @property
    def _llm_type(self) -> str:
        return "words"

    def _call(self, prompt: str, stop: Any = None, run_manager: Any = None, max_tokens: int = 4, **more: Any) -> str:
        self.calls += 1
        return " ".join(WORDS[:max_tokens])


class Chat(SimpleChatModel):
    """The same as a chat model."""

    @property
    def _llm_type(self) -> str:
        return "words"

    def _call(self, messages: Any, stop: Any = None, run_manager: Any = None, max_tokens: int = 4, **more: Any) -> str:
        return " ".join(WORDS[:max_tokens])


print("langchain-core", version("langchain-core"))
llm, chat = Completion(), Chat()
assert llm.invoke("Count.", max_tokens=1) == "one"
set_llm_cache(InMemoryCache())
found = [chat.invoke("Count.").text, chat.invoke("Count.", max_tokens=1).text]
print("chat model:", found)
assert found == [" ".join(WORDS), "one"], "changed: chats used to be told apart"
llm = Completion()
found = [llm.invoke("Count."), llm.invoke("Count.", max_tokens=1), llm.bind(max_tokens=1).invoke("Count.")]
print("completion:", found, "in", llm.calls, "call")
assert found == [" ".join(WORDS)] * 3 and llm.calls == 1, "changed: completions used to be taken for each other"
PY
