"""`secateur export`: a model's folder for places where secateur is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from secateur.errors import invalid
from secateur.exporting.int8 import save_int8
from secateur.exporting.onnx import save_onnx
from secateur.exporting.sentence_embedding import with_embedding
from secateur.exporting.standalone import MODULE, save_standalone
from secateur.measuring.onnx_graph import FILE
from secateur.models.loading import find_tokenizer, load_model
from secateur.models.sentence_transformers import copy_modules, embedding_of
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


def export_onnx(source: str | Path, out: str | Path, quantize: Literal["int8"] | None = None) -> dict[str, Any]:
    """Write the model `source`, dense or pruned, into the new folder `out` as an ONNX graph, with its tokenizer.

    The graph is `onnx/model.onnx`. Of a sentence-transformers model with pooling it also has the output
    `sentence_embedding`, and the modules come along. With `quantize="int8"` there is `onnx/model_qint8.onnx` beside it.

    Returns the class, the `file` of each graph as seen from `out`, and what `save_onnx` and `save_int8` return. Raises
    what they raise, and `InvalidInputError` for another `quantize`, and for modules that do more than to pool and to
    normalise; nothing is left behind then.
    """
    if quantize not in (None, "int8"):
        raise invalid("quantize", "be None or 'int8'", quantize)
    with new_folder(out) as folder:
        embedding = embedding_of(source)
        model = load_model(source, "cpu", whole=True)
        if embedding is not None:
            model = with_embedding(model, *embedding)
        tokenizer = find_tokenizer(source)
        place = copy_modules(source, folder)
        result = {
            "class": type(model).__name__,
            "file": str(place.relative_to(folder) / FILE),
            **save_onnx(model, place),
        }
        if quantize is not None:
            result["int8"] = save_int8(model, place, tokenizer)
        save_tokenizer(tokenizer, source, place)
    return result
