"""The graph with weights in int8, by ONNX Runtime's own quantiser, checked against PyTorch before it counts as written.

Quantisation is dynamic: a product scales its activations as they come. Scales that are measured beforehand made
MiniLM's embeddings worse and no faster.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import SecateurError
from secateur.exporting.onnx import one_error, prepared, quietly, text_inputs
from secateur.measuring.onnx_graph import FILE, INT8_FILE, open_graph, size_of
from secateur.measuring.timing import median_ratio, time_in_turn
from secateur.models.inputs import max_length
from secateur.texts.tokenization import batches

MIN_COSINE = 0.95
ROUNDS = 5
_SHAPE = (8, 128)
_LARGEST_FILE = 2**31  # bytes, of protobuf
_TEXTS = (
    "Hello!",
    "The train to the coast leaves at seven.",
    "What is the difference between a lease and a loan?",
    "She put the letter back into its envelope and never spoke of it again.",
    "Stir in the flour, then let the dough rest for an hour in a warm place.",
    "How do I reset the password of my account?",
    "The committee rejected the proposal by nine votes to four, with two members abstaining.",
    "A dull film with one good scene.",
    "In 1969 two people walked on the moon while a third one waited in orbit.",
    "Patients who slept less than six hours reported more pain on the following day than those who slept well.",
    "def add(a, b): return a + b",
    "Ten euros off your next order, this weekend only.",
    "The river had risen in the night, and by morning the lower fields, the road and the old bridge were under water.",
    "Is it cheaper to fly or to drive from Denver to Chicago?",
    "Goals by both captains made it two all, and neither side came close to a third one.",
    "Copper conducts heat better than iron does.",
)


def save_int8(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Write `onnx/model_qint8.onnx` into a folder that `save_onnx` has written of the same model.

    Every output of a weight has its own scale, and 7 of the 8 bits, so that CPUs without VNNI do not overflow. The
    graph is run on 16 English sentences, or random tokens without a tokenizer, and its output compared with PyTorch's:
    `sentence_embedding` where there is one, else the first, by text or, for states and logits of tokens, by token.
    `SecateurError` is raised where their mean cosine is below 0.95, `UnsupportedModelError` where the quantiser fails.

    Returns `cosine`; `bytes` of the file and `float_bytes` of the float32 graph with its weights; and `time`, its share
    of the float32 graph's time for 8 texts of 128 tokens, timed in turn on this machine.
    """
    model, file = prepared(model), folder / INT8_FILE
    float_bytes = size_of(folder / FILE)
    with quietly(), one_error(model, "cannot be quantised in ONNX Runtime"):
        quantize_graph(folder)
        cosine = _cosine(model, open_graph(file), tokenizer)
        if not cosine >= MIN_COSINE:
            raise SecateurError(
                f"the int8 graph of {type(model).__name__} has a mean cosine of {cosine:.3f} to PyTorch (at least "
                f"{MIN_COSINE:g} is accepted); export it without `quantize`"
            )
        feed = {name: value.numpy() for name, value in text_inputs(model, *_SHAPE).items()}
        runs = {one.name: partial(open_graph(one).run, None, feed) for one in (folder / FILE, file)}
        seconds = time_in_turn(runs, ROUNDS)
    time = median_ratio(seconds[file.name], seconds[Path(FILE).name])
    return {"cosine": cosine, "bytes": size_of(file), "float_bytes": float_bytes, "time": time}


def quantize_graph(folder: Path) -> None:
    """Make `onnx/model_qint8.onnx` of the float32 graph in a folder."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        folder / FILE, folder / INT8_FILE, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True,
        use_external_data_format=size_of(folder / FILE) >= _LARGEST_FILE,
    )  # fmt: skip


@torch.no_grad()
def _cosine(model: PreTrainedModel, session: Any, tokenizer: PreTrainedTokenizerBase | None) -> float:
    """Return the mean cosine between what the graph and the model make of the texts."""
    names = [output.name for output in session.get_outputs()]
    name = "sentence_embedding" if "sentence_embedding" in names else names[0]
    cosines = []
    for inputs in _inputs(model, tokenizer):
        (found,) = session.run([name], {given: value.numpy() for given, value in inputs.items()})
        made, wanted = (_rows(one, inputs["attention_mask"]) for one in (torch.as_tensor(found), model(**inputs)[name]))
        cosines.append(torch.cosine_similarity(made, wanted, dim=1))
    return float(torch.cat(cosines).mean())


def _inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[dict[str, Tensor]]:
    """Return the texts as batches of the graph's inputs."""
    if tokenizer is None:
        return [text_inputs(model, 8, 24, 9)]
    made = batches(tokenizer, _TEXTS, 8, max_length(model))
    zeros = dict.fromkeys(text_inputs(model, 1, 2))
    return [{name: batch.get(name, torch.zeros_like(batch["input_ids"])) for name in zeros} for batch in made]


def _rows(output: Tensor, mask: Tensor) -> Tensor:
    """Return a row for each text, or of states for each of its own tokens; single scores of texts are one row."""
    rows = output[mask.bool()] if output.dim() == 3 else output
    return rows if rows.shape[1] > 1 else rows.T
