"""The page in a real browser, over a real server."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.endtoend.command import ServeCommand
from tests.fixtures.browser import open_browser, set_view
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import LiveServer

PROMPT = "The quick brown fox"
# What JavaScript takes for white space is not what Python does.
WORD = "[^\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]+"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture
def page(browser: Chrome, tiny_server: ServeCommand) -> Chrome:
    set_view(browser, 1280, 900)
    browser.get_log("browser")
    browser.get(tiny_server.url)
    wait_for(browser, lambda: find_all(browser, "[name=width]"))
    return browser


def wait_for(browser: Chrome, condition: Any, seconds: float = 30) -> Any:
    return WebDriverWait(browser, seconds, 0.05).until(lambda _: condition())


def find(browser: Chrome | WebElement, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def find_all(browser: Chrome | WebElement, selector: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def press(browser: Chrome, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def send(browser: Chrome) -> None:
    ActionChains(browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()


def focus(browser: Chrome, selector: str) -> None:
    """Walk to an element with the Tab key."""
    for _ in range(40):
        press(browser, Keys.TAB)
        if browser.switch_to.active_element == find(browser, selector):
            return
    pytest.fail(f"the Tab key does not reach {selector}")


def ask_by_keyboard(browser: Chrome, max_tokens: int) -> None:
    """Ask 2 and 8 bits to continue PROMPT, touching nothing but keys."""
    focus(browser, "#prompt")
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).send_keys(PROMPT).perform()
    for box in find_all(browser, "[name=width]"):
        value = box.get_attribute("value")
        if box.is_selected() != (value in ("2", "8")):
            focus(browser, f"[name=width][value='{value}']")
            press(browser, Keys.SPACE)
    focus(browser, "[name=mode]:checked")
    press(browser, Keys.ARROW_DOWN)
    focus(browser, "#max-tokens")
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).send_keys(
        str(max_tokens)
    ).perform()
    send(browser)


def wait_for_end(browser: Chrome) -> None:
    wait_for(browser, lambda: "complete" in find(browser, "#status").text)


def figures(article: WebElement) -> dict[str, str]:
    return {place.get_attribute("data-is") or "": place.text for place in find_all(article, "dd")}


def complete(server: ServeCommand, width: int, max_tokens: int) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "bit_width": width}
    answer: dict[str, Any] = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    return answer


def content(element: WebElement) -> str:
    """Its text to the letter; `element.text` tidies what a random model says."""
    return str(element.get_property("textContent"))


def test_two_widths_side_by_side_by_keyboard_alone(page: Chrome, tiny_server: ServeCommand) -> None:
    page.execute_script(
        "window.lengths = new Set();"
        "new MutationObserver(() => window.lengths.add(document.querySelector('.text')?.textContent.length ?? 0))"
        ".observe(document.getElementById('answers'), {subtree: true, childList: true, characterData: true});"
    )
    ask_by_keyboard(page, 256)
    wait_for_end(page)
    eight, two = find_all(page, "article")
    assert [eight.get_attribute("data-width"), two.get_attribute("data-width")] == ["8", "2"]
    assert len(page.execute_script("return [...window.lengths]")) > 2, "the text did not come in pieces"
    wanted = {width: complete(tiny_server, width, 256) for width in (8, 2)}
    texts = {width: answer["choices"][0]["text"] for width, answer in wanted.items()}
    assert content(find(eight, ".text")) == texts[8]
    assert content(find(two, ".text")) == texts[2]

    models = {card["bit_width"]: card for card in httpx.get(f"{tiny_server.url}/v1/models").json()["data"]}
    for article, width in ((eight, 8), (two, 2)):
        shown = figures(article)
        assert shown["ttft"].endswith((" ms", " s"))
        assert float(shown["speed"]) > 0
        assert shown["tokens"] == str(wanted[width]["usage"]["completion_tokens"])
        size, unit = shown["read"].split()
        assert unit == "KiB"
        assert float(size) == pytest.approx(models[width]["bytes_read_per_token"] / 1024, rel=0.01)
        assert all(shown[name].endswith(("KiB", "MiB")) for name in ("weights", "kv"))

    words = {width: re.findall(WORD, text) for width, text in texts.items()}
    first = next(index for index, pair in enumerate(zip(words[8], words[2], strict=False)) if len(set(pair)) > 1)
    assert content(find(two, "mark")) == words[2][first]
    compared = content(find(two, ".difference"))
    assert compared == f"First differs at word {first + 1}, where 8 bits says “{words[8][first]}”."
    assert not find_all(eight, "mark")
    assert find(page, "#error").text == ""


def test_everything_comes_from_the_server_and_nothing_breaks(page: Chrome, tiny_server: ServeCommand) -> None:
    ask_by_keyboard(page, 8)
    wait_for_end(page)
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(({name}) => name)")
    assert len(loaded) > 5
    assert all(name.startswith(tiny_server.url) for name in loaded)
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")] == []


def test_charts_follow_what_the_server_does(page: Chrome) -> None:
    ask_by_keyboard(page, 200)
    wait_for_end(page)
    wait_for(page, lambda: re.search("at most ([1-9][0-9]*)", find(page, "#speed-now").text))
    wait_for(page, lambda: all(path.get_attribute("d") for path in find_all(page, "svg path")))
    assert len(find_all(page, "#speed path")) == 5
    assert "running" in find(page, "#requests-now").text
    assert [item.text for item in find_all(page, "#legend li")][-2:] == ["8 bits", "waiting"]
    assert "One copy of the weights" in find(page, "#memory").text


def test_refusals_are_one_sentence(page: Chrome) -> None:
    ask_by_keyboard(page, 100_000)
    wait_for_end(page)
    for place in ("#error", "article .error"):
        assert find(page, place).text.count(".") == 1
    assert "0 of 2" in find(page, "#status").text


@pytest.mark.parametrize("dark", [False, True])
def test_phone_shows_everything_in_one_column(page: Chrome, dark: bool) -> None:
    set_view(page, 360, 740, dark=dark, phone=True)
    ask_by_keyboard(page, 32)
    wait_for_end(page)
    assert page.execute_script("return document.documentElement.scrollWidth") == 360
    eight, two = find_all(page, "article")
    assert eight.rect["x"] == two.rect["x"]
    brightness = page.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0]")
    assert (int(brightness) < 128) == dark


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        (("a b c", True), ("a b c", True), None),
        (("a b", False), ("a b c", True), None),  # "b" may grow
        (("a b ", False), ("a c", False), None),  # so may "c"
        (("a x ", False), ("a c ", False), (2, "x", "c")),
        (("a bx", True), ("a b", True), (2, "bx", "b")),
        (("a", True), ("a b ", False), (2, "", "b")),
        (("a b", True), ("a", True), (2, "b", "")),
        (("a  b", True), ("a b", True), None),
        (("", True), ("", True), None),
    ],
)
def test_first_difference(
    page: Chrome, answer: tuple[str, bool], reference: tuple[str, bool], expected: tuple[int, str, str] | None
) -> None:
    texts = [{"text": text, "done": done} for text, done in (answer, reference)]
    found = page.execute_async_script(
        "const [texts, done] = arguments;"
        "import('./page/differences.js').then(({firstDifference}) => done(firstDifference(...texts)))",
        texts,
    )
    assert (found and (found["number"], found["word"], found["instead"])) == expected
    if found:
        assert texts[0]["text"][found["start"] : found["end"]] == found["word"]


@pytest.mark.parametrize(
    ("size", "shown"),
    [(17, "17 bytes"), (2**20, "1.00 MiB"), (4_262_789_120, "3.97 GiB"), (1_072_693_248, "0.999 GiB")],
)
def test_sizes_are_readable(page: Chrome, size: int, shown: str) -> None:
    found = page.execute_async_script(
        "const [size, done] = arguments; import('./page/units.js').then(({formatBytes}) => done(formatBytes(size)))",
        size,
    )
    assert found == shown


def test_stop_ends_a_run(browser: Chrome, tiny_checkpoint: Path) -> None:
    engine = FakeEngine(token_seconds=0.1)
    server = LiveServer(engine, tiny_checkpoint)
    try:
        browser.get(server.url)
        wait_for(browser, lambda: find_all(browser, "[name=width]"))
        ask_by_keyboard(browser, 200)
        wait_for(browser, lambda: len(find_all(browser, "article")) == 2 and len(engine.running) == 2)
        focus(browser, "#stop")
        press(browser, Keys.ENTER)
        wait_for_end(browser)
        assert [place.text for place in find_all(browser, "article .error")] == ["Stopped.", "Stopped."]
        wait_for(browser, lambda: len(engine.aborted) == 2)
    finally:
        server.stop()


def test_full_queue_is_one_sentence_and_leaves_the_other_answer_alone(browser: Chrome, tiny_checkpoint: Path) -> None:
    engine = FakeEngine(hold=True, token_seconds=0.01)
    server = LiveServer(engine, tiny_checkpoint, max_queued_requests=1)
    try:
        browser.get(server.url)
        wait_for(browser, lambda: find_all(browser, "[name=width]"))
        ask_by_keyboard(browser, 8)
        wait_for(browser, lambda: any(place.text for place in find_all(browser, "article .error")))
        engine.hold = False
        wait_for_end(browser)
        assert find(browser, "#error").text == "1 requests are waiting already; try again later (in 1 s)."
        assert find(browser, "#status").text == "1 of 2 answers are complete."
    finally:
        server.stop()


def test_key_is_asked_for_and_a_wrong_one_is_named(browser: Chrome, tiny_checkpoint: Path, cache: Path) -> None:
    with ServeCommand(tiny_checkpoint, "--api-key", "right-key", cache=cache) as server:
        browser.get(server.url)
        wait_for(browser, lambda: find(browser, "#key").is_displayed())
        assert find(browser, "#key-error").text == "This server asks for an API key."
        assert browser.switch_to.active_element == find(browser, "#key")
        press(browser, "wrong-key", Keys.ENTER)
        wait_for(browser, lambda: "does not accept" in find(browser, "#key-error").text)
        find(browser, "#key").clear()
        find(browser, "#key").send_keys("right-key", Keys.ENTER)
        wait_for(browser, lambda: find_all(browser, "[name=width]") and not find(browser, "#key-error").text)
        ask_by_keyboard(browser, 8)
        wait_for_end(browser)
        assert "2 of 2" in find(browser, "#status").text
        (link,) = [link for link in find_all(browser, "footer a") if link.is_displayed()]
        assert link.text == "health"  # the others would be refused
