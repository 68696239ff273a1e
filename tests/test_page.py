"""The page at `/`, in a real browser before a real server."""

import hashlib
import re
import time
from collections.abc import Iterator
from importlib.resources import files

import pytest
from browser import Browser, lacking
from byte_level import TOKENS, tokenizer
from models import elastic
from serving import NAME, THINKING, Server, served
from waiting import until

from star_elastic.model import ElasticModel
from star_elastic.serve.api.page import paths
from star_elastic.serve.keys import Key, Keys
from star_elastic.serve.opening import Capacity
from star_elastic.serve.settings import Settings

in_browser = pytest.mark.skipif(lacking() is not None, reason=f"no browser: {lacking()}")
EVIL = [f"<script>document.title='hurt {n}'</script><img src=x onerror=hurt>" for n in range(60)]
SHOWN = "return document.querySelectorAll('.answer').length"


def talkative() -> ElasticModel:
    """A parent that thinks, writes HTML every few tokens, and never ends an answer by itself."""
    made = elastic("llama", vocab_size=TOKENS + len(EVIL), max_position_embeddings=16384)
    made.tokenizer = tokenizer()
    made.tokenizer.add_tokens(EVIL)
    made.tokenizer.eos_token = None
    made.tokenizer.chat_template = THINKING
    return made


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = Settings.model_validate({"thinking": {"default": 8}})
    with served(talkative(), Capacity(4, 16000, step_tokens=64), settings) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Browser:
    """The page, loaded and with its figures, its logs read."""
    open_page(browser, server)
    return browser


def open_page(browser: Browser, server: Server) -> None:
    browser.open("about:blank")
    browser.log("browser")
    browser.requested()
    browser.open(server.url)
    until(lambda: browser.text("#state") == "ready")


def ask(page: Browser, prompt: str, sizes: list[str], tokens: int) -> None:
    page.run(
        """for (const box of document.querySelectorAll("#choices input"))
             box.checked = arguments[0].includes(box.value);
           document.getElementById("limit").value = arguments[1];""",
        sizes,
        tokens,
    )
    page.type("#prompt", prompt)
    page.click("#ask")
    until(lambda: page.run(SHOWN) == len(sizes))


def test_files_have_types_and_tags(server: Server) -> None:
    for path in paths():
        got = server.client.get(path)
        kind = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
        kind |= {"svg": "image/svg+xml"}
        assert got.headers["content-type"].startswith(kind[(path[1:] or "html").split(".")[-1]])
        assert got.headers["cache-control"] == "no-cache"
        assert hashlib.sha256(got.content).hexdigest()[:16] in got.headers["etag"]
        again = server.client.get(path, headers={"if-none-match": got.headers["etag"]})
        assert again.status_code == 304 and not again.content


@pytest.mark.parametrize("name", ["status.py", "..%2fstatus.py", "%2e%2e/status.py", "", "x.js"])
def test_nothing_else_is_served(server: Server, name: str) -> None:
    assert server.client.get(f"/page/{name}").status_code == 404


def test_the_files_keep_to_the_policy() -> None:
    """Nothing inline, nothing from elsewhere, and no text that becomes HTML."""
    folder = files("star_elastic.serve").joinpath("page")
    texts = {each.name: each.read_text("utf-8") for each in folder.iterdir()}
    assert not re.search(r"<style|<script(?![^>]* src=)|\son\w+=| style=", texts["index.html"])
    for name, text in texts.items():
        assert len(text.splitlines()) <= 320, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)
        assert not re.search(r"localStorage|sessionStorage|cookie", text), name
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w./]*", text)
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, name


@in_browser
def test_it_shows_the_sizes_and_asks_nobody_else(page: Browser, server: Server) -> None:
    until(lambda: page.text("#choices label") == "auto\nfull\nprefix\nsmall")
    assert page.text("#model") == NAME and page.text("#sizes .name").split() == [
        *server.opened.service.sizes
    ]
    assert page.text("#running") == "0" and "process" in page.text("#memory")
    assert page.log("browser") == []
    asked = page.requested()
    assert len(asked) >= len(paths())
    assert all(address.startswith(f"{server.url}/") for address in asked)


