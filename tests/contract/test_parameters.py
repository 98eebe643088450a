"""Every parameter of the public functions gets a wrong type, a wrong range and an empty value: one form of refusal."""

import inspect

import pytest
import torch

import secateur
from secateur import cli
from secateur.meta_training.subjects import Subject
from secateur.pruners.map_network import MetaPruner
from secateur.texts.data import Task
from secateur.units.masks import Mask
from secateur.units.scores import Scores
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")
SECTION = "Arguments"

COUNT = [0, -1, 1.5, "3", None, True, ""]
FLAG = [1, "yes", None, ""]
SEED = [-1, 2**32, 0.5, "0", None, True, ""]
MASK = [None, 3, "", {}, {"a": torch.ones(2, dtype=torch.bool)}]
MODEL = [None, 3, torch.nn.Linear(2, 2)]
SPREAD = ["layer", "", 3, []]
ALLOCATION = [*SPREAD, None]
RANKED = [*ALLOCATION, "sensitivity"]  # needs texts, which `prune` alone has
LEAST = [-1, 1.5, "1", None, True]
GIVEN_RATIO = [-0.1, 1, float("nan"), "half", True, ""]
RATIO = [*GIVEN_RATIO, None]
TEXTS = [[], "", "a text", 3, [3], {"a": 1}]
LISTED = TEXTS[:-1]  # these read anything that can be iterated over
BUDGET = [3, "", {}, "half"]
PROCESSES = [3, "", {}]
PATH = [None, 3, "", [], "a\0b"]
CONFIG = [3, "", {}]
LEARNED_ON = [None, 3, "", [], ["a"], {}]
INPUTS = [3, "", {}, {3: 1}]
READY = [3, "", [], [{}], [3]]
SETTINGS = [3, "", {}, {"batch_size": 4}]
UNITS = [3, "", "heads", {}, [], ["words"]]

