"""The tab in TensorBoard and the one-file page, in a headless Chromium."""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from browsers import HAS_CHROMIUM, NO_CHROMIUM, REQUIRED, Visit, chromium, tensorboard, visit
from dashboards import HOSTILE, make_reports, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Where pictures are kept for a look at them.
PICTURES = os.environ.get("JACMON_PICTURES")

# Without the Rust data server and with it; below a prefix and not.
PLAIN, PREFIXED = ("false", ""), ("true", "/some/where")
SERVERS = [PLAIN, PREFIXED, ("false", "/some/where"), ("true", "")] if REQUIRED else [PREFIXED]

REPORTS = make_reports(**{"calm": 0.0, "worst": -1.0, HOSTILE: -0.5})
SPAN, COLUMNS, LENGTH = 20, 3, 20


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not HAS_CHROMIUM:
        assert not REQUIRED, NO_CHROMIUM
        pytest.skip(NO_CHROMIUM)
    with chromium(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], str]]:
    logs = tmp_path_factory.mktemp("logs")
    write(logs / "first", REPORTS)
    write(logs / "second", make_reports(calm=0.2, worst=-0.3))
    with contextlib.ExitStack() as running:
        yield {
            (fast, prefix): running.enter_context(tensorboard(logs, "--load_fast", fast, "--path_prefix", prefix))
            for fast, prefix in SERVERS
        }


def at(seen: Visit, step: int, position: int) -> dict[str, float]:
    """Return where a cell is in the first heat map."""
    box = seen.content.locator("canvas.heatmap").first.bounding_box()
    width, height = box["width"] - 62, box["height"] - 44
    until = SPAN + SPAN / (COLUMNS - 1)
    return {"x": 52 + width * (step + 5) / until, "y": 8 + height * (1 - (position + 0.5) / LENGTH)}


def numbers(text: str) -> list[float]:
    return [float(word) for word in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)]


@pytest.mark.parametrize(("fast", "prefix"), SERVERS)
def test_the_tab_shows_the_numbers_of_the_report(browser: Any, servers: Any, fast: str, prefix: str) -> None:
    seen = visit(browser, f"{servers[fast, prefix]}#keras_jacmon")
    names = seen.content.locator("button.layer .name").all_text_contents()
    assert names == ["worst", HOSTILE, "calm"]
    verdict = REPORTS[-1][1].verdict["worst"]
    words = seen.content.locator("button.layer .words").first.text_content()
    assert words.startswith(f"vanishing after {verdict.horizon:.0f} of 20 steps, growth {verdict.growth:+.2g}")
    seen.content.locator("canvas.heatmap").hover(position=at(seen, 10, 7))
    readout = seen.content.locator(".readout", has_text="90 %")
    text = readout.text_content(timeout=10_000)
    assert text.startswith("step 10, position 7: ")
    values = REPORTS[1][1]["worst"]["joint/variance"][7]
    np.testing.assert_allclose(numbers(text), [values.mean(), *np.quantile(values, [0.1, 0.9])], rtol=5e-3)
    assert seen.complaints == []
    assert "TensorBoard" in seen.page.title()
    seen.page.close()


# The steps that the charts show, one after the other. To look now and then would miss the short ones.
NOTE_STEPS = """main => {
  main.stops = [];
  const note = () => main.stops.push(JSON.parse(main.dataset.measured)[3]);
  new MutationObserver(note).observe(main, { attributeFilter: ["data-measured"] });
}"""
FIRST_STEPS = """main => new Promise((resolve) => {
  const timer = setInterval(() => main.stops.length < 3 || finish(), 50);
  const finish = () => { clearInterval(timer); resolve(main.stops.slice(0, 3)); };
  setTimeout(finish, 30000);
})"""


def slowly(route: Any) -> None:
    """Answer after twice the time for which a step is shown."""
    time.sleep(0.4)
    route.continue_()


