"""The report's page as a person uses it, in a real headless Chromium: nothing is loaded, nothing overflows, it works.

pytest tests/fwlora_lab/report/test_report_page.py
"""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_study
import pytest

from fwlora_lab.analysis.results import read_study
from fwlora_lab.analysis.study import analyse
from fwlora_lab.report import figures
from fwlora_lab.report.page import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver (Debian: chromium, chromium-driver)"
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study of two tasks and four methods, with a failed run, a missing one, long words, and a search's plot."""
    folder = tmp_path_factory.mktemp("study")
    fake_study.full_study(folder)
    shutil.rmtree(folder / "sst2-0.2-adalora" / "seed-5")
    cfg = fake_study.config(folder, "cola", "fw_lora")
    failure = {"type": "RuntimeError", "message": "x" * 300, "traceback": "Traceback: " + "y" * 400}
    fake_study.write(folder, cfg, fake_study.record(cfg, 5, 0.5, status="failed", error=failure, warnings=["z" * 300]))
    search = folder / "cola-0.2-lora" / "search"
    search.mkdir()
    (search / "history.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="900pt" height="300pt" viewBox="0 0 900 300">'
        '<style>* {display: none}</style><rect id="figure_1" width="900" height="300" fill="#ffffff"/></svg>'
    )
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # The driver's path is given: selenium asks nobody on the network for one.
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(browser, folder) -> Any:
    look(browser, 1440, "light")
    browser.get((folder / "report.html").as_uri())
    return browser


def look(browser, width: int, scheme: str, media: str = "") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},  # a click waits for no scrolling
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def open_all(page) -> None:
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")


def test_nothing_is_requested_and_the_console_is_silent(page, folder):
    page.get_log("browser")
    page.get_log("performance")
    page.refresh()
    open_all(page)
    for width, scheme in ((360, "dark"), (1440, "light")):
        look(page, width, scheme)
    page.execute_script("scrollTo(0, document.body.scrollHeight)")
    page.find_element("css selector", "#comparisons-table th button").click()
    page.find_element("css selector", "button[data-copy]").click()
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("data:")} == {(folder / "report.html").as_uri()}


def test_what_is_not_the_pages_own_is_refused(page):
    """The page's policy: no script of anybody else's runs, and nothing can be fetched, should a text ever get in."""
    ran = page.execute_async_script(
        "const s = document.createElement('script'); s.textContent = 'window.evil = 1'; document.body.append(s);"
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
        "fetch('http://127.0.0.1:9/x.json').catch(() => 0).then(() => arguments[0](window.evil || 0))"
    )
    assert ran == 0
    told = " ".join(entry["message"] for entry in page.get_log("browser"))
    for directive in ("script-src", "img-src", "default-src"):
        assert re.search(f"Content Security Policy directive:? .{{0,3}}{directive} ", told), (directive, told)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_overflows_and_figures_can_be_read(page, width, scheme):
    look(page, width, scheme)
    open_all(page)
    whole, window = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert whole <= window == width
    outside = page.execute_script(
        """
        const within = e => { for (let p = e.parentElement; p; p = p.parentElement)
          if (getComputedStyle(p).overflowX !== "visible") return true; return false; };
        return [...document.querySelectorAll("body *")].filter(e => !e.closest("svg") && !within(e)
          && (e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
          && !e.matches(".skip")).map(e => e.outerHTML.slice(0, 120));
        """
    )
    assert outside == []
    # Figures' text keeps a readable size, and lies within its figure.
    sizes, cut = page.execute_script(
        """
        const texts = [...document.querySelectorAll("figure > svg text")];
        const cut = texts.filter(t => { const [a, b] = [t, t.closest("figure")].map(e => e.getBoundingClientRect());
          return a.left < b.left - 1 || a.right > b.right + 1; }).map(t => t.textContent);
        const size = t => parseFloat(getComputedStyle(t).fontSize);
        const scale = t => { const m = t.getScreenCTM(); return Math.hypot(m.c, m.d); };
        return [texts.map(t => size(t) * scale(t)), cut];
        """
    )
    assert cut == [] and len(sizes) > 100
    assert 8 <= min(sizes) and max(sizes) < 17


