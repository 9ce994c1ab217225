"""Pictures of the page after two runs, the widths together and in turn, at desktop and phone size, in light and dark.

anybit serve demo & python -m tests.bench.page_pictures --url http://127.0.0.1:8000 FOLDER
"""

import argparse
import tempfile
import time
from pathlib import Path

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests.fixtures.browser import open_browser, set_view

SIZES = {"desktop": (1100, 800), "phone": (390, 844)}


def run_once(browser: Chrome, prompt: str, max_tokens: int, order: str) -> None:
    WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.NAME, "width"))
    browser.execute_script(
        "document.getElementById('prompt').value = arguments[0];"
        "document.getElementById('max-tokens').value = arguments[1];"
        "document.querySelector(`[name=order][value=${arguments[2]}]`).checked = true;"
        "document.getElementById('form').requestSubmit();",
        prompt,
        max_tokens,
        order,
    )
    WebDriverWait(browser, 300).until(lambda _: "complete" in browser.find_element(By.ID, "status").text)
    time.sleep(2.5)  # the charts follow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prompt", default="Explain how rain forms.")
    parser.add_argument("--max-tokens", type=int, default=72)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as browser:
        browser.get(options.url)
        for order in ("together", "turns"):
            run_once(browser, options.prompt, options.max_tokens, order)
        for name, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                set_view(browser, width, height, dark=scheme == "dark", phone=name == "phone")
                whole = browser.execute_script("return document.documentElement.scrollHeight")
                set_view(browser, width, max(height, whole + 16), dark=scheme == "dark", phone=name == "phone")
                path = options.folder / f"page-{name}-{scheme}.png"
                browser.save_screenshot(str(path))
                print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
