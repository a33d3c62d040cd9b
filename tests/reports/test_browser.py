"""The page in a real browser: what a reader sees, points at and types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from divergence.reports.html import render_html
from tests.conftest import chromium
from tests.reports import cases

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

WIDTHS = (1440, 1100, 768, 390)
PAGES = {**cases.CASES, "smollm2": cases.recorded()}
Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers run as root, where Chromium's sandbox cannot.
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pages")
    for name, case in PAGES.items():
        (made / f"{name}.html").write_text(render_html(case), encoding="utf-8")
    return made


@pytest.fixture
def show(browser: Browser, folder: Path) -> Iterator[Open]:
    """Opens a page; afterwards it must have said nothing on the console and requested nothing."""
    contexts = []
    said: list[str] = []

    def refused(dialog: Any) -> None:
        said.append(dialog.message)
        dialog.dismiss()

    def opened(name: str, anchor: str = "", width: int = 1440, **context: Any) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **context))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.on("dialog", refused)
        requested: list[str] = []
        address = (folder / f"{name}.html").as_uri()
        page.goto(address + anchor)
        assert [url.partition("#")[0] for url in requested] == [address]
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def chosen(page: Page) -> str | None:
    return page.locator("#panel h2").text_content()


def shown_rows(page: Page) -> list[str]:
    return page.locator("#table tbody tr:visible th").all_text_contents()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_without_a_word_or_a_request(show: Open, name: str) -> None:
    page = show(name)
    assert page.locator(".badge").text_content() == PAGES[name].verdict.upper()


def test_a_page_of_thirty_layers_opens_within_a_second(show: Open) -> None:
    times = []
    for _ in range(3):
        page = show("smollm2")
        times.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert min(times) < 1000


@pytest.mark.parametrize("name", PAGES)
def test_nothing_scrolls_sideways_or_overlaps(show: Open, name: str) -> None:
    page = show(name)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
        assert page.evaluate(OUTSIDE) == [], width
        assert page.evaluate(OVERLAPS) == [], width


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("document.querySelector('.card').style.marginLeft = '-99px'", "OUTSIDE"),
        ("document.querySelector('.card').style.marginRight = '-99px'", "OVERLAPS"),
        ("document.querySelector('svg.plot text').setAttribute('y', 40)", "OVERLAPS"),
    ],
)
def test_the_check_for_overlaps_finds_one(show: Open, fault: str, check: str) -> None:
    page = show("fail")
    page.evaluate(fault)
    page.evaluate("document.querySelectorAll('svg.plot text').forEach((t) => t.setAttribute('x', 60))")
    assert page.evaluate({"OUTSIDE": OUTSIDE, "OVERLAPS": OVERLAPS}[check])


# Boxes that stick out of the window, and texts that their own box cuts off.
OUTSIDE = """() => [...document.querySelectorAll("body *:not(.skip)")].filter((e) => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1);
}).map((e) => e.outerHTML.slice(0, 80))"""

# Panels, cards, plots and captions that cover each other, and labels of a plot that do.
OVERLAPS = """() => {
  const apart = (within, query) => {
    const boxes = [...within.querySelectorAll(query)].filter((e) => e.getClientRects().length)
      .map((e) => [e, e.getBoundingClientRect()]);
    const found = [];
    boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
      if (a.contains(b) || b.contains(a)) return;
      const w = Math.min(x.right, y.right) - Math.max(x.left, y.left);
      const h = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
      if (w > 1 && h > 1) found.push(`${a.outerHTML.slice(0, 70)} | ${b.outerHTML.slice(0, 70)}`);
    }));
    return found;
  };
  return [
    ...apart(document, ".panel, .card, .facts > div, .verdict > *, .brand > *"),
    ...apart(document, ".line > b, .map .c, .chip"),
    ...apart(document, ".plots > div, figcaption, .legend"),
    ...[...document.querySelectorAll("svg.plot")].flatMap((svg) => apart(svg, "text")),
    ...[...document.querySelectorAll("#table tr")].slice(0, 20).flatMap((row) => apart(row, "th, td")),
  ];
}"""


@pytest.mark.parametrize("name", ["fail", "nan", "key-value", "smollm2"])
def test_the_first_screen_has_verdict_place_cause_and_fix(show: Open, name: str) -> None:
    """And the map of all layers, without scrolling."""
    page = show(name)
    for part in (".badge", "h1", ".card >> nth=0", ".card >> nth=1", ".card >> nth=2", ".map"):
        box = page.locator(part).bounding_box()
        assert box is not None, part
        assert box["y"] + box["height"] < 900, part


def test_a_name_from_the_model_stays_text(show: Open) -> None:
    page = show("evil")
    assert page.locator("img").count() == 0
    assert page.get_by_text(cases.EVIL).count() > 20
    assert chosen(page) == f"layers.0.{cases.EVIL}"


def test_the_first_divergence_is_chosen_at_first(show: Open) -> None:
    page = show("smollm2")
    assert chosen(page) == "layers.0.key"
    assert page.locator("#table tr.cur th").text_content() == "layers.0.key"


def test_a_link_to_a_layer_chooses_it(show: Open) -> None:
    assert chosen(show("smollm2", "#layers.3.key")) == "layers.3.key"
    assert chosen(show("smollm2", "#layers.4")) == "layers.4.key"
    assert chosen(show("stacks", "#expert.layers.3.hidden@2")) == "expert.layers.3.hidden@2"
    page = show("smollm2", "#nowhere")
    assert chosen(page) == "layers.0.key"
    page.evaluate("location.hash = '#layers.29.hidden'")
    page.wait_for_function("document.querySelector('#panel h2').textContent === 'layers.29.hidden'")


def test_choosing_a_layer_marks_it_everywhere(show: Open) -> None:
    page = show("smollm2")
    page.locator(".map a[href='#layers.12.value']").click()
    assert chosen(page) == "layers.12.value"
    assert page.url.endswith("#layers.12.value")
    marked = page.locator(".hit.on")
    assert marked.count() == page.locator("svg.plot[tabindex]").count()
    assert {marked.nth(i).get_attribute("data-r") for i in range(marked.count())} == {"12"}
    on = page.locator("#table tr.on, #table tr.cur").locator("th").all_text_contents()
    assert on == ["layers.12.key", "layers.12.value", "layers.12.hidden"]
    assert page.locator(".map .on").count() == 2


def test_choosing_in_a_plot_chooses_its_tensor(show: Open) -> None:
    page = show("smollm2")
    page.locator("svg[data-kind=range][data-tensor=hidden] .hit[data-r='7']").click()
    assert chosen(page) == "layers.7.hidden"


def test_hovering_tells_the_values(show: Open) -> None:
    page = show("smollm2")
    site = PAGES["smollm2"].site("layers.5.key")
    tip = page.locator("#tip")
    assert not tip.is_visible()
    page.locator("svg[data-kind=accumulation][data-tensor=key] .hit[data-r='5']").hover()
    assert tip.is_visible()
    told = tip.text_content() or ""
    assert told.startswith("layers.5.key\nintroduced: ")
    assert f"cumulative: {site.rel_l2:.1e}".replace("e-0", "e-") in told
    page.locator("svg[data-kind=range][data-tensor=key] .hit[data-r='5']").hover()
    assert "reference: [" in (tip.text_content() or "")
    page.mouse.move(5, 5)
    assert not tip.is_visible()


def test_hovering_over_a_heat_map_tells_head_and_token(show: Open) -> None:
    page = show("smollm2")
    site = PAGES["smollm2"].site("layers.9.key")
    hit = page.locator("svg[data-kind=head][data-tensor=key] .hit[data-r='9']")
    hit.scroll_into_view_if_needed()
    box = hit.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.95)
    expected = f"{site.profile.head[2]:.1e}".replace("e-0", "e-")
    assert page.locator("#tip").text_content() == f"layers.9.key\nhead 2: {expected}"
    hit = page.locator("svg[data-kind=token][data-tensor=key] .hit[data-r='9']")
    hit.scroll_into_view_if_needed()
    box = hit.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 63.5 / 64)
    expected = f"{site.profile.token[63]:.1e}".replace("e-0", "e-")
    assert page.locator("#tip").text_content() == f"layers.9.key\ntoken 102 to 103: {expected}"


def test_the_tip_stays_within_the_window(show: Open) -> None:
    page = show("smollm2", width=390)
    hit = page.locator("svg[data-kind=accumulation][data-tensor=key] .hit[data-r='29']")
    hit.hover()
    box = page.locator("#tip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


def test_the_table_is_sorted_by_any_column(show: Open) -> None:
    page = show("smollm2")
    sites = PAGES["smollm2"].sites
    page.get_by_role("button", name="cumulative").click()
    worst = sorted(sites, key=lambda s: -(s.rel_l2 or 0))
    assert shown_rows(page)[:5] == [s.site for s in worst[:5]]
    head = page.locator("#table th[aria-sort]")
    assert (head.count(), head.get_attribute("aria-sort")) == (1, "descending")
    page.get_by_role("button", name="cumulative").click()
    assert shown_rows(page)[:5] == [s.site for s in worst[::-1][:5]]
    page.get_by_role("button", name="site", exact=True).click()
    assert shown_rows(page) == [s.site for s in sites]


def test_sites_without_a_figure_are_sorted_last(show: Open) -> None:
    page = show("nan")
    page.locator("#table thead button[data-c='0']").click()
    assert shown_rows(page)[0] == "layers.5.key"
    assert shown_rows(page)[-1] == "layers.11.hidden"


def test_the_table_is_filtered(show: Open) -> None:
    page = show("smollm2")
    page.locator("#filter").fill("layers.1?.*")
    assert page.locator("#count").text_content() == "0 of 91"
    page.locator("#filter").fill("layers.1*.key")
    assert shown_rows(page) == ["layers.1.key", *(f"layers.{n}.key" for n in range(10, 20))]
    page.locator("#filter").fill("")
    page.locator("#tensor").select_option("value")
    page.locator("#state").select_option("pass")
    assert shown_rows(page) == ["layers.0.value"]
    page.locator("#state").select_option("over")
    assert page.locator("#count").text_content() == "29 of 91"


def test_the_keyboard_reaches_everything(show: Open) -> None:
    page = show("smollm2")
    page.keyboard.press("ArrowRight")
    assert chosen(page) == "layers.1.key"
    page.keyboard.press("n")
    assert chosen(page) == "layers.1.hidden"
    page.keyboard.press("p")
    page.keyboard.press("p")
    assert chosen(page) == "layers.0.hidden"
    page.keyboard.press("/")
    page.keyboard.type("n")
    assert page.locator("#filter").input_value() == "n"
    assert chosen(page) == "layers.0.hidden"
    page.locator("#panel [data-step='1']").press("Enter")
    assert chosen(page) == "layers.1.key"


def test_the_map_takes_one_stop_of_the_tab_key_and_the_arrows(show: Open) -> None:
    page = show("smollm2")
    assert page.locator(".map a[tabindex='0']").count() == 1
    page.locator(".map a[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    assert chosen(page) == "layers.0.value"
    page.keyboard.press("ArrowRight")
    assert chosen(page) == "layers.1.value"
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#layers.1.value"


def test_a_column_can_be_sorted_by_keyboard(show: Open) -> None:
    page = show("smollm2")
    page.locator("#table thead button[data-c='0']").focus()
    page.keyboard.press("Enter")
    assert page.locator("#table th[aria-sort]").get_attribute("aria-sort") == "descending"


def background(page: Page) -> float:
    """Brightness of the page, from 0 to 255."""
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, color.removeprefix("rgb(").rstrip(")").split(","))) / 3


def test_the_page_follows_the_system_and_the_button(show: Open) -> None:
    light, dark = show("smollm2", color_scheme="light"), show("smollm2", color_scheme="dark")
    assert background(light) > 200
    assert background(dark) < 50
    dark.locator("#theme").click()
    assert background(dark) > 200
    dark.keyboard.press("t")
    assert background(dark) < 50


def test_plots_follow_the_colour_scheme(show: Open) -> None:
    color = "getComputedStyle(document.querySelector('svg[data-kind=accumulation] text')).fill"
    assert show("smollm2", color_scheme="light").evaluate(color) != show(
        "smollm2", color_scheme="dark"
    ).evaluate(color)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible(show: Open, scheme: str) -> None:
    """Contrast of text and background at least 4.5, as WCAG 2.1 asks for (1.4.3)."""
    page = show("smollm2", color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate(CONTRAST) == []


CONTRAST = """() => {
  const channels = (color) => {
    const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => rgb.map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const solid = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (!/rgba|color|transparent/.test(color)) return color;
    }
    return "white";
  };
  return [...document.querySelectorAll("p, h1, h2, h3, h4, dt, dd, td, th, th *, span, b, li, summary")]
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .filter((e) => e.getClientRects().length)
    .map((e) => {
      const [a, b] = [getComputedStyle(e).color, solid(e)].map((c) => luminance(channels(c)) + 0.05);
      return [Math.max(a, b) / Math.min(a, b), e.outerHTML.slice(0, 60)];
    })
    .filter(([ratio]) => ratio < 4.5);
}"""


def test_print_shows_all_and_no_controls(show: Open) -> None:
    page = show("smollm2", color_scheme="dark")
    page.emulate_media(media="print")
    assert background(page) > 200
    assert not page.locator(".filter").is_visible()
    assert not page.locator("#theme").is_visible()
    assert page.locator("#table tbody tr:visible").count() == 91
    assert page.pdf(format="A4")[:5] == b"%PDF-"
