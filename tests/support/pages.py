"""The demo in a browser: its process, Chromium, visitors who ask, and what must hold of each visit."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

DEMO = Path(__file__).parents[2] / "recipes" / "demo.py"
PARTS = DEMO.with_name("demo_parts")
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Space:
    """
    The demo as the `app.py` of a Space, with its parts, in a folder in which an import of the project fails.

    Args:
        folder (`Path`): an empty folder.
        variables (`dict`): environment variables of the demo.
    """

    def __init__(self, folder: Path, variables: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        shutil.copy(DEMO, folder / "app.py")
        shutil.copytree(PARTS, folder / "demo_parts", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("modeling_cosup", "trainer", "cli"):
            (folder / f"{name}.py").write_text("raise SystemExit('the project was imported')")
        variables = variables | {
            "HF_HOME": folder / "hf_home",
            "GRADIO_TEMP_DIR": folder / "gradio",
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": port,
        }
        environment = os.environ.copy()
        for name in ("PYTHONPATH", "HF_MODULES_CACHE", "GRADIO_ANALYTICS_ENABLED"):
            environment.pop(name, None)
        for name, value in variables.items():
            environment[name] = str(value)
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "app.py"],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait(self) -> None:
        """Wait until the page is served."""
        waiting = threading.Event()
        for _ in range(1200):
            if self.process.poll() is not None:
                break
            try:
                return urllib.request.urlopen(self.url, timeout=5).close()
            except (urllib.error.URLError, ConnectionError):
                waiting.wait(0.1)
        raise AssertionError(f"The demo did not start:\n{self.log.read_text()}")

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(timeout=60)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Run a browser; skip the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def visitors(browser: Any) -> Iterator[Callable[[str], Any]]:
    """
    Yield a function that opens a page for a new visitor.

    In the end, no request may have left this machine, and no script may have failed.
    """
    contexts: list[Any] = []
    urls: list[Any] = []
    failures: list[str] = []

    def visit(url: str) -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        contexts.append(context)
        context.set_default_timeout(30_000)
        context.on("request", lambda request: urls.append(urlparse(request.url)))
        context.on("weberror", lambda error: failures.append(str(error.error)))
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("#question textarea")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert {url.hostname for url in urls if url.scheme not in ("data", "blob")} == {"127.0.0.1"}
    assert failures == []


def ask(page: Any, question: str, retrieval: str = "Automatic") -> tuple[str, list[str]]:
    """Ask, wait for the end of the answer, and return its text and the texts of its passages."""
    page.locator("#retrieval").get_by_text(retrieval, exact=True).click()
    page.fill("#question textarea", question)
    page.click("#ask")
    page.locator(".cosup-question").get_by_text(question, exact=True).wait_for()
    page.wait_for_selector(".cosup-caret", state="detached")
    return page.inner_text(".cosup-answer"), page.locator(".cosup-passage").all_inner_texts()


def upload(page: Any, path: Path) -> None:
    """Choose a corpus, and let it be indexed."""
    if not page.locator("#index").is_visible():
        page.get_by_text("Your own corpus").click()
    if page.locator("#corpus button[aria-label*='lear']").count():
        page.locator("#corpus button[aria-label*='lear']").first.click()
    page.set_input_files("#corpus input[type=file]", path)
    page.locator("#corpus").get_by_text(path.stem).first.wait_for()
    page.click("#index")
