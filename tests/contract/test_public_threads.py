"""Every public call in two threads at once: on a model each, and on one model for both."""

import copy
import itertools
import sys
from functools import partial

import pytest
import torch
from benchmarks.battery import same, state
from transformers import AutoModel, BertConfig

import secateur
from secateur.errors import SecateurError
from secateur.measuring.cost import measure_cost
from secateur.meta_training import joint_training
from secateur.meta_training.collecting import TrialConfig
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.fitting import FitConfig
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.subjects import Subject
from secateur.settings import Reading
from secateur.support.randomness import Drawn
from tests.contract.test_concurrency import in_threads
from tests.contract.test_parameters import CALLS, METHODS
from tests.support.joint import SMALL as SMALL_JOINT
from tests.support.joint import TASKS
from tests.support.meta import SMALL
from tests.support.tiny import _stirred, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")
SECTION = "At the same time"
TEXTS = tiny_texts(24)
READING = Reading(batch_size=8)
IN_USE = "in use in another thread"


def small_model(seed=0):
    """One layer, as two threads at it cost seconds."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    return _stirred(AutoModel.from_config(BertConfig(**sizes, vocab_size=99)))


def at_once(*calls):
    """Run calls in a thread each, which take turns five hundred times as often as they do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        return in_threads(*calls)
    finally:
        sys.setswitchinterval(before)


MASK = uneven_mask(secateur.find_sites(small_model()))
TEACHER = small_model(5)


def rows(by_site):
    return {site: row.tolist() for site, row in by_site.items()}


def weights(model):
    return {name: value.tolist() for name, value in model.state_dict().items()}


def gated(model):
    inputs = {"input_ids": torch.arange(4, 14).view(2, 5)}
    with torch.no_grad(), secateur.gated(model, MASK):
        return model(**inputs)[0].tolist()


def pruned(model, **options):
    small, report = secateur.prune(model, TEXTS, tokenizer=tiny_tokenizer(), reading=READING, **options)
    return weights(small), rows(report.mask)


def previewed(model):
    found = secateur.preview(model, TEXTS, ["macs=0.9"], tokenizer=tiny_tokenizer(), reading=READING)
    return [rows(one.mask) for one in found.rows]


def meta_trained(model, place):
    config = MetaTrainingConfig(**{**SMALL, "steps": 1})
    subjects = [Subject(model, tiny_tokenizer())]
    return weights(secateur.train_meta_pruner(subjects, TASKS[:1], place, config, progress=False))


def joint_trained(model, place):
    config = JointTrainingConfig(**{**SMALL_JOINT, "samples": 1})
    subjects = [Subject(model, tiny_tokenizer())]
    return weights(secateur.train_joint_pruner(subjects, TASKS[:1], place, config, progress=False))


@pytest.fixture(autouse=True)
def _little_to_fit(monkeypatch):
    """For all threads at once: one that puts back what it patched would put it back for the other too."""
    few = partial(TrialConfig, ratios=(0.5,), allocations=("uniform",), near=3, at_random=1)
    monkeypatch.setattr(joint_training, "TrialConfig", few)
    monkeypatch.setattr(joint_training, "FitConfig", partial(FitConfig, epochs=1))


SCORES = secateur.Scores({"a": [1.0, 2.0, 3.0]})
# Each is called with a model and with a place of its own, and returns all that it found.
THREADED = {
    "find_sites": lambda model, place: {name: site.units for name, site in secateur.find_sites(model).items()},
    "find_units": lambda model, place: {
        name: site.units for name, site in secateur.find_units(model, ["heads", "neurons", "layers"]).items()
    },
    "gated": lambda model, place: gated(model),
    "remove_": lambda model, place: (rows(secateur.remove_(model, MASK).mask), weights(model)),
    "score": lambda model, place: rows(
        secateur.score(model, TEXTS, "relational_taylor", tiny_tokenizer(), reading=READING)
    ),
    "prune": lambda model, place: pruned(model, restore="none"),
    "preview": lambda model, place: previewed(model),
    "reconstruct_": lambda model, place: secateur.reconstruct_(model, MASK, TEXTS, tiny_tokenizer(), reading=READING),
    "distill_": lambda model, place: secateur.distill_(
        model, copy.deepcopy(TEACHER), TEXTS, tiny_tokenizer(), steps=2, reading=READING
    ),
    "refine_mask": lambda model, place: rows(
        secateur.refine_mask(model, MASK, TEXTS, tiny_tokenizer(), steps=1, reading=READING)[0]
    ),
    "allocate": lambda model, place: rows(
        secateur.allocate(model, secateur.score(model, scorer="magnitude"), budget="macs=0.9")
    ),
    "train_meta_pruner": meta_trained,
    "train_joint_pruner": joint_trained,
    "select": lambda model, place: rows(secateur.select(SCORES, 0.5)),
    "Scores.save": lambda model, place: SCORES.save(place) or place.read_text(),
}
PURE = {"Reading", "Cut", "Scores", "Mask", "MetaPruner", "JointPruner", "Scores.load", "Mask.load", "Mask.save",
        "MetaPruner.from_authors_checkpoint"}  # fmt: skip
"""These make a new object of what they are given, and touch no model."""


def test_every_public_call_has_a_row(outcome):
    assert THREADED.keys() | PURE == CALLS.keys() | METHODS.keys()
    count = f"each of {len(THREADED)} public calls in two threads"
    outcome(SECTION, f"{count}, on a model each", "what it finds alone")
    came = "what it finds alone, or refused as in use; the model is left as by one call"
    outcome(SECTION, f"{count}, on one model", came)


def outcome_of(name, model, place):
    try:
        return THREADED[name](model, place)
    except SecateurError as error:
        return f"refused: {error}"


def left(model):
    """Return all of a model that a call may leave changed; random states are of the process."""
    passing = ("random", "identity", "the config", "the class")
    return {what: value for what, value in state(model) if not any(word in what for word in passing)}


def alike(one, other):
    return one.keys() == other.keys() and all(same(value, other[what]) for what, value in one.items())


@pytest.mark.parametrize("name", THREADED)
def test_a_call_in_two_threads(name, tmp_path):
    """On a model each they find what they find alone. On one model each does, or comes second, or is refused."""
    places = (tmp_path / str(number) for number in itertools.count())
    first, other = small_model(), small_model(1)
    alone = outcome_of(name, first, next(places))
    states = [left(first)]
    assert "refused" not in str(alone)
    second, apart = outcome_of(name, first, next(places)), outcome_of(name, other, next(places))
    states.append(left(first))
    calls = [partial(outcome_of, name, small_model(seed), next(places)) for seed in (0, 1)]
    assert at_once(*calls) == [alone, apart]
    shared = small_model()
    found = at_once(*[partial(outcome_of, name, shared, next(places)) for _ in range(2)])
    assert all(one in (alone, second) or IN_USE in str(one) for one in found)
    assert any(alike(left(shared), one) for one in states)


@pytest.mark.parametrize("network", [secateur.MetaPruner, secateur.JointPruner])
def test_the_first_weights_of_a_network_are_those_of_its_seed(network):
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        expected = weights(network())
    before = torch.get_rng_state()
    with Drawn(7):
        assert weights(network()) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_counting_leaves_the_attention_of_other_threads_as_it_is():
    model, seen = small_model(), []
    model.register_forward_hook(lambda *_: seen.extend(in_threads(torch.backends.cuda.flash_sdp_enabled)))
    measure_cost(model)
    assert set(seen) == {True}
