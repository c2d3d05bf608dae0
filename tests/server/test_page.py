"""The page in a real browser, on the seed model behind the real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx2
import pytest

pytest.importorskip("selenium", reason="selenium is not installed (it is in the dev extra)")

from scripts.screenshot_report import find_chromium, set_view, start_chromium
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from manyicl.server import ServerSettings, make_token
from tests.server.conftest import ROWS, rows_as_csv
from tests.support.serving import app_in_thread
from tests.support.slow_service import SlowService, wait_until

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="needs chromium and chromedriver"),
]
HOSTILE = "<img src=https://example.com/x.png onerror=\"document.title='hacked'\"><b>bold</b>"
# Controls that a screen reader could not name.
NAMELESS = """return [...document.querySelectorAll("input, select, textarea, button, summary")]
  .filter((e) => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map((e) => e.outerHTML)"""
# The machine of the tests may be busy with others.
PATIENCE_S = 90


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with start_chromium() as started:
        yield started


@pytest.fixture
def page(browser: Chrome, url: str) -> Iterator[Chrome]:
    """The start of the page. After the test: it logged nothing, and fetched nothing from elsewhere."""
    yield from opened(browser, url)


def opened(browser: Chrome, url: str) -> Iterator[Chrome]:
    set_view(browser, width=1280, height=900)
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(f"{url}/")
    WebDriverWait(browser, PATIENCE_S).until(
        lambda _: browser.find_elements(By.CSS_SELECTOR, "#tasks li, dialog[open]")
    )
    yield browser
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [address for address in asked if not address.startswith(f"{url}/")] == []
    # A refusal of the service is in the console as a failed request; everything else there is a fault of the page.
    assert [entry for entry in browser.get_log("browser") if "Failed to load resource" not in entry["message"]] == []


def find(page: Chrome, selector: str):
    return page.find_element(By.CSS_SELECTOR, selector)


def wait(page: Chrome, selector: str, text: str = ""):
    """Return an element once it is shown and has a text."""

    def is_shown(_: Chrome):
        return next(
            (e for e in page.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed() and text in e.text), None
        )

    return WebDriverWait(page, PATIENCE_S, ignored_exceptions=[StaleElementReferenceException]).until(
        is_shown, f"{selector} with {text!r}"
    )


def wait_until_measured(page: Chrome) -> None:
    WebDriverWait(page, PATIENCE_S).until(lambda _: find(page, "#sentence").text.startswith("After "))


def focused(page: Chrome) -> str:
    return page.switch_to.active_element.get_attribute("id")


def await_curve(url: str, name: str) -> None:
    """Wait for the end of a task's measurement, which the page announces too, perhaps right after an answer."""
    address = f"{url}/v1/tasks/{quote(name)}/curve"
    assert wait_until(lambda: httpx2.get(address).json()["state"] == "done", seconds=PATIENCE_S)


def open_task(page: Chrome, url: str, name: str) -> None:
    page.get(f"{url}/#{quote(name)}")
    wait(page, "#task-name", name)
    wait(page, "#examples li")


def write_rows(path: Path, rows=ROWS) -> Path:
    path.write_bytes(rows_as_csv(rows))
    return path


def test_a_file_becomes_a_task_that_is_asked_and_corrected_and_its_curve_moves(page, url, tmp_path):
    find(page, "#new-file").send_keys(str(write_rows(tmp_path / "colours & animals.csv")))
    wait(page, "#task-name", "colours & animals")
    assert page.title == "colours & animals – manyicl"
    wait(page, "#news", "120 examples added.")
    wait_until_measured(page)
    assert len(page.find_elements(By.CSS_SELECTOR, "#curve .point")) >= 4
    assert page.find_elements(By.CSS_SELECTOR, "#curve .band, #curve .majority, #curve .before") != []
    assert page.find_elements(By.CSS_SELECTOR, "#curve .before") == []
    assert "examples shown; 0 shots: " in find(page, "#curve svg").get_attribute("aria-label")

    find(page, "#input").send_keys("the mauve badger 7")
    find(page, "#ask-button").click()
    wait(page, "#reply .correct")
    api = f"{url}/v1/tasks/{quote('colours & animals')}"
    reply = httpx2.post(f"{api}/predict", json={"input": "the mauve badger 7"}, timeout=60).json()["replies"][0]
    shown = [bar.text.split("\n") for bar in page.find_elements(By.CSS_SELECTOR, ".bars li")]
    ranked = sorted(reply["probabilities"], key=reply["probabilities"].get, reverse=True)
    assert [label for label, _ in shown] == ranked
    assert find(page, "#reply .answer").text == reply["answer"]
    assert sum(float(share.removesuffix(" %").lstrip("<> ")) for _, share in shown) == pytest.approx(100, abs=0.3)
    find(page, "#reply details:last-of-type summary").click()
    wait(page, ".shown li")
    assert len(page.find_elements(By.CSS_SELECTOR, ".shown li")) == len(reply["shots"])

    Select(find(page, "#right-answer")).select_by_value(ranked[-1])
    find(page, ".correct button").click()
    wait(page, "#kept", ranked[-1])
    wait(page, "#task-facts", "121 examples")
    last = httpx2.get(f"{api}/examples?start=120").json()["examples"]
    assert [(one["input"], one["answer"]) for one in last] == [("the mauve badger 7", ranked[-1])]
    WebDriverWait(page, PATIENCE_S).until(lambda _: page.find_elements(By.CSS_SELECTOR, "#curve .before"))
    curve = httpx2.get(f"{api}/curve").json()
    assert (curve["version"], curve["state"]) == (2, "done")
    assert not find(page, "#progress").is_displayed()


def test_the_same_input_again_corrects_its_example(page, url):
    open_task(page, url, "animals")
    find(page, "#input").send_keys(ROWS[0]["input"])
    find(page, "#ask-button").click()
    wait(page, "#reply .correct")
    other = next(row["answer"] for row in ROWS if row["answer"] != ROWS[0]["answer"])
    Select(find(page, "#right-answer")).select_by_value(other)
    find(page, ".correct button").click()
    wait(page, "#kept")
    assert find(page, "#task-facts").text.startswith("120 examples")
    first = httpx2.get(f"{url}/v1/tasks/animals/examples?limit=1").json()["examples"][0]
    assert (first["input"], first["answer"]) == (ROWS[0]["input"], other)


def test_an_answer_that_is_not_sure_enough_is_marked_in_words(page, url):
    await_curve(url, "animals")
    open_task(page, url, "animals")
    find(page, "#least-field summary").click()
    find(page, "#least").send_keys("100")
    find(page, "#input").send_keys("the mauve badger 7")
    find(page, "#ask-button").click()
    told = wait(page, "#reply .unsure").text
    answer, share = page.find_element(By.CSS_SELECTOR, ".bars .first").text.split("\n")
    assert told == f"Unsure: its probability is {share}, and you want at least 100 %. Do not rely on this answer."
    WebDriverWait(page, 5).until(
        lambda _: find(page, "#status").get_attribute("textContent").startswith(f"Unsure answer: {answer}, ")
    )
    find(page, "#least").clear()
    find(page, "#least").send_keys("1")
    find(page, "#ask-button").click()
    WebDriverWait(page, PATIENCE_S).until(lambda _: not page.find_elements(By.CSS_SELECTOR, "#reply .unsure"))
    assert find(page, "#reply").text.split("\n")[:2] == ["the mauve badger 7", answer]


def test_a_task_is_asked_and_deleted_with_the_keyboard_alone(page, url):
    assert httpx2.post(f"{url}/v1/tasks", json={"name": "keys", "examples": ROWS[:20]}).status_code == 201
    await_curve(url, "keys")
    page.refresh()
    wait(page, "#tasks", "keys")
    press_tab_until(page, lambda element: element.text.startswith("keys"))
    press(page, Keys.ENTER)
    wait(page, "#task-name", "keys")
    WebDriverWait(page, PATIENCE_S).until(lambda _: focused(page) == "task-name")
    press(page, Keys.TAB)
    assert focused(page) == "input"
    page.switch_to.active_element.send_keys("the red horse", Keys.CONTROL, Keys.ENTER)
    wait(page, "#reply .answer")
    answer = find(page, "#reply .answer").text
    WebDriverWait(page, 5).until(
        lambda _: find(page, "#status").get_attribute("textContent").startswith(f"Answer: {answer}, ")
    )
    press_tab_until(page, lambda element: element.get_attribute("id") == "right-answer")
    press_tab_until(page, lambda element: element.text == "Keep as an example")
    press(page, Keys.ENTER)
    wait(page, "#task-facts", "21 examples")
    WebDriverWait(page, 5).until(lambda _: focused(page) == "kept")

    press_tab_until(page, lambda element: element.get_attribute("id") == "delete-task")
    press(page, Keys.ENTER)
    wait(page, "#confirm-title", "Delete “keys”?")
    assert page.switch_to.active_element.text == "Cancel"
    press(page, Keys.ENTER)
    assert focused(page) == "delete-task"
    assert httpx2.get(f"{url}/v1/tasks/keys").status_code == 200
    press(page, Keys.ENTER)
    wait(page, "#confirm-title")
    press(page, Keys.TAB)
    press(page, Keys.ENTER)
    wait(page, "#start h1")
    WebDriverWait(page, 5).until(lambda _: httpx2.get(f"{url}/v1/tasks/keys").status_code == 404)


def press(page: Chrome, key: str) -> None:
    ActionChains(page).send_keys(key).perform()


def press_tab_until(page: Chrome, is_there) -> None:
    """Press Tab until the focus is where it should be, and see that each stop on the way has a name to be read out."""
    for _ in range(120):
        press(page, Keys.TAB)
        element = page.switch_to.active_element
        if element.tag_name != "body":
            assert element.accessible_name or element.text, element.get_attribute("outerHTML")
        if is_there(element):
            return
    raise AssertionError("120 stops of Tab did not lead there")


def test_examples_are_added_corrected_and_deleted_and_texts_of_users_stay_text(page, url):
    rows = [{"input": f"{HOSTILE} {number}", "answer": "yes" if number % 2 else HOSTILE} for number in range(9)]
    name = HOSTILE.replace("/", "|")
    task = {"name": name, "settings": {"family": "classification"}, "examples": rows}
    assert httpx2.post(f"{url}/v1/tasks", json=task).status_code == 201
    open_task(page, url, name)
    assert find(page, "#examples li .text").text == f"{HOSTILE} 0"
    assert page.find_elements(By.CSS_SELECTOR, "main img, main b") == []

    find(page, "#add-input").send_keys("a new one")
    Select(find(page, "#add-answer")).select_by_value("yes")
    find(page, "#add button").click()
    wait(page, "#task-facts", "10 examples")
    row = wait(page, "#examples li:last-child", "a new one")
    row.find_element(By.CSS_SELECTOR, "button").click()
    Select(row.find_element(By.CSS_SELECTOR, "select")).select_by_index(0)  # the labels are sorted
    row.find_element(By.CSS_SELECTOR, ".edit button").click()
    wait(page, "#examples li:last-child .sub", HOSTILE)
    find(page, "#examples li:last-child .danger").click()
    wait(page, "#confirm-text", "a new one")
    find(page, "#confirm-buttons .danger").click()
    wait(page, "#task-facts", "9 examples")  # the list follows
    WebDriverWait(page, PATIENCE_S, ignored_exceptions=[StaleElementReferenceException]).until(
        lambda _: "a new one" not in find(page, "#examples").text
    )
    assert page.title == f"{name} – manyicl"


def test_a_refusal_is_told_in_words(page, url, tmp_path):
    (tmp_path / "wrong.csv").write_text("one,two\n1,2\n", encoding="utf-8")
    find(page, "#new-file").send_keys(str(tmp_path / "wrong.csv"))
    assert "wrong.csv" in wait(page, "#alert .note").text
    find(page, "#alert button").click()
    assert page.find_elements(By.CSS_SELECTOR, "#alert .note") == []

    find(page, "#new-file").send_keys(str(write_rows(tmp_path / "animals.csv")))
    wait(page, "#confirm-title", "There is already a task “animals”")
    find(page, "#confirm-name").clear()
    find(page, "#confirm-name").send_keys("more animals")
    find(page, "#confirm-buttons .main").click()
    wait(page, "#task-name", "more animals")
    page.get(f"{url}/#nothing")
    wait(page, "#alert", "nothing")
    assert find(page, "#start").is_displayed()


def test_a_file_with_other_columns_is_read_as_the_user_agrees(page, url, tmp_path):
    rows = "".join(f"the {n} th,{'fox' if n % 2 else 'owl'},{n}\n" for n in range(20))
    (tmp_path / "other.csv").write_text("text,label,id\n" + rows, encoding="utf-8")
    find(page, "#new-file").send_keys(str(tmp_path / "other.csv"))
    wait(page, "#confirm-title", "The columns of “other.csv” have other names")
    assert find(page, "#confirm-text").text == "Read input from “text”, answer from “label”?"
    find(page, "#confirm-buttons button").click()
    assert "no 'input' column" in wait(page, "#alert .note").text

    find(page, "#new-file").send_keys(str(tmp_path / "other.csv"))
    wait(page, "#confirm-buttons .main", "Read it this way").click()
    wait(page, "#task-name", "other")
    wait(page, "#news", "20 examples added.")
    assert httpx2.get(f"{url}/v1/tasks/other").json()["labels"] == ["fox", "owl"]


# A server that goes away while it writes an answer.
BREAK_OFF = """const fetched = window.fetch;
window.fetch = (path, options) => path.endsWith("/predict")
  ? Promise.resolve(new Response('event: text\\ndata: {"text": "the first wor"}\\n\\n'))
  : fetched(path, options);"""


def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(page, url):
    rows = [{"input": f"question {n}", "answer": f"answer {n}"} for n in range(8)]
    task = {"name": "open", "settings": {"family": "qa"}, "examples": rows}
    assert httpx2.post(f"{url}/v1/tasks", json=task).status_code == 201
    open_task(page, url, "open")
    page.execute_script(BREAK_OFF)
    find(page, "#input").send_keys("question 9")
    find(page, "#ask-button").click()
    assert wait(page, "#alert .note").text.startswith("The answer broke off; what is shown is only its beginning.")
    assert find(page, "#reply .answer").text == "the first wor"


def test_a_phone_shows_all_of_it_without_scrolling_sideways(page, url):
    for scheme in ("light", "dark"):
        set_view(page, width=360, height=740, scheme=scheme)
        open_task(page, url, "animals")
        wait_until_measured(page)
        assert page.execute_script("return document.documentElement.scrollWidth") == 360
    assert page.execute_script(NAMELESS) == []


def test_a_token_is_asked_for_and_kept_in_the_tab(browser, tmp_path):
    token = make_token(tmp_path / "tokens.txt")
    service = SlowService()
    service.tasks = list
    with app_in_thread(service, ServerSettings(token_file=tmp_path / "tokens.txt")) as url:
        for page in opened(browser, url):
            wait(page, "#token-title", "needs a token")
            assert focused(page) == "token-value"
            find(page, "#token-value").send_keys("wrong", Keys.ENTER)
            wait(page, "#token-title", "not accepted")
            find(page, "#token-value").send_keys(token, Keys.ENTER)
            wait(page, "#tasks", "None yet.")
            assert page.execute_script("return [sessionStorage.length, localStorage.length, document.cookie]") == [
                1,
                0,
                "",
            ]
            page.refresh()
            wait(page, "#tasks", "None yet.")
            find(page, "#token-button").click()
            wait(page, "#token-title", "needs a token")
