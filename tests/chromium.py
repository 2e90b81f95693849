"""Chromium, driven by Playwright, for tests of pages: found on this machine, or the reason why they are skipped."""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ARGUMENTS = ["--no-sandbox", "--force-prefers-reduced-motion"]


def executable() -> str:
    """The browser's path; skips the test where there is none."""
    pytest.importorskip("playwright", reason="Playwright is not installed: pip install -e '.[browser]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


@contextlib.contextmanager
def chromium() -> Iterator:
    """A browser that runs within this block."""
    path = executable()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def axe() -> str:
    """The source of axe-core, a checker of accessibility: from a wheel that has it, or the file that GPTJAX_AXE names.

    Skips the test where there is neither.
    """
    for name in ("axe_playwright_python", "axe_core_python"):
        if spec := importlib.util.find_spec(name):
            found = [path for folder in spec.submodule_search_locations or () for path in Path(folder).rglob("axe*.js")]
            if found:
                return found[0].read_text()
    if given := os.environ.get("GPTJAX_AXE"):
        return Path(given).read_text()
    pytest.skip("axe-core is not here: pip install -e '.[browser]', or name its axe.min.js in GPTJAX_AXE")
