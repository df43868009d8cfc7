"""Hostile texts in a report, looked at by a real browser: no dialog, no request, no other page."""

import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib.report import write_report
from tests.report.payloads import PAYLOADS
from tests.report.synthetic import write_run
from tests.report.test_report_escaping import _run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


class Browser:
    """Headless Chromium, spoken to over its DevTools pipe (descriptors 3 and 4)."""

    def __init__(self, profile: Path):
        to_browser, self.send_end = os.pipe()
        self.read_end, from_browser = os.pipe()
        words = [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe",
        ]  # fmt: skip
        shell = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", shell, "sh", *words], pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.left, self.events = 0, b"", []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: object) -> dict:
        """Send a command, and wait for its answer; events on the way are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.send_end, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 90
        while time.monotonic() < end:
            for answer in self.heard(end - time.monotonic()):
                if answer.get("id") == self.number:
                    assert "error" not in answer, answer
                    return answer["result"]
        raise AssertionError(f"{method}: no answer")

    def heard(self, seconds: float) -> list[dict]:
        """Whole messages that come within some seconds; dialogs are closed, all events kept."""
        if select.select([self.read_end], [], [], max(0, seconds))[0]:
            self.left += os.read(self.read_end, 2**20)
        *whole, self.left = self.left.split(b"\0")
        messages = [json.loads(m) for m in whole]
        for message in messages:
            if "method" in message:
                self.events.append(message)
            if message.get("method") == "Page.javascriptDialogOpening":
                close = {"id": 0, "method": "Page.handleJavaScriptDialog",
                         "params": {"accept": False}, "sessionId": self.session}  # fmt: skip
                os.write(self.send_end, json.dumps(close).encode() + b"\0")
        return messages

    def open(self, page: Path, seconds: float = 4) -> tuple[list, list, list]:
        """Dialogs, requests beyond the page itself, and other pages gone to."""
        self.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        end = time.monotonic() + 60  # a busy machine takes long to run a page's scripts
        while time.monotonic() < end and not any(
            event["method"] == "Page.loadEventFired" for event in self.events
        ):
            self.heard(1)
        return self.seen(page.as_uri(), seconds)

    def seen(self, url: str, seconds: float) -> tuple[list, list, list]:
        """The same of what happened until some seconds from now."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.heard(end - time.monotonic())
        named = [(e["method"], e["params"]) for e in self.events]
        dialogs = [p["message"] for m, p in named if m == "Page.javascriptDialogOpening"]
        asked = [p["request"]["url"] for m, p in named if m == "Network.requestWillBeSent"]
        gone = [p["frame"]["url"] for m, p in named if m == "Page.frameNavigated"]
        beyond = [u for u in asked if u != url and not u.startswith("data:image/")]
        return dialogs, beyond, [u for u in gone if u != url]

    def evaluate(self, text: str) -> object:
        """What a line of script comes to in the page."""
        return self.ask("Runtime.evaluate", expression=text, returnByValue=True)["result"]["value"]

    def close(self) -> None:
        """Its process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.send_end)
        os.close(self.read_end)


@pytest.fixture
def browser(tmp_path: Path):  # noqa: ANN201 - a generator fixture
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


def test_figures_and_commands_fit_every_screen(browser: Browser, tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "fits", rows_per_class=1, images=False))
    for width in (1400, 800, 380):
        browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=900,
                    deviceScaleFactor=1, mobile=False)  # fmt: skip
        browser.open(page, 1)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
        too_wide = """[...document.querySelectorAll("figure img, pre")].filter(e =>
            e.getBoundingClientRect().right > e.closest("section").getBoundingClientRect().right
            || e.scrollWidth > e.clientWidth).map(e => e.alt || e.textContent)"""
        assert browser.evaluate(too_wide) == [], width
        names = """[...document.querySelectorAll("figure:not(.plain) img")].map(e =>
            e.getBoundingClientRect().width / e.naturalWidth)"""
        scales = browser.evaluate(names)
        assert len(scales) == 3 and min(scales) > 0.65, (width, scales)  # text of 6.5 pt or more


def test_hostile_texts_do_nothing_in_a_browser(
    browser: Browser, tmp_path: Path, record: Callable
) -> None:
    bare = tmp_path / "bare.html"  # the browser does see what such a text does where it is markup
    bare.write_text(f"<body>{PAYLOADS['img_onerror']}{PAYLOADS['remote_image']}", encoding="utf-8")
    dialogs, beyond, _ = browser.open(bare)
    assert dialogs == ["1"] and any("evil.example" in url for url in beyond)

    page = write_report(_run(tmp_path, list(PAYLOADS.values())))
    assert browser.open(page) == ([], [], [])
    # Every fold opened and every button pressed, as a reader would.
    browser.evaluate(
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "document.querySelectorAll('button, summary, input').forEach(b => b.click()); 1"
    )
    assert browser.seen(page.as_uri(), 2) == ([], [], [])
    shown = browser.evaluate("document.body.textContent")
    assert "<script>alert(1)</script>" in shown and "onerror=alert(1)" in shown
    record("S3", len(PAYLOADS), len(PAYLOADS), "in Chromium, dialogs 0, requests 0")
