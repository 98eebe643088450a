"""Do the tests notice when the code is wrong? One small mistake at a time in the modules that everything rests on.

    python benchmarks/mutation.py [--only MODULE ...] [--again]

The mistakes (mutants) are cosmic-ray's, and one kind of our own: a statement that only has an effect is left out. Not
made are mutants that Python cannot compile, that change only annotations, or that swap `==` and `is`; of the eleven
operators that could stand in for an arithmetic one, the opposite one does. No texts are mutated, so neither are the
words of messages.

A mutant is tested in a process forked from this one, which has imported what the tests import, on a copy of the
project. It is killed where a test fails, or where the tests take twice the processor time that they take without it;
what else the machine does changes nothing. What was found is kept in build/mutation.jsonl, so that a stopped run goes
on; `--again` tests survivors that have no reason yet once more, for when there are new tests; with `--only` the other
modules' mutants that were never tested stay "untested". Writes benchmarks/results/mutation.json, with the reason of
benchmarks/survivors.json for each mutant that survives, and ends with exit code 1 where one has none.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names
from parso.python.tree import Keyword

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "mutation.json"
REASONS = ROOT / "benchmarks" / "survivors.json"
KEPT = ROOT / "build" / "mutation.jsonl"
PACKAGES = ("secateur", "torch", "transformers", "pytest", "hypothesis", "cosmic-ray")

_REMOVAL = [
    "contract/test_removal.py",
    "contract/test_proof.py",
    "contract/test_parts.py",
    "unit/test_reshaped.py",
    "contract/test_recipe.py::test_the_recipe_records_what_was_done",
    "contract/test_offload.py::test_what_would_hold_all_weights_is_refused_and_told_what_works",
    *(
        f"contract/test_parameters.py::test_a_wrong_value_is_named[{name}]"
        for name in ("gated-model", "gated-mask", "gated-sites", "remove_-mask", "remove_-inputs", "remove_-record")
    ),
    "contract/test_concurrency.py::test_two_models_of_one_config_object_in_two_threads",
    "contract/test_memory_and_numbers.py::test_nothing_is_proved_with_values_that_are_not_finite",
]

# Each module with the tests that are about it, but for the slow ones.
MODULES = {
    "units/select.py": ["unit/test_selection.py"],
    "removal/remove.py": [*_REMOVAL, "contract/test_plain.py", "contract/test_names.py"],
    "removal/proving.py": _REMOVAL,
    "removal/telling.py": [
        *_REMOVAL,
        "contract/test_recipe.py",
        "contract/test_plain.py",
        "contract/test_names.py",
        "contract/test_saving.py::test_a_layer_that_is_deleted_after_heads_were_removed[bert-0]",
        "contract/test_saving.py::test_a_config_of_its_own_forgets_what_is_no_longer_so",
    ],
    "sites/narrowing.py": [
        "unit/test_neurons.py::test_what_a_batch_normalisation_keeps_of_a_channel_goes_with_its_neuron",
        "unit/test_neurons.py::test_a_removal_that_fails_puts_the_statistics_back",
        "contract/test_removal.py",
        "contract/test_units.py",
    ],
    "removal/proof.py": [
        "unit/test_proof_by_hand.py",
        "contract/test_proof.py",
        "contract/test_removal.py",
        "contract/test_cached_decoding.py::test_a_cached_step_is_compared_where_there_is_a_cache",
        "contract/test_cached_decoding.py::test_a_removal_that_is_wrong_with_a_cache_alone_is_refused",
        "contract/test_memory_and_numbers.py::test_nothing_is_proved_with_values_that_are_not_finite",
    ],
    "removal/saving.py": ["contract/test_saving.py", "contract/test_recipe.py", "contract/test_parts.py"],
    "removal/checkpoint.py": [
        "contract/test_checkpoint.py::test_round_trip_and_saving_again[bert]",
        "contract/test_checkpoint.py::test_round_trip_and_saving_again[t5]",
        "contract/test_checkpoint.py::test_every_auto_class_reads_a_base_checkpoint",
        "contract/test_checkpoint.py::test_a_pruned_task_model_is_read_by_its_class_and_as_a_base",
        "contract/test_checkpoint.py::test_models_without_a_recipe_load_exactly_as_before",
        "contract/test_checkpoint.py::test_the_hook_is_installed_once",
        "contract/test_recipe.py",
        "contract/test_verify.py",
        "contract/test_checkpoint.py::test_models_are_built_whole_where_the_hook_is_off",
        "contract/test_tokenizers.py::test_a_tokenizer_that_was_given_is_saved_and_one_that_lies_there_stays",
        "contract/test_legacy.py",
        "contract/test_parts.py",
        "contract/test_saving.py",
        "unit/test_construction.py",
    ],
    "removal/construction.py": [
        "unit/test_construction.py",
        "contract/test_checkpoint.py::test_every_auto_class_reads_a_base_checkpoint",
        "contract/test_checkpoint.py::test_models_are_built_whole_where_the_hook_is_off",
    ],
    "sites/recipe.py": [
        "contract/test_recipe.py::test_sites_that_are_alike_share_a_layout_and_others_do_not",
        "contract/test_recipe.py::test_what_was_done_since_is_noted_where_the_config_tells_of_units",
        "contract/test_checkpoint.py::test_round_trip_and_saving_again[bert]",
        "contract/test_checkpoint.py::test_an_emptied_site_comes_back[gpt2]",
        "contract/test_recipe.py::test_damaged_recipes_are_refused_before_any_weight_is_read",
        "unit/test_packing.py",
        "contract/test_recipe.py::test_the_recipe_records_what_was_done",
        "unit/test_reshaped.py::test_a_module_that_asks_for_the_full_width_is_pruned_again_and_reloads",
        "unit/test_reshaped.py::test_a_recipe_that_reshapes_an_unknown_site_is_refused",
    ],
    "removal/replay.py": [
        "contract/test_units.py::test_a_block_that_loses_all_neurons_keeps_its_bias",
        "contract/test_checkpoint.py",
        "contract/test_parts.py",
        "contract/test_recipe.py",
        "contract/test_removal.py",
        "unit/test_reshaped.py",
        "system/test_standalone.py::test_without_secateur_the_outputs_are_the_same_bit_for_bit",
    ],
}
SLOW = [
    "--deselect=tests/unit/test_reshaped.py::test_it_trains_and_compiles",
    "--deselect=tests/contract/test_legacy.py::test_the_call_compiles_as_before",
    "--deselect=tests/contract/test_plain.py::test_folders_load_where_secateur_is_not",
    "--deselect=tests/contract/test_plain.py::test_what_follows_works_on_a_plain_cut",
]
# Not imported before the processes fork: what is mutated, what tests it, and what runs the tests.
OURS = ("secateur", "tests", "_pytest", "pytest", "__main__")
_WANTED = re.compile(
    "|".join(
        (
            "ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul|BitOr_BitAnd|BitAnd_BitOr)",
            "ReplaceUnaryOperator_(Delete_.*|USub_UAdd)",
            "ReplaceComparisonOperator_(Is_IsNot|IsNot_Is|(Eq|NotEq|Lt|LtE|Gt|GtE)_(Eq|NotEq|Lt|LtE|Gt|GtE))",
            "Replace(True|False|And|Or|Break|Continue)With.*",
            "AddNot|ExceptionReplacer|NumberReplacer|RemoveDecorator|ZeroIterationForLoop",
        )
    )
)


class LeaveOut(Operator):
    """Replace a call that stands alone, or an assignment to a part of something, by `pass`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        if node.type == "simple_stmt" and self._has_effect(node.children[0]):
            yield node.start_pos, node.end_pos

    @staticmethod
    def _has_effect(statement: Any) -> bool:
        if statement.type != "expr_stmt":
            return statement.type == "atom_expr"
        target = statement.children[0]
        parts = target.children if target.type == "testlist_star_expr" else [target]
        return statement.children[1].type != "annassign" and any(part.type == "atom_expr" for part in parts)

    def mutate(self, node: Any, index: int) -> Any:
        first = node.get_first_leaf()
        node.children[0] = Keyword("pass", first.start_pos, first.prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield the operator's name and the whole mutated source of every mutant that is not equal to `source` at sight."""
    known = {name.split("/")[1]: get_operator(name) for name in operator_names()}
    chosen = [(name, operator) for name, operator in known.items() if _WANTED.fullmatch(name)]
    tree, plain = get_ast(source), _without_annotations(source)
    for name, operator in [*chosen, ("LeaveOut", LeaveOut)]:
        count = sum(1 for node in ast_nodes(tree) for _ in operator().mutation_positions(node))
        for number in range(count):
            mutated = mutate_code(source, operator(), number)
            with suppress(SyntaxError):
                if _without_annotations(mutated) != plain:
                    yield name, mutated


def _without_annotations(source: str) -> str:
    """Return what a module computes where its annotations are not evaluated. Raises `SyntaxError` where nothing."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not _is_overload(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments) and node.posonlyargs:
            raise SyntaxError("a mark of keyword arguments, `*`, was taken for an operator")
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def _is_overload(node: ast.stmt) -> bool:
    """Whether this is a function of no body, which tells a type checker of the one that follows it."""
    return isinstance(node, ast.FunctionDef) and ast.unparse(node.body) == "..."


class Quickest:
    """A plugin of pytest: the tests that take least come first. `seconds` is what each took, `{}` where not known."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.before, self.seconds = seconds, Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.before.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration


def outcome(folder: Path, tests: list[str], limit: float, seconds: dict[str, float], seen: Path | None = None) -> str:
    """Run tests of the project in `folder` in a forked process: "survived", "killed", or "timeout".

    A timeout comes after `limit` seconds of processor time, or five times that while it waits.

    The process writes what it has imported in the end, and what each test took, into `seen`.
    """
    child = os.fork()
    if not child:
        code = 99
        with suppress(BaseException):
            plugin = Quickest(seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(_cpu_seconds() + limit), resource.RLIM_INFINITY))
            code = _run_tests(folder, tests, plugin)
            if seen is not None:
                seen.write_text(json.dumps([list(sys.modules), plugin.seconds]))
        os._exit(code)
    end = time.monotonic() + 5 * limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
                return "timeout"
            return "killed" if status else "survived"
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        time.sleep(0.02)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _run_tests(folder: Path, tests: list[str], plugin: Quickest) -> int:
    import pytest

    os.setsid()  # a group of its own, which ends together
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    sys.path[:0] = [str(folder / "src"), str(folder)]
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(folder / "src"), PYTHONDONTWRITEBYTECODE="1")
    files = [f"tests/{name}" for name in tests]
    return int(pytest.main(["-x", "-p", "no:cacheprovider", "--hypothesis-seed=0", *SLOW, *files], plugins=[plugin]))


