"""The page in a real browser: it loads nothing, works by mouse and keyboard, in both themes, narrow and wide."""

import pytest

from secateur.report import render_report
from secateur.report.reading import read_runs
from tests.support.browser import MISSING, browser, chromium, opened
from tests.support.report_data import EVIL, write_comparison, write_pruned

# Labels are the targets of the inputs in them; what a sheet of style hides is none.
SMALL = """[...document.querySelectorAll("a, button, label, summary, [tabindex='0']")]
    .filter(one => one.checkVisibility()).map(one => [one.outerHTML.slice(0, 80) + ' ', one.getBoundingClientRect()])
    .filter(([_, box]) => box.width < 24 || box.height < 24).map(([name, box]) => name + box.width)"""
CUT = """[...document.querySelectorAll(".wide, .scroll, table, pre")].filter(one => one.scrollWidth > one.clientWidth)
    .map(one => `${one.outerHTML.slice(0, 80)} ${one.scrollWidth} of ${one.clientWidth}`)"""


@pytest.fixture(scope="module")
def running():
    pytest.importorskip("playwright", reason="the page is tested with playwright, which the dev extra brings")
    if chromium() is None:
        pytest.skip(MISSING)
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A page with all there is: a pruning with maps, a comparison with scores, and a name that is markup."""
    folder = tmp_path_factory.mktemp("page")
    long = "a-model-with-a-name-without-any-break-" * 4
    runs = [write_pruned(folder / "p", model=long + EVIL, heads=12), write_comparison(folder / "c", model=EVIL)]
    (folder / "page.html").write_text(render_report(read_runs(runs)), encoding="utf-8")
    return folder / "page.html"


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_it_fits_asks_for_nothing_and_can_be_read(running, file, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    with opened(running, file, viewport={"width": width, "height": 800}, color_scheme=scheme) as (page, complaints):
        assert page.evaluate("document.documentElement.scrollWidth") == width
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (colour == "rgb(15, 20, 17)") is (scheme == "dark")
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert complaints == []


@pytest.mark.parametrize("columns", [12, 32])
def test_on_a_telephone_targets_are_large_and_no_column_is_cut_off(running, file, tmp_path, columns):
    quality = {"cosine": 0.98765, "relational_kl": 0.0123, "num_texts": 48, "agreement": None}
    budget = [{"asked": "latency=0.8x@8x128", "expected": 0.79, "reached": 0.812}]
    large = {"heads": columns * 3, "parameters": 7_615_616_512, "macs": 1_434_599_424, "batch": 1, "length": 128}
    changes = {"before": large, "after": {**large, "heads": columns * 3 // 2}, "quality": quality, "budget": budget}
    pruned = write_pruned(tmp_path / "p", heads=columns, **changes)
    (pruned / "config.json").write_text('{"head_pruning": {}}')
    own = tmp_path / "own.html"
    own.write_text(render_report(read_runs([pruned])), encoding="utf-8")
    for one in (own, file):
        with opened(running, one, viewport={"width": 400, "height": 800}) as (page, complaints):
            assert page.evaluate("document.documentElement.scrollWidth") == 400
            assert page.evaluate(SMALL) == []
            assert page.evaluate(CUT) == []
            assert complaints == []


def test_hover_click_and_keys(running, file):
    with opened(running, file, viewport={"width": 1280, "height": 900}) as (page, complaints):
        detail, tip = page.locator(".facts-line"), page.locator("#tip")
        assert "layer 2, head 11: kept, score 0.31, rank 1 of 12" in detail.inner_text()  # the highest, at first
        head = page.locator('button[data-site="encoder.layer.1.attention.self"][data-head="3"]')
        head.hover()
        assert tip.inner_text() == "layer 1, head 3: removed, score 0.13, rank 9 of 12 in its site"
        head.click()
        assert "layer 1, head 3" in detail.inner_text()
        assert page.locator(".attention rect").count() == 36
        label = page.locator(".attention").get_attribute("aria-label")
        # Everyone looks at token 3 with weight 0.5, at all others with 0.04: six tokens.
        assert "4 % of a token's attention goes to the first token, 12 % to itself, 13 % to the token before" in label
        page.locator(".attention rect").nth(6 * 2 + 3).hover()
        assert page.locator(".reading").inner_text() == "Token 2 → token 3: 0.500"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowLeft")
        assert tip.inner_text().startswith("layer 2, head 2: removed")
        assert "layer 1, head 3" in detail.inner_text()
        page.keyboard.press("Enter")
        assert "layer 2, head 2" in detail.inner_text()
        page.keyboard.press("Escape")
        assert tip.is_hidden()
        assert page.locator('button[tabindex="0"][data-head]').count() == 1
        colour = "getComputedStyle(document.querySelector('[data-head=\"11\"]')).backgroundColor"
        before = page.evaluate(colour)
        page.get_by_label("within its site").check()
        assert page.evaluate(colour) != before
        assert complaints == []


def test_the_theme_can_be_chosen_and_paper_is_light(running, file):
    colour = "getComputedStyle(document.body).color"
    with opened(running, file, color_scheme="dark") as (page, complaints):
        dark = page.evaluate(colour)
        button = page.locator(".theme")
        button.focus()
        page.keyboard.press("Enter")
        assert button.inner_text() == "Theme: light"
        light = page.evaluate(colour)
        assert light != dark
        page.keyboard.press("Enter")
        assert page.evaluate(colour) == dark
        page.emulate_media(media="print")
        assert page.evaluate(colour) == light
        assert not button.is_visible()
        assert complaints == []


def test_a_complaint_would_be_seen(running, tmp_path):
    """The checks above can fail: a page with an error, a request and no language."""
    bad = tmp_path / "bad.html"
    bad.write_text("<!doctype html><title>x</title><img src='other.png'><script>nothing()</script>")
    from axe_playwright_python.sync_playwright import Axe

    with opened(running, bad) as (page, complaints):
        assert any(line.startswith("request: ") for line in complaints)
        assert any("nothing is not defined" in line for line in complaints)
        assert Axe().run(page).violations_count > 0
