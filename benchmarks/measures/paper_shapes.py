"""Do BERT-base and BERT-large go through the paper's way? One update of meta-training, scoring, removal, and its proof.

Layers, heads, widths and vocabulary are the models' own; the weights are random, as those of the hub were not at hand.
So this tells that everything fits, BERT-large's 24 layers of 16 heads too, and how long it takes; nothing of quality.
The texts are the demo's sentences, the settings the paper's but for one small batch an update.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from benchmarks.runs import Run, minilm
from transformers import BertConfig, BertModel

from secateur import prune
from secateur.demo import demo_task
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.paper import train_meta_pruner
from secateur.meta_training.subjects import Subject
from secateur.support.files import read_lines
from secateur.support.run_files import LOG

SHAPES = {
    "BERT-base": {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072},
    "BERT-large": {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024, "intermediate_size": 4096},
}


def measure(run: Run, *, batch_size: int, scored: int) -> None:
    _, tokenizer = minilm()  # its vocabulary is theirs
    train, _ = demo_task()
    config = MetaTrainingConfig(steps=1, batch_size=batch_size, batches_per_step=1)
    found = run.so_far().get("models", {})
    for name, shape in SHAPES.items():
        if name in found:
            continue
        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).eval()
        cpu, out = [time.process_time()], Path(tempfile.mkdtemp()) / "run"
        pruner = train_meta_pruner(
            [Subject(model, tokenizer)], [train], out, config, progress=False, accelerator=Accelerator(cpu=True)
        )
        cpu.append(time.process_time())
        smaller, report = prune(
            model, train.texts[:scored], 0.5, scorer="smp", tokenizer=tokenizer, restore="none", pruner=pruner
        )
        cpu.append(time.process_time())
        step = read_lines(out / LOG)[-1]
        found[name] = {
            "parameters": report.before.parameters,
            "parameters_after": report.after.parameters,
            "sites": len(report.mask.kept),
            "scores_a_site": sorted({len(row) for row in report.scores.values()}),
            "kept_a_site": sorted({len(kept) for kept in report.mask.kept.values()}),
            "loss": step["losses"],
            "gradient_norm": step["gradient_norm"],
            "proof_largest_difference": report.max_difference,
            "update_cpu_seconds": cpu[1] - cpu[0],
            "pruning_cpu_seconds": cpu[2] - cpu[1],
        }
        run.write(batch_size=batch_size, scored=scored, models=found)
        del model, smaller
