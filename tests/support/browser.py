"""A real browser for the tests of the page: Debian's chromium, driven by playwright, with all it complains about."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@cache
def chromium() -> tuple[str | None, str]:
    """Return the browser's path, installed by apt-get where root may do that, or None and the reason."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is not None:
        return found, ""
    if shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None, "needs chromium on the PATH, and it can only be installed by root with apt-get"
    for command in ("apt-get update -q", "apt-get install -y -q --no-install-recommends chromium fonts-liberation"):
        done = subprocess.run(command.split(), capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            return None, f"needs chromium; `{command}` failed: {lines[-1]}"
        print(f"{command}: done", file=sys.stderr)
    return shutil.which("chromium"), "apt-get installed no chromium"


@contextmanager
def browser() -> Iterator[Any]:
    """Run the browser without a window."""
    from playwright.sync_api import sync_playwright

    path, reason = chromium()
    if path is None:
        raise RuntimeError(reason)
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
