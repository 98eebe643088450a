"""The documentation says what the code says; `make docs` builds it with warnings as errors."""

import importlib.util
import inspect
import re
import statistics
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
from benchmarks.measures.adaptation import matrices
from scipy.stats import ttest_rel

import secateur
from secateur.comparing.summary import ALL_TASKS, summarise
from secateur.scorers import SCORERS, scorer_class
from secateur.support.files import read_json, read_lines
from tests.support.outcomes import longer_runs

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCORER_PAGE = (ROOT / "docs" / "scorers.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_has_a_section_with_its_options(name, generate):
    page = generate.scorers_page()
    section = page.split(f"## {name}\n")[1].split("\n## ")[0]
    kind = scorer_class(name)
    assert f"- Source: {kind.source}" in section
    options = {} if kind.__init__ is object.__init__ else inspect.signature(kind).parameters
    for option in options.values():
        assert f"`{option.name}={option.default!r}`" in section
    assert (" labels" in section.split("- Needs:")[1].splitlines()[0]) is kind.needs_labels


def test_every_public_name_is_in_the_api_page(generate):
    page = generate.api_page()
    for name in set(secateur.__all__) - {"__version__", "errors", "settings"}:
        assert len(re.findall(rf"auto(?:class|function):: secateur\.{name}$", page, re.MULTILINE)) == 1, name


def test_the_api_page_begins_with_prune(generate):
    assert re.findall(r"auto\w+:: (\S+)", generate.api_page())[0] == "secateur.prune"


def test_every_page_is_in_one_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"```\{toctree\}\n:caption: (.+)\n(?::.*\n)*\n([^`]+)```", index)
    assert [caption for caption, _ in trees] == ["Start", "Guides", "Reference", "Measurements"]
    listed = [page for _, pages in trees for page in pages.split()]
    there = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} | {"generated/scorers", "generated/api"}
    assert sorted(listed) == sorted(there)


def readme_table():
    """Row → the numbers of the README's table: dense, half, quarter."""
    rows = re.findall(r"^\| (.+) \| ([\d.,]+) \| ([\d.,]+)\D? \| ([\d.,]+)\D? \|$", README, re.MULTILINE)
    return {name: [float(cell.replace(",", "")) for cell in cells] for name, *cells in rows}


def test_the_readmes_table_says_what_the_raw_files_say():
    rows = [row for row in read_lines(RESULTS / "half_model.jsonl") if row["way"] == "default"]

    def pruned(*cell):
        """Return the means over seeds, and what the first one keeps."""
        found = [row for row in rows if (row["budget"], row["steps"]) == cell]
        numbers = ("macs", "dense", "spearman", "retention", "recall_dense", "recall_small_on_dense_index")
        means = {name: statistics.fmean(row[name] for row in found) for name in (*numbers, "processor_seconds")}
        return {**means, "kept": found[0]["kept"], "seeds": len(found)}

    half, quarter, patient = pruned("macs=0.5", 300), pruned("macs=0.25", 1500), pruned("macs=0.25", 5000)
    timed = [row for row in read_json(RESULTS / "half_speed.json")["rows"] if row["subject"] == "minilm"]
    speed = {(row.get("shape"), row.get("runtime"), row.get("cut")): row.get("speed_up") for row in timed}

    def kept(row, ending):
        return sum(count for site, count in row["kept"].items() if site.endswith(ending))

    expected = {
        "heads": [72, kept(half, "self"), kept(quarter, "self")],
        "neurons": [9216, kept(half, "dense"), kept(quarter, "dense")],
        "multiply-accumulates": [1, round(half["macs"], 2), round(quarter["macs"], 2)],
        "STS-B, Spearman": [round(value, 3) for value in (half["dense"], half["spearman"], quarter["spearman"])],
        "recall@10, asked of the dense model's index": [round(half["recall_dense"], 3)]
        + [round(row["recall_small_on_dense_index"], 3) for row in (half, quarter)],
    }
    for name, runtime in (("PyTorch", "torch"), ("ONNX Runtime", "onnx")):
        cuts = [speed["1x128", runtime, f"by need macs={share}"] for share in (0.5, 0.25)]
        expected[f"speed, {name}"] = [1, *(round(value, 2) for value in cuts)]
    assert readme_table() == expected
    assert f"keeps {half['retention']:.1%} of" in README
    assert f"{half['processor_seconds'] / 60:.0f} minutes of processor time" in README
    assert f"`--steps 1500` and {quarter['processor_seconds'] / 60:.0f} minutes" in README
    assert f"keeps {quarter['retention']:.1%}." in README
    seeds = ["", "one", "two", "three"]
    assert f"Means of {seeds[half['seeds']]} seeds, {seeds[quarter['seeds']]} for the quarter;" in README
    minutes = f"{patient['processor_seconds'] / 60:.0f} minutes"
    assert f"`--steps 5000` and {minutes} it keeps {patient['retention']:.1%}." in README
    assert f"{speed['1x128', 'torch', 'by need macs=0.5']:.2f} times as fast in PyTorch" in README
    [int8] = [row for row in read_lines(RESULTS / "int8_quality.jsonl") if row["budget"] == "macs=0.33"]
    faster = int8["beside_dense_float32"]["int8"]["8x128"]
    said = f"a third runs {faster:.1f} times as fast as the dense model in float32, and keeps\n"
    assert f"{said}{int8['spearman']['int8'] / half['dense']:.1%} of its correlation" in README


