"""A model as an ONNX graph, checked by ONNX Runtime against PyTorch before it counts as written.

The exporter is transformers' own (`transformers.exporters`, on `torch.onnx.export` with `torch.export`): it comes with
the release that defines the models, which optimum-onnx 0.1 does not, since that requires transformers 4; and it carries
the fixes that masks and rotary embeddings need, which a bare `torch.onnx.export` leaves to its caller.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import InvalidInputError, SecateurError, UnsupportedModelError
from secateur.exporting.traces import traces_forgotten
from secateur.measuring.onnx_graph import FILE
from secateur.models.base_model import base_of
from secateur.models.inputs import example_inputs, max_length
from secateur.models.loading import quiet_transformers
from secateur.removal.emptied import bypass_
from secateur.removal.proof import TOLERANCE, largest_difference
from secateur.sites.feed_forward import FeedForwardSite
from secateur.sites.layout import Site
from secateur.sites.narrowing import cut_together
from secateur.sites.recipe import read_recipe
from secateur.support.disk_refusals import disk_refusal
from secateur.support.interrupts import in_one_go, interrupts_heard

OPSET = 20
AXES = ("batch", "sequence")

_SHAPES = ((1, 2, 0), (1, 17, 0), (3, 9, 4), (2, 40, 11))  # batch, length, padding of every second text


def save_onnx(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write `onnx/model.onnx`, its weights beside it, and the config into `folder`, for text encoders and decoders.

    The graph takes `input_ids`, `attention_mask` and, where the model tells first from second sentences,
    `token_type_ids`, int64 `[batch, sequence]`, both axes dynamic and named so, and computes in float32. It returns
    what the model returns; a decoder's key-value cache is left out, so a decoder gives the logits or states of whole
    texts. The graph is run at several shapes, with and without padding: where an output differs from PyTorch's by more
    than 1e-4 (of the largest output, where that is above 1), `SecateurError` is raised.

    Returns `opset`, `inputs`, `outputs` and `max_difference`. Raises `UnsupportedModelError` for models that read
    something else than text, and for encoder-decoders, and `InvalidInputError` where a package of the extra
    `secateur[onnx]` is missing.
    """
    try:
        in_one_go(_import)
    except ImportError as error:
        raise InvalidInputError(
            f"exporting to ONNX needs more packages ({error.name or error}); pip install 'secateur[onnx]'"
        ) from None
    base = base_of(model)
    if base.main_input_name != "input_ids" or base.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is neither a text encoder nor a decoder; only those export"
        )
    model = prepared(model)
    inputs = text_inputs(model, 2, 12, 3)
    with quietly(), one_error(model, "cannot be exported to ONNX"), traces_forgotten():
        _export(model, inputs, folder)
        outputs, difference = _check(model, folder / FILE)
    return {"opset": OPSET, "inputs": list(inputs), "outputs": outputs, "max_difference": difference}


def _import() -> None:
    """Import all that an export takes: the error comes before the work, and Ctrl-C leaves no package half imported.

    Python would take half of `onnx` for the whole afterwards.
    """
    for name in ("onnx", "onnxruntime", "onnxruntime.quantization", "onnxscript", "transformers.exporters"):
        import_module(name)


def _export(model: PreTrainedModel, inputs: dict[str, Tensor], folder: Path) -> None:
    from transformers.exporters import OnnxConfig, OnnxExporter

    # A range that fits what the models ask of themselves; the graph does not enforce it.
    batch = torch.export.Dim("batch", min=1)
    sequence = torch.export.Dim("sequence", min=2, max=max_length(model, 1 << 20))
    settings = OnnxConfig(
        dynamic_shapes={name: {0: batch, 1: sequence} for name in inputs},
        prefer_deferred_runtime_asserts_over_guards=True,
        opset_version=OPSET,
    )
    OnnxExporter().export(model, inputs, settings).save_pretrained((folder / FILE).parent)
    for file in (folder / FILE).parent.glob("*config.json"):  # the model's own, and how it generates
        file.rename(folder / file.name)
    _name_axes(folder / FILE)


def _name_axes(file: Path) -> None:
    """Call the inputs' axes `batch` and `sequence` wherever they occur; the exporter makes names such as `s18`."""
    import onnx

    proto = onnx.load(file, load_external_data=False)
    graph = proto.graph
    arguments = [dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim]
    names = {name: axis for name, axis in zip(arguments, AXES, strict=True) if name}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a name, or a sum or product of names
                dim.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim.dim_param)
    onnx.save(proto, file)


