"""What a batch of meta-training takes, part by part: padded as the paper has it, and by what its texts fill.

60 training texts of each of the paper's tasks, at most 128 tokens, MiniLM, straight-through gradient. `padded` pads a
batch to its longest text, or to `padded_to` tokens, and every map to 128 × 128; `filled` is what `meta-train` does.
Both see the same texts and draws, in turn; CPU time.
`gradient_errors` compares the pruner's gradient from 8 of the texts with that in float64 on padded maps: the norm of
the difference, as a share.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from benchmarks.provenance import provenance
from benchmarks.runs import Run, minilm
from torch import Tensor

from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.meta_step import MetaTraining, Seen, see
from secateur.meta_training.signals import straight_through_loss
from secateur.meta_training.subjects import Parts, Subject
from secateur.pruners.corners import score_corners
from secateur.pruners.map_network import PAIR, SINGLE, MetaPruner, to_network_size
from secateur.relations import by_first_token, represent
from secateur.sites.gating import probe
from secateur.support.randomness import generator
from secateur.texts.data import Task

BATCH, LENGTH = 60, 128
PARTS = ("dense", "pruner forward", "gated forward", "gated backward", "pruner backward")


def see_padded(subject: Subject, texts: list[Any], is_pair: bool, padded_to: int) -> Seen:
    """Run the dense model on a batch in one piece, and pad every map to 128 × 128. The padding of all inputs is 0."""
    batch, maps = subject.batch(texts, LENGTH), {}
    missing = max(0, padded_to - batch["input_ids"].shape[1])
    batch = {k: torch.nn.functional.pad(v, (0, missing)) if isinstance(v, Tensor) else v for k, v in batch.items()}
    first_token = by_first_token(subject.model, is_pair)

    def keep(reading: Any) -> None:
        maps[reading.site] = [to_network_size(reading.weights.float(), batch["attention_mask"])]

    with torch.no_grad(), probe(subject.model, keep, weights=True):
        dense = represent(subject.model, subject.model(**batch), batch, first_token)
    return Seen(Parts([batch], torch.arange(len(texts))), maps, dense)


def scores_padded(training: MetaTraining, seen: Seen, is_pair: bool) -> dict[str, Tensor]:
    """Score whole maps in one pass of the plain network."""
    maps = {site: parts[0] for site, parts in seen.maps.items()}
    flat = training.pruner(torch.cat([m.flatten(0, 1) for m in maps.values()]))[:, PAIR if is_pair else SINGLE]
    parts = flat.split([m.shape[0] * m.shape[1] for m in maps.values()])
    return {site: part.view(m.shape[:2]).mean(dim=0) for (site, m), part in zip(maps.items(), parts, strict=True)}


def gradient_errors(training: MetaTraining, maps: list[Tensor]) -> dict[str, float]:
    """Return how far each way's gradient is from that of padded maps in float64."""
    pruner, flat = training.pruner.train(), torch.cat([m[:8].flatten(0, 1) for m in maps])
    filled = int(flat.sum(dim=(0, 1)).nonzero().max()) + 1
    exact = copy.deepcopy(pruner).double()

    def gradient(scores: Tensor, network: MetaPruner) -> Tensor:
        given = torch.randn(scores.shape, generator=generator(1)).to(scores)
        return torch.cat([g.flatten() for g in torch.autograd.grad((scores * given).sum(), list(network.parameters()))])

    wanted = gradient(exact(flat.double()), exact)
    found = {
        "padded": gradient(pruner(flat), pruner),
        "filled": gradient(score_corners(pruner.main, [flat[:, :filled, :filled]])[0], pruner),
    }
    return {way: float((g - wanted).norm() / wanted.norm()) for way, g in found.items()}


def timed(
    dense: Callable[[], Seen], score: Callable[[Seen], dict[str, Tensor]], training: MetaTraining, task: Task
) -> list[float]:
    """Do what a step does with one batch, and return the CPU seconds of each part."""
    training.pruner.train()
    training.pruner.zero_grad()
    marks = [time.process_time()]
    seen = dense()
    marks.append(time.process_time())
    scores = score(seen)
    marks.append(time.process_time())
    loss = straight_through_loss(
        training.subjects[0].model, seen.batch, seen.dense, scores, task.is_pair, training.config, generator(0)
    )
    marks.append(time.process_time())
    rows = list(scores.values())
    of_scores = torch.autograd.grad(loss, rows, allow_unused=True)
    marks.append(time.process_time())
    used = [(row, given) for row, given in zip(rows, of_scores, strict=True) if given is not None]
    torch.autograd.backward([row for row, _ in used], [given for _, given in used])
    marks.append(time.process_time())
    return [end - start for start, end in pairwise(marks)]


def measure(run: Run, *, rounds: int, padded_to: int = 0) -> None:
    subject = Subject(*minilm())
    done = {row["task"] for row in run.rows()}
    for name in [name for name in run.tasks if name not in done]:
        task = Task(name, run.texts(name, BATCH))
        training = MetaTraining([subject], [task], MetaTrainingConfig(), Accelerator(cpu=True))
        ways = {
            "padded": (
                lambda task=task: see_padded(subject, task.texts, task.is_pair, padded_to),
                lambda seen, training=training, task=task: scores_padded(training, seen, task.is_pair),
            ),
            "filled": (
                lambda task=task: see(subject, task.texts, task.is_pair, LENGTH),
                lambda seen, training=training, task=task: training.scores(seen.maps, task.is_pair),
            ),
        }
        seconds: dict[str, list[list[float]]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, (dense, score) in ways.items():
                taken = timed(dense, score, training, task)
                if number:  # the first round warms up
                    seconds[way].append(taken)
        tokens = subject.batch(task.texts, LENGTH)["attention_mask"].sum(dim=1)
        whole = see_padded(subject, task.texts, task.is_pair, padded_to)
        ratios = [sum(p) / sum(f) for p, f in zip(seconds["padded"], seconds["filled"], strict=True)]
        row = {
            **provenance(run.command, run.note),
            "task": name,
            "tokens": {"mean": float(tokens.float().mean()), "longest": int(tokens.max())},
            "gradient_errors": gradient_errors(training, [parts[0] for parts in whole.maps.values()]),
            "seconds": {
                way: {part: [row[i] for row in taken] for i, part in enumerate(PARTS)} for way, taken in seconds.items()
            },
            "ratios": ratios,
        }
        run.add(row)
        print(
            f"{name}: {row['tokens']}, {statistics.median(ratios):.2f} times faster "
            f"(from {min(ratios):.2f} to {max(ratios):.2f}), errors {row['gradient_errors']}",
            flush=True,
        )
