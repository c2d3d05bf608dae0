"""Screenshots of a report in headless Chromium: light, dark and phone width, and its PDF as printed.

    python scripts/screenshot_report.py OUT/report.html docs/example --full

Needs selenium and Debian's chromium and chromium-driver. Without --full a picture is the first screen; with it, the
whole page.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

# As root there is no sandbox; the rest keeps the browser from looking for its own servers.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
# name -> width, height, device pixels a pixel, colour scheme
VIEWS = {
    "light": (1200, 1000, 1, "light"),
    "dark": (1200, 1000, 1, "dark"),
    "phone": (390, 844, 2, "light"),
    "phone-dark": (390, 844, 2, "dark"),
}


def find_chromium() -> tuple[str, str] | None:
    """Return where chromium and chromedriver are; None where one is missing."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def start_chromium(*, javascript: bool = True) -> Iterator[webdriver.Chrome]:
    """Give the block a browser with a new profile, that keeps its console's and its network's messages."""
    found = find_chromium()
    if found is None:
        raise SystemExit("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    if not javascript:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(found[1]))
        try:
            yield browser
        finally:
            browser.quit()


def set_view(browser: webdriver.Chrome, *, width: int, height: int, scale: float = 1, scheme: str = "light") -> None:
    """Make the page as wide and high as a screen of so many pixels, light or dark."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})


def take_screenshots(report: Path, folder: Path, *, full: bool = False) -> list[Path]:
    """Write one PNG a view, and the printed page as PDF; return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with start_chromium() as browser:
        for name, (width, height, scale, scheme) in VIEWS.items():
            set_view(browser, width=width, height=height, scale=scale, scheme=scheme)
            browser.get(report.absolute().as_uri())
            shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": full})
            paths.append(folder / f"{name}.png")
            paths[-1].write_bytes(base64.b64decode(shot["data"]))
        options = {"printBackground": False, "paperWidth": 8.27, "paperHeight": 11.69}
        printed = browser.execute_cdp_cmd("Page.printToPDF", options)
        paths.append(folder / "print.pdf")
        paths[-1].write_bytes(base64.b64decode(printed["data"]))
    return paths


def main() -> None:
    """Read the arguments, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true", help="the whole page, not the first screen")
    args = parser.parse_args()
    for path in take_screenshots(args.report, args.out, full=args.full):
        print(path)


if __name__ == "__main__":
    main()