def test_everything_that_can_be_done(browser: Any, servers: Any) -> None:
    seen = visit(browser, f"{servers[SERVERS[0]]}#keras_jacmon")
    main, content = seen.content.locator("main"), seen.content

    def measured(layer: str, step: int) -> None:
        content.locator(f"main[data-measured*='\"{layer}\"'][data-measured$=',{step}]']").wait_for(timeout=10_000)

    measured("worst", 20)
    assert (
        content.locator(".together").text_content().endswith("first/jacobian, first/jacobian/max, first/jacobian/min.")
    )
    # The band, the mean, its edges, and the target of the regularizer.
    assert content.locator(".chart").first.locator(".scatterlayer .trace").count() == 4
    assert content.locator(".chart", has_text="target of the regularizer: 0.8").count() == 1
    assert content.locator("section", has_text="What the loss feels of a step").locator(".trace").count() == 3
    content.locator("button.layer", has_text="calm").click()
    measured("calm", 20)
    content.locator("canvas.heatmap").click(position=at(seen, 10, 3))
    measured("calm", 10)
    content.locator("canvas.heatmap").press("ArrowLeft")
    measured("calm", 0)
    content.get_by_role("slider", name="training step").press("End")
    measured("calm", 20)
    # Answers that take longer than a step is shown for, and are not known yet.
    content.get_by_label("measure", exact=True).select_option("spectral_norm")
    content.locator("main[data-measured*='joint/spectral_norm']").wait_for(timeout=10_000)
    seen.page.route("**/measurement?*", slowly)
    main.evaluate(NOTE_STEPS)
    content.get_by_role("button", name="Play").click()
    assert main.evaluate(FIRST_STEPS) == [0, 10, 20]
    content.get_by_role("button", name="Pause").click()
    seen.page.unroute("**/measurement?*")
    content.get_by_label("measure", exact=True).select_option("variance")
    content.get_by_label("compare with").select_option("second/jacobian")
    content.locator("canvas.heatmap").nth(1).wait_for(timeout=10_000)
    content.get_by_label("measure", exact=True).select_option("spectral_norm")
    content.locator("main[data-measured*='joint/spectral_norm']").wait_for(timeout=10_000)
    # Of two runs: the band, the mean and its edges each.
    assert content.locator(".chart").first.locator(".scatterlayer .trace").count() == 6
    before = main.get_attribute("data-measured")
    seen.page.reload()
    seen.shown()
    assert main.get_attribute("data-measured") == before
    assert content.locator("canvas.heatmap").count() == 2
    assert seen.complaints == []
    seen.page.close()


# Sooner or later: until the charts are drawn anew they are as wide as before.
FITS = """body => new Promise((resolve) => {
  const look = () => body.scrollWidth <= window.innerWidth ? resolve(true) : setTimeout(look, 50);
  setTimeout(() => resolve(false), 30000);
  look();
})"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_every_screen(browser: Any, servers: Any, theme: str) -> None:
    seen = visit(browser, f"{servers[PREFIXED]}?darkMode={str(theme == 'dark').lower()}#keras_jacmon")
    body = seen.content.locator("body")
    assert ("dark" in body.get_attribute("class").split()) == (theme == "dark")
    for width in (1440, 1024, 390):
        seen.page.set_viewport_size({"width": width, "height": 1400})
        assert body.evaluate(FITS)
        if PICTURES:
            seen.page.screenshot(path=f"{PICTURES}/{width}_{theme}.png")
    assert seen.complaints == []
    seen.page.close()


def test_custom_scalars_have_a_group_for_each_layer(browser: Any, servers: Any) -> None:
    page = browser.new_page()
    page.goto(f"{servers[PREFIXED]}#custom_scalars")
    # Of the first layer, which is open.
    page.locator("tf-custom-scalar-margin-chart-card").nth(1).wait_for(timeout=60_000)
    titles = page.locator("tf-category-paginated-view .heading .category-name").all_text_contents()
    assert [title.strip() for title in titles if title.strip() in ("calm", "worst")] == ["calm", "worst"]
    drawn = page.locator("tf-custom-scalar-margin-chart-card", has_text="joint/variance").first
    drawn.locator("text=Matches (2)").wait_for(timeout=30_000)
    page.close()


def test_the_page_of_one_file_needs_no_network(browser: Any, tmp_path: Path) -> None:
    REPORTS[-1][1].to_html(tmp_path / "page.html")
    browser.set_offline(True)
    try:
        seen = visit(browser, (tmp_path / "page.html").as_uri(), in_frame=False)
        assert seen.page.title() == "Jacobians"
        assert seen.content.locator("button.layer .name").all_text_contents() == ["worst", HOSTILE, "calm"]
        seen.content.locator("button.layer", has_text="calm").click()
        seen.content.locator("main[data-measured*='calm']").wait_for(timeout=10_000)
        assert seen.content.locator(".chart .scatterlayer").count() >= 3
        assert seen.complaints == []
        if PICTURES:
            seen.page.screenshot(path=f"{PICTURES}/one_file.png")
        seen.page.close()
    finally:
        browser.set_offline(False)
