"""`cards chat`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cards_integrations.cli.options import (
    AllowImportsOption,
    ConfigOption,
    DecodingOption,
    MaxTokensOption,
    ModelOption,
    RewardOption,
    SeedOption,
    SetOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    ThinkingOption,
    TopKOption,
    TopPOption,
    after_system,
    llm_from,
)

if TYPE_CHECKING:
    from rich.console import Console

    from cards_integrations.llm import CardsLLM
    from cards_integrations.trace import Alignment


def chat(
    config: ConfigOption = None,
    allow_imports: AllowImportsOption = False,
    model: ModelOption = None,
    reward: RewardOption = None,
    decoding: DecodingOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    thinking: ThinkingOption = None,
    assigned: SetOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    stop: StopOption = None,
    system: SystemOption = None,
    rejected: Annotated[bool, typer.Option(help="Show rejected candidates, dimmed.")] = False,
) -> None:
    """Chat with the model. Kept segments appear as they are decided; an empty line or Ctrl-D ends the chat."""
    from rich.console import Console

    console = Console(highlight=False)
    messages: list[dict[str, Any]] = after_system([], system)
    with llm_from(
        config, allow_imports, assigned, model=model, reward=reward, decoding=decoding, max_tokens=max_tokens,
        temperature=temperature, seed=seed, thinking=thinking, top_k=top_k, top_p=top_p, stop=stop,
    ) as llm:  # fmt: skip
        while question := _read_line(console):
            messages.append({"role": "user", "content": question})
            answer = show(console, llm, messages, rejected)
            messages.append({"role": "assistant", "content": answer.text, "reasoning_content": answer.thoughts})


def show(console: Console, llm: CardsLLM, messages: list[dict[str, Any]], rejected: bool) -> Alignment:
    """Print an answer while it is drafted, then what it cost."""
    from cards_integrations.trace import Alignment

    thought = False
    for item in llm.align_stream(messages):
        if isinstance(item, Alignment):
            break
        if item.thought:
            console.print(item.thought, style="dim italic", markup=False, end="", soft_wrap=True)
            thought = True
            continue
        if thought:
            console.print("\n")
            thought = False
        for draft in item.segment.drafts if rejected else ():
            if draft.verdict == "rejected":
                console.print(f"{draft.text} ✗", style="dim strike", markup=False, end="", soft_wrap=True)
        console.print(item.text, markup=False, end="", soft_wrap=True)
    assert isinstance(item, Alignment)
    usage = item.usage
    reward = "" if item.reward is None else f"reward {item.reward:.2f}, "
    console.print(
        f"\n[dim]{reward}{usage.completion_tokens} tokens kept of {usage.drafted_tokens} drafted, "
        f"{usage.seconds:.1f} s[/dim]\n"
    )
    return item


def _read_line(console: Console) -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""
