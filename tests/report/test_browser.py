"""The page in a real browser: nothing fails, nothing is loaded, sorting and hovering work, on a phone, in the dark and on paper."""

from __future__ import annotations

import shutil

import pytest

from report_samples import EVIL, sample_report
from whet.records import Report
from whet.report.html import write_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def data():
    data = sample_report()
    data["runtimes"] = [data["original"], data["compressed"]]
    data["steps"][0]["changed"][0]["sensitivity"] = 0.013
    return data


@pytest.fixture(scope="module")
def path(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(Report(data), path)
    return path


class Watched:
    """An opened page, and everything that it complained of or asked for."""

    def __init__(self, browser, path, **context) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **context})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())


@pytest.fixture
def opened(browser, path):
    made: list[Watched] = []

    def open_page(**context) -> Watched:
        made.append(Watched(browser, path, **context))
        return made[-1]

    yield open_page
    for watched in made:
        watched.context.close()


def test_nothing_fails_and_nothing_is_loaded(opened, path) -> None:
    watched = opened()
    for button in watched.page.locator("button:visible").all():
        if button.get_attribute("id") is None:
            button.click()
    watched.page.locator("summary").first.click()
    assert watched.said == []
    assert watched.asked == [path.as_uri()]


def test_the_watch_sees_errors_and_requests(opened, tmp_path, browser) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://localhost:9/x.png'><script>alert(1)</script><script>missing()</script>")
    watched = Watched(browser, bad)
    watched.page.wait_for_load_state()
    assert any("missing" in text for text in watched.said) and "1" in watched.said
    assert "http://localhost:9/x.png" in watched.asked
    watched.context.close()


def test_a_layer_named_like_a_script_stays_text(opened) -> None:
    page = opened().page
    assert page.locator("td.name", has_text=f"{EVIL}.weight").count() == 1
    assert page.locator("script").count() == 2  # the data and the page's own


def weights(page):
    """The weights' table in its present order, as rows of texts."""
    table = page.locator("table.sortable").first
    return [[cell.strip() for cell in row.locator("td").all_inner_texts()] for row in table.locator("tbody tr").all()]


def test_sorting_by_numbers_by_names_and_with_gaps(opened) -> None:
    page = opened().page
    heads = page.locator("table.sortable").first.locator("th button")
    heads.filter(has_text="parameters").click()
    assert [row[1] for row in weights(page)] == ["90", "500", "1,800", "16,000"]
    heads.filter(has_text="parameters").press("Enter")
    assert [row[1] for row in weights(page)] == ["16,000", "1,800", "500", "90"]
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("parameters")
    heads.filter(has_text="weight").click()
    assert [row[0] for row in weights(page)] == [f"{EVIL}.weight", "conv1.weight", "conv2.weight", "fc2.weight"]
    for _ in range(2):
        heads.filter(has_text="sensitivity").click()
        assert weights(page)[0][0] == "conv1.weight"  # the only one with a value, first in both orders


def test_hovering_tells_a_recipes_numbers(opened) -> None:
    page = opened().page
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator("svg[aria-label^='accuracy against the file'] .chosen .halo").hover()
    assert tip.inner_text().splitlines()[:3] == ["recipe 2", "97.7 % [95.7, 98.7]", "27.1 kB"]
    page.locator("svg[aria-label^='accuracy against the median'] .original .halo").hover()
    assert tip.inner_text().splitlines() == ["original", "98.0 % [96.0, 99.0]", "0.0211 ms"]
    page.mouse.move(2, 2)
    assert tip.is_hidden()


def test_hovering_tells_an_epoch_and_a_bin(opened) -> None:
    page = opened().page
    page.locator("svg[aria-label^='training loss'] .halo").first.hover()
    assert page.locator("#tip").inner_text() == "epoch 0: 1.980"
    chart = page.locator("svg.hist").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 16.5 / 32, box["y"] + 5)
    assert page.locator("#tip").inner_text().splitlines() == ["0 to 0.00781", "before: 895 (8.0 %)", "after: 8,652 (77.7 %)"]


def test_the_keyboard_reaches_what_the_pointer_does(opened) -> None:
    page = opened().page
    tip = page.locator("#tip")
    page.locator("svg[aria-label^='accuracy against the file']").focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("original")
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("recipe 1")
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.locator("svg.hist").first.focus()
    page.keyboard.press("ArrowRight")
    assert "before:" in tip.inner_text()


def test_a_phone_needs_no_sideways_scrolling_and_a_finger_gets_the_values(opened) -> None:
    page = opened(viewport={"width": 375, "height": 800}, has_touch=True, is_mobile=True, device_scale_factor=2).page
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [375, 375]
    page.locator("svg .chosen .halo").first.tap()
    tip = page.locator("#tip")
    assert "recipe 2" in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 375
    page.locator("h1").tap()
    assert tip.is_hidden()
    small = page.evaluate("""() => [...document.querySelectorAll("main *")].filter((e) => !e.closest("svg") && !e.closest("[hidden]")
        && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) && parseFloat(getComputedStyle(e).fontSize) < 12)
        .map((e) => e.outerHTML.slice(0, 80))""")
    assert small == []


# WCAG's contrast of every text with the nearest opaque background behind it.
CONTRAST = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("script, style, [hidden], title")) continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(parse(e.closest("svg") ? style.fill : style.color)), light(behind(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 90)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(opened, scheme) -> None:
    page = opened(color_scheme=scheme).page
    page.locator("svg .chosen .halo").first.hover()
    found = page.evaluate(CONTRAST)
    assert len(found) > 150
    assert [item for item in found if item[0] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 3 * 64) == (scheme == "dark")


def test_paper_gets_everything_open_and_no_buttons(opened) -> None:
    watched = opened(color_scheme="dark")
    page = watched.page
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".action:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [item for item in page.evaluate(CONTRAST) if item[0] < 4.5] == []
    page.emulate_media(media=None)
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF") and watched.said == []


def test_the_recipe_is_copied_and_the_json_saved(opened, data, tmp_path) -> None:
    watched = opened()
    page = watched.page
    page.locator("#copy-recipe").click()
    page.wait_for_function("/^(Copied|Selected)/.test(document.getElementById('copy-recipe').textContent)")
    with page.expect_download() as saving:
        page.locator("#save-json").click()
    saving.value.save_as(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json").data == data


def test_points_that_cover_each_other_are_told_together(browser, tmp_path) -> None:
    data = sample_report()
    data["candidates"][0]["on_val"] = data["candidates"][1]["on_val"]
    write_html(Report(data), tmp_path / "same.html")
    watched = Watched(browser, tmp_path / "same.html")
    watched.page.locator("svg[aria-label^='accuracy against the file'] .chosen .halo").hover()
    said = watched.page.locator("#tip").inner_text()
    assert said.startswith("recipe 2") and "recipe 1" in said and "original" not in said
    watched.context.close()


def test_a_hostile_recipe_stays_text_under_the_pointer(browser, tmp_path) -> None:
    data = sample_report()
    hostile = "<img src=x onerror=alert(1)>"
    data["candidates"][1]["recipe"] = [{"Prune": {"keep": [hostile]}}]
    write_html(Report(data), tmp_path / "hostile.html")
    watched = Watched(browser, tmp_path / "hostile.html")
    watched.page.locator("svg .chosen .halo").first.hover()
    assert hostile in watched.page.locator("#tip").inner_text()
    assert watched.page.locator("img").count() == 0 and watched.said == []
    watched.context.close()
