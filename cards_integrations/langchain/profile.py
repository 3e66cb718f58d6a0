"""The profile of a model, which LangChain's agents and middleware look up before they use it."""

from __future__ import annotations

from typing import Any, cast

from langchain_core.language_models.model_profile import ModelProfile

from cards_integrations.chat.thinking import KNOWN
from cards_integrations.models.sources import known_chat_template, known_context_window
from cards_integrations.settings import Options


def model_profile(options: Options) -> ModelProfile:
    """Return the profile of the model that these options name, with those keys that the installed LangChain has.

    `max_input_tokens` is read from a config if that is on this machine already; nothing is loaded or downloaded.
    """
    profile: dict[str, Any] = {
        "name": options.model.model,
        "max_output_tokens": options.max_tokens,
        "text_inputs": True,
        "text_outputs": True,
        **{f"{kind}_inputs": False for kind in ("image", "image_url", "audio", "pdf", "video")},
        **{f"{kind}_outputs": False for kind in ("image", "audio", "video")},
        "image_tool_message": False,
        "pdf_tool_message": False,
        "tool_calling": True,
        "tool_choice": True,
        "tool_call_streaming": True,
        "structured_output": True,
        "mid_conversation_system_messages": True,
        "temperature": True,
        "reasoning_output": options.thinking != "off" and _thinks(known_chat_template(options.model)),
    }
    if (window := known_context_window(options.model)) is not None:
        profile["max_input_tokens"] = window
    return cast("ModelProfile", {key: value for key, value in profile.items() if key in ModelProfile.__annotations__})


def _thinks(template: str) -> bool:
    """True if a chat template contains marks around thoughts."""
    return any(form.opening in template or form.closing in template for form in KNOWN)
