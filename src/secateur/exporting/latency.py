"""What units cost in ONNX Runtime: each model that is timed is exported first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from secateur.exporting.int8 import quantize_graph
from secateur.exporting.onnx import one_error, quietly, save_onnx
from secateur.measuring.latency_table import LatencyTable, measure_latency
from secateur.measuring.onnx_graph import FILE, INT8_FILE, OnnxGraph
from secateur.measuring.unit_costs import UnitCosts
from secateur.models.base_model import base_of
from secateur.settings import Shape
from secateur.sites.finding import find_units
from secateur.support.defaults import UNITS
from secateur.support.files import temporary_folder

Runtime = Literal["pytorch", "onnx", "onnx-int8"]


def latency_table(model: PreTrainedModel, shape: Shape, runtime: Runtime = "pytorch", **options: Any) -> LatencyTable:
    """Measure what heads, neurons and layers cost in a runtime on this machine, as `measure_latency` does.

    `options` are `rounds`, `clock` and `progress`. In ONNX Runtime all graphs are open at once, some 25 of the model's
    size. Raises `UnsupportedModelError` for a model that has no such units, and what `save_onnx` raises.
    """
    base = base_of(model)
    costs = UnitCosts(base, find_units(base, UNITS), *shape)
    if runtime == "pytorch":
        return measure_latency(base, costs, shape, **options)
    with temporary_folder() as folder:

        def run_of(smaller: PreTrainedModel, batch: int, length: int) -> Callable[[], Any]:
            place = folder / str(len(list(folder.iterdir())))
            place.mkdir()
            save_onnx(smaller, place)
            return OnnxGraph(_graph(smaller, place, runtime), smaller).forward_pass(batch, length)

        return measure_latency(base, costs, shape, run_of=run_of, runtime=runtime, **options)


def _graph(model: PreTrainedModel, folder: Path, runtime: Runtime) -> Path:
    """Return the file that the runtime reads, made of the float32 graph in the folder where it is another."""
    if runtime == "onnx":
        return folder / FILE
    with quietly(), one_error(model, "cannot be quantised in ONNX Runtime"):
        quantize_graph(folder)
    return folder / INT8_FILE
