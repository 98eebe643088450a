"""What distil-trainer makes of half of a sentence encoder, by its own pruning and training.

    pip install --no-deps distil-trainer==0.1.27
    python -m benchmarks.run distil_trainer --data GLUE

all-MiniLM-L6-v2 at half of its multiply-accumulates, on the sentences of `half_model` and judged as there. Ways: three
of six layers, by its importance or evenly spaced; and neurons alone, by its importance, as many in every layer. Then
its EmbeddingDistillationTrainer brings the embeddings nearer to the dense model's, with as many updates of 32 sentences
as we take, at its own learning rate and at ours. Its loss is the squared difference of embeddings. Fewer heads are not
tried: its code leaves the output projections of attention as wide as they were, so that such a model does not run.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

from benchmarks.measures.half_model import SCORED, Judge, sentences
from benchmarks.provenance import made
from benchmarks.runs import Run, minilm
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor

from secateur.demo import demo_model
from secateur.measuring.cost import measure_cost

BATCH, LENGTH = 32, 128


def measure(run: Run, *, cells: list[list[Any]]) -> None:
    """Add a row for each way, learning rate and number of steps in `cells`, and each seed, that there is none of."""
    done = {(row["way"], row["learning_rate"], row["steps"], row["seed"]) for row in run.rows()}
    dense, tokenizer = minilm()
    judge = Judge(run, dense, tokenizer)
    before = measure_cost(dense).macs
    for seed in run.seeds:
        texts = sentences(run, seed)
        for way, rate, steps in cells:
            if (way, rate, steps, seed) in done:
                continue
            start, spent = time.perf_counter(), time.process_time()
            model = taught(pruned(way, texts[:SCORED]), texts[: steps * BATCH], rate)
            row = {"way": way, "learning_rate": rate, "steps": steps, "seed": seed}
            seconds = {"seconds": round(time.perf_counter() - start)}
            seconds["processor_seconds"] = round(time.process_time() - spent)
            inner = model[0].auto_model.eval()
            macs = round(measure_cost(inner).macs / before, 4)
            run.add({**row, **judge(inner), "macs": macs, **seconds, **made(run.note)})


def pruned(way: str, texts: list[str]) -> Any:
    """Return the encoder as its pruners leave it."""
    from distil_trainer.core.config import WidthPruningConfig
    from distil_trainer.pruning import DepthPruner, WidthPruner

    model = encoder(str(demo_model()))
    if way == "neurons":
        # Feed-forward blocks have 63% of the arithmetic, so that a fifth of their neurons leaves a half of it all.
        config = WidthPruningConfig(intermediate_size_ratio=0.2)
        return WidthPruner(model, texts).prune(config)
    return DepthPruner(model, texts).prune(num_layers_to_keep=3, layer_selection=way.removesuffix(" layers"))


def taught(model: Any, texts: list[str], rate: float) -> Any:
    """Return the encoder after one epoch of its training on the dense model's embeddings."""
    from distil_trainer.core.embedding_trainer import EmbeddingDistillationTrainer, EmbeddingTrainerConfig

    targets = encoder(str(demo_model())).encode(texts, batch_size=BATCH, convert_to_numpy=True).tolist()
    rows = Dataset.from_dict({"text": texts, "teacher_embedding_final": targets})
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/student")
        config = EmbeddingTrainerConfig(
            student_model=f"{folder}/student", learning_rate=rate, num_epochs=1, batch_size=BATCH, device="cpu",
            output_dir=f"{folder}/trained", save_steps=10**9,
        )  # fmt: skip
        trainer = EmbeddingDistillationTrainer(config)
        tokenize = trainer.student_model.tokenize
        # It moves all that is returned to a device; sentence-transformers 6 returns words as well.
        trainer.student_model.tokenize = lambda texts: {
            name: value for name, value in tokenize(texts).items() if isinstance(value, Tensor)
        }
        trainer.train(rows)
        return trainer.student_model.eval()


def encoder(place: str) -> Any:
    model = SentenceTransformer(place, device="cpu")
    model.max_seq_length = LENGTH
    return model