WAYS = {
    "default": "by need", "matching heads": "by need, heads by `matching`", "layers": "fewer layers",
    "uniform": "same share everywhere", "not restored": "by need, not restored",
}  # fmt: skip


def line_of(rows):
    """The line of a page's table that says what rows of several seeds have in common."""

    def mean(value):
        return statistics.fmean(map(value, rows))

    row = rows[0]
    cells = [f"{mean(lambda r: r['macs']):.2f}", WAYS[row["way"]], f"{row['steps']:,}", str(len(rows))]
    cells += [f"{mean(lambda r: r['spearman']):.3f}", f"{mean(lambda r: r['retention']):.1%}"]
    if row["quality"]:
        cells += [f"{mean(lambda r: r['quality']['cosine']):.3f}"]
        cells += [f"{mean(lambda r: r['quality']['relational_kl']):.4f}"]
    else:
        cells[2] = ""  # what is not restored is not taught
        cells += ["", ""]
    return [*cells, f"{mean(lambda r: r['processor_seconds']) / 60:.0f} min"]


def test_the_page_of_half_a_model_says_what_was_measured():
    found = {}
    for row in read_lines(RESULTS / "half_model.jsonl"):
        found.setdefault((row["way"], row["budget"], row["steps"]), []).append(row)
    page = (ROOT / "docs" / "half-model.md").read_text(encoding="utf-8")
    section = page.split("## What is left\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    assert sorted(lines[2:]) == sorted(map(line_of, found.values()))


def test_the_page_of_half_a_model_says_what_was_fine_tuned():
    found, metrics = {}, {}
    for row in read_lines(RESULTS / "half_finetuning.jsonl"):
        found.setdefault((row["task"], row["way"], row["budget"]), []).append(row["value"])
        metrics[row["task"]] = row["metric"]
    page = (ROOT / "docs" / "half-model.md").read_text(encoding="utf-8")
    section = page.split("## After fine-tuning\n")[1].split("\n## ")[0]
    for task, metric in metrics.items():
        if (task, "by need", "macs=0.5") in found:
            dense, half = (
                statistics.fmean(found[task, way, budget])
                for way, budget in (("dense", "macs=1"), ("by need", "macs=0.5"))
            )
            assert f"| {task}, {metric} | {dense:.3f} | {half:.3f} | {half / dense:.1%} |\n" in section


def scorer_rows():
    """Scorer → the cells of its row in the two tables of docs/scorers.md."""
    rows = re.findall(r"^\| `([\w-]+)`(?: \(default\))? \| (.*) \|$", SCORER_PAGE, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in rows if name in SCORERS}


def test_the_page_of_scorers_has_every_scorer_once_and_no_other():
    assert sorted(re.findall(r"^\| `([\w-]+)`", SCORER_PAGE, re.MULTILINE)) == sorted(SCORERS)


@pytest.mark.parametrize("name", SCORERS)
def test_the_table_of_scorers_agrees_with_the_registry(name):
    _, passes, last = scorer_rows()[name]
    kind = scorer_class(name)
    assert (last == "yes") is kind.needs_labels  # the first table has no labels, and recovery in this column
    first = re.match(r"\d+", passes)
    assert first is not None
    assert kind.passes.startswith(first[0]), f"page: {passes}, registry: {kind.passes}"


def test_links_and_pictures_of_the_pages_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        # What stands in code is no link: an error that quotes `layers[i](x)`, say.
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for place in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose):
            if not place.startswith("generated/"):
                assert (page.parent / place).exists(), f"{page.name}: {place}"


