"""The report in a real browser: it opens in silence, sorts, filters, fetches nothing, and is read without a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="selenium is not installed (it is in the dev extra)")

from scripts.screenshot_report import find_chromium, set_view, start_chromium, take_screenshots
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from manyicl.report.document import write_report
from tests.support.comparison_data import make_comparison, write_comparison

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="needs chromium and chromedriver"),
]
# Everything that an author could forget to make fit: tables are wide, names and inputs long, one text hostile.
LONG_NAME = "a_task_with_a_name_that_is_much_longer_than_a_phone_is_wide_and_has_no_spaces_at_all_in_it"
HOSTILE = (
    "<img src=https://example.com/x.png onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = make_comparison(num_seeds=3, num_tasks=10)
    text = json.dumps(content).replace(content["tasks"][3]["task"], LONG_NAME)
    content = json.loads(text)
    content["examples"][0]["input"] = HOSTILE
    content["device"] = HOSTILE
    return write_report(write_comparison(tmp_path_factory.mktemp("report"), content))


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with start_chromium() as started:
        yield started


@pytest.fixture
def page(browser: Chrome, report: Path) -> Chrome:
    set_view(browser, width=1200, height=900)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(report.as_uri())
    return browser


def column(page: Chrome, number: int) -> list[str]:
    """Return the shown cells of one column of the table of tasks."""
    rows = page.find_elements(By.CSS_SELECTOR, "#task-table tbody tr")
    return [row.find_elements(By.CSS_SELECTOR, "th, td")[number].text for row in rows if row.is_displayed()]


def head(page: Chrome, name: str):
    heads = page.find_elements(By.CSS_SELECTOR, "#task-table thead th")
    return next((number, cell) for number, cell in enumerate(heads) if cell.text.startswith(name))


def test_the_page_opens_without_a_word_on_the_console_and_runs_no_text_of_a_user(page):
    assert page.title == "world-five-arms: a comparison by manyicl"
    assert page.get_log("browser") == []
    assert page.find_elements(By.TAG_NAME, "img") == []
    assert HOSTILE in page.find_element(By.CSS_SELECTOR, ".example .input").text


def test_the_page_fetches_nothing(page, report):
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked == [report.as_uri()]


def test_the_policy_would_stop_what_an_author_let_slip(page):
    page.execute_script(
        "const i = document.createElement('img'); i.src = 'https://example.com/x.png'; document.body.append(i);"
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
    )
    assert page.execute_script("return window.ran") is None
    refused = [entry["message"] for entry in page.get_log("browser")]
    assert any("Content Security Policy" in message and "example.com" in message for message in refused)


def test_a_click_on_a_head_sorts_and_another_turns_it_round(page):
    number, cell = head(page, "Zero-shot")
    button = cell.find_element(By.TAG_NAME, "button")
    button.click()
    scores = [float(text) for text in column(page, number)]
    assert scores == sorted(scores, reverse=True)  # numbers begin with the best
    assert len(set(scores)) > 5
    assert head(page, "Zero-shot")[1].get_attribute("aria-sort") == "descending"
    button.click()
    assert [float(text) for text in column(page, number)] == sorted(scores)
    assert head(page, "Zero-shot")[1].get_attribute("aria-sort") == "ascending"
    head(page, "Task")[1].find_element(By.TAG_NAME, "button").click()
    names = column(page, 0)
    assert names == sorted(names)
    assert head(page, "Zero-shot")[1].get_attribute("aria-sort") is None


def test_what_was_not_measured_is_last_either_way(page):
    number, cell = head(page, "Dedicated")
    button = cell.find_element(By.TAG_NAME, "button")
    for _ in range(2):
        button.send_keys(Keys.ENTER)  # the keyboard does as well
        assert column(page, number)[-4:] == ["–"] * 4


def test_filters_show_what_fits_all_of_them_and_count_it(page):
    count = page.find_element(By.ID, "filter-count")
    assert count.text == "10 of 10 tasks"
    Select(page.find_element(By.ID, "filter-role")).select_by_visible_text("held-out")
    assert count.text == "4 of 10 tasks"
    assert set(column(page, head(page, "Role")[0])) == {"held-out"}
    Select(page.find_element(By.ID, "filter-family")).select_by_visible_text("qa")
    assert column(page, 0) == ["qa_birch_07"]
    page.find_element(By.ID, "filter-name").send_keys("no such task")
    assert count.text == "0 of 10 tasks"
    assert column(page, 0) == []


def test_a_tasks_name_leads_to_its_curves_which_were_folded(page):
    page.find_element(By.LINK_TEXT, "qa_birch_07").click()
    place = page.find_element(By.ID, "task-7")
    assert place.get_attribute("open") is not None
    assert "worst draw" in place.find_element(By.TAG_NAME, "table").text


@pytest.mark.parametrize("width", [390, 320, 1200])
def test_the_page_never_scrolls_sideways(page, report, width):
    set_view(page, width=width, height=844)
    page.get(report.as_uri())
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    scroll, inner = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert scroll <= inner == width
    table = page.find_element(By.CSS_SELECTOR, "#scores .box")
    scrolls = "return arguments[0].scrollWidth > arguments[0].clientWidth"
    assert page.execute_script(scrolls, table) == (width < 1000)  # the table does, in its own box
    shown = page.execute_script("return getComputedStyle(arguments[0]).backgroundAttachment", table)
    assert shown == "local, scroll"  # an edge in shadow as long as there is more to the right


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_paper(page, report, scheme):
    set_view(page, width=1200, height=900, scheme=scheme)
    page.get(report.as_uri())
    colour = "return getComputedStyle(arguments[0])[arguments[1]]"
    paper = luminance(page.execute_script(colour, page.find_element(By.TAG_NAME, "body"), "backgroundColor"))
    assert (paper < 0.05) == (scheme == "dark")
    texts = {
        ".verdict": "color",
        ".facts dt": "color",
        ".note": "color",
        "td .interval": "color",
        "nav a": "color",
        ".legend li": "color",
        ".plot text": "fill",
    }
    for selector, key in texts.items():
        ink = luminance(page.execute_script(colour, page.find_element(By.CSS_SELECTOR, selector), key))
        low, high = sorted((ink, paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector


def test_without_javascript_everything_is_there_and_what_needs_it_is_not(report):
    with start_chromium(javascript=False) as browser:
        set_view(browser, width=1200, height=900)
        browser.get(report.as_uri())
        text = browser.find_element(By.TAG_NAME, "body").text
        for words in ("ManyICL answers", "Score against shots", "Paired differences", "How to read it", "qa_birch_07"):
            assert words in text
        assert not browser.find_element(By.ID, "filters").is_displayed()
        assert browser.find_elements(By.CSS_SELECTOR, "th button") == []
        rows = browser.find_elements(By.CSS_SELECTOR, "#task-table tbody tr")
        assert [row.is_displayed() for row in rows] == [True] * 10
        folded = browser.find_element(By.CSS_SELECTOR, "#costs details")
        folded.find_element(By.TAG_NAME, "summary").click()
        assert folded.find_element(By.TAG_NAME, "table").is_displayed()


def test_printed_what_was_folded_is_open_and_what_is_for_the_hand_is_gone(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not page.find_element(By.TAG_NAME, "nav").is_displayed()
    assert not page.find_element(By.ID, "filters").is_displayed()
    folded = page.find_element(By.CSS_SELECTOR, "#costs details table")
    height = page.execute_script("return arguments[0].getBoundingClientRect().height", folded)
    assert height > 100
    position = "return getComputedStyle(document.querySelector('tbody th')).position"
    assert page.execute_script(position) == "static"


def test_screenshots_are_pictures_of_the_sizes_they_are_named_for(report, tmp_path):
    paths = take_screenshots(report, tmp_path)
    assert [path.name for path in paths] == ["light.png", "dark.png", "phone.png", "phone-dark.png", "print.pdf"]
    sizes = [tuple(int.from_bytes(path.read_bytes()[i : i + 4], "big") for i in (16, 20)) for path in paths[:4]]
    assert sizes == [(1200, 1000), (1200, 1000), (780, 1688), (780, 1688)]
    assert paths[4].read_bytes().startswith(b"%PDF")
