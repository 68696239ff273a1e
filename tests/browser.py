"""A headless Chromium, driven through chromedriver by the W3C protocol, which is JSON over HTTP."""

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx2

PROGRAMS = ("chromium", "chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of a reference
_FLAGS = [
    "--headless=new",
    "--no-sandbox",  # the tests may run as root in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
]


def lacking() -> str | None:
    """Why there can be no browser here; None if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not on PATH: {', '.join(missing)}" if missing else None


class Browser:
    """One window; `close` it in the end."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self._driver, port = _driver()
        self._http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        wanted = {
            "goog:chromeOptions": {"args": [*_FLAGS, f"--window-size={width},{height}"]},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def close(self) -> None:
        """End the browser and its driver."""
        self._http.delete(self._session)
        self._http.close()
        self._driver.terminate()
        self._driver.wait(10)
        if self._driver.stdout is not None:
            self._driver.stdout.close()

    def open(self, url: str) -> None:
        """Go there, and wait until it has loaded."""
        self._post(f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript function's body returns; its arguments are `arguments`."""
        return self._post(
            f"{self._session}/execute/sync", {"script": script, "args": list(arguments)}
        )

    def text(self, selector: str) -> str:
        """The text of all elements that match, in order."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        return "\n".join(self.run(script, selector))

    def click(self, selector: str) -> None:
        """As with a mouse: an element that is hidden or covered raises."""
        self._post(f"{self._session}/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """As with a keyboard, after what stands there."""
        self._post(f"{self._session}/element/{self._find(selector)}/value", {"text": text})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: "browser" (the console) or "performance"."""
        return self._post(f"{self._session}/se/log", {"type": kind})

    def requested(self) -> list[str]:
        """The addresses that were requested since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        body = {"cmd": command, "params": parameters}
        return self._post(f"{self._session}/goog/cdp/execute", body)

    def photograph(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _find(self, selector: str) -> str:
        body = {"using": "css selector", "value": selector}
        return self._post(f"{self._session}/element", body)[_ELEMENT]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        reply = self._http.post(path, json=body).json()["value"]
        assert not (isinstance(reply, dict) and "error" in reply), reply["message"]
        return reply


def _driver() -> tuple[subprocess.Popen[str], str]:
    """A chromedriver and its port. The one it finds free may be taken when it gets there."""
    for _ in range(5):
        driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert driver.stdout is not None
        for line in driver.stdout:
            if "started successfully on port" in line:
                return driver, line.rstrip(".\n").rpartition(" ")[2]
        driver.stdout.close()
        driver.wait(10)
    raise AssertionError("chromedriver does not start")
