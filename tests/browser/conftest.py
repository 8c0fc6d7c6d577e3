"""A headless Chromium, driven by Playwright; skipped with a reason where there is none."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.samples import SAMPLES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_NAMES = "chromium", "chromium-browser", "google-chrome"
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def _missing() -> str:
    """Reason why there is no browser here; empty where there is one."""
    if os.environ.get("DISTBENCH_BROWSER") != "1":
        return "long: make test-browser"
    lacking = [name for name in ("playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None]
    if lacking:
        return f"no {' and no '.join(lacking)}: pip install '.[browser]', or make test-browser"
    return "" if _chromium() else f"no Chromium here ({', '.join(_NAMES)}): apt-get install chromium"


def _chromium() -> str:
    return next((path for path in map(shutil.which, _NAMES) if path), "")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The browser of all tests."""
    why = _missing()
    if why:
        pytest.skip(why)
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - of an extra

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=_chromium(), args=list(_FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="session")
def samples(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: ARG001 - only with one
    """Files of all sample pages."""
    root = tmp_path_factory.mktemp("pages")
    for name, write in SAMPLES.items():
        write(root / name)
    return {name: root / name / "results.html" for name in SAMPLES}


class Opened:
    """A page with what it did: dialogs, requests beyond its own file, and messages of its console."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page = page
        self.did: list[str] = []
        page.on("dialog", self._dialog)
        page.on("request", lambda request: self._note("request", request.url, path.as_uri()))
        page.on("console", lambda message: self.did.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.did.append(f"error: {error}"))
        page.goto(path.as_uri(), wait_until="load")

    def _dialog(self, dialog: Any) -> None:
        self.did.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _note(self, what: str, url: str, own: str) -> None:
        if url.partition("#")[0] != own:
            self.did.append(f"{what}: {url:.200}")