@in_browser
def test_two_sizes_answer_side_by_side_and_html_stays_text(page: Browser) -> None:
    ask(page, "Say <b>hello</b>", ["full", "small"], 150)
    until(lambda: page.text(".answer .phase") == "cut at the limit\ncut at the limit")
    assert page.text(".answer h3") == "full\nsmall"
    said = page.run("return [...document.querySelectorAll('.said')].map(e => e.textContent)")
    assert all("<script>document.title='hurt" in text for text in said)
    assert page.run("return document.querySelectorAll('#answers script, #answers img').length") == 0
    thought = page.run(
        "return [...document.querySelectorAll('.thoughts .text')].map(e => e.textContent)"
    )
    assert all(thought) and not any("</think>" in text for text in thought)
    assert page.run("return [...document.querySelectorAll('.thoughts')].map(e => e.open)") == [
        False,
        False,
    ]
    for line in page.text(".account").replace("\u00a0", " ").splitlines():
        assert re.fullmatch(r"150 tokens · first after [\d.]+ s · [\d.,]+ tokens/s", line)
    assert "pinned: the request names full" in page.text(".answer .why")
    assert page.run("return document.title") == f"{NAME} · star-elastic"
    assert page.log("browser") == []


@in_browser
def test_auto_tells_who_answered(page: Browser) -> None:
    ask(page, "hello", [""], 20)
    until(lambda: page.text(".answer .phase") == "cut at the limit")
    assert page.text(".answer h3") == "auto → full"


@in_browser
def test_answers_stream_and_stop_frees_the_request(page: Browser, server: Server) -> None:
    ask(page, "go on for ever", ["full", "prefix"], 15000)
    until(lambda: page.text(".answer .phase") == "answering\nanswering")
    first = len(page.text(".said"))
    until(lambda: len(page.text(".said")) > first)  # more of it, while it goes on
    until(lambda: page.text("#running") == "2" and page.text("#requests .name") == "full\nprefix")
    assert "go on" not in page.text(".requests")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    page.click("#stop")
    assert server.wait_idle() < 2000  # of 30,000
    assert server.client.get("/status").json()["requests"] == []
    until(lambda: page.text(".answer .phase") == "stopped\nstopped")
    until(lambda: page.text("#running") == "0")
    assert page.run("return document.querySelector('#stop').disabled")


@in_browser
def test_a_refusal_is_shown(page: Browser) -> None:
    ask(page, "long " * 20, ["full"], 15990)
    until(lambda: page.text(".answer .phase") == "failed")
    assert "max_tokens" in page.text(".answer .bad") or "tokens" in page.text(".answer .bad")


@in_browser
def test_keys_are_enough(page: Browser, server: Server) -> None:
    page.type("#prompt", "hello\ue009\ue007")  # Control, Enter
    until(lambda: page.text(".answer .phase").count("ing"))
    page.type("#prompt", "\ue00c")  # Escape
    server.wait_idle()
    until(lambda: set(page.text(".answer .phase").splitlines()) <= {"stopped", "cut at the limit"})


@in_browser
def test_nobody_is_asked_while_nobody_looks(page: Browser) -> None:
    """Headless windows are always visible, so the page is told otherwise."""
    hide = (
        "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'));"
    )
    page.run(hide, True)
    page.requested()
    time.sleep(1.5)
    assert page.requested() == []
    page.run(hide, False)
    until(lambda: any("/status" in address for address in page.requested()))


@in_browser
@pytest.mark.parametrize("width", [340, 800, 1900])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_any_window_will_do(page: Browser, width: int, scheme: str) -> None:
    page.devtools(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=800,
        deviceScaleFactor=1,
        mobile=False,
    )
    page.devtools(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    ink, paper = page.run(
        "const {color, backgroundColor} = getComputedStyle(document.body);"
        "return [color, backgroundColor].map(c => Number(c.match(/\\d+/)[0]))"
    )
    assert (ink < paper) == (scheme == "light") and abs(ink - paper) > 150
    page.devtools("Emulation.clearDeviceMetricsOverride")
    page.devtools("Emulation.setEmulatedMedia", features=[])


@in_browser
def test_a_key_is_asked_for_and_kept_nowhere(browser: Browser) -> None:
    key = "se-only-for-this-test"
    keys = Keys([Key(name="me", sha256=hashlib.sha256(key.encode()).hexdigest())])
    with served(talkative(), keys=keys) as server:
        browser.open(server.url)
        until(lambda: browser.text("#state") == "locked")
        browser.type("#key", "wrong\n")
        until(lambda: "not known here" in browser.text("#key-error"))
        browser.type("#key", f"{key}\n")
        until(lambda: browser.text("#state") == "ready")
        until(lambda: browser.text("#choices label") == "auto\nfull\nprefix\nsmall")
        assert browser.run("return localStorage.length + sessionStorage.length") == 0
        assert browser.run("return document.cookie + document.getElementById('key').value") == ""
        browser.open(server.url)
        until(lambda: browser.text("#state") == "locked")
        browser.open("about:blank")
