"""The version of this package, said once, and what a result was made with."""

from __future__ import annotations

__version__ = "0.1.0"


def environment() -> dict[str, str]:
    """Return the versions that a result depends on, as the packages say them of themselves."""
    import torch
    import transformers

    return {"secateur": __version__, "torch": str(torch.__version__), "transformers": str(transformers.__version__)}
