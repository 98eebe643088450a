"""What is said of steps that lower the relational KL to the dense model, in a line of a command and on the page.

A step that does not lower it is undone, and both say so.
"""

from __future__ import annotations

from collections.abc import Sequence


def refinement_line(tried: Sequence[float]) -> str:
    """Say what exchanges of heads gave; the first of the masks that were tried is that of the scores."""
    return f"relational KL on these texts {tried[0]:.4f}, after {len(tried) - 1} exchanges {min(tried):.4f}"


def reconstruction_line(before: float, after: float) -> str:
    """Say what refitting the output projections gave."""
    what = f"with reconstruction {after:.4f}" if after < before else "no lower with reconstruction, so without"
    return f"relational KL on these texts {before:.4f}, {what}"


def reconstruction_note(before: float, after: float) -> str:
    """Say on the page what refitting the output projections gave."""
    if not after < before:
        return f"Reconstruction did not lower the relational KL, {before:.4f}: the weights are those of the model."
    return f"Output projections were refitted on these texts: relational KL {before:.4f} without, {after:.4f} with."


def distillation_line(before: float, after: float, steps: int) -> str:
    """Say what learning from the dense model gave."""
    what = f"after {steps} steps {after:.4f}" if after < before else f"no lower after {steps} steps, so without"
    return f"relational KL on texts held out {before:.4f}, {what}"


def distillation_note(before: float, after: float, steps: int, texts: int) -> str:
    """Say on the page what learning from the dense model gave."""
    if not after < before:
        return f"Distillation did not lower the relational KL, {before:.4f}: the weights are those before it."
    return (
        f"Distilled after the proof, in {steps:,} steps on {texts:,} texts: relational KL on texts held out "
        f"{before:.4f} before, {after:.4f} after."
    )


def restored_words(restore: str, steps: int | None) -> str:
    """Name what a comparison does between pruning and fine-tuning, or nothing."""
    words = [] if restore == "none" else ["output projections refitted"]
    return ", ".join([*words, *([f"distilled in {steps} steps"] if restore == "distill" else [])])
