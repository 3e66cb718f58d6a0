"""The page of an answer in a real browser: what is seen, light and dark, narrow and wide, and by the keyboard."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_picture import HOSTILE, alignment, draft, segment, short_repr

from cards_integrations.trace import Alignment, Guidance, Thinking, ToolCall

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=5000"),
]
THEMES = {"dark": "0", "light": "1"}
LOOKS = """
const told = {};
const all = selector => [...document.querySelectorAll(selector)];
const seen = element => element.getClientRects().length > 0 && element.checkVisibility();
const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");

function blended(colours) {  // as light: 0 to 1
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(
    value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(element) {
  const behind = [];
  for (let each = element; each; each = each.parentElement) behind.unshift(getComputedStyle(each).backgroundColor);
  const style = getComputedStyle(element), colour = element instanceof SVGElement ? style.fill : style.color;
  const [low, high] = [blended(behind), blended([...behind, colour])].sort((one, other) => one - other);
  return (high + 0.05) / (low + 0.05);
}
async function follow(element) {
  element.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true}));
  await new Promise(done => setTimeout(done, 50));
}
const opened = () => all("table[id]").filter(seen).map(each => each.id);

addEventListener("load", async () => {
  told.scripts = document.scripts.length;
  told.requests = performance.getEntriesByType("resource").length;
  told.overflow = document.documentElement.scrollWidth - innerWidth;
  told.width = innerWidth;
  told.answer = document.querySelector(".answer").innerText;
  told.background = getComputedStyle(document.body).backgroundColor;
  told.scale = document.querySelector("svg").getBoundingClientRect().width / 900;
  told.closed = opened();
  await follow(document.querySelectorAll(".answer a")[1]);
  told.by_text = opened();
  const spot = all(".spot").at(-1);  // the last kept one is on top
  spot.scrollIntoView({block: "center", inline: "center"});
  const {x, y, width, height} = spot.getBoundingClientRect();
  told.on_top = document.elementFromPoint(x + width / 2, y + height / 2) === spot;
  await follow(spot);
  told.by_spot = opened();
  told.target = getComputedStyle(document.querySelector("details:has(> :target) > summary")).backgroundColor;
  all("details").forEach(each => { each.open = true; });
  told.drafts = all(".draft").filter(seen).map(each => each.textContent);
  told.overflow_open = document.documentElement.scrollWidth - innerWidth;
  const words = all("body *").filter(each => seen(each) && !each.matches(".spot")
    && [...each.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim()));
  told.faint = words.map(each => [contrast(each), each.outerHTML.slice(0, 80)]).filter(([ratio]) => ratio < 4.5);
  told.words = words.length;
  const reachable = all("a, summary, [tabindex]").filter(each => each.tabIndex >= 0);
  told.unreachable = reachable.filter(each => (each.focus(), document.activeElement !== each)).length;
  told.reachable = reachable.length;
  told.hacked = typeof window.hacked;
  parent.postMessage(JSON.stringify(told), "*");
});
addEventListener("error", event => parent.postMessage(event.message, "*"));
addEventListener("unhandledrejection", event => parent.postMessage(String(event.reason.stack), "*"));
"""
FRAME = """<!doctype html><html><meta charset="utf-8"><style>:root { color-scheme: light dark }</style>
<script>addEventListener("message", event => { document.body.textContent = `told ${event.data} told`; });</script>
<iframe src="page.html" style="width: WIDTHpx; height: 900px; border: 0"></iframe></html>"""
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")


def seen(page: str, folder: Path, width: int, theme: str) -> dict[str, Any]:
    """What a browser shows of a page."""
    (folder / "page.html").write_text(page.replace("</head>", f"<script>{LOOKS}</script></head>"), encoding="utf-8")
    file = folder / "frame.html"  # no window is as narrow as a frame
    file.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    assert BROWSER is not None
    given = [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={THEMES[theme]}"]
    ran = subprocess.run([BROWSER, *FLAGS, *given, "--dump-dom", file.as_uri()], capture_output=True, timeout=120)
    shown = ran.stdout.decode("utf-8")
    told = re.search(r"<body>told (.*) told</body>", shown, re.DOTALL)
    if told is None or not told[1].startswith("{"):
        raise AssertionError(shown[-2000:] + ran.stderr.decode("utf-8", "replace")[-2000:])
    found: dict[str, Any] = json.loads(html.unescape(told[1]))
    return found


def an_answer(word: str) -> Alignment:
    """A tree with a survivor, thresholds, parts, thoughts and a call, in which everything says this word."""
    parts: Any = {word: 0.5, "length": 0.25}
    rejected = draft(f"{word} no", -0.5, "rejected", 4, index=1, threshold=0.75, parts=parts)
    later = [draft(f" {word} {i}", i / 8, "rejected", index=i + 1, parent=1, parts=parts) for i in range(12)]
    first, second = segment(f"One {word}", 0.25, 0.75, rejected), segment(f" two {word}", 1.5, 0.8, *later)
    third = segment(" three.", 1.25, 0.9)
    return alignment(
        first, second, third, prompt_reward=0.1, kept_at=(0.5, 0.75, 2.5), guidance=Guidance(0.9, 0.1, "measured"),
        thinking=Thinking(f"Hm, {word}", (1, 2), (), "stop"), tool_calls=(ToolCall("1", word, {word: word}),),
    )  # fmt: skip


@pytest.mark.parametrize(("width", "theme"), [(360, "dark"), (360, "light"), (1200, "dark"), (1200, "light")])
def test_it_is_seen_and_reached(width: int, theme: str, tmp_path: Path) -> None:
    answer = an_answer("pineapple")
    found = seen(answer.to_html(tmp_path / "page.html").read_text(encoding="utf-8"), tmp_path, width, theme)
    assert (found["width"], found["scripts"], found["requests"]) == (width, 1, 0)
    assert (found["overflow"] <= 0, found["overflow_open"] <= 0) == (True, True)
    assert re.sub(r"\u2060\d", "", found["answer"]) == answer.text
    assert found["background"] == {"dark": "rgb(22, 22, 24)", "light": "rgb(255, 255, 255)"}[theme]
    assert found["scale"] > 0.6  # labels of 12 pixels are legible
    assert found["closed"] == []
    assert found["by_text"] == ["segment-2"]
    assert found["on_top"]
    assert found["by_spot"] == ["segment-2", "segment-3"]
    assert found["target"] != "rgba(0, 0, 0, 0)"
    assert found["drafts"] == [draft.text for segment in answer.segments for draft in segment.drafts]
    assert found["words"] > 50
    assert found["faint"] == []
    assert found["reachable"] >= 3 + 3 + 3 + 5 + 1  # pieces, spots and bars; folds; the chart, which may be scrolled
    assert found["unreachable"] == 0


def test_hostile_text_does_nothing(tmp_path: Path) -> None:
    word = f'<script>hacked = 1</script><img src=x onerror="hacked = 1">{HOSTILE}'
    answer = an_answer(word)
    found = seen(answer.to_html(tmp_path / "page.html").read_text(encoding="utf-8"), tmp_path, 360, "light")
    assert (found["hacked"], found["scripts"], found["requests"]) == ("undefined", 1, 0)
    assert found["drafts"] == [short_repr(draft.text) for segment in answer.segments for draft in segment.drafts]
    assert (found["overflow"] <= 0, found["overflow_open"] <= 0) == (True, True)
