"""What a result was made with."""

from __future__ import annotations

from importlib.metadata import version


def environment() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {package: version(package) for package in ("secateur", "torch", "transformers")}
