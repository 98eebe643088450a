"""Batches that do not fit, values that are not finite, half precision, and how many threads compute."""

import pytest
import torch

from secateur import cli
from secateur.choosing.refinement import refine_mask
from secateur.errors import InvalidInputError, OutOfMemoryError, SecateurWarning
from secateur.finetuning.evaluate import evaluate_model
from secateur.removal.proof import hidden_states, largest_difference
from secateur.removal.remove import gated, remove_
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.texts.data import Task
from secateur.texts.halving import in_batches_that_fit, is_out_of_memory
from secateur.units.scores import Scores
from secateur.units.select import select
from tests.support.memory import CPU, full_above, poisoned
from tests.support.processes import command
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")
MEMORY, NUMBERS = "Out of memory", "NaN and infinity"
TEXTS = tiny_texts(8)
GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"


@pytest.mark.parametrize(
    ("scorer", "error", "text"),
    [
        *((scorer, RuntimeError, CPU) for scorer in ("contribution", "leave_one_out", "relational_taylor")),
        ("contribution", torch.OutOfMemoryError, GPU),
        ("contribution", MemoryError, ""),
    ],
)
def test_scoring_halves_the_batch_and_says_so(scorer, error, text, outcome):
    """The scores are those of the batch that fits, also where texts of a batch are compared with each other."""
    expected = score(tiny_model("bert"), TEXTS, scorer, tiny_tokenizer(), reading=Reading(batch_size=4))
    model = tiny_model("bert")
    find_sites(model)
    full_above(model, 4, error, text)
    with pytest.warns(SecateurWarning) as warned:
        found = score(model, TEXTS, scorer, tiny_tokenizer(), reading=Reading(batch_size=16))
    assert [str(w.message).removesuffix(" a batch") for w in warned] == [
        "a batch of 16 texts does not fit into memory; starting again with 8",
        "a batch of 8 texts does not fit into memory; starting again with 4",
    ]
    assert all(torch.equal(row, expected[site]) for site, row in found.items())
    outcome(MEMORY, f"a batch does not fit while `{scorer}` scores ({error.__name__})", warned[0].message)


def test_refinement_halves_the_batch(outcome):
    mask = select(score(tiny_model("bert"), scorer="magnitude"), 0.5)
    expected = refine_mask(tiny_model("bert"), mask, TEXTS, tiny_tokenizer(), steps=3, reading=Reading(batch_size=4))
    model = tiny_model("bert")
    find_sites(model)
    full_above(model, 4)
    with pytest.warns(SecateurWarning, match="starting again with 4") as warned:
        found = refine_mask(model, mask, TEXTS, tiny_tokenizer(), steps=3, reading=Reading(batch_size=8))
    assert found[1] == expected[1]
    outcome(MEMORY, "a batch does not fit during refinement", warned[0].message)


def test_evaluation_halves_the_batch(outcome):
    task = Task("task", TEXTS, [i % 3 for i in range(8)])
    expected = evaluate_model(tiny_classifier("bert"), tiny_tokenizer(), task, reading=Reading(progress=False))
    model = tiny_classifier("bert")
    sizes = full_above(model, 3)
    with pytest.warns(SecateurWarning, match="starting again with 2") as warned:
        found = evaluate_model(model, tiny_tokenizer(), task, reading=Reading(batch_size=5, progress=False))
    assert found == expected
    assert sizes == [5, 2, 2, 2, 2]
    outcome(MEMORY, "a batch does not fit during evaluation", warned[0].message)


@pytest.mark.parametrize(
    ("most", "batch_size", "message"),
    [(2, 8, "`batch_size` must be smaller than 8"), (0, 1, "one text does not fit into memory; lower `max_length`")],
)
def test_texts_that_come_only_once_are_not_begun_again(most, batch_size, message):
    model = tiny_model("bert")
    find_sites(model)
    full_above(model, most)
    with pytest.raises(OutOfMemoryError, match=message):
        score(model, iter(TEXTS), "contribution", tiny_tokenizer(), reading=Reading(batch_size=batch_size))


def test_what_cannot_be_halved_is_said(outcome):
    model = tiny_model("bert")
    find_sites(model)
    full_above(model, 0)
    with pytest.warns(SecateurWarning), pytest.raises(OutOfMemoryError, match="lower `max_length`") as caught:
        score(model, TEXTS, "contribution", tiny_tokenizer(), reading=Reading(batch_size=2))
    outcome(MEMORY, "not even one text fits", caught.value)
    batch = {"input_ids": torch.arange(4, 14).view(2, 5)}
    with pytest.raises(OutOfMemoryError, match="make smaller ones") as caught:
        score(model, scorer="contribution", inputs=[batch])
    outcome(MEMORY, "a batch of `inputs` that the caller made does not fit", caught.value)


def test_other_errors_and_other_processes_are_left_alone():
    class Accelerator:
        num_processes = 2

    def work(error, **reading):
        def fails(_):
            raise error

        in_batches_that_fit(fails, Reading(batch_size=8, **reading))

    for error in (RuntimeError("shapes do not fit"), ValueError(CPU), OutOfMemoryError("told already")):
        with pytest.raises(type(error)) as caught:
            work(error)
        assert caught.value is error
    with pytest.raises(OutOfMemoryError, match="`batch_size` must be smaller than 8"):
        work(MemoryError(), accelerator=Accelerator())
    assert not is_out_of_memory(KeyboardInterrupt())


