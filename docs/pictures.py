"""Make the pictures of the pages from the code that stands before them: `make pictures`, or some by their names.

    python docs/pictures.py trace chat

Pages and terminals are photographed by a headless Chromium. A picture says in its metadata what it was made from, and
a test compares that with the page.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^(?P<off><!-- not run: .+ -->\n)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
IMAGE = re.compile(r'!\[(?P<alt>[^\]]*)\]\((?P<file>[^)]+\.png)\)|(?:src|srcset)="(?P<html>[^"]+\.png)"')
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=1.5"),
]
QUESTIONS = ("What was the hotel room like?", "And the breakfast?")  # of the picture of a chat
COLUMNS, PROMPT = 96, "\x1b[1m> "
MADE_FROM = "Made from"


@dataclass(frozen=True)
class Picture:
    """A picture, the page that shows it, and how it is made."""

    file: str
    page: str
    make: Callable[[Picture], None]

    @property
    def path(self) -> Path:
        """Where it is."""
        return ROOT / self.file

    @property
    def source(self) -> str:
        """The code of the page before the picture; of a terminal, the command, which is the picture's description."""
        text = (ROOT / self.page).read_text(encoding="utf-8")
        found = next(image for image in IMAGE.finditer(text) if self.path == linked(self.page, image))
        if self.make is terminal:
            return str(found["alt"])
        return "\n".join(block["code"] for block in BLOCK.finditer(text, 0, found.start()) if not block["off"])

    @property
    def made_from(self) -> str | None:
        """What the file was made from."""
        from PIL import Image

        with Image.open(self.path) as image:
            told = image.info.get(MADE_FROM)
        return None if told is None else str(told)


def linked(page: str, image: re.Match[str]) -> Path:
    """The file that a page shows."""
    return ((ROOT / page).parent / (image["file"] or image["html"])).resolve()


def shown() -> Iterator[tuple[str, Path]]:
    """All images of the pages, each with its page."""
    for page in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]:
        name = page.relative_to(ROOT).as_posix()
        yield from ((name, linked(name, image)) for image in IMAGE.finditer(page.read_text(encoding="utf-8")))


# --- how they are made ---


@cache
def ran(source: str) -> tuple[dict[str, Any], Path]:
    """Run the code of a page in a folder of its own; what it has defined, and the folder."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    folder = Path(tempfile.mkdtemp())
    with chdir(folder):
        exec(compile(source, "page", "exec"), namespace)
    return namespace, folder


def answer_page(picture: Picture) -> None:
    """`answer`, with the first segment unfolded that has a few candidates."""
    namespace, folder = ran(picture.source)
    answer = namespace["answer"]
    page = answer.to_html(folder / "answer.html")
    unfolded = next((i for i, segment in enumerate(answer.segments, 1) if 3 <= len(segment.drafts) <= 8), 1)
    photograph(picture, f"{page.as_uri()}#segment-{unfolded}", 960)


def report(picture: Picture) -> None:
    """The file `report.html` that the code writes."""
    photograph(picture, (ran(picture.source)[1] / "report.html").as_uri(), 1600)


def plot(picture: Picture) -> None:
    """What the code has drawn with matplotlib last."""
    from matplotlib import pyplot

    ran(picture.source)
    pyplot.gcf().savefig(picture.path, dpi=130)
    pyplot.close("all")
    sign(picture)


def terminal(picture: Picture) -> None:
    """A terminal in which the command answers two questions."""
    import pexpect
    from rich.console import Console
    from rich.text import Text

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {**os.environ, "PATH": path, "TERM": "xterm-256color"}
    chat = pexpect.spawn(picture.source, env=own, dimensions=(60, COLUMNS), encoding="utf-8", timeout=600)
    said = f"$ {picture.source}\n"
    for question in QUESTIONS:
        chat.expect_exact(PROMPT)
        said += chat.before + PROMPT
        chat.sendline(question)
    chat.expect_exact(PROMPT)
    said += chat.before
    chat.close()
    screen = Console(record=True, width=COLUMNS, file=io.StringIO())
    screen.print(Text.from_ansi(said.replace("\r\n", "\n").rstrip()))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "screen.html"
        file.write_text(
            f"<!doctype html><body style='margin: 0'>{screen.export_svg(title='cards chat')}", encoding="utf-8"
        )
        photograph(picture, file.as_uri(), 980)


def chart_of_speed(picture: Picture) -> None:
    """The chart of `benchmarks/results/speed.json`."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from chart import draw

    draw(json.loads(picture.path.with_suffix(".json").read_text(encoding="utf-8")), picture.path)


def chart_of_methods(picture: Picture) -> None:
    """The chart of a comparison, from its answers."""
    from cards_integrations.study.comparison import Comparison
    from cards_integrations.study.rows import Results

    found = Comparison(Results(picture.path.with_suffix(".jsonl"), {"prompt"}).rows)
    found.plot("looked_at_tokens").savefig(picture.path, dpi=130)


def chart_of_wide_steps(picture: Picture) -> None:
    """The chart of what `benchmarks/wide.py` found."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from wide_chart import SHOWN, draw

    draw(SHOWN, picture.path)


def photograph(picture: Picture, address: str, width: int) -> None:
    """Photograph a page at this width, dark if the name of the picture says so, and cut off what is empty below."""
    from PIL import Image, ImageChops

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"{picture.file} needs Chromium: one of {', '.join(BROWSERS)}.")
    scheme = "0" if picture.path.stem.endswith("dark") else "1"
    with tempfile.TemporaryDirectory() as profile:
        given = [f"--user-data-dir={profile}", f"--window-size={width},3000", f"--screenshot={picture.path}"]
        given.append(f"--blink-settings=preferredColorScheme={scheme}")
        subprocess.run([browser, *FLAGS, *given, address], check=True, capture_output=True, timeout=120)
    with Image.open(picture.path) as image:
        whole = image.convert("RGB")
    empty = Image.new("RGB", whole.size, whole.getpixel((whole.width - 1, whole.height - 1)))
    box = ImageChops.difference(whole, empty).getbbox()
    bottom = min(whole.height, box[3] + 24) if box else whole.height
    whole.crop((0, 0, whole.width, bottom)).quantize(256).save(picture.path)
    sign(picture)


def sign(picture: Picture) -> None:
    """Note in the file what it was made from."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_itxt(MADE_FROM, picture.source)
    with Image.open(picture.path) as image:
        image.load()
        image.save(picture.path, pnginfo=told, optimize=True)


PICTURES = [
    Picture("docs/trace.png", "docs/index.md", answer_page),
    Picture("docs/trace-dark.png", "README.md", answer_page),
    Picture("docs/chat.png", "docs/first-answers.md", terminal),
    Picture("docs/trace-plot.png", "docs/method.md", plot),
    Picture("docs/tree-plot.png", "docs/method.md", plot),
    Picture("docs/report.png", "docs/comparison.md", report),
]
CHARTS = [  # of results that are kept; the benchmarks draw them, too
    Picture("benchmarks/results/speed.png", "docs/performance.md", chart_of_speed),
    Picture("benchmarks/results/methods-smollm2.png", "docs/comparison.md", chart_of_methods),
    Picture("benchmarks/results/methods-tiny.png", "docs/comparison.md", chart_of_methods),
    Picture("docs/wide.png", "docs/comparison.md", chart_of_wide_steps),
]


def main() -> None:
    """Make all pictures, or those that are named."""
    for picture in [*PICTURES, *CHARTS]:
        if not sys.argv[1:] or picture.path.stem in sys.argv[1:]:
            picture.make(picture)
            print(picture.file)


if __name__ == "__main__":
    main()
