"""Measuring models in turn: what is counted is right; how long things take is nobody's business here."""

import json

import pytest
import torch
from torch import nn

from secateur import cli
from secateur.errors import InvalidInputError
from secateur.measuring.bench import Measured, _cut, benchmark
from secateur.measuring.cost import measure_cost
from secateur.measuring.memory import peak_bytes
from secateur.measuring.timing import quartiles, time_in_turn
from secateur.removal.remove import remove_
from secateur.settings import Shape, parse_shape
from secateur.sites.attention import find_sites
from tests.support.tiny import tiny_model, uneven_mask

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_peak_memory_is_what_tensors_hold_at_once():
    layer, inputs = nn.Linear(256, 512, bias=False), torch.randn(64, 256)
    with torch.no_grad():
        assert peak_bytes(lambda: layer(inputs), CPU) == 64 * 512 * 4

    def one_after_the_other():
        first = torch.zeros(1000)
        del first
        return torch.zeros(600), torch.zeros(300)

    assert peak_bytes(one_after_the_other, CPU) == 1000 * 4
    assert peak_bytes(lambda: (torch.zeros(600), torch.zeros(600)), CPU) == 1200 * 4
    assert peak_bytes(lambda: None, CPU) == 0
    assert peak_bytes(lambda: None, torch.device("meta")) is None


def test_things_are_run_in_turn_back_and_forth():
    seen = []
    runs = {name: lambda name=name: seen.append(name) for name in "ab"}
    seconds = time_in_turn(runs, rounds=3, min_seconds=1e-9)
    order = [name for i, name in enumerate(seen) if i == 0 or seen[i - 1] != name]
    assert order == ["a", "b", "a", "b"]  # a b, then b a, then a b: neighbours are the same
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_shapes_are_read():
    assert parse_shape("8x128") == Shape(8, 128)
    assert str(Shape(8, 128)) == "8x128"
    for text in ("8", "x128", "0x4", "8x", "8x128x2", "-1x4", "a x b"):
        with pytest.raises(InvalidInputError, match="`shape` must be BATCHxLENGTH, such as 8x128"):
            parse_shape(text)


def test_efficiency_is_the_part_of_the_limit_that_is_reached():
    row = Measured("m", Shape(8, 128), "pass", 1, [0.1, 0.4, 0.2], (1.1, 1.2, 1.3), 1.5, None)
    assert row.efficiency == pytest.approx(0.8)
    assert row.texts_per_second == pytest.approx(40)
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_a_benchmark_holds_models_against_the_first_and_leaves_them_alone():
    dense, pruned = tiny_model("bert"), tiny_model("bert")
    remove_(pruned, uneven_mask(find_sites(pruned)))
    state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    result = benchmark({"dense": dense, "pruned": pruned}, [Shape(2, 8), Shape(2, 8)], rounds=1, train=True)
    assert [(r.work, str(r.shape), r.model) for r in result.rows] == [
        (work, "2x8", model) for work in ("pass", "training step") for model in ("dense", "pruned")
    ]
    whole, less = measure_cost(dense, 2, 8).macs, measure_cost(pruned, 2, 8).macs
    for row in result.rows:
        assert row.limit == (1 if row.model == "dense" else whole / less)
    by_kind = {(row.work, row.model): row for row in result.rows}
    assert by_kind["pass", "dense"].speed_up == (1, 1, 1)
    assert by_kind["training step", "dense"].peak_bytes > by_kind["training step", "pruned"].peak_bytes
    # Gradients and the two states of AdamW of every parameter that the output depends on, and activations.
    unused = sum(p.numel() for p in dense.pooler.parameters())
    trained = 4 * (sum(p.numel() for p in dense.parameters()) - unused)
    assert by_kind["training step", "dense"].peak_bytes > 3 * trained
    assert result.weight_bytes["dense"] == 4 * measure_cost(dense).parameters
    assert all(torch.equal(tensor, state[name]) for name, tensor in pruned.state_dict().items())
    assert not pruned.training
    assert all(p.grad is None for p in pruned.parameters())


def test_shapes_are_cut_to_what_all_models_have_positions_for():
    models = {name: tiny_model(name) for name in ("bert", "roberta")}
    assert _cut(Shape(3, 600), models) == Shape(3, 510)
    assert _cut(Shape(3, 12), models) == Shape(3, 12)


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ({}, {}, "`models` must name at least one model"),
        ({"a": None}, {"shapes": []}, "`shapes` must name at least one shape"),
        ({"a": None}, {"clock": "sun"}, "`clock` must be 'wall' or 'cpu', got 'sun'"),
        ({"a": None}, {"rounds": 0}, "`rounds` must be a whole number from 1"),
    ],
)
def test_bad_arguments(models, options, message):
    with pytest.raises(InvalidInputError, match=message):
        benchmark(models, **options)


def test_command_line(tmp_path, capsys):
    folders = [str(tmp_path / "dense"), str(tmp_path / "small")]
    for folder in folders:
        model = tiny_model("bert")
        if folder.endswith("small"):
            remove_(model, uneven_mask(find_sites(model)))
        model.save_pretrained(folder)
    threads = torch.get_num_threads()
    given = ["bench", *folders, "--shape", "2x8", "--rounds", "1", "--device", "cpu"]
    assert cli.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["rows"]] == ["dense", "small"]
    assert found["rows"][1]["efficiency"] == found["rows"][1]["speed_up_quartiles"][1] / found["rows"][1]["limit"]
    assert found["machine"]["threads"] == threads
    assert cli.main([*given, "--clock", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "cpu clock" in table
    assert "efficiency" in table
    assert cli.main(["bench", folders[0], folders[0]]) == 2
    assert "name each model once" in capsys.readouterr().err
    assert cli.main(["bench", folders[0], "--shape", "8"]) == 2
    assert "`shape` must be BATCHxLENGTH" in capsys.readouterr().err
