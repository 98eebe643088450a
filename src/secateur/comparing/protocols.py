"""How the runs of a comparison train, by name; read by the command line too, so nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.support.defaults import BATCH_SIZE


@dataclass(frozen=True)
class Protocol:
    """How a run trains: the training texts at most (None: all), tokens a text, and the optimiser's settings."""

    max_train: int | None
    max_length: int
    epochs: float
    learning_rate: float
    batch_size: int = BATCH_SIZE


PROTOCOLS = {
    "lite": Protocol(max_train=2000, max_length=64, epochs=3.0, learning_rate=5e-5),
    "full": Protocol(max_train=None, max_length=128, epochs=3.0, learning_rate=2e-5),
}
"""`lite` is for a laptop: about two minutes a run with MiniLM on two cores."""

DEFAULT_PROTOCOL = "lite"
