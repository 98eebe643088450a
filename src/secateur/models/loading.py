"""Models and tokenizers from a folder or the Hub, with one-line errors."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.errors import CheckpointError, InvalidInputError, SecateurError, SecateurWarning, invalid, shown
from secateur.models.classifier import CLASSIFIERS, is_classifier
from secateur.models.hub_access import answers, check_in_reach
from secateur.models.originals import originals, recorded_original
from secateur.models.places import check_depth, check_no_kernels, check_tokenizer_files
from secateur.models.sentence_transformers import transformer_folder
from secateur.support.checks import knows_words
from secateur.support.interrupts import undoing

TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "source.spm", "special_tokens_map")
_LACKING = "_secateur_lacking"  # on a model: the weights that its files did not have
SPREAD = "auto"
"""A device that stands for GPUs, memory and disk together."""

_SMALL = 300_000_000  # bytes that load in about a second, for which a progress bar is noise


def load_model(
    model: str | Path,
    device: str | torch.device | None = None,
    model_class: Any = None,
    *,
    whole: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load a folder or Hub id with the class that its config names, so that a task head is not lost on the way.

    `model_class` (an Auto class, say) overrides that class; `options` go to its `from_pretrained`. A path of a `.gguf`
    file is read too: its weights are widened to float32, after which the model is one like any other. The model arrives
    in eval mode, on `device` unless the options have a `device_map`; the device "auto" stands for that of the same
    name. Code that lies beside a model is run only where `options` has `trust_remote_code=True`, and a folder is read
    without asking the Hub, whatever its files name. Raises `InvalidInputError` where there is no model, and
    `CheckpointError` where a pruned one cannot be rebuilt.

    Weights that the files lack are random. With `whole` that is a `CheckpointError`, or an `InvalidInputError` where a
    classifier is asked for and the config names none; else a `SecateurWarning`, but for another class than the config
    names: who asks for one, such as one with a new head, knows what is new in it.
    """
    check_exists(model)
    own_class = model_class is None
    source, from_file = _source(model)
    options = {**_access(model), **({"device_map": SPREAD} if device == SPREAD else {}), **options}
    small = Path(model).is_dir() and sum(map(_size, Path(model).rglob("*.safetensors"))) < _SMALL
    try:
        with quiet_transformers(progress=not small):
            asked = {name: options[name] for name in _access(model)}
            settings = PreTrainedConfig.get_config_dict(source, **asked, **from_file)[0]
            check_depth(settings, str(model))
            if "attn_implementation" not in options:
                check_no_kernels(settings, str(model))
            if model_class is None:
                access = {name: options[name] for name in _access(model)}
                model_class = _named_class(AutoConfig.from_pretrained(source, **access, **from_file))
            if from_file:
                options = {"dtype": torch.float32, **options, **from_file}
            loaded, loading = model_class.from_pretrained(source, output_loading_info=True, **options)
    except SecateurError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError and more here
        raise InvalidInputError(f"{model} cannot be loaded as a model: {_first_line(error)}") from error
    vars(loaded)[_LACKING] = frozenset(loading["missing_keys"])
    if missing := sorted(loading["missing_keys"]) if whole or own_class else []:
        lost = f"{model} lacks weights of {type(loaded).__name__}, such as {missing[0]}"
        if whole:
            _check_fine_tuned(model, loaded)
            raise CheckpointError(f"{lost}; get its files again or, where it has a new head, fine-tune it first")
        warnings.warn(f"{lost}: {len(missing)} are random here", SecateurWarning, stacklevel=2)
    if from_file:
        # What is left of the quantiser would be saved, and the folder would ask for it when it is loaded.
        loaded.hf_quantizer, loaded.is_quantized = None, False
        del loaded.config.quantization_config
    if not type(loaded).__module__.startswith("transformers_modules"):
        # The class is transformers' own: saved again, a standalone export would lack the code that `auto_map` names.
        vars(loaded.config).pop("auto_map", None)
    return (loaded if "device_map" in options else loaded.to(device or default_device())).eval()


