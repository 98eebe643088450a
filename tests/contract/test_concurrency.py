"""One model in two threads, two models in two threads, contexts inside contexts, torch's own around ours."""

import threading

import pytest
import torch
from transformers import BertModel
from transformers.utils import logging

from secateur.errors import RemovalError, SecateurError, UnsupportedModelError
from secateur.models.loading import quiet_transformers
from secateur.models.state import in_float32
from secateur.pruning import prune
from secateur.removal.remove import gated, remove_
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_layers
from secateur.sites.gating import probe
from secateur.units.masks import Mask
from tests.support.tiny import CONFIGS, tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")
SECTION = "At the same time"
TEXTS = tiny_texts(12)
SITE = "encoder.layer.0.attention.self"


def inputs():
    return {"input_ids": torch.arange(4, 14).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}


def scores_of(model, scorer="contribution", **options):
    found = score(model, TEXTS, scorer, tiny_tokenizer(), reading=Reading(batch_size=4), **options)
    return {site: row.tolist() for site, row in found.items()}


def in_threads(*calls):
    """Run the calls in a thread each, all of which start at once; return results and exceptions."""
    ready, found = threading.Barrier(len(calls)), [None] * len(calls)

    def go(number, call):
        ready.wait()
        try:
            found[number] = call()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=go, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def settings_of(model):
    """What a measurement switches, and must put back."""
    configs = {id(m.config): m.config._attn_implementation_internal for m in model.modules() if hasattr(m, "config")}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return configs, hooks, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def test_two_models_in_two_threads(outcome):
    """Of a kind that computes attention itself; the calls in `test_public_threads.py` are of one that does not."""
    kind = "mpnet"
    models = [tiny_model(kind, seed) for seed in (0, 1)]
    alone = [scores_of(model, scorer) for model in models for scorer in ("contribution", "relational_taylor")]
    fresh = [tiny_model(kind, seed) for seed in (0, 1)]

    def both(model):
        return [scores_of(model, scorer) for scorer in ("contribution", "relational_taylor")]

    found = in_threads(lambda: both(fresh[0]), lambda: both(fresh[1]))
    assert found[0] + found[1] == alone
    outcome(SECTION, f"two {kind} models scored in two threads", "the scores of one after the other")


def test_one_model_in_two_threads_is_refused_and_left_as_it_was(outcome):
    model = tiny_model("bert").train()
    before, entered, go = settings_of(model), threading.Event(), threading.Event()
    expected = scores_of(model)

    def slow(reading):
        entered.set()
        assert go.wait(60)

    def hold():
        with torch.no_grad(), probe(model, slow):
            model(**inputs())

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(60)
    refused = [
        lambda: scores_of(model),
        lambda: find_sites(model),
        lambda: probe(model).__enter__(),
        lambda: remove_(model, uneven_mask(find_sites(model))),
    ]
    for call in refused:
        with pytest.raises(SecateurError, match="in use in another thread") as caught:
            call()
    go.set()
    thread.join()
    assert settings_of(model) == before
    assert scores_of(model) == expected
    outcome(SECTION, "one model in two threads", caught.value)


@pytest.mark.parametrize("kind", ["bert", "mpnet", "gpt2"])
def test_passes_of_another_thread_are_those_of_the_model_while_it_is_measured(kind):
    """Hooks, gates and names of attention functions are for the thread that measures, also halfway through a pass."""
    model, beside = tiny_model(kind), inputs()
    run = torch.no_grad()(lambda: model(**beside)[0])
    dense, alone, found, started, go_on = run(), scores_of(model, "entropy"), [], threading.Event(), threading.Event()
    mask = uneven_mask(find_sites(model))

    def wait_halfway(*_):
        if threading.current_thread() is not threading.main_thread() and not go_on.is_set():
            started.set()
            assert go_on.wait(60)

    halfway = model.get_submodule(next(iter(mask)).rpartition(".")[0]).register_forward_pre_hook(wait_halfway)
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    assert started.wait(60)  # its masks are made
    with gated(model, mask), probe(model, lambda reading: None, weights=True):
        go_on.set()
        thread.join()
        found += in_threads(run)
        assert not torch.equal(run(), dense)
    halfway.remove()
    thread = threading.Thread(target=lambda: found.extend(run() for _ in range(40)))
    thread.start()
    assert [scores_of(model, "entropy") for _ in range(2)] == [alone] * 2
    find_layers(model)
    thread.join()
    assert len(found) == 42
    for one in found:
        torch.testing.assert_close(one, dense)


def test_a_pass_of_another_thread_is_refused_while_weights_change():
    model = tiny_model("bert").to(torch.bfloat16)
    with in_float32(model):
        (refused,) = in_threads(lambda: model(**inputs()))
        model(**inputs())
    assert isinstance(refused, SecateurError)
    assert in_threads(lambda: model(**inputs())[0].dtype) == [torch.bfloat16]


def test_loading_in_threads_leaves_what_transformers_logs():
    """The first to come may not be the last to go."""
    before, entered, go = logging.get_verbosity(), threading.Event(), threading.Event()

    def first():
        with quiet_transformers(progress=False):
            entered.set()
            assert go.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(60)
    with quiet_transformers(progress=False):
        go.set()
        thread.join()
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (before, True)


