"""A file of a few kilobytes does not ask for all memory, in processes that may take little."""

import json

import pytest
import torch
from transformers import AutoModel

from secateur.errors import CheckpointError, InvalidInputError, SecateurError
from secateur.pruners.joint_network import JointPruner
from secateur.sites.layout import Runs
from tests.support.processes import outcome_within
from tests.support.tiny import tiny_model

MEMORY = 400  # MiB more than a process that has imported everything


def load(folder):
    AutoModel.from_pretrained(folder)


def load_pruner(folder):
    JointPruner.from_pretrained(folder)


def write_config(folder, **values):
    tiny_model("bert").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def bomb(layouts, runs):
    """A recipe of 300 sites with 20 slices each, `layouts` of them in a layout."""
    names = [f"encoder.layer.{number}.attention.self" for number in range(300)]
    layout = {
        "site": "self", "num_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "output": "output.dense",
        "attributes": {},
    }  # fmt: skip
    made = []
    for start in range(0, 300, layouts):
        slices = [[f"self.x{number}.weight", 0, "query", runs(start + number)] for number in range(20)]
        made.append({"sites": names[start : start + layouts], **layout, "slices": slices})
    return {"format_version": 1, "kept_heads": {name: [0] for name in names}, "layouts": made}


@pytest.mark.parametrize(
    ("layouts", "runs", "message"),
    [
        (300, lambda number: "0x1000000", "names the site"),
        (300, lambda number: f"0x{999000 - number} 1x{number + 1}", "more than 10000000 entries"),
        (1, lambda number: f"0x{1000000 - number}", "more than 10000000 entries"),
    ],
    ids=["alike", "unlike", "in layouts"],
)
def test_a_recipe_with_long_runs(layouts, runs, message, tmp_path):
    write_config(tmp_path, head_pruning=bomb(layouts, runs))
    kind, text = outcome_within(MEMORY, load, tmp_path)
    assert (kind, message in text) == (CheckpointError.__name__, True), text


@pytest.mark.parametrize(
    "sizes",
    [{"hidden_size": 40_000, "intermediate_size": 40_000}, {"num_hidden_layers": 24, "intermediate_size": 4096}],
    ids=["wide", "deep"],
)
def test_pruned_heads_of_transformers_4_in_a_huge_model(sizes, tmp_path):
    """What is read from it takes memory for one layer; the weights, which are not there, are asked for later."""
    write_config(tmp_path, pruned_heads={"1": [0, 2]}, **({"hidden_size": 1024} | sizes))
    (tmp_path / "model.safetensors").write_bytes(b"never to be read")
    kind, text = outcome_within(MEMORY, load, tmp_path)
    if "hidden_size" in sizes:  # not even that
        assert (kind, "above 500000000; prune the original again" in text) == (CheckpointError.__name__, True), text
    else:
        assert kind == "SafetensorError", text


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 4096, "layers": 4096}, {"members": 4096, "layers": 4096, "width": 4},
        {"remembered": [[16384, 16384]] * 9},
    ],
    ids=["weights", "blocks", "remembered"],
)  # fmt: skip
def test_a_pruner_that_is_too_large(sizes, tmp_path):
    pruner = JointPruner(members=1)
    pruner.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes}))
    kind, text = outcome_within(MEMORY, load_pruner, tmp_path)
    assert kind == InvalidInputError.__name__, text
    assert issubclass(InvalidInputError, SecateurError)


def test_runs_that_are_written_alike_are_held_once():
    runs = Runs()
    assert runs.owners("0x2 -x1 1x2", 2) == (0, 0, -1, 1, 1)
    assert runs.owners("0x2 -x1 1x2", 2) is runs.owners("0x2 -x1 1x2", 2)
    assert runs.units(3) == (0, 1, 2)
    assert runs.units(3) is runs.units(3)
    assert runs.owners("", 3) == ()
    with pytest.raises(ValueError, match="impossible run '2x1' among 2 units"):
        runs.owners("2x1", 2)
    assert torch.tensor(runs.owners("0x1000000", 1)).sum() == 0