CALLS = {
    "find_sites": {"model": MODEL, "inputs": INPUTS},
    "find_units": {"model": MODEL, "units": UNITS, "inputs": INPUTS},
    "gated": {"model": MODEL, "mask": MASK, "sites": [3, "", {}]},
    "remove_": {
        "model": MODEL, "mask": MASK, "inputs": INPUTS, "sites": [3, "", {}],
        "record": [3, "", {}, {"kept_heads": {}}, {"a": object()}],
    },
    "select": {
        "scores": [None, 3, "", {}], "pruning_ratio": RATIO, "allocation": RANKED, "floor": LEAST,
        "multiple": COUNT,
    },
    "allocate": {
        "scores": [None, 3, "", {}], "budget": [*BUDGET, None, "heads=0", "heads=1.1", "heads=nan", "latency=0.5",
                   "similarity=0.9"],
        "model": MODEL, "allocation": RANKED, "floor": LEAST, "multiple": COUNT,
    },
    "score": {
        "model": MODEL, "texts": LISTED, "scorer": ["best", "", None, 3],
        "tokenizer": [3, "", object()], "labels": [3, ""], "inputs": READY,
        "cut": SETTINGS, "reading": SETTINGS, "units": [None, *UNITS],
    },
    "prune": {
        "model": [*MODEL, ""], "texts": LISTED, "pruning_ratio": GIVEN_RATIO, "scorer": ["best", "", None, 3],
        "restore": [True, "", "distil", 3], "tokenizer": [3, "", object()], "labels": [3, ""], "budget": BUDGET,
        "reading": SETTINGS, "steps": COUNT, "inputs": READY, "cut": SETTINGS, "out": PATH[1:],
    },
    "preview": {
        "model": [*MODEL, ""], "texts": LISTED,
        "budgets": [*BUDGET, None, [], ["heads=0.5"], ["macs=0.5", "params=0.5"], ["similarity=0.9"]],
        "scorer": ["best", "", None, 3], "tokenizer": [3, "", object()], "labels": [3, ""],
        "reading": SETTINGS, "inputs": READY, "cut": SETTINGS,
    },
    "reconstruct_": {
        "model": MODEL, "mask": MASK, "texts": TEXTS, "tokenizer": [3, "", object()],
        "inputs": READY, "reading": SETTINGS,
    },
    "distill_": {
        "model": MODEL, "teacher": MODEL, "texts": TEXTS, "tokenizer": [3, "", object()], "steps": COUNT,
        "learning_rate": [0, -1, float("nan"), float("inf"), "1", None, True],
        "layers": [3, "", {}, {"a": 3}, {"a": []}, {"a": ["0"]}, [0]], "inputs": READY, "reading": SETTINGS,
        "checkpoints": [3, "", object()],
    },
    "refine_mask": {
        "model": MODEL, "mask": MASK, "texts": TEXTS, "tokenizer": [3, "", object()], "steps": LEAST,
        "allocation": ALLOCATION, "floor": LEAST, "inputs": READY, "reading": SETTINGS,
    },
    "Reading": {
        "batch_size": COUNT, "max_length": [3, -1, 4.5, "9", None, True, ""], "seed": SEED,
        "stop": [0, -1, "soon", "", None, 1.5], "bf16": FLAG, "maps": FLAG, "progress": FLAG, "accelerator": PROCESSES,
        "device": ["abacus", "", 3.5, []],
    },
    "Cut": {
        "pruning_ratio": RATIO, "allocation": SPREAD, "floor": LEAST, "budget": [3, "", {}], "units": UNITS,
        "multiple": COUNT, "exclude": [3, "encoder.*", [3]], "plain": FLAG, "refine": LEAST,
        "latency_table": [3, "", []],
    },
    "Scores": {
        "values_by_site": [None, 3, "", {}, {3: [1.0]}, {"a": []}, {"a": "x"}, {"a": [float("nan")]}, {"a": [[1.0]]}],
        "num_groups": [None, 3, "", {"a": 0}, {"a": 3}, {"a": "1"}],
        "scorer": [None, 3], "interactions": [None, 3, "", {"b": [[1.0]]}, {"a": "x"}, {"a": [1.0]}],
        "kinds": [None, 3, "", {"a": "words"}],
        "num_texts": [-1, "3", 1.5, True], "agreement": [-0.1, 1.1, "1", float("nan")],
        "staying": [None, 3, "", {"a": 0}, {"a": ["0"]}],
    },
    "train_meta_pruner": {
        "subjects": LEARNED_ON, "tasks": LEARNED_ON, "out": PATH, "config": CONFIG, "held_out": [3, "", None, [3]],
        "resume": FLAG, "progress": FLAG, "stop_after": [0, -1, "1", True, float("nan")], "accelerator": PROCESSES,
    },
    "train_joint_pruner": {
        "subjects": LEARNED_ON, "tasks": LEARNED_ON, "out": PATH, "config": CONFIG, "resume": FLAG, "progress": FLAG,
        "accelerator": PROCESSES,
    },
    "Mask": {"values_by_site": [None, 3, "", {}, {3: [True]}, {"a": []}, {"a": [1, 0]}, {"a": "x"}]},
    "MetaPruner": {"initial_std": [0, -1, "1", None, float("nan"), float("inf"), True, ""]},
    "JointPruner": {
        "width": [0, 47, 1.5, "48", None, 10**9], "layers": [0, "2", None, 10**9],
        "attention_heads": [0, "4", None, 10**9], "joint": FLAG, "without": [3, None, "maps", ["none"]],
        "members": [0, "4", None, 10**9], "prior": [-1, "1", None, float("nan"), True],
        "matching": [-1, "1", None, float("nan"), True],
        "remembered": [None, 3, "ab", [3], [(1, 2, 3)], ["ab"], [(0, 1)], [(12, None)], [(10**9, 10**9)]],
    },
}  # fmt: skip
METHODS = {
    "Scores.load": (Scores.load, "path"),
    "Mask.load": (Mask.load, "path"),
    "Scores.save": (Scores({"a": [1.0]}).save, "path"),
    "Mask.save": (Mask({"a": [True]}).save, "path"),
    "MetaPruner.from_authors_checkpoint": (MetaPruner.from_authors_checkpoint, "path"),
}
# Made by the functions above or raised by them, and the class that scorers derive from.
RESULTS = {"CheckpointError", "InvalidInputError", "Preview", "PruningReport", "RemovalError", "Scorer",
           "SecateurError", "UnsupportedModelError"}  # fmt: skip
