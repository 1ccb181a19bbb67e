"""The page in a browser: it draws itself, logs nothing, asks for nothing, and answers mouse, keys and printer."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from recorded_runs import HOSTILE, recorded

from lipcore.report.compare.page import compare_page
from lipcore.report.output import write_whole
from lipcore.report.page import page_of
from lipcore.report.postmortem.page import postmortem_page

pytest.importorskip("bokeh", reason="needs the extra `report`")
from browser import CHROMIUM, Page, browser

pytestmark = [pytest.mark.ci, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")]

CASES: dict[str, dict[str, Any]] = {
    "usual": {"fault": (240, "layers.1"), "alarm": True},
    "without a step": {"steps": 0, "windows": 0},
    "without a window": {"windows": 0},
    "NaN alone": {"only_nan": True},
    "one place": {"places": ["only"], "steps": 3},
    "2,000 places": {"places": [f"layers.{i}.weight" for i in range(2000)], "level": "tensor"},
    "hostile names": {"places": HOSTILE, "fault": (200, HOSTILE[0]), "alarm": True},
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as page:
        yield page


def opened(chromium: Page, folder: Path, width: int = 1280, **what: Any) -> Page:
    chromium.troubles.clear()
    chromium.requests.clear()
    with recorded(folder / "a", **what) as run:
        path = write_whole(page_of(run), folder / "page.html")
    chromium.open(path, width)
    return chromium


def asked(page: Page) -> list[str]:
    """Addresses that were asked for beside the page itself, and what it carries."""
    return [url for url in page.requests if not url.startswith(("data:", "blob:")) and not url.endswith("/page.html")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [1280, 390])
def test_it_draws_itself_and_asks_for_nothing(chromium: Page, tmp_path: Path, case: str, width: int) -> None:
    page = opened(chromium, tmp_path, width, **CASES[case])
    figures = page.value("document.querySelectorAll('.plot').length")
    assert (figures > 0) == (CASES[case].get("steps") != 0)
    assert page.value("[...document.querySelectorAll('.plot')].every((p) => p.childElementCount > 0)")
    assert page.picture(tmp_path / "picture.png", whole=True).stat().st_size > 10_000
    assert page.value("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.value("window.injected") is None
    assert page.troubles == []
    assert asked(page) == []


def test_step_and_layer_of_a_fault_are_seen_without_scrolling(chromium: Page, tmp_path: Path) -> None:
    page = opened(chromium, tmp_path, **CASES["usual"])
    assert page.value("document.querySelector('.headline').getBoundingClientRect().bottom") < 200
    headline = page.value("document.querySelector('.headline').innerText")
    assert "step 240, layers.1: update norm" in headline
    assert page.value("document.querySelector('#plot-ratio-map').getBoundingClientRect().bottom") < 800
    # The cell is of the darkest orange, and the one beside it pale.
    cells = "Bokeh.documents[0].get_model_by_name('ratio-map-image').data.image[0]"
    colours = [page.value(f"(({cells})[1 * 300 + {bin_}] >>> 0).toString(16)") for bin_ in (239, 238)]
    assert colours[0] == "ff04277f"
    assert all(int(colours[1][i : i + 2], 16) > 0xD0 for i in (2, 4, 6))


def test_a_click_and_keys_choose_a_layer(chromium: Page, tmp_path: Path) -> None:
    page = opened(chromium, tmp_path, **CASES["usual"])
    page.value("document.querySelector('#plot-ratio-map').scrollIntoView({block: 'center'})")
    box = page.value("JSON.parse(JSON.stringify(document.querySelector('#plot-ratio-map').getBoundingClientRect()))")
    chosen = "document.querySelector('#chosen').innerText"
    assert page.value(chosen).startswith("layers.1")
    page.click(box["x"] + box["width"] / 2, box["y"] + 0.15 * box["height"])
    assert page.value(chosen).startswith("layers.0")
    page.hover(box["x"] + box["width"] / 2, box["y"] + 0.4 * box["height"])
    assert page.value("document.querySelector('#map-told').innerText").startswith("layers.1, step 1")
    page.value("document.querySelector('#plot-ratio-map').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
        page.key(key)
    assert page.value(chosen).startswith("layers.2")
    first = "Bokeh.documents[0].get_model_by_name('ratio-of-one-0').data.mean.length"
    assert page.value(first) == 300
    page.value("document.querySelector('#map-relative').click()")
    assert "tenth" not in page.value("document.querySelector('#map-low').innerText")
    assert page.troubles == []


def test_a_drag_zooms_all_figures_and_hover_tells_a_number(chromium: Page, tmp_path: Path) -> None:
    page = opened(chromium, tmp_path, **CASES["usual"])
    box = page.value("JSON.parse(JSON.stringify(document.querySelector('#plot-loss').getBoundingClientRect()))")
    page.hover(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    inside = "(n) => [...n.childNodes].map((c) => c.nodeType === 3 ? c.data : text(c)).join(' ')"
    text = f"const text = (n) => n.localName === 'style' ? '' : ({inside})(n.shadowRoot ?? n)"
    tips = f"(() => {{ {text}; return text(document.body); }})()"
    seen = page.value(f"new Promise((done) => setTimeout(() => done({tips}), 300))")
    assert re.search(r"step: 1\d\d mean: 1\.\d", " ".join(seen.split()))
    spans = "Bokeh.documents[0].roots().map((r) => r.x_range.end - r.x_range.start)"
    before = page.value(spans)
    page.drag(box["x"] + 0.5 * box["width"], box["y"] + 50, box["x"] + 0.7 * box["width"], box["y"] + 60)
    after = page.value(f"new Promise((done) => setTimeout(() => done({spans}), 200))")
    assert len(set(after)) == 1
    assert after[0] < 0.5 * before[0]


def test_a_link_saves_the_numbers_of_a_figure(chromium: Page, tmp_path: Path) -> None:
    page = opened(chromium, tmp_path, **CASES["usual"])
    page.value("document.addEventListener('click', (e) => e.preventDefault())")  # nothing is saved here
    found = {}
    for figure in ("loss", "ratio-map"):
        page.value(f"document.querySelector('a.csv[data-figure={figure}]').click()")
        link = page.value(f"document.querySelector('a.csv[data-figure={figure}]').href")
        found[figure] = unquote(link.partition(",")[2]).splitlines()
    assert len(found["loss"]) == 301
    assert found["ratio-map"][0] == "layer,first_step,last_step,least,mean,greatest,not_finite"
    assert len(found["ratio-map"]) == 1 + 3 * 300
    with recorded(tmp_path / "again", **CASES["usual"]) as run:
        loss = run.series("loss")["total"]
    assert float(found["loss"][17].split(",")[4]) == pytest.approx(loss[16], rel=1e-6)


@pytest.mark.parametrize("case", ["usual", "hostile names", "NaN alone", "one place"])
def test_a_postmortem_draws_itself_too(chromium: Page, tmp_path: Path, case: str) -> None:
    chromium.troubles.clear()
    chromium.requests.clear()
    with recorded(tmp_path / "a", **CASES[case]) as run:
        path = write_whole(
            postmortem_page(run, None if CASES[case].get("alarm") else run.last_step), tmp_path / "page.html"
        )
    for width in (1280, 390):
        chromium.open(path, width)
        assert chromium.value("[...document.querySelectorAll('.plot')].every((p) => p.childElementCount > 0)")
        assert chromium.value("document.querySelector('.headline').getBoundingClientRect().bottom") < 300
        assert chromium.value("document.documentElement.scrollWidth <= window.innerWidth")
    assert chromium.value("window.injected") is None
    assert chromium.troubles == []
    assert asked(chromium) == []


def test_a_comparison_draws_itself_too(chromium: Page, tmp_path: Path) -> None:
    chromium.troubles.clear()
    chromium.requests.clear()
    what = [{"places": HOSTILE}, {"places": HOSTILE, "fault": (200, HOSTILE[1])}, {"only_nan": True}]
    runs = [recorded(tmp_path / str(i), **one) for i, one in enumerate(what)]
    path = write_whole(compare_page(runs), tmp_path / "page.html")
    for width in (1280, 390):
        chromium.open(path, width)
        assert chromium.value("document.querySelectorAll('.plot').length") >= 5
        assert chromium.value("[...document.querySelectorAll('.plot')].every((p) => p.childElementCount > 0)")
        assert chromium.value("document.documentElement.scrollWidth <= window.innerWidth")
    assert chromium.troubles == []
    assert asked(chromium) == []
    for run in runs:
        run.close()


def test_it_prints(chromium: Page, tmp_path: Path) -> None:
    page = opened(chromium, tmp_path, **CASES["usual"])
    assert page.pdf().startswith(b"%PDF")
    plots = page.value("document.querySelectorAll('.plot').length")
    colours = "new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
    pictures = f"[...document.querySelectorAll('canvas.paper')].map((c) => [c.width, {colours}])"
    found = page.value(f"dispatchEvent(new Event('beforeprint')), {pictures}")
    assert len(found) == plots
    assert all(width >= 1600 and seen > 10 for width, seen in found)  # drawn already, and fine enough for paper
    after = "[window.devicePixelRatio, document.querySelectorAll('canvas.paper').length]"
    assert page.value(f"dispatchEvent(new Event('afterprint')), {after}") == [1, 0]
    widths = "[...document.querySelectorAll('.plot')].map((p) => p.clientWidth)"
    assert min(page.value(widths)) > 1000
    assert page.troubles == []


def test_a_followed_page_loads_itself_anew_and_stays_as_it_was(chromium: Page, tmp_path: Path) -> None:
    with recorded(tmp_path / "a", **CASES["usual"]) as run:
        path = write_whole(page_of(run, reload_seconds=3), tmp_path / "page.html")
    chromium.open(path)
    chromium.value("window.older = true; document.querySelector('#not-measured').open = true")
    chromium.value("document.querySelector('#plot-ratio-map').focus()")
    for key in ("ArrowDown", "Enter"):
        chromium.key(key)
    for _ in range(200):
        with suppress(RuntimeError):  # the page is just being loaded
            if chromium.value("window.older !== true && document.body?.dataset.ready === 'yes'"):
                break
        time.sleep(0.05)
    assert chromium.value("document.querySelector('#not-measured').open")
    assert chromium.value("document.querySelector('#chosen').innerText").startswith("layers.2")
    chromium.call("Page.navigate", url="about:blank")
