"""What every public call owes to every model that it supports: one battery of named checks, for any tiny model.

Each check is given a model of its own and raises `Failed` where a promise is broken, `Skipped` where the model itself
shows nothing. The sweep runs all of them on every type, a contract test on the tiny kinds. They share no code with
secateur's own proof.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from benchmarks.outputs import difference, said, shapes, tensors_only, uneven_mask
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import SecateurError
from secateur.measuring.cost import measure_cost
from secateur.models.base_model import base_of
from secateur.models.inputs import example_inputs
from secateur.pruning import prune
from secateur.removal.remove import gated, remove_
from secateur.removal.verify import verify_checkpoint
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_units
from secateur.sites.gating import probe
from secateur.texts.calibration import PreparedModel
from secateur.units.masks import Mask

TOLERANCE = 1e-4
LONGEST = 600  # tokens
DECODED = 20  # tokens, past the windows of tiny models

Check = Callable[[PreTrainedModel], None]


class Failed(Exception):
    """A promise is broken; the message says how."""


class Skipped(Exception):
    """The model, or transformers, cannot show whether the promise holds."""


def failures(model: PreTrainedModel) -> dict[str, str]:
    """Run every check on a copy of `model`, which has sites, and return what failed: the check's name and how."""
    found = {}
    for name, check in CHECKS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(copy.deepcopy(model))
        except Skipped:
            pass
        except Failed as failure:
            found[name] = str(failure)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


# --- numbers ---------------------------------------------------------------------------------------------------------


def ones_are_the_identity(model: PreTrainedModel) -> None:
    """Gates of ones change nothing, for the usual inputs and a text longer than what the config has numbers for."""
    sites = find_sites(model)
    gates = {name: torch.ones(site.num_units) for name, site in sites.items()}
    for inputs in (example_inputs(model), longest_inputs(model)):
        if inputs is None:
            continue
        plain = said(model, inputs)
        with probe(model, gates=gates):
            moved = difference(plain, said(model, inputs))
        if not moved <= TOLERANCE:
            raise Failed(f"gates of ones change the outputs by {moved:.2g}, inputs of {shapes(inputs)}")


def cached_steps_are_the_whole_text(model: PreTrainedModel) -> None:
    """A pruned decoder computes token by token, with a cache, what it computes of all tokens at once."""
    moved = _moved_by_cache(model)
    if not moved <= TOLERANCE:
        raise Skipped("so does the whole model")
    _cut_(model)
    moved = _moved_by_cache(model)
    if not moved <= TOLERANCE:
        raise Failed(f"token by token the pruned model says something else, by {moved:.2g}")


def _moved_by_cache(model: PreTrainedModel) -> float:
    """Return how far outputs token by token are from those of all tokens. Raises `Skipped` where none can be made."""
    base, inputs = base_of(model), example_inputs(model, length=DECODED, padding=0)
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    accepted = inspect.signature(base.forward).parameters
    if name not in inputs or not {"past_key_values", "use_cache"} <= accepted.keys():
        raise Skipped("no decoder")
    inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
    tokens, cache, parts = inputs[name], None, []
    try:
        with torch.no_grad():
            whole = base(**inputs)[0]
            for start, end in [(0, 5), *((i, i + 1) for i in range(5, DECODED))]:
                step = base(**{**inputs, name: tokens[:, start:end], "use_cache": True}, past_key_values=cache)
                cache = step.past_key_values
                parts.append(step[0])
    except Exception as error:
        if hasattr(base.config, "head_pruning"):
            raise Failed(f"the pruned model does not decode: {type(error).__name__}: {error}") from error
        raise Skipped(f"the whole model does not decode: {error}") from error
    return difference([whole], [torch.cat(parts, dim=1)])


# --- modes -----------------------------------------------------------------------------------------------------------


def training_mode_changes_nothing(model: PreTrainedModel) -> None:
    """In training mode the same sites are found and the same model comes of pruning, which is in training mode too."""
    dense, twin = model.eval(), copy.deepcopy(model).train()
    pruned, mask = _pruned(dense)
    try:
        trained, other_mask = _pruned(twin)
    except SecateurError as error:
        raise Failed(f"in training mode pruning is refused: {error}") from error
    if mask != other_mask:
        raise Failed("in training mode other sites or heads are pruned")
    if not all(module.training for module in [*twin.modules(), *trained.modules()]):
        raise Failed("pruning ends training mode")
    if any(module.training for module in [*dense.modules(), *pruned.modules()]):
        raise Failed("pruning ends evaluation mode")
    ours, theirs = trained.state_dict(), pruned.state_dict()
    other = [name for name in theirs if name not in ours or not torch.equal(theirs[name], ours[name])]
    if other or len(ours) != len(theirs):
        raise Failed(f"what is pruned in training mode has another {other[0] if other else 'set of weights'}")


def _pruned(model: PreTrainedModel) -> tuple[Any, Mask]:
    try:
        smaller, report = prune(model, scorer="magnitude", pruning_ratio=0.5)
    except SecateurError as error:
        if model.training:
            raise
        raise Skipped(str(error)) from error
    return smaller, report.mask


# --- what is borrowed is given back ----------------------------------------------------------------------------------