@torch.no_grad()
def _check(model: PreTrainedModel, file: Path) -> tuple[list[str], float]:
    """Return the graph's outputs and their largest difference to the model's, or raise `SecateurError`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    worst = 0.0
    for shape in _SHAPES:
        inputs = text_inputs(model, *shape)
        wanted = model(**inputs)
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        tensors = [torch.as_tensor(value) for value in found]
        worst = max(worst, largest_difference(tensors, [wanted[name] for name in names]))
    if not worst <= TOLERANCE:
        raise SecateurError(
            f"the ONNX graph of {type(model).__name__} differs from PyTorch by {worst:.2g} (at most {TOLERANCE:g} is "
            "accepted)"
        )
    return names, worst


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """Return a float32 copy on the CPU, without a cache or maps among its outputs, and without tensors of size 0."""
    model = copy.deepcopy(model).to("cpu").float().eval()
    base = base_of(model)
    for config in (model.config, base.config):
        config.use_cache = config.output_hidden_states = config.output_attentions = False
        config.return_dict = True
    recipe = read_recipe(base.config)
    for name, kept in (recipe.kept if recipe else {}).items():
        if recipe is not None and not kept and name not in recipe.bypassed:
            _fill_(base, recipe.sites[name])
    return model


def _fill_(base: PreTrainedModel, site: Site) -> None:
    """Make an emptied site one that ONNX Runtime runs: its shape inference takes a size of 0 for "as before".

    Its own code is left out. Where the output projection is part of it, the bias is all that it writes; elsewhere the
    projection reads one feature, which is 0, with the weight 0.
    """
    if isinstance(site, FeedForwardSite):
        _fill_block_(base, site)
        return
    if site.output.startswith(site.name + "."):
        bypass_(base, site)
        return
    projection: Any = base.get_submodule(site.output)
    if not isinstance(projection, nn.Linear):
        raise UnsupportedModelError(
            f"site {site.name} is empty, and {site.output} is no linear layer to export it with"
        )
    projection.weight = nn.Parameter(torch.zeros(projection.out_features, 1))
    projection.in_features = 1
    module: Any = base.get_submodule(site.name)
    module.__class__ = type(type(module).__name__, (_OneZero, type(module)), {})


def _fill_block_(base: PreTrainedModel, site: FeedForwardSite) -> None:
    """Give a block without neurons one that is written, and read, with weights of 0."""
    first = torch.arange(site.num_units) == 0
    for (name, axis), indices in site.kept_indices(first).items():
        for tensor in cut_together(base, name).values():
            shape = list(tensor.shape)
            shape[axis] = len(indices)
            tensor.data = tensor.data.new_zeros(shape)


class _OneZero:
    """Takes the place of an emptied attention module's forward: one feature, which is 0."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return zeros `[batch, tokens, 1]` and no map."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 1), None


def text_inputs(model: PreTrainedModel, batch: int, length: int, padding: int = 0) -> dict[str, Tensor]:
    """Return the graph's inputs, random texts of at most `length` tokens, every second with `padding` at its end."""
    length = min(length, max_length(model, length))
    arguments = example_inputs(model, batch, length, min(padding, length - 1))
    inputs = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    if "token_type_ids" in inspect.signature(model.forward).parameters and (
        getattr(model.config, "type_vocab_size", 0) > 1
    ):
        inputs["token_type_ids"] = torch.zeros(batch, length, dtype=torch.int64)
        inputs["token_type_ids"][:, length // 2 :] = 1
    return inputs


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep back what the exporter and the packages below it print, log and warn about; errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            quiet_transformers(progress=False),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def one_error(model: PreTrainedModel, failure: str) -> Iterator[None]:
    """Make an `UnsupportedModelError` of what the exporter and ONNX Runtime raise, in one line with its first cause.

    Not of a full disk, nor of a Ctrl-C that they took for a failure.
    """
    heard = interrupts_heard()
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        if interrupts_heard() != heard:
            raise KeyboardInterrupt from error
        if (refused := disk_refusal(error)) is not None:
            raise refused from error  # who made the folder knows what it is called
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise UnsupportedModelError(f"{type(model).__name__} {failure}: {reason}") from error
