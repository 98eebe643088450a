"""When, where and with what a result was measured: the header of every result file, and the end of every row."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import torch

from secateur.support.versions import environment


def provenance(command: str, note: str = "") -> dict[str, Any]:
    """Return the command, the date, the machine and the versions; `note` says what else the machine was doing, say."""
    return {"command": command, "date": today(), "machine": machine(note), "versions": environment()}


def made(note: str = "") -> dict[str, Any]:
    """Return when, where and with what a single row was measured: rows of a file may be of several days."""
    return {"date": today(), "machine": machine(note), "environment": environment()}


def today() -> str:
    return datetime.date.today().isoformat()


def machine(note: str = "") -> str:
    """Return the processor, by the instructions that round as they do, the threads of a process, and the GPU."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    where = (
        f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} cores, {chip}, Python {platform.python_version()}"
    )
    return f"{where}; {note}" if note else where
