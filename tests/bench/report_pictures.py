"""Pictures of a report of `anybit bench serve --html`, at desktop and phone size, in light and dark; report.png is the
README's: what comes before the long tables, in few colours.

python -m tests.bench.report_pictures report.html FOLDER
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome

from tests.fixtures.browser import open_browser, set_view

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
COLOURS = 48


def save(browser: Chrome, path: Path, name: str, scheme: str) -> None:
    """The whole page, however long."""
    width, height = SIZES[name]
    set_view(browser, width, height, dark=scheme == "dark", phone=name == "phone")
    whole = browser.execute_script("return document.documentElement.scrollHeight")
    set_view(browser, width, max(height, whole), dark=scheme == "dark", phone=name == "phone")
    browser.save_screenshot(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as browser:
        browser.get(options.report.resolve().as_uri())
        for name in SIZES:
            for scheme in ("light", "dark"):
                save(browser, options.folder / f"report-{name}-{scheme}.png", name, scheme)
        browser.execute_script(
            "window.scrollTo(0, 0);"
            "document.querySelectorAll('section').forEach((part) => {"
            "  if (!part.querySelector('figure') && part.previousElementSibling) part.remove(); });"
            "document.querySelector('footer').remove();"
            "document.documentElement.style.overflow = 'hidden';"
        )
        path = options.folder / "report.png"
        save(browser, path, "desktop", "light")
        Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    for path in sorted(options.folder.glob("report*.png")):
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
