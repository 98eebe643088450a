"""What runs on a GPU: scores, gates, removal, proof, refinement and the commands, beside the CPU's results."""

import copy
import json

import pytest
import torch
from accelerate import dispatch_model

import secateur
from secateur import cli
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.joint_training import train_joint_pruner
from secateur.meta_training.subjects import Subject
from secateur.models.inputs import example_inputs
from secateur.models.offload import is_offloaded
from secateur.scorers import SCORERS
from secateur.settings import Cut, Reading
from secateur.sites.attention import find_sites
from tests.support.joint import SMALL, TASKS
from tests.support.scoring import LABELS, condition, inputs_of, model_for, options
from tests.support.tiny import CONFIGS, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.usefixtures("one_thread"),
]  # fmt: skip

# Their draws, of noise, of gates and of dropout, come from the device's generator.
OWN_DRAWS = {"l0", "dsp", "fisher", "taylor"}


def on_gpu(batch):
    return {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def left(model):
    """All of a model that could be left changed, its tensors brought back to the CPU, and the GPU's generator."""
    return *condition(copy.deepcopy(model).cpu()), torch.cuda.get_rng_state().tolist()


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("kind", ["bert", "llama", "bart"])
def test_scores_are_those_of_the_cpu_and_the_model_is_left_alone(name, kind, monkeypatch):
    # The random weights of `smp` here tell maps apart by millionths, below what convolutions in TF32 round to.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    chosen = options(name)
    model = model_for(name, kind)
    expected = secateur.score(model, scorer=name, inputs=inputs_of(model), labels=LABELS, **chosen)
    model = model_for(name, kind).to("cuda")
    before = left(model)
    given = [on_gpu(batch) for batch in inputs_of(model_for(name, kind))]
    found = secateur.score(model, scorer=name, inputs=given, labels=LABELS, **chosen)
    assert left(model) == before
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())
    assert {site: scores.device.type for site, scores in found.items()} == dict.fromkeys(expected, "cpu")
    one, other = (torch.cat(list(scores.values())).double() for scores in (expected, found))
    if name in OWN_DRAWS:
        assert torch.isfinite(other).all()
    else:
        assert float(torch.corrcoef(torch.stack([one, other]))[0, 1]) > 0.999


@pytest.mark.parametrize("kind", CONFIGS)
def test_gates_and_removal_agree(kind):
    model = tiny_model(kind).to("cuda")
    sites = find_sites(model)
    assert sites == find_sites(tiny_model(kind))
    mask, batch = uneven_mask(sites), on_gpu(example_inputs(tiny_model(kind)))
    with torch.no_grad():
        with secateur.gated(model, mask):
            preview = model(**batch)[0]
        secateur.remove_(model, mask)
        torch.testing.assert_close(model(**batch)[0], preview, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {}),
        ({"cut": Cut(refine=4)}, {}),
        ({"restore": "reconstruct"}, {}),
        ({}, {"bf16": True}),
        ({}, {"stop": "auto"}),
        ({"cut": Cut(allocation="ranking")}, {}),
    ],
)
def test_a_model_is_pruned_and_proved_where_it_lies(options, settings):
    model, texts = tiny_model("bert").to("cuda"), tiny_texts(24)
    before = left(model)
    smaller, report = secateur.prune(
        model, texts, 0.5, tokenizer=tiny_tokenizer(), reading=Reading(max_length=16, **settings), **options
    )
    assert left(model) == before
    assert report.max_difference <= report.tolerance
    assert smaller.device.type == "cuda"


def test_refinement_finds_what_it_finds_on_the_cpu():
    texts, found = tiny_texts(16), []
    for device in ("cpu", "cuda"):
        model = tiny_model("bert").to(device)
        mask = uneven_mask(find_sites(model))
        found.append(
            secateur.refine_mask(model, mask, texts, tiny_tokenizer(), steps=6, reading=Reading(max_length=16))
        )
    (one, losses), (other, on_the_gpu) = found
    assert one.to_json() == other.to_json()
    assert on_the_gpu == pytest.approx(losses, rel=1e-3)


def test_reconstruction_finds_what_it_finds_on_the_cpu():
    texts, found = tiny_texts(64), []
    for device in ("cpu", "cuda"):
        model = tiny_model("bert").to(device)
        mask = uneven_mask(find_sites(model))
        found.append(secateur.reconstruct_(model, mask, texts, tiny_tokenizer(), reading=Reading(max_length=16)))
    assert found[1] == pytest.approx(found[0], rel=1e-2)
    assert found[0][1] < found[0][0]


