"""Screenshots of the page of a running service, with a question that is answered: light, dark and phone width.

    python scripts/screenshot_page.py http://127.0.0.1:8300 "shop mail" "The brake lever is loose" docs/example

Writes serve-light.png, serve-dark.png and serve-phone.png. Needs what scripts/screenshot_report.py needs.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path
from urllib.parse import quote

from scripts.screenshot_report import set_view, start_chromium
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

# name -> width, height, device pixels a pixel, colour scheme
VIEWS = {
    "light": (1280, 1040, 1, "light"),
    "dark": (1280, 1040, 1, "dark"),
    "phone": (390, 1760, 1.5, "light"),
}
ANSWER_S = 120


def take_screenshots(url: str, *, task: str, question: str, folder: Path) -> list[Path]:
    """Open a task, ask it a question, and write one PNG a view; return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with start_chromium() as browser:
        for name, (width, height, scale, scheme) in VIEWS.items():
            set_view(browser, width=width, height=height, scale=scale, scheme=scheme)
            browser.get("about:blank")  # else only the address after # changes, and nothing is loaded anew
            browser.get(f"{url}/#{quote(task)}")
            wait = WebDriverWait(browser, ANSWER_S)
            wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#examples li"))
            browser.find_element(By.ID, "input").send_keys(question)
            browser.find_element(By.ID, "ask-button").click()
            wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#reply .correct"))
            browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
            shot = browser.execute_cdp_cmd("Page.captureScreenshot", {})
            paths.append(folder / f"serve-{name}.png")
            paths[-1].write_bytes(base64.b64decode(shot["data"]))
    return paths


def main() -> None:
    """Read the arguments, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("task")
    parser.add_argument("question")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for path in take_screenshots(args.url.rstrip("/"), task=args.task, question=args.question, folder=args.folder):
        print(path)


if __name__ == "__main__":
    main()
