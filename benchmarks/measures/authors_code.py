"""Rival criteria against the code that their authors published, on the same inputs.

    python -m benchmarks.run authors_code --data GLUE --set michel=DIR kwon=DIR li=DIR louizos=DIR --out FILE

The four folders are checkouts of github pmichel31415/pytorch-pretrained-BERT (branch paul),
WoosukKwon/retraining-free-pruning, rycolab/differentiable-subset-pruning and AMLab-Amsterdam/L0_regularization; their
functions are imported as they stand and called. The texts are those of SST-2. The model is MiniLM with a classification
head drawn with seed 0, in float64. Gradients for the authors' functions are taken from each head's output by hooks of
this file, not by our probe.

- `taylor`: their `calculate_head_importance`. It takes absolute values token by token, where the paper's equation and
  ours take them text by text. So it is called twice: as published, and with a text's tokens shown to it as the
  coordinates of one, where its arithmetic is the equation's.
- `fisher`: their `compute_fisher_info` and `greedy_rearrange`, on the gradients of single texts.
- `l0`: the gates and the penalty of Li et al.'s `ConcreteGate`, which follows Voita et al.'s (TensorFlow 1, which no
  longer installs), and of Louizos et al.'s `L0Dense`.
- `dsp`: their `gumbel_soft_top_k`, given the noise that we draw.
- `confidence` and `entropy` have no published code that still runs.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from benchmarks.runs import LENGTH, Run
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import set_seed

from secateur.demo import demo_model
from secateur.finetuning.finetune import load_classifier
from secateur.models.loading import load_tokenizer
from secateur.scorers.dsp import relaxed_top_k
from secateur.scorers.fisher import FisherScorer
from secateur.scorers.l0 import TEMPERATURE, hard_concrete, open_probability
from secateur.scorers.score import score
from secateur.scorers.taylor import TaylorScorer
from secateur.settings import Reading
from secateur.texts.data import Task
from secateur.units.scores import Scores
from secateur.units.select import select

TEXTS, SEED = 64, 0
RATIOS = (0.25, 0.5, 0.75)


def module(folder: Path, file: str) -> Any:
    """Import one file of a checkout, with its folder on the path meanwhile."""
    path = folder / file
    spec = importlib.util.spec_from_file_location(f"authors_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    loaded = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(folder), str(path.parent), *sys.path]):
        spec.loader.exec_module(loaded)
    return loaded


def commit(folder: Path) -> str | None:
    """Return the commit of a checkout, where its history came with it."""
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    top = subprocess.run(["git", "-C", str(folder), "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    return found.stdout.strip() if Path(top.stdout.strip()) == folder.resolve() else None


class AsTheirs(nn.Module):
    """Our classifier with the face that Michel et al.'s function expects; heads' outputs are `[batch, heads, n, m]`."""

    def __init__(self, model: Any, tokens_as_one: bool) -> None:
        super().__init__()
        self.model, self.heads, self.tokens_as_one = model, model.config.num_attention_heads, tokens_as_one
        self.layers = [SimpleNamespace(attention=SimpleNamespace(self=SimpleNamespace())) for _ in self.encoder()]
        self.bert = SimpleNamespace(config=model.config, encoder=SimpleNamespace(layer=self.layers))
        for number, layer in enumerate(self.encoder()):
            layer.attention.output.dense.register_forward_pre_hook(lambda _, given, n=number: self.keep(n, given))

    def encoder(self) -> Any:
        return self.model.bert.encoder.layer

    def keep(self, number: int, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        batch, tokens, width = given[0].shape
        context = given[0].view(batch, tokens, self.heads, -1).transpose(1, 2)
        if self.tokens_as_one:
            context = context.flatten(2)[:, :, None]
        context.retain_grad()
        self.layers[number].attention.self.context_layer_val = context
        back = context.reshape(batch, self.heads, tokens, -1).transpose(1, 2).reshape(batch, tokens, width)
        return (back,)

    def forward(self, input_ids: Tensor, segment_ids: Tensor, input_mask: Tensor, label_ids: Tensor) -> Tensor:
        given = {"input_ids": input_ids, "token_type_ids": segment_ids, "attention_mask": input_mask}
        return nn.functional.cross_entropy(self.model(**given).logits, label_ids)

    def gate_gradients(self, data: TensorDataset) -> Tensor:
        """Return the derivative of each text's loss on each head's gate, `[texts, layers, heads]`."""
        rows = []
        for ids, mask, segments, label in data:
            self(ids[None], segments[None], mask[None], label[None]).backward()
            kept = [layer.attention.self.context_layer_val for layer in self.layers]
            rows.append(torch.stack([(c * c.grad).sum(dim=(0, 2, 3)) for c in kept]))
        return torch.stack(rows).detach()


def tensors(task: Task, tokenizer: Any) -> TensorDataset:
    """Return the texts one by one, padded to one length; padding reaches no head of a real token."""
    made = tokenizer(task.texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return TensorDataset(
        made["input_ids"], made["attention_mask"], made["token_type_ids"], torch.tensor(task.labels)
    )  # fmt: skip


def matrix(scores: Scores) -> Tensor:
    return torch.stack(list(scores.values()))


def classifier(task: Task) -> Any:
    set_seed(SEED)
    return load_classifier(demo_model(), task).double().eval()


def taylor(michel: Path, task: Task, tokenizer: Any) -> dict[str, Any]:
    theirs = module(michel / "examples", "classifier_eval.py").calculate_head_importance
    ours = score(
        classifier(task), task.texts, TaylorScorer(), tokenizer, labels=task.labels, reading=Reading(max_length=LENGTH)
    )
    quiet = {"batch_size": 1, "verbose": False, "disable_progress_bar": True}
    found = {
        name: theirs(AsTheirs(classifier(task), as_one), tensors(task, tokenizer), **quiet).double()
        for name, as_one in (("as_published", False), ("tokens_as_one", True))
    }
    sites = list(ours)
    published = Scores(dict(zip(sites, found["as_published"], strict=True)))
    return {
        "largest_difference_tokens_as_one": float((found["tokens_as_one"] - matrix(ours)).abs().max()),
        "as_published": {
            "spearman": float(spearmanr(found["as_published"].flatten(), matrix(ours).flatten()).statistic),
            "heads_that_agree_at_half": float(
                torch.stack([select(published)[s] == select(ours)[s] for s in sites]).double().mean()
            ),
        },
    }


def fisher(kwon: Path, task: Task, tokenizer: Any) -> dict[str, Any]:
    gradients = AsTheirs(classifier(task), False).gate_gradients(tensors(task, tokenizer))
    importance = module(kwon, "prune/fisher.py").compute_fisher_info(gradients) / len(task)
    rearrange = module(kwon, "prune/rearrange.py").greedy_rearrange
    given = {"labels": task.labels, "max_length": LENGTH}
    ours = score(classifier(task), task.texts, FisherScorer(), tokenizer, **given)
    plain = Scores(dict(ours))
    differing, changed = 0, 0
    for ratio in RATIOS:
        before, after = select(plain, ratio), select(ours, ratio)
        for layer, site in enumerate(ours):
            expected = rearrange(before[site].double(), gradients[:, layer])
            differing += int((expected.bool() != after[site]).any())
            changed += int((before[site] != after[site]).any())
    return {
        "largest_relative_difference": float(((importance - matrix(ours)) / importance).abs().max()),
        "masks_compared": len(ours) * len(RATIOS),
        "masks_that_rearranging_changed": changed,
        "masks_that_differ": differing,
    }


def l0(li: Path, louizos: Path) -> dict[str, Any]:
    torch.manual_seed(SEED)
    log_alpha, uniform = 3 * torch.randn(10_000, dtype=torch.float64), torch.rand(10_000, dtype=torch.float64)
    gate = module(li, "transformers/src/transformers/gated_bert_utilities.py").ConcreteGate
    gate = gate([1, len(log_alpha)], temperature=TEMPERATURE, eps=0.0)
    gate.log_a = nn.Parameter(log_alpha[None])
    with mock.patch.object(torch, "rand", return_value=uniform[None]):
        by_li = gate.get_gates(True)[0]
    dense = module(louizos, "l0_layers.py").L0Dense
    of = SimpleNamespace(qz_loga=log_alpha, temperature=TEMPERATURE)
    by_louizos = nn.functional.hardtanh(dense.quantile_concrete(of, uniform), 0, 1)
    opened = open_probability(log_alpha)
    return {
        "gates": len(log_alpha),
        "largest_difference_gates_li": float((by_li.detach() - hard_concrete(log_alpha, uniform)).abs().max()),
        "relative_difference_penalty_li": float((gate.get_penalty().detach() / opened.sum() - 1).abs()),
        "largest_difference_gates_louizos": float((by_louizos - hard_concrete(log_alpha, uniform)).abs().max()),
        "largest_difference_open_louizos": float((1 - dense.cdf_qz(of, 0) - opened).abs().max()),
    }


def dsp(li: Path) -> dict[str, Any]:
    torch.manual_seed(SEED)
    theirs = module(li, "transformers/src/transformers/gated_bert_utilities.py").gumbel_soft_top_k
    worst, cases = 0.0, 0
    for kept in (1, 12, 36, 71):
        for temperature in (10.0, 1.0, 0.1):
            weights, uniform = torch.randn(72, dtype=torch.float64), torch.rand(72, dtype=torch.float64)
            with mock.patch.object(torch, "rand_like", lambda w, u=uniform: u):
                expected = theirs(weights, kept, temperature)
            keys = weights - torch.log(-torch.log(uniform))
            worst = max(worst, float((expected - relaxed_top_k(keys, kept, temperature)).abs().max()))
            cases += 1
    return {"cases": cases, "largest_difference": worst}


def measure(run: Run, **checkouts: str) -> None:
    michel, kwon, li, louizos = (Path(checkouts[name]) for name in ("michel", "kwon", "li", "louizos"))
    task = run.task("sst2", need_labels=True).head(TEXTS, seed=SEED)
    tokenizer = load_tokenizer(demo_model())
    run.write(
        seed=SEED,
        texts=TEXTS,
        commits={name: commit(Path(folder)) for name, folder in checkouts.items()},
        taylor=taylor(michel, task, tokenizer),
        fisher=fisher(kwon, task, tokenizer),
        l0=l0(li, louizos),
        dsp=dsp(li),
    )
    print(run.out.read_text())