def test_distillation_comes_as_near_as_on_the_cpu():
    texts, found = tiny_texts(64), []
    for device in ("cpu", "cuda"):
        teacher, student = tiny_model("bert"), tiny_model("bert").to(device)
        secateur.remove_(student, uneven_mask(find_sites(student)))
        found.append(
            secateur.distill_(
                student, teacher, texts, tiny_tokenizer(), steps=20, learning_rate=2e-3, reading=Reading(max_length=16)
            )
        )
        assert (student.device.type, teacher.device.type) == (device, "cpu")
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert found[0][1] < found[0][0]


def test_a_model_spread_over_gpu_and_memory_gives_the_scores_of_a_whole_one():
    places = {"embeddings": 0, "encoder.layer.0": "cpu", "encoder.layer.1": 0, "encoder.layer.2": "cpu", "pooler": 0}
    whole, model = tiny_model("bert").to("cuda"), dispatch_model(tiny_model("bert"), places)
    assert is_offloaded(model)
    texts, tokenizer = tiny_texts(9), tiny_tokenizer()
    for scorer in ("contribution", "smp", "smp-plus", "entropy", "magnitude"):
        expected = secateur.score(whole, texts, scorer, tokenizer, reading=Reading(batch_size=4))
        found = secateur.score(model, texts, scorer, tokenizer, reading=Reading(batch_size=4))
        for site in expected:
            torch.testing.assert_close(found[site], expected[site], rtol=1e-4, atol=1e-5)
    mask, batch = uneven_mask(find_sites(whole)), on_gpu(example_inputs(tiny_model("bert")))
    with secateur.gated(model, mask), secateur.gated(whole, mask), torch.no_grad():
        torch.testing.assert_close(model(**batch)[0], whole(**batch)[0], rtol=1e-4, atol=1e-4)


def test_a_joint_pruner_is_taught(tmp_path):
    model = tiny_model("bert").to("cuda")
    subject = Subject(model, tiny_tokenizer())  # freezes it
    before = left(model)
    pruner = train_joint_pruner([subject], TASKS, tmp_path / "run", JointTrainingConfig(**SMALL))
    assert left(model) == before
    scores = secateur.score(model, tiny_texts(9), "smp-plus", tiny_tokenizer(), pruner=pruner)
    assert all(torch.isfinite(values).all() for values in scores.values())


def test_the_commands_find_the_gpu(tmp_path, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    task = tmp_path / "words"
    task.mkdir()
    for split, count, seed in (("train", 48, 0), ("dev", 40, 1)):
        lines = [f"{text}\t{number % 2}" for number, text in enumerate(tiny_texts(count, seed))]
        (task / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    model, data, small, tuned = (str(tmp_path / name) for name in ("model", "words", "small", "tuned"))
    short = ["--max-length", "16"]
    runs = [
        ["info", model],
        ["score", model, "--data", data, "--stop", "auto", *short, "--out", str(tmp_path / "scores.json")],
        ["score", model, "--data", data, "--device", "auto", *short],
        ["prune", model, "--data", data, *short, "--out", small],
        ["verify", small],
        ["finetune", small, "--data", data, "--bf16", "--epochs", "1", *short, "--out", tuned],
        ["evaluate", tuned, "--data", data, *short],
        ["bench", model, small, "--shape", "2x16", "--rounds", "2", "--train", "--json"],
        ["compare", "--model", model, "--data", data, "--scorer", "contribution", "--scorer", "taylor", "--seeds", "1",
         "--epochs", "1", "--jobs", "2", "--out", str(tmp_path / "compared")],
        ["meta-train", "--model", model, "--data", data, "--steps", "2", "--batch-size", "4", "--batches-per-step", "2",
         *short, "--out", str(tmp_path / "meta")],
        ["joint-train", "--model", model, "--data", data, "--samples", "1", "--texts", "8", "--judges", "2",
         "--batch-size", "4", *short, "--out", str(tmp_path / "joint")],
    ]  # fmt: skip
    printed = {}
    for words in runs:
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
        printed[words[0]] = capsys.readouterr().out
    measured = json.loads(printed["bench"])
    assert measured["machine"]["device"] == torch.cuda.get_device_name()
    assert all(row["peak_bytes"] > 0 for row in measured["rows"])
    rows = [json.loads(line) for line in (tmp_path / "compared" / "runs.jsonl").read_text().splitlines()]
    assert {row["environment"]["device"] for row in rows} == {torch.cuda.get_device_name()}