def build_empty(folder: Path) -> PreTrainedModel:
    """Return the base model that the config of a folder describes, on the CPU, all of its weights 0.

    Raises `InvalidInputError` for a config that describes none.
    """
    try:
        with quiet_transformers(progress=False):
            settings = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0]
            check_depth(settings, str(folder))
            check_no_kernels(settings, str(folder))
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with init_empty_weights(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weights without an entry, which a pruned model may have
                model = AutoModel.from_config(config)
            model._apply(lambda tensor: torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor)
    except SecateurError:
        raise
    except Exception as error:
        raise InvalidInputError(f"{folder}/config.json describes no model: {_first_line(error)}") from error
    return model.eval()


def lacking(loaded: PreTrainedModel) -> frozenset[str]:
    """Return the weights that a model which `load_model` returned has at random, as its files lacked them."""
    found: frozenset[str] = vars(loaded).get(_LACKING, frozenset())
    return found


def note_trained_(model: torch.nn.Module) -> None:
    """Note that no weight is random any more, as a training has seen to those that the files lacked."""
    vars(model).pop(_LACKING, None)


def config_class(model: str | Path) -> type | None:
    """Return the class of the config of a folder or Hub id, or None where it has none that can be read."""
    source, from_file = _source(model)
    try:
        return type(AutoConfig.from_pretrained(source, **_access(model), **from_file))
    except Exception:  # who loads the model says why
        return None


def has_no_head(model: str | Path) -> bool:
    """Return whether a folder or Hub id is an encoder that was not fine-tuned: its config names no classifier.

    Raises `InvalidInputError` where there is no model.
    """
    check_exists(model)
    source, from_file = _source(model)
    try:
        config = AutoConfig.from_pretrained(source, **_access(model), **from_file)
    except Exception as error:
        raise InvalidInputError(f"{model} cannot be loaded as a model: {_first_line(error)}") from error
    return _named_otherwise(config) is not None


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id.

    Where it has no tokenizer files, transformers makes one up that knows no word. Then the tokenizer of the original
    is taken that the recipe of a pruned model names, if that is on this machine. Raises `InvalidInputError` where
    there is none, and for one that cannot be loaded.
    """
    check_exists(model)
    found = _own_tokenizer(model) or _tokenizer_of_original(model)
    if found is None:
        name = recorded_original(model)
        origin = "" if name is None else f" (pruned from {shown(name)})"
        save = f"{'save_pretrained' if Path(model).exists() else 'push_to_hub'}({str(model)!r})"
        raise InvalidInputError(
            f"{model}{origin} has no tokenizer files that know words; save the original's beside it: "
            f"AutoTokenizer.from_pretrained(ORIGINAL).{save}, or pass `tokenizer=` in Python"
        )
    return found


def find_tokenizer(model: str | Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a folder or Hub id, or return None where it has none.

    Raises `InvalidInputError` for a tokenizer in a folder that is there but cannot be loaded.
    """
    try:
        return load_tokenizer(model)
    except InvalidInputError:
        if Path(model).exists() and not _lacks_tokenizer_files(model):
            raise
        return None


class _Quiet:
    """How many contexts of all threads hide what transformers logs, and its bars; and what there was before."""

    lock = threading.Lock()
    logs = bars = 0
    verbosity, had_bars = 0, False


@undoing
def quiet_transformers(progress: bool) -> Iterator[None]:
    """Hide what transformers logs below errors and, without `progress`, its bars; errors are still raised.

    The switches are of the whole process. The last of all threads puts back what the first found.
    """
    log = transformers.utils.logging
    with _Quiet.lock:
        if not _Quiet.logs:
            _Quiet.verbosity = log.get_verbosity()
            log.set_verbosity_error()
        if not progress and not _Quiet.bars:
            _Quiet.had_bars = log.is_progress_bar_enabled()
            log.disable_progress_bar()
        _Quiet.logs, _Quiet.bars = _Quiet.logs + 1, _Quiet.bars + (not progress)
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.logs, _Quiet.bars = _Quiet.logs - 1, _Quiet.bars - (not progress)
            if not _Quiet.logs:
                log.set_verbosity(_Quiet.verbosity)
            if not progress and not _Quiet.bars and _Quiet.had_bars:
                log.enable_progress_bar()


def default_device() -> torch.device:
    """Return the first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str | torch.device | None) -> torch.device:
    """Return the device meant by a name such as "cpu" or "cuda:0". Raises `InvalidInputError` for others."""
    if device is None:
        return default_device()
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # the meta device holds nothing
    except (RuntimeError, AssertionError, TypeError):
        raise invalid("device", "be a device that this machine has, such as 'cpu'", str(device)) from None
    return chosen


def _own_tokenizer(model: str | Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that lies in a folder or Hub repository; None where transformers would make one up."""
    source, from_file = _source(model)
    if isinstance(source, Path) and not from_file:
        check_tokenizer_files(source, TOKENIZER_FILES)
    try:
        found = AutoTokenizer.from_pretrained(source, **_access(model), **from_file)
    except Exception as error:
        if _lacks_tokenizer_files(model):
            return None
        raise InvalidInputError(f"{model} has no tokenizer that can be loaded: {_first_line(error)}") from None
    return found if knows_words(found) else None


def _tokenizer_of_original(model: str | Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of what a model was pruned from; None where that has none, or is not on this machine."""
    for original in originals(model):
        try:
            check_exists(original)
            found = _own_tokenizer(original)
        except InvalidInputError:
            return None
        if found is not None:
            return found
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0  # not of a link to nothing


def _lacks_tokenizer_files(model: str | Path) -> bool:
    """Whether `model` is a folder in which no file is called like one of a tokenizer."""
    path = Path(model)
    return path.is_dir() and not any(f.name.startswith(TOKENIZER_FILES) for f in transformer_folder(path).iterdir())


def _source(model: str | Path) -> tuple[str | Path, dict[str, str]]:
    """Return what transformers is asked for: a folder or Hub id, or a `.gguf` file's folder and name."""
    path = Path(model)
    if _is_gguf(path):
        return path.parent, {"gguf_file": path.name}
    return (transformer_folder(path) if path.is_dir() else model), {}


def _access(model: str | Path) -> dict[str, bool]:
    """Return what transformers may do: run no code from a model's files, and ask the Hub for no local one."""
    # Files of a folder can name Hub repositories, such as an adapter its base model.
    return {"trust_remote_code": False, "local_files_only": Path(model).exists() or not answers()}


def _named_class(config: Any) -> Any:
    """Return the class that a config names, where it is a model of transformers, else `AutoModel`."""
    named = next(iter(getattr(config, "architectures", None) or []), None)
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else AutoModel


def _named_otherwise(config: Any) -> str | None:
    """Return the class that a config names where that is no classifier."""
    named = next(iter(config.architectures or []), None)
    return named if isinstance(named, str) and not named.endswith(CLASSIFIERS) else None


def _check_fine_tuned(model: str | Path, loaded: PreTrainedModel) -> None:
    """Raise `InvalidInputError` where a classifier was made of a model whose config names none: nothing got lost."""
    named = _named_otherwise(loaded.config)
    if is_classifier(loaded) and named is not None:
        remedy = f"it is a {named}; fine-tune it first: secateur finetune {model} --data DATA --out FOLDER"
        raise invalid("model", "be fine-tuned for classification", str(model), remedy)


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def check_exists(model: str | Path) -> None:
    """Raise `InvalidInputError` for a folder or a file that is no model, and for what is not there or out of reach."""
    path = Path(model)
    if _is_gguf(path):
        return
    if path.suffix == ".gguf":
        raise invalid("model", "be a .gguf file that exists", str(model))
    if path.exists():
        if not path.is_dir() or not (transformer_folder(path) / "config.json").is_file():
            raise invalid("model", "be a folder with a config.json, or a Hub id", str(model))
    elif isinstance(model, Path) or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        # What has another shape than a Hub id can only have been meant as a folder.
        raise invalid("model", "be a folder that exists, or a Hub id", str(model))
    else:
        check_in_reach(str(model))


def _first_line(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    text = str(error).strip()
    return " ".join(text.split())[:200].strip() if text else type(error).__name__