SAID_AS = {"values_by_site": r"scores|mask", "record": "record"}


@pytest.fixture(scope="module")
def good():
    """Arguments with which every function works."""
    model = tiny_model("bert")
    sites = secateur.find_sites(model)
    return {
        "model": model, "mask": uneven_mask(sites), "scores": Scores({"a": [1.0, 2.0]}), "texts": tiny_texts(24),
        "teacher": tiny_model("bert"), "tokenizer": tiny_tokenizer(), "values_by_site": {"a": [1.0, 2.0]},
        "sites": None, "steps": 1,
        "budget": "heads=0.5", "subjects": [Subject(tiny_model("bert"), tiny_tokenizer())],
        "tasks": [Task("words", tiny_texts(200))], "out": "nowhere",
    }  # fmt: skip


def call(name, arguments):
    made = getattr(secateur, name)(**arguments)
    if name == "gated":
        with made:
            pass


def test_the_table_has_every_parameter():
    assert set(CALLS) | RESULTS == set(secateur.__all__) - {"__version__", "errors", "settings"}
    for name, table in CALLS.items():
        parameters = inspect.signature(getattr(secateur, name)).parameters.values()
        named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        assert set(table) == named - {"hub_mixin_config"}, name


@pytest.mark.parametrize(("name", "parameter"), [(n, p) for n, table in CALLS.items() for p in table])
def test_a_wrong_value_is_named(name, parameter, good, outcome):
    known = inspect.signature(getattr(secateur, name)).parameters
    right = {key: value for key, value in good.items() if key in known}
    before = torch.cat([p.flatten() for p in good["model"].parameters()])
    for value in CALLS[name][parameter]:
        with pytest.raises((ValueError, TypeError)) as caught:
            call(name, {**right, parameter: value})
        text = str(caught.value)
        named = SAID_AS.get(parameter, parameter)
        assert any(f"`{word}" in text for word in named.split("|")), (value, text)
        assert "\n" not in text
        assert " must " in text or " need" in text, (value, text)
    assert torch.equal(before, torch.cat([p.flatten() for p in good["model"].parameters()]))
    outcome(SECTION, f"`{name}({parameter}=…)`, {len(CALLS[name][parameter])} values", caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_path_is_named(method, outcome):
    function, name = METHODS[method]
    for value in PATH:
        with pytest.raises((ValueError, TypeError), match=f"`{name}` must ") as caught:
            function(value)
    outcome(SECTION, f"`{method}({name}=…)`, 5 values", caught.value)


def options():
    """Every option of every command that has a rule, with values that break it."""
    import click

    for command in cli.cli.commands.values():
        for option in command.params:
            if not isinstance(option, click.Option) or option.is_flag:
                continue
            kind = option.type
            wrong = []
            if isinstance(kind, click.Choice):
                wrong = ["nothing", ""]
            elif isinstance(kind, click.IntRange):
                wrong = ["x", "", "1.5", str((kind.min or 0) - 1)]
            elif kind.name in ("ratio", "all|auto|N", "number"):
                wrong = ["x", "", "-1", "nan", "1e999"]
            if wrong:
                yield pytest.param(command.name, option.opts[-1], wrong, id=f"{command.name} {option.opts[-1]}")


@pytest.mark.parametrize(("command", "option", "wrong"), list(options()))
def test_a_wrong_option_is_one_line(command, option, wrong, capsys, outcome):
    for value in wrong:
        given = [command, f"{option}={value}"]
        code = cli.main(given)
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), given
        assert len(err.splitlines()) == 1, err
        assert err.startswith("secateur: error: ")
        assert option in err or f"`{option.lstrip('-').replace('-', '_')}`" in err, err
    outcome(SECTION, f"`secateur {command} {option}`, {len(wrong)} values", err)


def test_the_pruners_take_only_maps():
    with pytest.raises(ValueError, match="`maps` must"):
        MetaPruner()("x")
    with pytest.raises(ValueError, match="`weights` must"):
        MetaPruner().score_maps("x", None, False)