def luminance(colour: list[float]) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_and_words_follow_the_theme_with_contrast(page, scheme):
    look(page, 1440, scheme)
    found = page.execute_script(
        """
        const probe = document.createElement("span"); document.body.append(probe);
        const rgb = name => { probe.style.color = `var(${name})`;
          return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number); };
        const names = ["--surface", "--paper", "--ink", "--muted", "--accent", "--holds", "--fails", "--undecided",
          "--doubt", "--m0", "--m1", "--m2", "--m3", "--m4", "--m5"];
        const out = Object.fromEntries(names.map(n => [n, rgb(n)]));
        out.drawn = getComputedStyle(document.querySelector("figure > svg text")).fill.match(/\\d+/g).map(Number);
        return out;
        """
    )
    assert found["drawn"][:3] == found["--ink"], "a figure's text is the page's ink"
    assert (luminance(found["--paper"]) > 0.5) == (scheme == "light")
    for name in set(found) - {"drawn", "--surface", "--paper"}:
        for ground in ("--surface", "--paper"):
            light, dark = sorted((luminance(found[name]), luminance(found[ground])), reverse=True)
            least = 3 if name.startswith("--m") and name != "--muted" else 4.5  # WCAG: marks, text
            assert (light + 0.05) / (dark + 0.05) >= least, (name, ground)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_on_a_heat_map_can_be_read_at_every_strength(page, scheme):
    look(page, 1440, scheme)
    names = ["--surface", "--heat", "--on-pale", "--on-strong"]
    of = "return arguments[0].map(name => getComputedStyle(document.documentElement).getPropertyValue(name).trim())"
    found = page.execute_script(of, names)
    surface, heat, pale, strong = (
        [int(c * (2 if len(v) == 4 else 1), 16) for c in re.findall("." * (len(v) // 3), v[1:])] for v in found
    )
    for share in range(101):
        alpha = figures.heat_strength(share / 100)
        cell = luminance([alpha * h + (1 - alpha) * s for h, s in zip(heat, surface, strict=True)])
        ink = luminance(strong if alpha > figures.HEAT_TURNS else pale)
        assert (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05) >= 4, share


def values(page, table: str, key: str) -> list[str]:
    cells = page.find_elements("css selector", f"#{table} td[data-key={key}]")
    return [cell.get_attribute("data-value") for cell in cells]


def test_tables_sort_by_number_and_by_word_with_mouse_and_keyboard(page):
    def heading(text):
        path = f"//table[@id='comparisons-table']//th[button[starts-with(., '{text}')]]"
        return page.find_element("xpath", path)

    before = [float(v) for v in values(page, "comparisons-table", "mean_difference_points")]
    assert before == sorted(before) and before[0] < 0
    button = heading("p, paired t").find_element("css selector", "button")
    button.click()
    p = [float(v) for v in values(page, "comparisons-table", "p")]
    assert p == sorted(p) and p != sorted(p, reverse=True)
    assert heading("p, paired t").get_attribute("aria-sort") == "ascending"
    button.send_keys("\ue007")  # Enter
    assert [float(v) for v in values(page, "comparisons-table", "p")] == sorted(p, reverse=True)
    assert heading("p, paired t").get_attribute("aria-sort") == "descending"
    heading("method").find_element("css selector", "button").click()
    methods = values(page, "comparisons-table", "method")
    assert methods == sorted(methods) and heading("p, paired t").get_attribute("aria-sort") is None
    # Rows stay whole, and what has no number stands last either way.
    open_all(page)
    for _ in range(2):
        page.find_element("xpath", "//table[@id='seeds-table']//th[button[starts-with(., 'accuracy')]]/button").click()
        accuracy, tasks = values(page, "seeds-table", "accuracy"), values(page, "seeds-table", "task")
        assert [t for t, a in zip(tasks, accuracy, strict=True) if a] == ["sst2"] * 23
        assert accuracy[:23] == sorted(accuracy[:23], key=float, reverse=_ == 1) and not any(accuracy[23:])


def test_numbers_are_copied_as_csv(page, folder):
    page.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    button = page.find_element("css selector", "button[data-copy=comparisons-table-csv]")
    button.click()
    message = "return document.querySelector('[data-copy=comparisons-table-csv] + .message').textContent"
    wait_for(page, message, "copied")
    copied = page.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], e => arguments[0](String(e)))"
    )
    assert copied == (folder / "comparison" / "comparisons.csv").read_text()
    assert page.find_element("id", "announcement").get_attribute("textContent") == "copied", "screen readers hear it"
    figure = page.find_element("css selector", "#scores ~ .figures figure")
    figure.find_element("css selector", "button").click()
    wait_for(page, "return document.querySelector('#scores ~ .figures figure .message').textContent", "copied")
    copied = page.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], e => arguments[0](String(e)))"
    )
    rows = list(csv.DictReader(copied.splitlines()))
    mean = analyse(read_study(folder)).groups[0].cells[0].summary.mean
    assert mean is not None and float(rows[0]["mean_points"]) == pytest.approx(100 * mean)


