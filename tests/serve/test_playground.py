"""The playground: what its page may do, told from the file; what it does, in a browser where there is one."""

import base64
import hashlib
import re
import shutil
import socket
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from serve import pages
from serve.directory import Entry
from serve.keys import add, read_records
from tests.serve.conftest import directory

HOSTILE = "<img src=x onerror=document.title='owned'>"
PATHS = pages.openapi()["paths"]


class Parts(HTMLParser):
    """The inline scripts and styles of a page, and all that it refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.references: list[str] = []
        self.attributes: set[str] = set()
        self._tag = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.attributes |= {name for name, _ in attrs}
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "action")]

    def handle_data(self, data: str) -> None:
        if self._tag in self.inline:
            self.inline[self._tag].append(data)

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


@pytest.fixture
def page(serve_family: Any, explicit: Any) -> Any:
    return serve_family(explicit).client.get("http://server/")


def test_it_is_served_at_the_root(page: Any) -> None:
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "/docs" in Parts(page.text).references


def test_the_policy_allows_its_own_script_and_style_and_nothing_else(page: Any) -> None:
    rules = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert rules.pop("default-src") == "'none'"
    for tag, texts in Parts(page.text).inline.items():
        (text,) = texts
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert rules.pop("connect-src") == "'self'"
    assert rules.pop("img-src") == "data: blob:"
    assert set(rules.values()) == {"'none'"}


def test_it_needs_nothing_from_elsewhere(page: Any) -> None:
    parts = Parts(page.text)
    assert set(parts.references) == {"data:,", "/docs"}
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", page.text)
    assert not {name for name in parts.attributes if name == "style" or name.startswith("on")}


def test_what_the_server_says_never_becomes_markup(page: Any) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|setHTML"
    assert not re.search(forbidden, page.text)


def test_every_address_that_it_asks_is_documented(page: Any) -> None:
    (script,) = Parts(page.text).inline["script"]
    operations = re.findall(r"\bpost\(\"(\w+)\"", script)
    assert {"sample", "complete", "classify", "interpolate"} == set(operations)
    for operation in operations:
        assert f"/v1/models/{{name}}/{operation}" in PATHS
    assert set(re.findall(r"\"(/[a-z0-9/]+)\"", script)) <= PATHS.keys()


def test_an_installed_package_has_the_page() -> None:
    project = Path(__file__).parents[2]
    setuptools = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = setuptools["package-data"]["serve"]
    assert [(project / "serve" / file).read_text() for file in files] == [pages.PLAYGROUND]


class Browser:
    """Headless Chromium, by the WebDriver protocol.

    References:
        Stewart, Burns. WebDriver. W3C Recommendation, 2018. https://www.w3.org/TR/webdriver1/
    """

    def __init__(self, url: str, profile: Path, chromium: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=60)
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        options = {"args": [*arguments, f"--user-data-dir={profile}"], "binary": chromium}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = ""
        session = self._post("session", capabilities={"alwaysMatch": capabilities})
        self._session = f"session/{session['sessionId']}/"

    def _post(self, command: str, **body: Any) -> Any:
        answer = self._http.post(f"/{self._session}{command}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def open(self, url: str) -> None:
        self._post("url", url=url)

    def run(self, script: str) -> Any:
        return self._post("execute/sync", script=script, args=[])

    def value(self, expression: str) -> Any:
        return self.run(f"return {expression}")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true."""
        begin = time.monotonic()
        while not (value := self.value(expression)):
            assert time.monotonic() - begin < 30, (expression, self.value("document.body.innerText"))
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({selector!r}).click()")

    def complaints(self) -> list[str]:
        """What the console has to say, about the policy for example."""
        return [entry["message"] for entry in self._post("se/log", type="browser")]

    def close(self) -> None:
        """End the browser's processes too."""
        answer = self._http.delete(f"/{self._session.rstrip('/')}")
        self._http.close()
        assert answer.status_code == 200, answer.text


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not on this machine")
    port = free_port()
    with subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            answers(f"{url}/status")
            started = Browser(url, tmp_path / "profile", chromium)
            yield started
            started.close()
        finally:
            process.terminate()


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an application on loopback."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        answers(f"http://127.0.0.1:{port}/healthz")
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(url: str) -> None:
    for _ in range(200):
        try:
            httpx.get(url)
            return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")


def eventually(condition: Callable[[], bool]) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < 30
        time.sleep(0.02)


def pixels(selector: str) -> str:
    """Expression for the grey values of a canvas."""
    canvas = f"document.querySelector({selector!r})"
    data = f"{canvas}.getContext('2d').getImageData(0, 0, {canvas}.width, {canvas}.height).data"
    return f"Array.from({data}).filter((_, i) => i % 4 === 0)"


