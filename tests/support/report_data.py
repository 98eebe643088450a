"""Folders as the commands write them, and comparisons made by rule, for the tests of the page."""

import json
from html.parser import HTMLParser

import torch

from secateur.sites.attention_maps import AttentionMaps

EVIL = "</script><script>alert('x')</script>\"'&"


def pruning_json(sites=3, heads=4, refinement=(0.4, 0.5, 0.3, 0.35, 0.2), **changes):
    names = [f"encoder.layer.{i}.attention.self" for i in range(sites)]
    cost = {"heads": sites * heads, "parameters": 1000, "macs": 5000, "batch": 1, "length": 128}
    half = {**cost, "heads": sites * (heads // 2), "parameters": 900, "macs": 4000}
    return {
        "kind": "pruning_report",
        "model": "a model",
        "scorer": "contribution",
        "allocation": "uniform",
        "requested_ratio": 0.5,
        "pruning_ratio": 0.5,
        "seed": 0,
        "num_texts": 16,
        "before": cost,
        "after": half,
        "max_difference": 1e-7,
        "tolerance": 1e-4,
        "scoring_seconds": 1.5,
        "refinement": list(refinement),
        "scores": {name: [0.1 * i + 0.01 * h for h in range(heads)] for i, name in enumerate(names)},
        "kept_heads": {name: list(range(heads // 2, heads)) for name in names},
        "versions": {"torch": "2"},
        "created": "2026-01-02 03:04 UTC",
        "command": "secateur prune",
        **changes,
    }


def maps_of(report, tokens=6):
    """Maps whose head h looks at token h most."""
    maps, heads = {}, {}
    for number, (name, row) in enumerate(report["scores"].items()):
        maps[name] = torch.full((len(row), tokens, tokens), 0.02 * (number + 1))
        for head in range(len(row)):
            maps[name][head, :, head % tokens] = 0.5
        heads[name] = list(range(len(row)))
    return AttentionMaps(maps, heads, 16, tokens)


def write_pruned(folder, maps=True, **changes):
    report = pruning_json(**changes)
    folder.mkdir(parents=True)
    (folder / "pruning_report.json").write_text(json.dumps(report))
    if maps:
        maps_of(report).save(folder / "attention_maps.json")
    return folder


# For scorer, ratio: what each of two seeds loses of the dense model's value.
LOSSES = {
    ("random", 0.25): (0.10, 0.12),
    ("random", 0.5): (0.30, 0.35),
    ("contribution", 0.25): (0.00, 0.01),
    ("contribution", 0.5): (0.02, 0.03),
    ("smp", 0.25): (0.01, 0.00),
    ("smp", 0.5): (0.05, 0.04),
}
SECONDS = {"random": 0.2, "contribution": 1.0, "smp": 3.3}
KEPT = {"random": [0, 1], "contribution": [2, 3], "smp": [1, 3]}
SCORES = {"random": [4.0, 3.0, 2.0, 1.0], "contribution": [1.0, 2.0, 3.0, 4.0], "smp": [1.0, 3.0, 2.0, 4.0]}


def comparison_rows(tasks=("a", "b"), losses=None):
    rows = []
    for seed in (0, 1):
        for number, task in enumerate(tasks):
            dense = 0.8 + 0.05 * number + 0.01 * seed
            base = {"data": f"data/{task}", "task": task, "seed": seed, "metric": "accuracy", "constant": 0.5}
            cost = {"training_seconds": 60.0}
            rows.append({**base, "scorer": "dense", "ratio": 0.0, "value": dense, "kept_heads": None, "cost": cost})
            for (scorer, ratio), lost in (losses or LOSSES).items():
                cost = {"training_seconds": 50.0, "scoring_seconds": SECONDS.get(scorer, 2.0)}
                own = KEPT.get(scorer, [0, 3])
                kept = {"layer.0": own if ratio == 0.5 else [0, *own][-3:]}
                value = dense - lost[seed]
                rows.append(
                    {**base, "scorer": scorer, "ratio": ratio, "value": value, "kept_heads": kept, "cost": cost}
                )
    return rows


def write_comparison(folder, rows=None, scores=True, **settings):
    (folder / "scores").mkdir(parents=True)
    rows = comparison_rows() if rows is None else rows
    known = {
        "model": "a model",
        "protocol": "lite",
        "allocation": "uniform",
        "num_texts": 8,
        "threads": 1,
        "pruners": {},
    }
    (folder / "settings.json").write_text(json.dumps({**known, "max_train": None, **settings}))
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if scores:
        for row in rows:
            if row["scorer"] != "dense":
                data = {"kind": "scores", "scores": {"layer.0": SCORES[row["scorer"]]}}
                name = f"{row['task'].replace('/', '-')}-{row['scorer']}-{row['seed']}.json"
                (folder / "scores" / name).write_text(json.dumps(data))
    return folder


class Page(HTMLParser):
    """Collects the tags with their attributes and the text outside of styles and scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.inside = [], [], ""
        self.feed(html)
        self.heads = [a for tag, a in self.tags if tag == "button" and "data-head" in a]
        # Plain characters are easier to read and to type in the tests below.
        text = " ".join(" ".join(self.words).split())
        self.text = text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "~")

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.words.append(data)

    def verdicts(self):
        return {(a["data-site"], int(a["data-head"])): a["data-verdict"] for a in self.heads}

    def facts(self, site, head):
        return next(a["aria-label"] for a in self.heads if (a["data-site"], a["data-head"]) == (site, str(head)))
