"""What int8 gives in ONNX Runtime on top of half of a model, a third and a quarter.

    python -m benchmarks.run int8 --data GLUE

all-MiniLM-L6-v2, dense, without half of its heads or of its layers, and cut to shares of its multiply-accumulates by
heads and neurons, the same share at every site, chosen at random: values cost no time. PyTorch, the float32 graph and
the int8 graph run in turn, the graphs with all of ONNX Runtime's optimisers and without those that fuse additions with
layer norms, on tokens without padding.
Writes the seconds of every round, the sizes of the files, and the resident memory that a session of each adds to a
process. Of the float32 weights only those are resident that a pass has read: the file is mapped.

Of the dense model, and of a half that is chosen by contribution and reconstructed, it also writes the Spearman
correlation of cosines with the scores of STS-B's test pairs, by either graph.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from benchmarks.measures.half_speed import WAYS, onnx_run
from benchmarks.measures.onnx_norms import session
from benchmarks.runs import BATCH, LENGTH, Run, alone, memory_mb, minilm
from scipy.stats import spearmanr

from secateur.exporting.int8 import save_int8
from secateur.exporting.onnx import save_onnx
from secateur.exporting.sentence_embedding import with_embedding
from secateur.measuring.cost import forward_pass, measure_cost
from secateur.measuring.onnx_graph import FILE, INT8_FILE, UNFUSED
from secateur.measuring.timing import median_ratio, time_in_turn
from secateur.models.inputs import example_inputs
from secateur.pruning import prune
from secateur.settings import Cut
from secateur.support.versions import environment
from secateur.texts.tokenization import batches

SHAPES = ((1, 128), (8, 128), (32, 32))
GRAPHS = {"float32": FILE, "int8": INT8_FILE}
OPTIMISERS: dict[str, list[str]] = {"": [], ", norms unfused": UNFUSED}
DENSE = "onnx float32, norms unfused: dense"
JUDGED_HALF = "macs=0.5, reconstructed"


def measure(run: Run, *, budgets: list[str], texts: int, rounds: int) -> None:
    """Time the dense model and one for each budget; `texts` of STS-B reconstruct the half that is judged."""
    model, tokenizer = minilm()
    ways = {b: WAYS["layers" if b.startswith("layers") else "uniform"] for b in budgets}
    cut = {b: prune(model, None, budget=b, restore="none", tokenizer=tokenizer, **way)[0] for b, way in ways.items()}
    sentences = [text for pair in run.texts("stsb", texts // 2) for text in pair]
    half, _ = prune(
        model, sentences, budget="macs=0.5", scorer="contribution", restore="reconstruct", tokenizer=tokenizer,
        cut=Cut(allocation="uniform"),
    )  # fmt: skip
    models = {"dense": model, **cut, JUDGED_HALF: half}
    dense = measure_cost(model).macs
    shares = {name: round(measure_cost(one).macs / dense, 4) for name, one in models.items()}
    models = {name: with_embedding(one, ("mean",), normalised=True) for name, one in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, str(number)) for number, name in enumerate(models)}
        rows = [{"model": name, **exported(one, files[name], tokenizer)} for name, one in models.items()]
        for name in ("dense", JUDGED_HALF):
            rows.append({"model": name, "spearman": similarity(run, files[name], tokenizer)})
            print(rows[-1], flush=True)
        del models[JUDGED_HALF]
        for shape in SHAPES:
            runs = runs_of(models, files, shape, run.threads)
            rows += timed(time_in_turn(runs, rounds), shape, shares)
    versions = {**environment(), "onnxruntime": onnxruntime.__version__}
    run.write(versions=versions, **vnni(), threads=run.threads, rounds=rounds, rows=rows)


def exported(model: Any, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Write both graphs; return their sizes, the cosine of int8 to PyTorch, and the memory of a session."""
    folder.mkdir()
    save_onnx(model, folder)
    found = save_int8(model, folder, tokenizer)
    memory = {name: alone(__spec__.name, str(folder / file))["session_mb"] for name, file in GRAPHS.items()}
    row = {"float32_mb": round(found["float_bytes"] / 1e6, 1), "int8_mb": round(found["bytes"] / 1e6, 1)}
    row |= {"cosine": round(found["cosine"], 4), "session_mb": memory}
    print(row, flush=True)
    return row


def runs_of(
    models: dict[str, Any], files: dict[str, Path], shape: tuple[int, int], threads: int
) -> dict[str, Callable[[], Any]]:
    """Return a pass of each model in each runtime."""
    runs: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        runs[f"torch: {name}"] = torch.inference_mode()(forward_pass(model, *shape))
        inputs = example_inputs(model, *shape, padding=0)
        for graph, file in GRAPHS.items():
            for how, left_out in OPTIMISERS.items():
                runs[f"onnx {graph}{how}: {name}"] = onnx_run(session(files[name] / file, threads, left_out), inputs)
    return runs


def timed(seconds: dict[str, list[float]], shape: tuple[int, int], shares: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row of each run: how much faster than the dense model alike, and than that in float32, norms unfused."""
    rows = []
    for name, values in seconds.items():
        runtime, _, model = name.partition(": ")
        row = {"model": model, "macs": shares[model], "shape": "x".join(map(str, shape)), "runtime": runtime}
        row["beside_dense"] = round(median_ratio(seconds[f"{runtime}: dense"], values), 3)
        row["beside_dense_float32"] = round(median_ratio(seconds[DENSE], values), 3)
        print(row, flush=True)
        rows.append({**row, "seconds": values})
    return rows


def similarity(run: Run, folder: Path, tokenizer: Any) -> dict[str, float]:
    """Return the Spearman correlation of cosines with the scores of STS-B's test pairs, by each graph."""
    test = run.task("stsb", "test", need_labels=True)
    found = {}
    for name, file in GRAPHS.items():
        graph = session(folder / file, run.threads, UNFUSED)
        one, other = (embeddings(graph, tokenizer, [pair[side] for pair in test.texts]) for side in (0, 1))
        found[name] = round(float(spearmanr((one * other).sum(1).numpy(), test.labels).statistic), 4)
    return found


def embeddings(graph: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Return `[sentences, width]`, of length 1, in the order given."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    names = [given.name for given in graph.get_inputs()]
    rows = [
        torch.as_tensor(graph.run(["sentence_embedding"], {name: batch[name].numpy() for name in names})[0])
        for batch in batches(tokenizer, [sentences[i] for i in order], BATCH, LENGTH)
    ]
    return torch.cat(rows)[torch.argsort(torch.tensor(order))]


def vnni() -> dict[str, bool]:
    """Return whether the processor multiplies int8 by instructions of its own. Linux only."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return {name: name in flags for name in ("avx512_vnni", "avx_vnni")}


def session_memory(file: Path) -> dict[str, float]:
    """Return the resident memory in MB that a session adds to this process, after a pass of 1 x 128 tokens."""
    before = memory_mb("VmRSS")
    graph = session(file, 1, UNFUSED)
    ids = torch.ones(1, 128, dtype=torch.long)
    onnx_run(graph, {"input_ids": ids, "attention_mask": ids})()
    return {"session_mb": round(memory_mb("VmRSS") - before, 1)}


if __name__ == "__main__":
    print(json.dumps(session_memory(Path(sys.argv[1]))))