def test_where_the_clipboard_is_closed_the_text_is_there_to_be_copied(page, folder):
    page.execute_script(
        "navigator.clipboard.writeText = () => Promise.reject(new Error('closed')); document.execCommand = () => false"
    )
    page.find_element("css selector", "button[data-copy=scores-table-csv]").click()
    told = "return document.querySelector('[data-copy=scores-table-csv] + .message').textContent"
    wait_for(page, told, "selected: press Ctrl+C")
    box = page.find_element("id", "scores-table-csv")
    assert box.is_displayed() and page.switch_to.active_element == box
    text = page.execute_script(
        "const b = document.activeElement; return b.value.slice(b.selectionStart, b.selectionEnd)"
    )
    assert text.startswith("task,budget_percent,method,metric,seeds,mean_points") and text.count("\n") == 9


def wait_for(page, script: str, value: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 5).until(lambda browser: browser.execute_script(script) == value)


def test_it_is_a_document_with_headings_names_and_descriptions(page):
    open_all(page)
    found = page.execute_script(
        """
        const levels = [...document.querySelectorAll("h1, h2, h3")].map(h => Number(h.tagName[1]));
        const tree = e => e.getAttribute("aria-label") || "";
        return {
          levels,
          figures: [...document.querySelectorAll("figure > svg")].map(tree),
          strips: [...document.querySelectorAll(".strip, .paper")].map(tree),
          tables: [...document.querySelectorAll("table")].map(t => t.caption?.textContent || ""),
          badges: [...document.querySelectorAll(".verdict")].map(v => {
            const shape = v.querySelector(".badge svg > :first-child");
            return [v.dataset.state, v.querySelector(".badge").innerText, shape.tagName + shape.getAttribute("d")];
          }),
          states: [...document.querySelectorAll("#run-grid td.state .sr")].map(e => e.textContent),
          language: document.documentElement.lang, main: document.querySelectorAll("main").length,
        };
        """
    )
    levels = found["levels"]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert len(found["figures"]) == 22 and all(len(text) > 40 for text in found["figures"])
    assert all(found["strips"]) and all(found["tables"])
    assert all(state == word for state, word, _ in found["badges"]), "a word, not a colour alone"
    assert len({shape for _, _, shape in found["badges"]}) == len({state for state, _, _ in found["badges"]}) == 3
    assert found["states"].count("complete") == 46 and {"failed", "missing"} <= set(found["states"])
    assert (found["language"], found["main"]) == ("en", 1)


def test_a_foreign_plot_does_not_reach_the_page(page):
    open_all(page)
    assert page.find_element("css selector", ".paper svg").is_displayed(), "its style sheet is gone"


def test_it_prints_everything_in_ink_on_paper(page):
    look(page, 1440, "dark", "print")
    found = page.execute_script(
        """
        const style = getComputedStyle(document.body);
        return [style.backgroundColor, style.color, getComputedStyle(document.querySelector(".tools")).display,
          getComputedStyle(document.querySelector("nav")).display,
          getComputedStyle(document.querySelector("thead button")).display];
        """
    )
    assert found == ["rgb(255, 255, 255)", "rgb(0, 0, 0)", "none", "none", "inline"]
    page.execute_script(
        "window.opened = 0; addEventListener('beforeprint', () => setTimeout(() => 0), {once: true});"
        "addEventListener('beforeprint', () => { opened = document.querySelectorAll('details[open]').length })"
    )
    closed = len(page.find_elements("css selector", "details:not([open])"))
    printed = page.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    assert page.execute_script("return opened") == len(page.find_elements("css selector", "details"))
    assert len(page.find_elements("css selector", "details:not([open])")) == closed > 0, "closed again"