PAPER = (ROOT / "docs" / "paper-table.md").read_text(encoding="utf-8")


def test_what_the_papers_table_says_of_fine_tuning():
    glue, four, two = (read_lines(RESULTS / f"{name}.jsonl") for name in ("glue", "rivals", "rivals_mnli_qnli"))
    half = {(row["scorer"], row["task"], row["seed"]): row for row in four + two if row["ratio"] == 0.5}
    smp = {key[1:]: row for key, row in half.items() if key[0] == "smp"}

    def retention(rows, scorer):
        found = {(s.scorer, s.ratio): s.retention for s in summarise(rows) if s.task == ALL_TASKS}
        return f"{found[scorer, 0.5]:.1%}"

    def less(scorer, tasks=None):
        runs = [run for run in smp if tasks is None or run[0] in tasks]
        pairs = [(smp[run]["value"], half[(scorer, *run)]["value"]) for run in runs]
        p_value = ttest_rel(*zip(*pairs, strict=True)).pvalue
        return len(pairs), f"{statistics.fmean(one - other for one, other in pairs):+.3f}".replace("0.", "."), p_value

    def shared(is_same):
        pairs = [(smp[a]["kept_heads"], smp[b]["kept_heads"]) for a, b in combinations(smp, 2) if is_same(a, b)]
        return statistics.fmean(
            sum(len(set(a[site]) & set(b[site])) for site in a) / sum(map(len, a.values())) for a, b in pairs
        )

    (count, more, p_value), (_, fewer, p_fewer) = less("random"), less("contribution")
    for cell in (
        f"`smp` keeps {retention(glue, 'smp')} |",
        f"`smp` keeps {retention(four, 'smp')} |",
        f"`smp` keeps {retention(two, 'smp')}, random heads {retention(two, 'random')} |",
        f"{count} pairs of those six tasks | {more} (p = {p_value:.2f}); "
        f"on STS-B alone {less('random', ['stsb'])[1]} |",
        f"which learns nothing | {fewer} (p = {p_fewer:.2f}) |",
        f"| {shared(lambda a, b: a[0] != b[0] and a[1] == b[1]):.0%} between tasks, "
        f"{shared(lambda a, b: a[0] == b[0]):.0%} within a task |",
    ):
        assert cell.replace("p = 0.", "p = .") in PAPER, cell