def borrowing(call: Callable[[PreTrainedModel], Any]) -> Check:
    """Return the check that `call` leaves a model as it was: in training mode, half frozen, with gradients on it."""

    def check(model: PreTrainedModel) -> None:
        said(model, example_inputs(model))  # what a model keeps after its first pass is its own affair
        model.train()
        for number, parameter in enumerate(model.parameters()):
            if number % 2:
                parameter.requires_grad_(False)
            elif parameter.is_floating_point():
                parameter.grad = torch.full_like(parameter, 0.5)
        before = dict(state(model))
        with contextlib.suppress(SecateurError):  # a refusal leaves it as it was too
            call(model)
        for what, value in state(model):
            if not same(before.pop(what, None), value):
                raise Failed(f"changes {what}")
        if before:
            raise Failed(f"takes away {next(iter(before))}")

    return check


def state(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Yield all that a call could leave behind on a model, its configs, or in random generators, each with a name."""
    for name, parameter in model.named_parameters():
        yield f"the values of {name}", parameter.detach().clone()
        yield f"`.grad` of {name}", None if parameter.grad is None else parameter.grad.clone()
        yield f"`requires_grad` of {name}", parameter.requires_grad
        yield f"the identity of {name}", id(parameter)
    for name, buffer in model.named_buffers():
        yield f"the buffer {name}", buffer.clone()
    for name, module in model.named_modules():
        where = name or type(model).__name__
        yield f"the mode of {where}", module.training
        yield f"the class of {where}", id(type(module))
        yield f"the hooks of {where}", [len(getattr(module, kind)) for kind in _HOOKS]
        yield f"attributes of {where}", sorted(vars(module))
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            yield f"the config of {where}", (id(config), repr(sorted(vars(config).items(), key=lambda one: one[0])))
    yield "torch's random state", torch.get_rng_state()
    yield "Python's random state", random.getstate()
    yield "NumPy's random state", repr(numpy.random.get_state())
    yield "whether gradients are recorded", torch.is_grad_enabled()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def same(one: Any, other: Any) -> bool:
    """Are two values of `state` equal, tensors bit for bit?"""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
    return type(one) is type(other) and one == other


def _find(model: PreTrainedModel) -> None:
    find_sites(model)
    find_units(model, ["layers"])


def _gate(model: PreTrainedModel) -> None:
    sites = find_sites(model)
    with gated(model, uneven_mask(sites), sites):
        pass


def _score(model: PreTrainedModel) -> None:
    prepared = PreparedModel.of(model, None, Reading())
    for scorer in ("random", "magnitude", "contribution"):
        score(prepared, inputs=[tensors_only(example_inputs(model))], scorer=scorer)


def _prune_and_verify(model: PreTrainedModel) -> None:
    smaller, _ = prune(model, scorer="random", pruning_ratio=0.25)
    with tempfile.TemporaryDirectory() as folder:
        dense, small = Path(folder) / "dense", Path(folder) / "small"
        try:
            copy.deepcopy(model).save_pretrained(dense)
            smaller.save_pretrained(small)
            result = verify_checkpoint(small, dense)
        except SecateurError:
            raise
        except Exception as error:
            raise Skipped(f"transformers does not save and load it: {error}") from error
    if not result["equal"]:
        raise Failed(f"`verify` finds a difference of {result['max_difference']:.2g} in what it has just pruned")


def removed_units_are_gated_ones(model: PreTrainedModel) -> None:
    """Without neurons, or a layer, a model says what it says with them gated, which its own proof does not tell us."""
    found = 0
    for kind in ("neurons", "layers"):
        try:
            sites = find_units(model, [kind])
            mask, smaller, inputs = uneven_mask(sites), copy.deepcopy(model), example_inputs(model)
            remove_(smaller, mask)
        except SecateurError:
            continue
        with gated(model, mask, sites):
            wanted = said(model, inputs)
        moved = difference(wanted[:1], said(smaller, inputs)[:1])
        if not moved <= TOLERANCE:
            raise Failed(f"without {kind} the model says something else than with them gated, by {moved:.2g}")
        found += 1
    if not found:
        raise Skipped("neither neurons nor layers go")


CHECKS: dict[str, Check] = {
    "removed neurons and layers are gated ones": removed_units_are_gated_ones,
    "gates of ones are the identity": ones_are_the_identity,
    "cached steps are the whole text": cached_steps_are_the_whole_text,
    "training mode changes nothing": training_mode_changes_nothing,
    "finding units leaves the model alone": borrowing(_find),
    "scoring leaves the model alone": borrowing(_score),
    "gating leaves the model alone": borrowing(_gate),
    "measuring cost leaves the model alone": borrowing(measure_cost),
    "pruning a copy leaves the model alone, and `verify` agrees": borrowing(_prune_and_verify),
}


# --- means -----------------------------------------------------------------------------------------------------------


def longest_inputs(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return one text just longer than the largest number in the config, up to `LONGEST`, with which the model runs.

    Whatever the number is called: some are lengths. None where the model runs with none of them or reads no text.
    """
    if base_of(model).main_input_name != "input_ids":
        return None
    for number in sorted(set(numbers(model.config)), reverse=True):
        try:
            inputs = example_inputs(model, 1, number + 1, padding=0)
            if all(bool(torch.isfinite(one).all()) for one in said(model, inputs)):
                return inputs
        except Exception:  # no positions for so many
            continue
    return None


def numbers(settings: Any) -> Iterator[int]:
    """Yield the whole numbers in a config that may be lengths of texts."""
    if isinstance(settings, PreTrainedConfig):
        settings = vars(settings)
    if isinstance(settings, Mapping):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for value in settings:
            yield from numbers(value)
    elif isinstance(settings, int) and 12 <= settings <= LONGEST:
        yield settings


def _cut_(model: PreTrainedModel) -> None:
    try:
        remove_(model, uneven_mask(find_sites(model)))
    except SecateurError as error:
        raise Skipped(str(error)) from error