def done(browser: Browser) -> None:
    browser.until("document.querySelector('#main').ariaBusy !== 'true'")


def sampled(browser: Browser) -> None:
    browser.until("!document.querySelector('#go').disabled")
    browser.run("document.querySelector('#of-n').value = 6; document.querySelector('#label').value = '3'")
    browser.click("#go")
    browser.until("!document.querySelector('#again').hidden")


@pytest.mark.slow
def test_a_browser_draws_what_the_service_answers(serve_family: Any, able: Any, browser: Browser) -> None:
    served = serve_family(able)
    known = {**directory().entries, HOSTILE: Entry(aliases={}, failure=HOSTILE)}
    served.shelf.directory = directory(entries=known)
    with listening(served.app) as url:
        browser.open(url)
        sampled(browser)
        body = {"n": 6, "seed": 7, "label": 3, "format": "json"}
        x = served.client.post("/sample", json=body).json()["samples"]
        shown = browser.value(pixels("#drawn .sample:nth-child(5) canvas"))
        assert shown == [round(value * 255 / 16) for row in x[4][0] for value in row]
        assert not browser.value("document.querySelector('#film').hidden")  # there were previews
        assert '"seed":7,"label":3' in browser.value("document.querySelector('#curl').textContent")
        assert "seed=7, label=3" in browser.value("document.querySelector('#python').textContent")
        browser.click("[data-keep=upper]")
        browser.click("#fill")
        done(browser)
        filled = browser.value(pixels("#filled .sample:nth-child(8) canvas"))
        assert filled[:8] == browser.value(pixels("#drawn .sample:nth-child(1) canvas"))[:8]
        browser.click("#judge")
        done(browser)
        told = served.client.post("/classify", json={"x": x[:1], "samples": 8}).json()["probabilities"][0]
        bars = browser.value("Array.from(document.querySelectorAll('.bar'), (bar) => bar.style.width)")
        assert [float(width.removesuffix("%")) / 100 for width in bars] == pytest.approx(told, abs=6e-4)
        browser.click("#drawn .sample:nth-child(5)")
        browser.click("#walk")
        done(browser)
        ends = [browser.value(pixels(f"#way .sample:nth-child({i}) canvas")) for i in (1, 10)]
        assert ends == [browser.value(pixels(f"#drawn .sample:nth-child({i}) canvas")) for i in (1, 5)]
        models = browser.value("document.querySelector('#models').textContent")
        assert models.count(HOSTILE) == 2
        assert browser.value("document.title") == "gdl_ray playground"
        assert not [told for told in browser.complaints() if "willReadFrequently" not in told]


@pytest.mark.slow
def test_known_pixels_are_painted_and_what_is_drawn_can_be_stopped(
    serve_family: Any, able: Any, browser: Browser
) -> None:
    served = serve_family(able)
    with listening(served.app) as url:
        browser.open(url)
        browser.until("!document.querySelector('#complete').hidden")
        for key in (" ", "ArrowRight", "ArrowDown", " "):  # the corner, and the next on the diagonal
            event = f"new KeyboardEvent('keydown', {{key: {key!r}, bubbles: true}})"
            browser.run(f"document.querySelector('#grid').dispatchEvent({event})")
        assert browser.value("document.querySelector('#cursor').textContent") == "Row 2, column 2: value 16"
        browser.click("#fill")
        done(browser)
        for i in (1, 8):
            image = browser.value(pixels(f"#filled .sample:nth-child({i}) canvas"))
            assert (image[0], image[5]) == (255, 255)
        able.gate.clear()
        browser.click("#go")
        browser.until("document.querySelector('#go').textContent === 'Stop'")
        eventually(lambda: served.engine.load.active > 0)
        browser.click("#go")
        browser.until("document.querySelector('#told').textContent === 'No samples.'")
        able.gate.set()
        eventually(lambda: served.engine.load.active + served.engine.load.waiting == 0)
        assert browser.value("document.querySelector('#trouble').hidden")


@pytest.mark.slow
def test_a_browser_asks_for_the_key_where_one_is_needed(
    serve_family: Any, explicit: Any, browser: Browser, tmp_path: Path
) -> None:
    served = serve_family(explicit, required=True)
    secret, _ = add(tmp_path / "keys.json", "ada", ["read", "sample"])
    served.keyring.update(read_records(tmp_path / "keys.json"))
    with listening(served.app) as url:
        browser.open(url)
        browser.until("!document.querySelector('#locked').hidden")
        assert "Send a key" in browser.value("document.querySelector('#trouble').textContent")
        browser.run(f"document.querySelector('#key').value = {secret!r}")
        browser.click("#unlock button")
        sampled(browser)
        assert browser.value("document.querySelector('#locked').hidden")
        assert secret not in browser.value("document.querySelector('#again').textContent")
