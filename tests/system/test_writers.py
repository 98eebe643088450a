"""Every writer at everything that may stand at its place: files, links, pipes, devices, folders, and nothing.

A new writer is a row: of `FILES` where it puts a file in a place, of `FOLDERS` where it makes a folder. The sources and
the options of commands are searched for writers without a row.
"""

import ast
from pathlib import Path

import click
import pytest

import secateur
from secateur import cli
from secateur.errors import SecateurError
from secateur.report import plots
from secateur.support.files import append_line
from secateur.units.scores import Scores
from tests.support.standing import FREE, PLACES, TAKEN, taken
from tests.support.writers import FILES, FOLDERS, QUICK, write_given

pytestmark = pytest.mark.usefixtures("one_thread", "sketched")
SECTION = "What stands at a writer's place"
SOURCES = Path(secateur.__file__).parent


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    write_given(folder)
    return folder


@pytest.fixture
def sketched(monkeypatch):
    """What is written need not be worked out each time."""
    monkeypatch.setattr(plots, "_figures", lambda run: [("head-map", None)])
    monkeypatch.setattr(plots, "_rendered", lambda figure, kind: b"<svg/>")
    monkeypatch.setattr("secateur.report.render_report", lambda runs: "<html>")
    monkeypatch.setattr("secateur.scorers.score.score", lambda *_, **__: Scores({"a": [1.0, 2.0]}))


# These write into a folder that a row has made or holds, or are what a row calls.
INSIDE = {
    "cli/bench.py": {"_write_table"},
    "cli/prune.py": {"_prune"},
    "comparing/folder.py": {"owned"},
    "comparing/run.py": {"score_run"},
    "demo.py": {"run_demo"},
    "exporting/convert.py": {"_convert_model", "_convert_pruner"},
    "exporting/standalone.py": {"save_standalone"},
    "finetuning/finetune.py": {"_save_result"},
    "meta_training/contents.py": {"settle_contents"},
    "meta_training/joint_settings.py": {"settle"},
    "meta_training/paper.py": {"_save"},
    "meta_training/runs.py": {"Log", "held_run", "save_checkpoint"},
    "pruning.py": {"_folder"},
    "pruning_steps.py": {"kept_steps"},
    "reproducing/reproduce.py": {"_write_demo_task"},
    "units/by_site.py": {"Saved"},
}
WRITES = {"write_text", "write_bytes", "write_together", "append_line", "new_folder", "replaced_folder", "one_run",
          "held_run"}  # fmt: skip
PAST = {".write_text", ".write_bytes", ".copyfile", ".copytree", ".copy2", ".move", ".symlink_to", ".hardlink_to"}


def called(node):
    """Yield the names of what is called in a piece of code, methods with a dot before them."""
    for one in ast.walk(node):
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Name | ast.Attribute):
            yield one.func.id if isinstance(one.func, ast.Name) else f".{one.func.attr}"


def makes_a_folder(node):
    """Is it a public function with a place `out` for what it makes?"""
    arguments = node.args.args + node.args.kwonlyargs if isinstance(node, ast.FunctionDef) else []
    places = [one for one in arguments if one.arg == "out" and "str | Path" in ast.unparse(one.annotation)]
    return bool(places) and not node.name.startswith("_")


def test_every_writer_has_a_row():
    rows = {False: set(), True: set()}
    for name in (*FILES, *FOLDERS):
        rows[" --" in name].add(name.partition(" ")[0].partition(".")[0].replace("-", "_"))
    for file in SOURCES.rglob("*.py"):
        place, text = str(file.relative_to(SOURCES)), file.read_text(encoding="utf-8")
        known = rows[place.startswith("cli/")] | INSIDE.get(place, set())
        if place == "support/files.py" or not any(name.lstrip(".") in text for name in {*WRITES, *PAST, "out: str"}):
            continue
        for node in ast.parse(text).body:
            names = set(called(node))
            if names & WRITES or makes_a_folder(node):
                assert node.name in known, f"{place}: {node.name} writes and has no row"
            assert not names & PAST or place == "models/places.py", f"{place}: {node.name} writes past support/files.py"


def test_every_option_of_a_place_has_a_row():
    known = {tuple(name.split(" ")) for name in (*FILES, *FOLDERS) if " --" in name}
    found = {
        (name, option.opts[0])
        for name, one in cli.cli.commands.items()
        for option in one.params
        if isinstance(option, click.Option) and isinstance(option.type, click.Path) and not option.type.exists
    }
    assert found == known


# --- what stands there -----------------------------------------------------------------------------------------------


def tried(writers, place, folder, given):
    """Return, by writer, what went otherwise than the place says."""
    wrong = {}
    for number, (writer, (name, call)) in enumerate(writers.items()):
        path = folder / f"{number}" / "in" / name
        path.parent.mkdir(parents=True)
        try:
            with place(path) as refused:
                if refused is None:
                    call(path, given)
                else:
                    with pytest.raises(SecateurError, match=refused) as caught:
                        call(path, given)
                    assert "\n" not in str(caught.value)
            assert {one.name for one in (folder / f"{number}").rglob(".*")} <= {".lock"}, "something hidden is left"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | pytest.skip.Exception):
                raise
            wrong[writer] = f"{type(error).__name__}: {error}"
    return wrong


@pytest.mark.parametrize("name", PLACES)
def test_a_file_is_written_at(name, given, tmp_path, outcome):
    place, came = PLACES[name]
    assert tried(FILES, place, tmp_path, given) == {}
    outcome(SECTION, f"{name}, where each of {len(FILES)} writers puts a file", came)


@pytest.mark.parametrize("name", FREE)
def test_a_folder_is_made_at(name, given, tmp_path, outcome):
    place, came = FREE[name]
    writers = {writer: ("out", call) for writer, call in QUICK.items()}
    assert tried(writers, place, tmp_path, given) == {}
    outcome(SECTION, f"{name}, where each of {len(writers)} writers makes a folder", came)


@pytest.mark.parametrize("name", TAKEN)
def test_a_folder_is_refused_at(name, given, tmp_path, outcome):
    writers = {writer: ("out", call) for writer, call in FOLDERS.items()}
    if name == "a folder with something in it":
        writers = {writer: call for writer, call in writers.items() if "plots" not in writer}  # they may be added
    assert tried(writers, taken(TAKEN[name]), tmp_path, given) == {}
    outcome(SECTION, f"{name}, where each of {len(writers)} writers makes a folder", "refused in one line")


def test_a_line_goes_into_a_file_alone(tmp_path):
    """It is appended in place, so that each name of a file has it; what cannot be cut short again is refused."""
    writers = {"append_line": ("lines", lambda path, given: append_line(path, 1))}
    for name in ("nothing", "a file of mode 0600", "a link to a file"):
        assert tried(writers, PLACES[name][0], tmp_path / name, None) == {}
    for name in TAKEN.keys() - {"a file", "a link to a file"}:
        assert tried(writers, taken(TAKEN[name], "cannot be written"), tmp_path / name, None) == {}
