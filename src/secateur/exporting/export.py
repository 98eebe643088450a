"""`secateur export`: a model's folder for places where secateur is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.exporting.onnx import save_onnx
from secateur.exporting.standalone import MODULE, save_standalone
from secateur.models.loading import find_tokenizer, load_model
from secateur.models.sentence_transformers import copy_modules
from secateur.models.tokenizer_saving import save_tokenizer
from secateur.support.files import new_folder


def export_standalone(source: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the pruned model `source` into the new folder `out`, with the code that rebuilds it and its tokenizer.

    The folder loads with `AutoModel….from_pretrained(out, trust_remote_code=True)` where torch and transformers 5 are
    installed and secateur is not; where `source` is a sentence-transformers model that keeps its transformer in a
    folder of its own, so does `out`. Returns the class, the Auto classes that read that folder, and the file of the
    code, as seen from `out`.
    Raises what `save_standalone` raises; nothing is left behind then.
    """
    with new_folder(out) as folder:
        model = load_model(source, "cpu", whole=True, dtype="auto")
        tokenizer = find_tokenizer(source)
        place = copy_modules(source, folder)
        auto_map = save_standalone(model, place)
        save_tokenizer(tokenizer, source, place)
        code = place.relative_to(folder) / f"{MODULE}.py"
    return {"class": type(model).__name__, "auto_classes": sorted(auto_map), "code": str(code)}


def export_onnx(source: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the model `source`, dense or pruned, into the new folder `out` as an ONNX graph, with its tokenizer.

    Returns the class and what `save_onnx` returns. Raises what `save_onnx` raises; nothing is left behind then.
    """
    with new_folder(out) as folder:
        model = load_model(source, "cpu", whole=True)
        tokenizer = find_tokenizer(source)
        result = save_onnx(model, folder)
        save_tokenizer(tokenizer, source, folder)
    return {"class": type(model).__name__, **result}
