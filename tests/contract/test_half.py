"""The path that leaves half of a model: by need, reconstructed, distilled, and judged on texts held out."""

import json

import pytest
import torch

import secateur
from secateur.cli import main
from secateur.models.state import evaluation_mode
from secateur.removal.remove import remove_
from secateur.removal.verify import verify_checkpoint
from secateur.restoring.distillation_loss import Pair, hidden_states
from secateur.restoring.quality import Quality, QualityJudge
from secateur.settings import Reading
from secateur.sites.finding import find_layers, find_units
from secateur.texts.calibration import PreparedModel
from secateur.units.masks import Mask
from tests.support.pruned import assert_equal
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer
from tests.support.units import even_mask, small_model

TEXTS = tiny_texts(60)
READING = Reading(batch_size=8, max_length=16, device="cpu")


def saved_model(folder):
    small_model("wide bert").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def judged(model, texts=TEXTS):
    prepared = PreparedModel(model, tiny_tokenizer(), READING)
    return QualityJudge(prepared, texts, READING)


def test_a_model_is_all_of_itself():
    quality = judged(tiny_model("bert"))()
    assert quality == Quality(pytest.approx(1, abs=1e-6), pytest.approx(0, abs=1e-6), 60)


def test_what_pruning_changed_shows_in_cosine_and_relations():
    model = tiny_model("bert")
    judge = judged(model)
    with evaluation_mode(model), torch.no_grad():
        batch = PreparedModel(model, tiny_tokenizer(), READING).batch(TEXTS)

        def means():
            mask = batch["attention_mask"][:, :, None]
            return (model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)

        dense = means()
        remove_(model, even_mask(find_units(model, ["heads", "neurons"])))
        wanted = torch.cosine_similarity(dense, means(), dim=1).mean()
    quality = judge()
    assert quality.cosine == pytest.approx(float(wanted), abs=1e-5)
    assert quality.cosine < 0.999
    assert quality.relational_kl > 1e-4
    assert str(quality).endswith("(60 texts held out)")


@pytest.mark.parametrize(
    ("kept", "own", "there", "numbers"),
    [
        ([0, 2], 3, 4, [0, 1, 3]),  # the middle one of three went: the last stands for both
        ([1, 2], 3, 4, [0, 2, 3]),
        ([0, 1], 3, 4, [0, 1, 3]),  # the last one went: the one before answers for it
        ([1], 2, 5, [0, 4]),
        ([1, 2, 4], 4, 7, [0, 2, 3, 6]),
    ],
)
def test_a_layer_answers_for_those_that_went_before_it(kept, own, there, numbers):
    model = tiny_model("bert")
    assert Pair(model, model, {"encoder.layer": kept})._numbers("hidden_states", own, there) == numbers


def test_a_model_without_a_layer_that_did_nothing_has_nothing_to_learn():
    """Held against the dense states after the layers that went before each that stays; with others it would differ."""
    teacher, student = tiny_model("llama"), tiny_model("llama")
    for model in (teacher, student):
        for site in find_units(model, ["heads", "neurons"]).values():
            if ".1." in site.name:
                model.get_submodule(site.output).weight.data.zero_()
    remove_(student, Mask({name: torch.tensor([True, False, True]) for name in find_layers(student)}))
    batch = PreparedModel(teacher, tiny_tokenizer(), READING).batch(TEXTS)
    assert [len(hidden_states(model, batch)["hidden_states"]) for model in (teacher, student)] == [4, 3]
    losses = [Pair(student, teacher, {"layers": kept})(**batch)["loss"].item() for kept in ([0, 2], [1, 2])]
    assert losses == [pytest.approx(0, abs=1e-8)] * 2
    student.layers[0].mlp.down_proj.weight.data.mul_(2)
    assert Pair(student, teacher, {"layers": [0, 2]})(**batch)["loss"].item() > 1e-3
    with pytest.raises(secateur.InvalidInputError, match="got 4 hidden states where the pruned model has 3, and which"):
        Pair(student, teacher, {})(**batch)


def test_half_of_a_model_in_one_call(tmp_path):
    whole = saved_model(tmp_path / "whole")
    smaller, report = secateur.prune(whole, TEXTS, budget="macs=0.6", steps=3, reading=READING)
    assert (report.allocation, report.steps, report.quality.num_texts) == ("sensitivity", 3, 6)
    assert len(report.distillation) == len(report.reconstruction) == 2
    assert report.budget[0].reached <= 0.6
    assert report.units.keys() == {"heads", "neurons"}
    assert report.quality.cosine > 0
    assert report.num_texts == 54
    smaller.save_pretrained(tmp_path / "small")
    assert_equal(smaller, type(smaller).from_pretrained(tmp_path / "small"))
    found = verify_checkpoint(tmp_path / "small", whole)
    assert found["verdict"] == ("trained" if report.distillation[1] < report.distillation[0] else "equal")


def test_layers_may_go_by_need_and_the_rest_learns():
    model = small_model("wide bert")
    smaller, report = secateur.prune(
        model,
        TEXTS,
        budget="macs=0.7",
        cut=secateur.Cut(units=["layers"]),
        steps=2,
        tokenizer=tiny_tokenizer(),
        reading=READING,
    )
    assert report.budget[0].reached <= 0.7
    assert len(report.distillation) == 2
    assert report.units == {"layers": (3, len(smaller.encoder.layer))}


def test_the_command_takes_the_same(tmp_path, capsys):
    whole = saved_model(tmp_path / "whole")
    (tmp_path / "texts.csv").write_text("sentence\n" + "".join(f"{text}\n" for text in TEXTS))
    words = ["prune", whole, "--data", tmp_path / "texts.csv", "--device", "cpu", "--max-length", 16, "--steps", 2]
    words = [*words, "--ratio", 0.4, "--units", "heads,neurons", "--allocation", "sensitivity", "--restore", "distill"]
    assert main([*map(str, words), "--out", str(tmp_path / "small")]) == 0
    out = capsys.readouterr().out
    assert "relational KL on texts held out" in out
    assert "quality: mean cosine to the dense model " in out
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert (report["allocation"], report["steps"]) == ("sensitivity", 2)
    assert report["quality"]["num_texts"] == 6
    assert [outcome["asked"] for outcome in report["budget"]] == ["heads=0.6", "neurons=0.6"]
    assert "quality" in (tmp_path / "small" / "report.html").read_text()


def test_a_command_that_teaches_reads_more_texts_than_it_scores_elsewhere(tmp_path):
    (tmp_path / "texts.csv").write_text("\n".join(["sentence", *tiny_texts(400)]))
    data = ["--data", tmp_path / "texts.csv", "--no-maps", "--max-length", 8, "--scorer", "contribution"]
    model = saved_model(tmp_path / "model")
    scored = {}
    for name, words in {
        "taught": ["--budget", "macs=0.8", "--steps", 1],
        "asked for": ["--ratio", 0.5, "--restore", "distill", "--steps", 1],
        "not taught": ["--budget", "macs=0.8", "--restore", "none"],
    }.items():
        command = ["prune", model, *data, *words, "--out", tmp_path / name]
        assert main([*map(str, command)]) == 0
        scored[name] = json.loads((tmp_path / name / "pruning_report.json").read_text())["num_texts"]
    assert scored == {"taught": 360, "asked for": 360, "not taught": 256}