def test_a_real_process_with_little_memory(tmp_path, outcome):
    """The maps of 128 texts of 512 tokens take 512 MiB more than once, where 600 MiB are left."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.csv").write_text("sentence\n" + ("good film " * 300 + "\n") * 128)
    words = ["score", tmp_path / "model", "--data", tmp_path / "texts.csv", "--scorer", "entropy", "--device", "cpu"]
    words += ["--batch-size", "128", "--max-length", "512", "--json"]
    done = command(words, tmp_path / "log", memory=600).wait()
    assert done.code == 0, done.err
    told = [line for line in done.err.splitlines() if line.startswith("secateur: a batch of ")]
    assert told[0] == "secateur: a batch of 128 texts does not fit into memory; starting again with 64 a batch"
    outcome(MEMORY, "a real process with 600 MiB left scores 128 texts of 512 tokens a batch", told[-1])


# --- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scorer", ["contribution", "leave_one_out", "smp", "smp-plus", "relational_taylor"])
def test_scores_that_are_not_finite_name_the_site_and_stop(scorer, value, outcome):
    model = poisoned(tiny_model("bert"), value)
    with pytest.raises(InvalidInputError, match=r"encoder\.layer\.1\.attention\.self") as caught:
        score(model, TEXTS, scorer, tiny_tokenizer())
    outcome(NUMBERS, f"the second layer computes {value}, `{scorer}`", caught.value)


def test_weights_that_are_not_finite_are_named(outcome):
    model = tiny_model("bert")
    with torch.no_grad():
        model.get_submodule("encoder.layer.1.attention.self.value").weight[0, 0] = torch.nan
    with pytest.raises(
        InvalidInputError, match=r"encoder\.layer\.1\.attention\.self\.value\.weight holds NaN"
    ) as caught:
        score(model, TEXTS, "contribution", tiny_tokenizer())
    outcome(NUMBERS, "a weight is nan", caught.value)


def test_a_mask_is_not_judged_by_values_that_are_not_finite(outcome):
    model = poisoned(tiny_model("bert"))
    mask = select(score(model, scorer="magnitude"), 0.5)
    with pytest.raises(InvalidInputError, match=r"first in encoder\.layer\.1\.attention\.self\.query") as caught:
        refine_mask(model, mask, TEXTS, tiny_tokenizer(), steps=2)
    outcome(NUMBERS, "the second layer computes nan, refinement", caught.value)


def test_no_metric_is_made_of_values_that_are_not_finite(outcome):
    task = Task("task", TEXTS, [i % 3 for i in range(8)])
    model = poisoned(tiny_classifier("bert"))
    with pytest.raises(InvalidInputError, match=r"first in bert\.encoder\.layer\.1\.attention\.self\.query") as caught:
        evaluate_model(model, tiny_tokenizer(), task, reading=Reading(progress=False))
    outcome(NUMBERS, "the second layer computes nan, evaluation", caught.value)


def test_nothing_is_proved_with_values_that_are_not_finite(outcome):
    model = tiny_model("bert")
    sites, before = find_sites(model), {name: value.clone() for name, value in model.state_dict().items()}
    poisoned(model, above=0)
    with pytest.raises(InvalidInputError, match=r"first in encoder\.layer\.1\.attention\.self\.query") as caught:
        remove_(model, uneven_mask(sites), sites=sites)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.config, "head_pruning")
    outcome(NUMBERS, "the second layer computes nan, removal", caught.value)


# --- half precision and threads

# Largest difference of removed and gated in the model's own precision, relative to the largest output where above 1:
# a few times the spacing of numbers there, 2^-11 and 2^-8.
WITHIN = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "mpnet", "gpt2"])
def test_removed_is_gated_in_every_precision(kind, dtype, outcome):
    model = tiny_model(kind).to(dtype)
    mask, inputs = uneven_mask(find_sites(model)), {"input_ids": torch.arange(4, 28).view(2, 12)}
    if kind == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    with gated(model, mask):
        preview = hidden_states(model, inputs)
    dense = hidden_states(model, inputs)
    removal = remove_(model, mask)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert removal.max_difference <= 1e-4  # the proof itself is in float32, whatever the model's own precision is
    assert largest_difference(preview, hidden_states(model, inputs)) <= WITHIN[dtype]
    assert largest_difference(preview, dense) > WITHIN[dtype]
    outcome("Numerics", f"removed and gated {kind} in {dtype}", f"equal within {WITHIN[dtype]:g}")


@pytest.mark.real
def test_threads_change_rounding_and_nothing_else(minilm, tokenizer, outcome):
    """The same number of threads gives the same bits; another one other roundings, far below what selects heads."""
    found = {}
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        scores = score(minilm, tiny_texts(8), "contribution", tokenizer)
        found.setdefault(threads, []).append(torch.stack(list(scores.values())))
    for one, again in found.values():
        assert torch.equal(one, again)
    torch.testing.assert_close(found[1][0], found[2][0], rtol=1e-5, atol=0)
    masks = [select(Scores({str(i): row for i, row in enumerate(rows)})) for rows, _ in found.values()]
    assert all(torch.equal(row, masks[1][site]) for site, row in masks[0].items())
    came = "the same bits with the same number; between 1 and 2, scores equal within 1e-5 of their size and equal masks"
    outcome("Numerics", "all-MiniLM-L6-v2 scored with 1 and 2 threads", came)


def test_the_command_says_in_one_line_that_memory_is_short(tmp_path, monkeypatch, capsys, outcome):
    from transformers import Trainer

    def full(self, **_):
        raise torch.OutOfMemoryError(GPU)

    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "task.csv").write_text("sentence,label\n" + "".join(f"{t},{i % 2}\n" for i, t in enumerate(TEXTS)))
    monkeypatch.setattr(Trainer, "train", full)
    words = ["finetune", tmp_path / "model", "--data", tmp_path / "task.csv", "--out", tmp_path / "out"]
    assert cli.main([*map(str, words), "--device", "cpu"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("secateur: error: out of memory")
    assert not (tmp_path / "out").exists()
    outcome(MEMORY, "a batch does not fit while `finetune` trains", message)
