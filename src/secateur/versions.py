"""What a result was made with."""

from __future__ import annotations

import torch
import transformers

import secateur


def environment() -> dict[str, str]:
    """Return the versions that a result depends on: those that the packages say of themselves, installed or not."""
    return {package.__name__: str(package.__version__) for package in (secateur, torch, transformers)}