def _baseline(folder: Path, tests: list[str]) -> tuple[float, dict[str, float]]:
    """Return the seconds of the tests on the project as it is, all of them and each, and import what they needed."""
    seen = folder / "seen.json"
    if outcome(folder, tests, 3600, {}, seen) != "survived":
        raise SystemExit(f"the tests fail without any mutant: {(folder / 'log.txt').read_text()[-2000:]}")
    names, seconds = json.loads(seen.read_text())
    for name in names:
        if name.partition(".")[0] not in OURS:
            with suppress(BaseException):
                importlib.import_module(name)
    return sum(seconds.values()), seconds


def run(only: list[str], again: bool, reasons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {row["key"]: row for row in map(json.loads, KEPT.read_text().splitlines())} if KEPT.is_file() else {}
    KEPT.parent.mkdir(exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "project"
        files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
        for file in files.splitlines():
            if (ROOT / file).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / file, folder / file)
        for module, tests in MODULES.items():
            path, source = folder / "src" / "secateur" / module, (ROOT / "src" / "secateur" / module).read_text()
            total, seconds = 0.0, {}
            for operator, mutated in mutants(source):
                key = hashlib.sha256(f"{module}\n{mutated}".encode()).hexdigest()[:16]
                row = known.get(key)
                if module not in only:
                    row = row or {"module": module, "outcome": "untested"}
                elif row is None or (again and row["outcome"] == "survived" and _reason(row, reasons) is None):
                    if not total:
                        total, seconds = _baseline(folder, tests)
                        print(f"{module}: {', '.join(tests)} take {total:.1f} s", flush=True)
                    path.write_text(mutated)
                    start = time.monotonic()
                    found = outcome(folder, tests, 2 * total + 10, seconds)
                    row = {"key": key, "module": module, "operator": operator, "outcome": found}
                    row |= {"seconds": round(time.monotonic() - start, 1), "diff": _diff(source, mutated)}
                    path.write_text(source)
                    with KEPT.open("a") as kept:
                        kept.write(json.dumps(row) + "\n")
                    print(module, found, f"{row['seconds']} s", operator, row["diff"].replace("\n", " "), flush=True)
                rows.append(row)
    return rows


def _diff(source: str, mutated: str) -> str:
    """Return the changed lines, with the number of the first."""
    lines = list(difflib.unified_diff(source.splitlines(), mutated.splitlines(), lineterm="", n=0))[2:]
    lines[0] = f"line {lines[0].split()[1][1:].split(',')[0]}"
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--again", action="store_true", help="test once more what survives without a reason")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES), metavar="MODULE")
    options = parser.parse_args()
    reasons = json.loads(REASONS.read_text())
    rows = run(options.only, options.again, reasons)
    table = {}
    for module, tests in MODULES.items():
        found = Counter(row["outcome"] for row in rows if row["module"] == module)
        table[module] = {"tests": tests, "mutants": found.total(), **found}
    survivors = [
        {k: row[k] for k in ("module", "operator", "diff")} | {"reason": _reason(row, reasons)}
        for row in rows
        if row["outcome"] == "survived"
    ]
    result = {
        "command": "python benchmarks/mutation.py",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": {
            p: version(p) for p in ("secateur", "cosmic-ray", "pytest", "hypothesis", "torch", "transformers")
        },
        "modules": table,
        "survivors": survivors,
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    unexplained = [row for row in survivors if row["reason"] is None]
    for row in unexplained:
        print(f"{row['module']}: survives without a reason:\n{row['diff']}")
    raise SystemExit(1 if unexplained else 0)


def _reason(row: dict[str, Any], reasons: list[dict[str, Any]]) -> str | None:
    """Return why a mutant survives: `survivors.json` has the mutated line, or the one left out, for each reason."""
    sign = "-" if row["operator"] in ("LeaveOut", "RemoveDecorator") else "+"
    line = "\n".join(line[1:].strip() for line in row["diff"].splitlines() if line.startswith(sign)).strip()
    told = [one["reason"] for one in reasons if one["module"] == row["module"] and line in one["mutants"]]
    return told[0] if told else None


if __name__ == "__main__":
    main()