def test_two_models_of_one_config_object_in_two_threads(outcome):
    """Both consult the object that a probe writes to."""
    config = CONFIGS["bert"]()
    one, other = BertModel(config).eval(), BertModel(config).eval()
    with probe(one):
        (found,) = in_threads(lambda: scores_of(other))
        assert isinstance(found, SecateurError)
        scores_of(other)  # in the same thread
    assert config._attn_implementation_internal == settings_of(one)[0].popitem()[1] == "sdpa"
    outcome(SECTION, "two models that share one config object in two threads", found)


@pytest.mark.parametrize("in_another_thread", [True, False])
def test_a_pass_of_a_pruned_t5_is_not_mixed_up_with_one_that_runs_meanwhile(in_another_thread):
    """A narrowed module returns the bias of all heads, which it keeps aside while its own code runs."""
    model = tiny_model("t5")
    remove_(model, uneven_mask(find_sites(model)))
    encoder, ids, other = model.encoder, inputs()["input_ids"], torch.arange(4, 12).view(1, 8)

    @torch.no_grad()
    def run(ids):
        return encoder(input_ids=ids).last_hidden_state

    expected, interrupted = (run(ids), run(other)), []

    def interrupt(*_):
        if not interrupted:
            interrupted.append(None)
            interrupted[:] = in_threads(lambda: run(other)) if in_another_thread else [run(other)]

    encoder.block[0].layer[0].SelfAttention.o.register_forward_hook(interrupt)
    assert torch.equal(run(ids), expected[0])
    assert torch.equal(interrupted[0], expected[1])


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("scorer", ["contribution", "relational_taylor"])
def test_scoring_inside_torchs_contexts(kind, context, scorer, outcome):
    expected = scores_of(tiny_model(kind), scorer)
    model = tiny_model(kind)
    with context():
        found = scores_of(model, scorer)
        with gated(model, uneven_mask(find_sites(model))):
            model(**inputs())
    assert found == expected
    outcome(SECTION, f"`{scorer}` on {kind} within `torch.{context.__name__}`", "the scores without it")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_model_pruned_inside_torchs_contexts_can_be_trained(context, outcome):
    model = tiny_classifier("bert")
    with context():
        smaller, report = prune(model, TEXTS, 0.5, tokenizer=tiny_tokenizer())
    assert report.after.heads == 6
    smaller.train()
    smaller(**inputs(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and not p.is_inference() for p in smaller.parameters())
    outcome(SECTION, f"`prune` within `torch.{context.__name__}`", "a model that can be trained")


def test_a_model_made_within_inference_mode_is_refused(outcome):
    with torch.inference_mode():
        model = tiny_model("bert")
    with pytest.raises(UnsupportedModelError, match="load it outside of it") as caught:
        scores_of(model)
    outcome(SECTION, "a model that was loaded within `torch.inference_mode`", caught.value)


def test_gates_within_gates_multiply(outcome):
    model = tiny_model("bert")
    masks = [Mask({SITE: torch.tensor(row)}) for row in ([True, False, True, True], [True, True, False, True])]
    both = Mask({SITE: torch.tensor([True, False, False, True])})
    with torch.no_grad():
        with gated(model, both):
            expected = model(**inputs())[0]
        with gated(model, masks[0]), gated(model, masks[1]):
            found = model(**inputs())[0]
        dense = model(**inputs())[0]
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, dense)
    outcome(SECTION, "gates within gates", "a head is closed that either closes")


def test_scores_within_gates_are_those_of_the_gated_model(outcome):
    model, mask = tiny_model("bert"), Mask({SITE: torch.tensor([True, False, True, True])})
    dense = scores_of(model)
    with gated(model, mask):
        found = scores_of(model)
    smaller = tiny_model("bert")
    remove_(smaller, mask)
    removed = scores_of(smaller)
    # Nothing lies before the first site; a head that is closed contributes nothing.
    assert found[SITE] == [value * (head != 1) for head, value in enumerate(dense[SITE])]
    last = "encoder.layer.2.attention.self"
    assert found[last] == pytest.approx(removed[last], rel=1e-4)
    assert found[last] != pytest.approx(dense[last], rel=1e-5)
    outcome(SECTION, "scoring within gates", "the scores of the gated model")


def test_removal_within_gates_is_refused(outcome):
    model, mask = tiny_model("bert"), Mask({SITE: torch.tensor([True, False, True, True])})
    before = settings_of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with gated(model, mask), pytest.raises(RemovalError, match="outside of that context") as caught:
        remove_(model, mask)
    assert settings_of(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    outcome(SECTION, "removal within gates of the same model", caught.value)


def test_contexts_that_end_in_another_order_are_refused(outcome):
    model = tiny_model("bert")
    before = settings_of(model)
    first, second = probe(model), probe(model)
    first.__enter__()
    second.__enter__()
    with pytest.raises(SecateurError, match="reverse order") as caught:
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert settings_of(model) == before
    outcome(SECTION, "gates of one model that end in another order than the reverse", caught.value)
