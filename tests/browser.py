"""A browser for tests of the gallery's page: Chromium, driven by Playwright."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser() -> Iterator:
    """A running browser without a window; the test is skipped where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("Playwright is not installed")
    with sync_playwright() as driver:
        own = driver.chromium.executable_path
        program = next((found for name in (*PROGRAMS, own) if (found := shutil.which(name))), None)
        if program is None:
            pytest.skip("Chromium is not installed")
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


class Watched:
    """A page with what went wrong on it, and what it asked for."""

    def __init__(self, running, width: int = 1280, height: int = 800, **options):
        self.page = running.new_page(viewport={"width": width, "height": height}, **options)
        self.errors, self.asked = [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, address: str):
        """The page at an address, once it shows all of its samples."""
        self.page.goto(address)
        self.page.wait_for_selector(".card, .nothing")
        until(self.page, "filled")
        return self.page


def until(page, expression: str, seconds: float = 20.0) -> None:
    """Waits until an expression holds; Playwright's own way needs `eval`, which the page's policy does not allow. While
    the page is read anew, its scripts are not there yet.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(f"typeof filled === 'boolean' && ({expression})"):
        assert time.monotonic() < end, f"{expression} does not hold after {seconds:g} s"
        page.wait_for_timeout(30)
