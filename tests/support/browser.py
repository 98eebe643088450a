"""A real browser for the tests of the page: Debian's chromium, driven by playwright, with all it complains about."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MISSING = "no chromium on the PATH; `make browser` installs it"


def chromium() -> str | None:
    """Return the browser's path."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, found), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Run the browser without a window."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    if path is None:
        raise RuntimeError(MISSING)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield running
        finally:
            running.close()


@contextmanager
def opened(running: Any, file: Any, **context: Any) -> Iterator[tuple[Any, list[str]]]:
    """Open a file in a page of its own; yield it with the list of its console errors and requests, which grows."""
    inside = running.new_context(**context)
    page, complaints = inside.new_page(), []
    page.on("console", lambda m: complaints.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    # The page itself is the one request; data: addresses are inside it.
    inside_page = (file.as_uri(), "data:")
    page.on("request", lambda r: None if r.url.startswith(inside_page) else complaints.append(f"request: {r.url}"))
    page.goto(file.as_uri())
    try:
        yield page, complaints
    finally:
        inside.close()
