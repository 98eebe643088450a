"""Graphs that `secateur export` wrote, in ONNX Runtime on the CPU: where their files are, and how they are opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.errors import InvalidInputError
from secateur.models.inputs import example_inputs, max_length
from secateur.models.loading import build_empty
from secateur.models.sentence_transformers import transformer_folder
from secateur.support.parsing import short

FILE = "onnx/model.onnx"
INT8_FILE = "onnx/model_qint8.onnx"
"""Where sentence-transformers and optimum look for a graph in a model's folder."""

_RUNTIMES = {"ONNX": FILE, "ONNX, int8": INT8_FILE}
UNFUSED = ["SkipLayerNormFusion", "BiasSkipLayerNormFusion"]
"""Optimisers of ONNX Runtime that make graphs slower on the CPUs that were measured."""


@dataclass(frozen=True)
class OnnxGraph:
    """A graph in `file`, and the base model that it was made of: of the same shapes, with weights of 0."""

    file: Path
    base: PreTrainedModel

    @property
    def weight_bytes(self) -> int:
        """Return what `size_of` returns of the file."""
        return size_of(self.file)

    def forward_pass(self, batch: int, length: int) -> Callable[[], Any]:
        """Return a call that runs the graph on made-up text of `batch` × `length` tokens, on PyTorch's threads.

        Raises what `open_graph` raises, and `InvalidInputError` for a graph that does not take such text.
        """
        run = open_graph(self.file, torch.get_num_threads())
        texts = example_inputs(self.base, batch, min(length, max_length(self.base, length)), padding=0)
        try:
            # Kinds of tokens, which not every model is given.
            inputs = {one.name: texts.get(one.name, torch.zeros_like(texts["input_ids"])) for one in run.get_inputs()}
            call = partial(run.run, None, {name: value.numpy() for name, value in inputs.items()})
            call()
        except Exception as error:
            raise InvalidInputError(f"{self.file} does not run on {batch} x {length} tokens: {short(error)}") from error
        return call


def size_of(file: Path) -> int:
    """Return the bytes of a graph, with the weights that are in files beside it."""
    return sum(one.stat().st_size for one in file.parent.glob(f"{file.name}*"))


def open_graph(file: Path, threads: int = 0) -> Any:
    """Return ONNX Runtime's session for a graph, on the CPU. 0 `threads` = one for each core.

    Raises `InvalidInputError` for a file that is no graph, and where onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError:
        raise InvalidInputError(f"running {file} needs onnxruntime; pip install 'secateur[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads that spin would take the cores from whatever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what it logs of a damaged file, the error says too
    try:
        return onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"], disabled_optimizers=UNFUSED
        )
    except Exception as error:  # classes of its own, which differ by version
        raise InvalidInputError(f"{file} is no graph that ONNX Runtime reads: {short(error)}") from error


def graphs_in(folder: str | Path) -> dict[str, OnnxGraph]:
    """Return the graphs in a folder that `secateur export --format onnx` wrote, by "ONNX" and "ONNX, int8"; or none.

    A folder that has PyTorch's weights too, as some on the Hub do, is a model's and counts as none.
    """
    place = transformer_folder(Path(folder)) if Path(folder).is_dir() else Path(folder)
    files = {name: place / file for name, file in _RUNTIMES.items() if (place / file).is_file()}
    if not files or any(place.glob("*.safetensors")) or any(place.glob("*.bin")):
        return {}
    base = build_empty(place)
    return {name: OnnxGraph(file, base) for name, file in files.items()}