def test_what_the_papers_table_says_of_representations_and_time():
    representations = read_json(RESULTS / "representations.json")

    def mean(part, number, scorer, ratio=0.5):
        wanted = (scorer, "uniform", ratio)
        rows = [r for r in representations[part] if (r["scorer"], r["allocation"], r["ratio"]) == wanted]
        return f"{statistics.fmean(row[number] for row in rows):.3f}".removeprefix("0")

    similar, kl = partial(mean, "similarity", "spearman"), partial(mean, "rows", "kl")
    curve = read_json(RESULTS / "learning_curves.json")["straight-through (paper), SGD"]["held_out"]
    start, end = (f"{statistics.fmean(curve[at][1].values()):.3f}".removeprefix("0") for at in (0, -1))
    passes = {name: found[1] for name, found in read_json(RESULTS / "scoring_profile.json")["dense_passes"].items()}
    for cell in (
        f"dense {similar('dense', 0.0)}, `smp` {similar('smp')}, random {similar('random')} |",
        f"`smp` {kl('smp')}, random {kl('random')}, `contribution` {kl('contribution')} |",
        f"signal, {curve[-1][0]} updates of 16 texts | KL from {start} to {end} |",
        f"| {passes['smp']:.2f}; leave-one-out {passes['leave_one_out']:.1f} |",
    ):
        assert cell in PAPER, cell
    for name, model, of, work, shape in (
        ("speed_up", "half, scope site", None, "training step", "8x128"),
        ("speed_up", "half, scope site", None, "pass", "8x128"),
        ("gpu_speed_bert_base", "half", "BERT-base", "pass", "64x128"),
    ):
        rows = read_json(RESULTS / f"{name}.json")["rows"]
        row = next(r for r in rows if (r["model"], r.get("of"), r["work"], r["shape"]) == (model, of, work, shape))
        assert f"| {row['speed_up_quartiles'][1]:.3f} times as fast | " in PAPER


def test_the_matrices_of_adaptation_are_those_of_the_raw_file():
    page = (ROOT / "docs" / "adaptation.md").read_text(encoding="utf-8")
    assert matrices(read_lines(RESULTS / "adaptation.jsonl")).strip() in page


def test_what_the_papers_table_says_of_costs():
    (step,) = read_lines(RESULTS / "meta_step_cost_at_128.jsonl")
    batch = sum(statistics.median(seconds) for seconds in step["seconds"]["filled"].values())
    hours = 6000 * 8 * batch / 3600
    assert f"it takes {hours:.1f} hours of one CPU core: 48,000 batches of 60 texts, {batch:.2f} s" in PAPER
    of = {
        (row["model"], row["work"]): row
        for row in read_json(RESULTS / "speed_up.json")["rows"]
        if row["shape"] == "8x128"
    }

    def saved(work, texts):
        faster = of["half, scope site", work]["speed_up_quartiles"][1]
        return texts / of["dense", work]["texts_per_second"] * (1 - 1 / faster)

    for work, texts in (("training step", 3 * 10_000), ("pass", 1_000_000)):
        seconds = saved(work, texts)
        assert f"| {seconds / 60:.0f} min | {round(3600 * hours / seconds)} |" in PAPER
    seconds = {
        name: statistics.median(values) for name, values in read_json(RESULTS / "scoring_time.json")["seconds"].items()
    }
    said = [f"{seconds[name]:.2f} s".lstrip("0") for name in ("contribution", "smp", "dense")]
    assert all(one in PAPER for one in said)


def test_the_page_of_what_was_tried_says_what_came_of_the_long_runs():
    page = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    assert all(f"- {said}\n" in page for said in longer_runs().values())
    assert read_json(RESULTS / "soak.json")["left"] == []


def test_what_is_said_of_int8_and_of_several_processes():
    half_model, scale = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("half-model", "scale"))
    rows = read_lines(RESULTS / "int8_quality.jsonl")
    dense = rows[0]["spearman"]["float32"]
    for row in rows:
        steps = f"{row['steps']:,}" if row["steps"] else ""
        numbers = [f"{row['spearman'][graph]:.3f}" for graph in ("float32", "int8")]
        of_dense = f"{row['spearman']['int8'] / dense:.1%}"
        faster = [f"{times:.2f}\u00d7" for times in row["beside_dense_float32"]["int8"].values()]
        line = " | ".join([f"{row['macs']:.2f}", steps, *numbers, of_dense, *faster]).replace("|  |", "| |")
        assert f"| {line} |" in half_model
    one, *others = read_json(RESULTS / "several_processes.json")["rows"]
    assert all(row["same_scores"] and row["same_units"] and row["same_weights"] for row in others)
    for row in (one, *others):
        assert f"| {row['machines']} \u00d7 {row['processes_on_each']} | {row['seconds']} |" in scale
