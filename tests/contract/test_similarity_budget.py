"""`similarity=0.98`: the smallest model that stays as near to the dense one as was asked for."""

import json

import pytest
import torch

import secateur
from secateur.choosing.allocation import SensitivitySelection
from secateur.cli import main
from secateur.errors import InvalidInputError
from secateur.restoring import keeping
from secateur.restoring.keeping import smallest_keeping
from secateur.restoring.quality import QualityJudge
from secateur.settings import Budget, Cut, Reading
from secateur.sites.finding import find_units
from secateur.texts.calibration import PreparedModel
from tests.support.tiny import tiny_texts, tiny_tokenizer
from tests.support.units import even_mask, small_model

TEXTS = tiny_texts(30)
READING = Reading(batch_size=8, max_length=16, device="cpu")


def selection_of(model):
    prepared = PreparedModel(model, tiny_tokenizer(), READING)
    return SensitivitySelection(prepared, Cut(0, "sensitivity", budget="macs=1"), TEXTS, READING)


@pytest.fixture(scope="module")
def made_up():
    """A selection whose mask is its share, of which less than a fifth is out of reach, and the shares that it tries."""
    selection = selection_of(small_model("wide bert"))
    tries = []

    class MadeUp(SensitivitySelection):
        def measure(self, scores):
            return {}

        def choose(self, scores, measured):
            tries.append(self.joint.limit)
            if self.joint.limit < 0.2:
                raise InvalidInputError("out of reach")
            return self.joint.limit, 0.0

    selection.__class__ = MadeUp
    return selection, tries


@pytest.mark.parametrize(("asked", "share"), [(0.3, 0.2), (0.505, 0.21), (0.795, 0.5), (0.99, 0.97)])
def test_the_smallest_share_that_keeps_it_is_found_in_seven_tries(asked, share, made_up, monkeypatch):
    monkeypatch.setattr(keeping, "_cosine", lambda selection, mask, *others: min(0.3 + mask, 0.7 + 0.3 * mask))
    selection, tries = made_up
    tries.clear()
    budget, mask, cosine = smallest_keeping(selection, {}, None, Budget("similarity", asked), True)
    assert (budget, mask) == (Budget("macs", share), share)
    assert cosine >= asked
    assert len(tries) <= 7


def test_what_cannot_be_kept_says_what_can(made_up, monkeypatch):
    monkeypatch.setattr(keeping, "_cosine", lambda selection, mask, *others: 0.9 * mask)
    with pytest.raises(InvalidInputError, match=r"`budget` must be at most similarity=0\.891, which this model keeps"):
        smallest_keeping(made_up[0], {}, None, Budget("similarity", 0.9), True)


def test_a_try_is_judged_refitted_and_leaves_the_model_as_it_was():
    model = small_model("wide bert")
    selection = selection_of(model)
    judge = QualityJudge(selection.prepared, TEXTS[:4], READING)
    mask = even_mask(find_units(model, ["heads", "neurons"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refitted, plain = (keeping._cosine(selection, mask, judge, reconstructs) for reconstructs in (True, False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert plain < refitted < 0.9999
    secateur.reconstruct_(model, mask, TEXTS, tiny_tokenizer(), reading=READING)
    with secateur.gated(model, mask):
        assert judge().cosine == pytest.approx(refitted, abs=1e-5)


@pytest.mark.parametrize(
    ("texts", "given", "message"),
    [
        (TEXTS[:29], {}, "`texts` must be at least 30 with a budget of similarity"),
        (TEXTS, {"cut": Cut(allocation="uniform")}, "`allocation` must be 'sensitivity' with a budget of similarity"),
        (TEXTS, {"budget": "similarity=0.9,heads=0.5"}, "`budget` must name nothing else beside similarity"),
    ],
)
def test_what_does_not_go_together_is_refused(texts, given, message):
    with pytest.raises(InvalidInputError, match=message):
        secateur.prune(small_model("wide bert"), texts, **{"budget": "similarity=0.9", **given})


def test_nothing_but_prune_takes_it():
    scores = secateur.Scores({"encoder.layer.0.attention.self": [1.0, 2, 3, 4]})
    with pytest.raises(
        InvalidInputError, match="`budget` must be about what is left; `prune` alone keeps a similarity"
    ):
        secateur.allocate(small_model("wide bert"), scores, budget="similarity=0.9")


def test_the_report_says_what_was_asked_and_reached(tmp_path, capsys):
    small_model("wide bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.csv").write_text("\n".join(["sentence", *TEXTS]))
    words = ["prune", tmp_path / "model", "--data", tmp_path / "texts.csv", "--max-length", 16, "--no-maps"]
    words += ["--budget", "similarity=0.9", "--scorer", "random", "--steps", 1, "--out", tmp_path / "small"]
    assert main([*map(str, words)]) == 0
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    similarity, macs = report["budget"]
    assert similarity["asked"] == "similarity=0.9"
    assert similarity["expected"] >= 0.9
    assert similarity["reached"] == report["quality"]["cosine"]
    asked = float(macs["asked"].removeprefix("macs=").removesuffix("@1x128"))
    assert macs["reached"] <= asked < 1
    assert report["steps"] == 1
    assert f"mean cosine {similarity['reached']:.4f} (budget similarity=0.9), macs 0." in capsys.readouterr().out
    assert "similarity=0.9" in (tmp_path / "small" / "report.html").read_text()
