"""An alignment draws itself: whatever the model wrote, and whatever the method left in the trace."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import matplotlib
import pytest
from conftest import Start
from hypothesis import example, given
from hypothesis import strategies as st

from cards_integrations.decoding import Cards, Cascade, Decoding, FixedLength, Particles, SpeculativeRejection, TreeBoN
from cards_integrations.engine import Request
from cards_integrations.picture.chart import BOTTOM, HEIGHT, TOP, WIDTH, Points, svg, ticks
from cards_integrations.picture.numbers import number
from cards_integrations.picture.tree import levels_of
from cards_integrations.rewards import FunctionReward
from cards_integrations.trace import Alignment, DraftTrace, InvalidToolCall, Segment, ToolCall, Usage, Verdict

matplotlib.use("Agg")

TAGS = {"div", "style", "p", "span", "code", "svg", "path", "text", "details", "summary", "table", "tr", "th", "td"}
PAGE_TAGS = {"main", "h1", "a", "circle", "title"}
ATTRIBUTES = {
    "class": r"[a-z -]*",
    "title": r"[\w .,·≥<+:-]*",
    "style": r"--blue: \d\.\d\d|flex-grow: [\d.]+|background: linear-gradient\(90deg(, rgb\([\d ./]+\)){2}\)",
    "href": r"#segment-\d+",
    "id": r"segment-\d+",
    "tabindex": "0|-1",
    "d": r"[MLHhmls\d .-]*",
    "viewbox": r"[\d ]+",
    "role": "img|group|region",
    "aria-label": "reward over tokens|along the answer|chart",
    "dir": "auto",
    "open": "",
    **dict.fromkeys(["x", "y", "cx", "cy", "r"], r"-?[\d.]+"),
    "dy": r"\.35em",
    "text-anchor": "start|middle|end",
}
TWO = FixedLength(length=2)
SEARCHES = [
    Cascade(budget="tokens:6"),
    TreeBoN(n=4, children=2, boundary=TWO),
    Particles(n=4, beta=1.0, boundary=TWO),
    SpeculativeRejection(n=4, checkpoint=4),
    Cards(target_reward=0.9, beta=0.1, boundary=TWO),
]
HOSTILE = (
    '<script>alert(1)</script></details></style><!-- "\' onload=" &amp; \u202eright to left \0\r\n\U0001f600'
    + 300 * "x"
)


class Read(HTMLParser):
    """Refuses what the picture does not write; the text of each element by its class, or by its tag."""

    def __init__(self, html: str, tags: set[str] = TAGS) -> None:
        super().__init__()
        self.tags = tags
        self.open: list[str] = []
        self.found: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in self.tags
        for name, value in attributes:
            assert re.fullmatch(ATTRIBUTES[name], value or ""), (tag, name, value)
        kind = dict(attributes).get("class") or tag
        self.open.append(f"{tag} {kind}")
        self.found.setdefault(kind, []).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split()[0] == tag

    def handle_data(self, data: str) -> None:
        for kind in {entry.split(" ", 1)[1] for entry in self.open}:
            self.found[kind][-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment  # type: ignore[assignment]


def draft(text: str, reward: float | None, verdict: Verdict, tokens: int = 3, **more: object) -> DraftTrace:
    told: dict[str, Any] = {"index": 0, "threshold": None, **more}
    return DraftTrace(text=text, token_ids=tuple(range(tokens)), reward=reward, verdict=verdict, **told)


def segment(text: str, reward: float | None = 1.0, threshold: float | None = None, *drafts: DraftTrace) -> Segment:
    kept = draft(text, reward, "unscored" if reward is None else "accepted")
    return Segment(text, (1, 2, 3), reward, threshold, (*drafts, kept))


def alignment(*segments: Segment, **more: object) -> Alignment:
    text = "".join(segment.text for segment in segments)
    told = dict(method="cards", model="a <model>", **more)
    reward = segments[-1].reward if segments else None
    usage = Usage(completion_tokens=3 * len(segments), drafted_tokens=1234, drafts=5, lm_forwards=1, seconds=2.5)
    return Alignment(text, (), (), reward, segments, usage, "stop", -1.0, 42, **told)  # type: ignore[arg-type]


MANY = [segment(f" word {i}", i / 7, i / 10, draft(" no", -i / 7, "rejected", tokens=i % 9)) for i in range(100)]
SHAPES = {
    "without segments": alignment(),
    "plain": alignment(segment("Hello", None), segment(" there.", None)),
    "one segment": alignment(segment("word " * 500, 1.0, None, *[draft("other " * 500, 0.5, "rejected", 500)] * 15)),
    "a hundred": alignment(*MANY),
    "empty": alignment(Segment("", (), 0.5, None, (draft("", 0.5, "accepted", 0),))),
    "equal": alignment(segment("Same", 2.0, 2.0), segment(" again", 2.0, 2.0)),
    "all zero": alignment(segment("Same", 0.0, 0.0), segment(" again", 0.0)),
    "partly scored": alignment(segment("One", None), segment(" two", 1.0), segment(" three", None)),
    "huge": alignment(segment("One", -1e12, 1e12), segment(" two", 1e-12)),
    "a tree": alignment(
        segment("a", 1.0, None, draft(" b", 0.5, "rejected", 2, index=1), draft(" c", 0.2, "rejected", index=2)),
        segment(
            " d", 0.9, None, draft(" e", 0.7, "rejected", 4, index=1, parent=1), draft(" f", 0.1, "rejected", index=2)
        ),
        prompt_reward=0.4,
        kept_at=(1.0, 1.0),
    ),
}


def body(answer: Alignment, folder: Path) -> str:
    """The body of its page."""
    page = answer.to_html(folder / "page.html").read_bytes().decode("utf-8")
    return page.partition("<body>")[2].partition("</body>")[0]


def short_repr(text: str) -> str:
    """NUL is the one character that HTML has no way to write."""
    return text.replace("\0", "\ufffd")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_its_text_and_its_folds(shape: str) -> None:
    answer = SHAPES[shape]
    read = Read(answer._repr_html_()).found
    assert read.get("answer", [""]) == [answer.text]
    drafts = [draft for segment in answer.segments for draft in segment.drafts]
    assert read.get("draft", []) == [draft.text for draft in drafts]
    assert len(read.get("row", [])) == len(answer.segments)
    assert ("svg" in read) == any(segment.reward is not None for segment in answer.segments)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_page_shows_the_same_and_leads_to_every_segment(shape: str, tmp_path: Path) -> None:
    answer = SHAPES[shape]
    page = body(answer, tmp_path)
    read, notebook = Read(page, TAGS | PAGE_TAGS).found, Read(answer._repr_html_()).found
    assert {kind: read[kind] for kind in notebook if kind in ("answer", "draft", "row", "note cost", "value")} == {
        kind: notebook[kind] for kind in notebook if kind in ("answer", "draft", "row", "note cost", "value")
    }
    numbers = {str(i + 1) for i in range(len(answer.segments))}
    assert set(re.findall(r' id="segment-(\d+)"', page)) == numbers
    assert set(re.findall(r' href="#segment-(\d+)"', page)) == numbers
    assert "href" not in answer._repr_html_()


texts = st.text() | st.text(alphabet="<>&\"'/ \0\r\n\u202e\u2067sx=")


@example([HOSTILE, HOSTILE], HOSTILE)
@given(st.lists(texts, min_size=1, max_size=4), texts)
def test_hostile_text_stays_text(pieces: list[str], name: str) -> None:
    rejected = draft(pieces[0], 0.1, "rejected", parts={name: 0.25})
    answer = alignment(
        *[segment(piece, i / 4, 0.3, rejected) for i, piece in enumerate(pieces)],
        tool_calls=(ToolCall(name, name, {name: name}),),
        invalid_tool_calls=(InvalidToolCall(name, name, name, name),),
        request_id=name,
    )
    with TemporaryDirectory() as folder:
        titles = Read(body(answer, Path(folder)), TAGS | PAGE_TAGS).found["title"]
    told = {title.partition(": ")[2] for title in titles}
    assert told == {short_repr(text.strip()) for text in pieces}
    drawn = answer._repr_html_()
    assert "\r" not in drawn  # browsers make a line break of it
    read = Read(drawn).found
    assert read.get("answer", [""]) == [short_repr(answer.text)]
    assert read["draft"] == [short_repr(text) for piece in pieces for text in (pieces[0], piece)]
    assert f"{short_repr(name)} 0.250" in read["note"]
    assert read["call"][1] == f"invalid call {short_repr(f'{name}({name})')}: {short_repr(name)}"
    assert "a <model>" in read["note cost"][0]


@given(st.text(), st.lists(st.integers(0, 9), min_size=1), st.integers(0, 9))
def test_segments_that_do_not_add_up_show_the_text_once(text: str, lengths: list[int], longer: int) -> None:
    """A stop string takes back what an earlier segment had."""
    answer = alignment(*[segment("x" * length) for length in lengths])
    answer = Alignment(**{**vars(answer), "text": text})
    assert Read(answer._repr_html_()).found.get("answer", [""]) == [short_repr(text)]


def test_halves_of_surrogate_pairs_can_be_written(tmp_path: Path) -> None:
    answer = alignment(segment("x"), tool_calls=(ToolCall("1", "f", {"a": "\ud800"}),))
    assert "calls f(" in Read(answer._repr_html_()).found["call"][0]
    answer.to_html(tmp_path / "page.html")


def test_numbers_are_those_of_the_trace() -> None:
    low = segment("Low", -0.5, 0.25, draft("Worse", -1.5, "rejected", parts={"length": 7.0}))
    answer = alignment(low, segment(" high.", 1234.5, 0.75), prompt_reward=0.125)
    read = Read(answer._repr_html_()).found
    assert read["note legend"] == ["reward -0.5001,234.500 \u2003 underlined: kept below its threshold"]
    assert read["kept"] == ["high.", ""]  # the text, and the line of the chart
    assert read["kept below"] == ["Low"]
    assert read["facts"] == ["-0.500 < 0.250 · 2 candidates", "1,234.500 ≥ 0.750 · 1 candidate"]
    assert read["value"] == ["reward", "-1.500", "-0.500", "reward", "1,234.500"]
    assert "length 7.000" in read["note"]
    assert read["note cost"] == [
        "cards on a <model> · reward 1,234.500 (prompt alone 0.125) · 6 tokens kept, 1,234 drafted · "
        "5 candidates looked at · language model 1 forward, 0 tokens · 2.50 s · finish: stop · seed 42"
    ]


def test_higher_rewards_are_bluer() -> None:
    answer = alignment(segment("a", -3.0), segment("b", 0.0), segment("c", 3.0))
    blues = re.findall(r"--blue: ([\d.]+)", answer._repr_html_())
    assert blues == ["0.10", "0.35", "0.60"]


def test_points_lie_where_the_trace_has_them() -> None:
    found = Points.of(alignment(segment("a", 1.0, 0.5, draft("no", 0.25, "rejected", 7)), segment("b", 2.0, 0.75)))
    assert found.kept == [(3, 1.0), (6, 2.0)]
    assert found.thresholds == [(3, 0.5), (6, 0.75)]
    assert found.rejected == [(7, 0.25)]
    assert found.twigs == []  # of the first segment nobody knows where they begin


def test_branches_begin_where_what_they_follow_ends() -> None:
    answer = SHAPES["a tree"]
    [(b, c, a), (e, f, d)] = levels_of(answer)
    assert [node.went_on for node in (a, b, c, d, e, f)] == [False, True, False, False, False, False]
    assert (e.start, e.point) == (b.point, (6, 0.7)) == ((2, 0.5), (6, 0.7))
    assert (f.start, f.end) == (a.point, 6)
    found = Points.of(answer)
    assert found.kept == [(0, 0.4), (3, 1.0), (6, 0.9)]
    assert found.rejected == [(3, 0.2), (6, 0.7), (6, 0.1)]
    assert found.went_on == [(2, 0.5)]
    assert found.twigs == [((0, 0.4), (2, 0.5)), ((0, 0.4), (3, 0.2)), ((2, 0.5), (6, 0.7)), ((3, 1.0), (6, 0.1))]
    read = Read(answer._repr_html_()).found
    assert read["place after"] == ["-", "-", "-", "2", "kept", "kept"]
    assert read["facts"] == ["1.000 · 3 candidates · 1 went on", "0.900 · 3 candidates"]
    assert "→ went on" in read["td"]
    assert read["text"][2:5] == ["kept", "went on", "rejected"]  # the key of the chart
    assert len(read["went-on"]) == 1


def checksum(prompt: str, answers: list[str]) -> list[float]:
    """A reward by which a beginning is known."""
    return [crc32(answer.encode()) / 2**32 for answer in answers]


@pytest.mark.parametrize("decoding", SEARCHES, ids=lambda each: each.method)
def test_the_tree_of_a_trace_is_that_of_the_search(
    decoding: Decoding, models: Callable[..., str], start: Start
) -> None:
    """Every candidate has the reward of the beginning that it is drawn at the end of."""
    request = Request("w9 w20 w31", decoding, FunctionReward(function=checksum), max_tokens=24, seed=2)
    answer = start(models("llama")).run(request)
    kept, branched = "", 0
    before: dict[int, str] = {}
    for segment in answer.segments:
        texts: dict[int, str] = {}
        for draft in segment.drafts:
            branched += draft.parent is not None
            texts[draft.index] = (kept if draft.parent is None else before[draft.parent]) + draft.text
            assert draft.reward == checksum("", [texts[draft.index]])[0]
        kept, before = kept + segment.text, texts
    assert kept == answer.text
    assert (branched > 0) == (decoding.method != "cards")
    assert len(answer.kept_at) == len(answer.segments)
    assert 0 < answer.kept_at[0] <= answer.kept_at[-1] <= answer.usage.seconds
    assert list(answer.kept_at) == sorted(answer.kept_at)


def test_segments_that_are_kept_together_are_one_bar() -> None:
    answer = alignment(*[segment(f"{i} ") for i in range(4)], kept_at=(1.0, 2.0, 2.001, 4.0))
    assert Read(answer._repr_html_()).found["times"][0].split() == ["1", "2-3", "4"]
    shares = re.findall(r"flex-grow: ([\d.]+)", answer._repr_html_())
    assert [float(share) for share in shares] == pytest.approx([25, 25.02, 49.98], abs=0.01)


finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9)


@given(st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=5))
def test_the_chart_stays_in_its_frame(rewards: list[tuple[float, float, float]]) -> None:
    segments = [segment("a", kept, over, draft("no", no, "rejected", 9)) for kept, over, no in rewards]
    drawn = svg(Points.of(alignment(*segments)))
    Read(drawn)
    for x, y in re.findall(r"[ML]([\d.e-]+) ([\d.e-]+)", drawn):
        assert 0 <= float(x) <= WIDTH
        assert float(y) < TOP / 2 or TOP <= float(y) <= HEIGHT - BOTTOM  # the key, or the chart


@given(finite, st.floats(1e-6, 1e9))
def test_ticks_are_few_and_in_between(low: float, span: float) -> None:
    high = low + max(span, abs(low) * 1e-6)
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    slack = 1e-9 * max(abs(low), abs(high))
    assert all(low - slack <= tick <= high + slack for tick in found)


def test_numbers_keep_three_digits() -> None:
    values = [0.0, 1.0, -0.37, 0.001, 1e-5, 1234.5, 2.5e9, math.pi]
    assert [number(value) for value in values] == [
        "0.000", "1.000", "-0.370", "0.001", "1e-05", "1,234.500", "2.5e+09", "3.142",
    ]  # fmt: skip
    assert number(None) == "-"


def test_a_notebook_needs_no_matplotlib() -> None:
    lines = (
        "import sys; from cards_integrations.trace import Alignment, Usage;"
        "Alignment('x', (), (), None, (), Usage(), 'stop', 0.0, 1)._repr_html_();"
        "sys.exit('matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", lines], check=True)


def test_a_page_opens_offline(tmp_path: Path) -> None:
    path = tmp_path / "trace.html"
    answer = alignment(segment("Grüße, 你好 \U0001f600"))
    assert answer.to_html(str(path)) == path
    page = path.read_bytes().decode("utf-8")
    assert "Grüße, 你好 \U0001f600" in page
    assert '<meta charset="utf-8">' in page
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|src=|href=(?!\"#segment-\d+\")", page)


@pytest.mark.parametrize("shape", SHAPES)
def test_plot_on_given_axes(shape: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    answer = SHAPES[shape]
    assert answer.plot(axes) is axes
    figure.savefig(io.BytesIO(), format="png")
    assert axes.get_xlabel() == "tokens"
    assert axes.get_ylabel() == "reward"
    assert (axes.get_legend() is None) == all(segment.reward is None for segment in answer.segments)


def test_plot_makes_axes_of_its_own() -> None:
    from matplotlib import pyplot

    axes: Any = SHAPES["a hundred"].plot()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["kept", "rejected", "threshold"]
    assert [list(line.get_ydata())[-1] for line in axes.lines] == pytest.approx([99 / 7, -99 / 7, 9.9])
    pyplot.close(axes.figure)
