"""Teaching a joint pruner a model: what is collected, what a run survives, and what comes of it."""

import json
import statistics
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from transformers import AutoModel, BertConfig

import secateur
from secateur import cli
from secateur.choosing.mask_loss import MaskLoss
from secateur.errors import CheckpointError, InvalidInputError, UnsupportedModelError
from secateur.meta_training import joint_samples, joint_training
from secateur.meta_training.collecting import TrialConfig, collect
from secateur.meta_training.fitting import FitConfig, trial_loss
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.joint_held_out import held_out_losses
from secateur.meta_training.joint_samples import CountedMaskLoss
from secateur.meta_training.joint_training import train_joint_pruner
from secateur.meta_training.sample import Sample
from secateur.meta_training.subjects import Subject
from secateur.pruners.evidence import contribution_scores
from secateur.pruners.joint_network import JointPruner
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.texts.data import Task
from tests.support.joint import SMALL, TASKS
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

NEAR = 3


def train(out, kind="bert", tasks=TASKS, resume=False, progress=False, subject=None, **settings):
    subject = subject or Subject(tiny_model(kind), tiny_tokenizer())
    config = JointTrainingConfig(**{**SMALL, **settings})
    return train_joint_pruner([subject], tasks, out, config, resume=resume, progress=progress)


def samples(out):
    return {path.name: Sample.load(path) for path in sorted((out / "samples").iterdir())}


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.fixture(scope="module", autouse=True)
def small_runs():
    """A few masks near each choice, and a short fit, so that a run takes seconds."""
    fewer, shorter = partial(TrialConfig, near=NEAR), partial(FitConfig, epochs=40)
    with mock.patch.multiple(joint_training, TrialConfig=fewer, FitConfig=shorter):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run: its folder and its pruner."""
    out = tmp_path_factory.mktemp("joint") / "run"
    return out, train(out)


def test_every_task_has_its_samples_and_later_ones_lie_near_what_a_fit_on_earlier_ones_chooses(whole):
    out, pruner = whole
    found = samples(out)
    assert list(found) == ["0-0-0.safetensors", "0-0-1.safetensors", "0-1-0.safetensors", "0-1-1.safetensors"]
    assert [sample.task for sample in found.values()] == ["singles", "singles", "pairs", "pairs"]
    # Each of 6 groups has 5 masks at random, some near a choice, and each choice twice: of one ranking, later of three.
    assert [len(sample.masks) for sample in found.values()] == [6 * (5 + NEAR + 2), 6 * (5 + NEAR + 6)] * 2
    first = joint_training._fitted(
        [found["0-0-0.safetensors"], found["0-1-0.safetensors"]], JointTrainingConfig(**SMALL)
    )
    second = found["0-1-1.safetensors"]
    with torch.no_grad():
        scores = first(second.evidence)
    own = secateur.select(secateur.Scores(second.evidence.split(scores.double())), 0.5, "ranking")
    by_whole_model = second.masks[second.trial_sets == 5]  # sites 1 to 3, whole model 4 to 6: a quarter, half, three
    assert by_whole_model[1].tolist() == torch.cat(list(own.values())).tolist()
    assert same(JointPruner.from_pretrained(str(out / "pruner")), pruner)


def test_it_explains_the_trials_better_than_the_contribution_does(whole):
    out, pruner = whole
    found = list(samples(out).values())
    with torch.no_grad():
        fitted = statistics.mean(float(trial_loss(pruner(sample.evidence), sample)) for sample in found)
        plain = statistics.mean(float(trial_loss(contribution_scores(sample.evidence), sample)) for sample in found)
    assert fitted < 0.9 * plain, (fitted, plain)


def test_a_stopped_run_goes_on_to_the_identical_end(whole, tmp_path, monkeypatch):
    calls = []

    def stops(*positional, **named):
        calls.append(named)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return collect(*positional, **named)

    with monkeypatch.context() as patch:
        patch.setattr(joint_samples, "collect", stops)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run")
    assert len(samples(tmp_path / "run")) == 2
    assert same(train(tmp_path / "run", resume=True), whole[1])


@pytest.mark.parametrize("config", [TrialConfig(search=4), TrialConfig(near=3, at_random=2)])
def test_as_many_masks_are_evaluated_as_it_says(config):
    model = tiny_model("bert")
    subject, calls = Subject(model, tiny_tokenizer()), mock.Mock()
    evaluators = [CountedMaskLoss(model, subject.batches(tiny_texts(4, seed=n), 4, 16), False, calls) for n in range(3)]
    batches = subject.batches(tiny_texts(8), 4, 16)
    for pruner in (None, JointPruner().eval()):
        calls.reset_mock()
        collect(
            model, find_sites(model), batches, evaluators, False,
            subject="tiny", task="words", config=config, seed=0, pruner=pruner,
        )  # fmt: skip
        assert calls.update.call_count == config.passes(len(evaluators), pruner is not None)


def test_a_task_with_few_texts_has_fewer_evaluation_batches(tmp_path, monkeypatch, capsys):
    numbers = []

    def counted(model, sites, batches, evaluators, *rest, **named):
        numbers.append(len(evaluators))
        return collect(model, sites, batches, evaluators, *rest, **named)

    monkeypatch.setattr(joint_samples, "collect", counted)
    few = [Task(str(count), tiny_texts(count)) for count in (12, 15, 16, 200)]
    train(tmp_path / "run", tasks=few, samples=1)
    assert numbers == [1, 1, 2, 3]  # whole batches of 4 beyond the 8 that are scored, 3 at most
    passes = TrialConfig(near=NEAR).passes(1, False)
    train(tmp_path / "bar", tasks=few[:1], samples=1, progress=True)
    assert f"{passes}/{passes}" in capsys.readouterr().err
    with pytest.raises(
        InvalidInputError, match=r"task few has 11 texts, fewer than the 12 that a sample takes: `num_texts` \(8\)"
    ):
        train(tmp_path / "few", tasks=[Task("few", tiny_texts(11))])
    assert not (tmp_path / "few").exists()


def test_what_searches_find_is_learned_and_remembered(tmp_path):
    subjects = [Subject(tiny_model(kind, seed), tiny_tokenizer()) for kind, seed in (("bert", 0), ("llama", 0))]
    out = tmp_path / "run"
    config = JointTrainingConfig(**SMALL, samples=1, search=2)
    pruner = train_joint_pruner(subjects, TASKS, out, config, progress=False)
    assert (pruner.prior, pruner.matching) == (0.0, 1.3)
    found = samples(out)
    for number, known in enumerate(pruner.known):
        own = [found[f"{number}-{task}-0.safetensors"] for task in range(2)]
        assert known.pairs.tolist() == [False, True]
        for sample, kept in zip(own, known.kept, strict=True):
            assert torch.equal(sample.evidence.fingerprints, known.fingerprints)
            assert len(known.fingerprints) == sum(subjects[number].heads.values())
            assert torch.equal(kept, sample.found[~sample.by_site].float().mean(dim=0))
            torch.testing.assert_close(pruner.recall(sample.evidence), kept)
    assert same(JointPruner.from_pretrained(str(out / "pruner")), pruner)
    with pytest.raises(CheckpointError, match="was made with search = 2, not 0"):
        train_joint_pruner(subjects, TASKS, out, replace(config, search=0), resume=True, progress=False)
    again = train_joint_pruner(subjects, TASKS, out, config, resume=True, progress=False)
    assert same(again, pruner)


def test_runs_of_versions_without_a_search_go_on_and_may_ask_for_more(whole, tmp_path):
    """Such a run becomes the one that asked for all samples at once."""
    train(tmp_path / "run", samples=1)
    settings = tmp_path / "run" / "settings.json"
    old = json.loads(settings.read_text())
    assert old.pop("search") == 0
    settings.write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match="was made with search = 0, not 3"):
        train(tmp_path / "run", resume=True, search=3)
    assert same(train(tmp_path / "run", resume=True), whole[1])


@pytest.mark.parametrize("kind", ["llama", "albert", "bart"])
def test_other_kinds_are_learned_on_and_left_as_they_were(kind, tmp_path):
    model = tiny_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subject = Subject(model, tiny_tokenizer())
    config = JointTrainingConfig(**SMALL, samples=1, bf16=True)
    pruner = train_joint_pruner([subject], TASKS[1:], tmp_path / "run", config, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    scores = score(model, TASKS[1].texts, "smp-plus", tiny_tokenizer(), pruner=pruner, reading=Reading(max_length=16))
    assert all(bool(row.isfinite().all()) for row in scores.values())


def test_the_held_out_losses_are_those_of_the_masks_that_the_scorers_choose(whole):
    model, pruner = tiny_model("bert"), whole[1]
    subject, task = Subject(model, tiny_tokenizer()), Task("dev", tiny_texts(14, seed=9, pairs=True))
    found = held_out_losses(subject, task, pruner, JointTrainingConfig(**SMALL))
    assert list(found) == ["uniform", "ranking"]
    texts = task.head(14, seed=0).texts
    loss = MaskLoss(model, subject.batches(texts[7:], 4, 16), True)
    for name, scorer, options in (
        ("contribution", "contribution", {}),
        ("joint_pruner", "smp-plus", {"pruner": pruner}),
    ):
        scores = score(
            model, texts[:7], scorer, tiny_tokenizer(), reading=Reading(batch_size=4, max_length=16), **options
        )
        for allocation, losses in found.items():
            assert losses[name] == pytest.approx(loss(secateur.select(scores, 0.5, allocation)), rel=1e-4)
    with pytest.raises(InvalidInputError, match="held-out task dev has 7 texts, fewer than 8; give more dev texts"):
        held_out_losses(subject, Task("dev", tiny_texts(7)), pruner)
    for name, wrong in (("subject", model), ("task", texts), ("pruner", "shipped"), ("config", {})):
        right = {"subject": subject, "task": task, "pruner": pruner}
        with pytest.raises(InvalidInputError, match=f"`{name}` must be a "):
            held_out_losses(**{**right, name: wrong})


def test_runs_that_cannot_go_on(whole, tmp_path):
    out, _ = whole
    with pytest.raises(InvalidInputError, match="`out` must be a new or empty folder"):
        train(out)
    with pytest.raises(CheckpointError, match="was made with seed = 0, not 1"):
        train(out, resume=True, seed=1)
    with pytest.raises(
        CheckpointError, match=r"was made with tasks = \['singles, 40 texts \w+', 'pairs, 24 texts \w+'\], not"
    ):
        train(out, resume=True, tasks=TASKS[:1])
    changed = [Task("singles", tiny_texts(40, seed=7)), TASKS[1]]
    last = Subject(tiny_model("bert"), tiny_tokenizer())
    with torch.no_grad():
        last.model.encoder.layer[1].output.dense.weight[-1, -1] += 1  # a single number, and not the first
    for other in ({"tasks": changed}, {"kind": "llama"}, {"subject": last}):
        with pytest.raises(CheckpointError, match=r"was made with .*; go on with the same, or choose another folder"):
            train(out, resume=True, **other)
    with pytest.raises(InvalidInputError, match=r"`samples` must be at least the 2 of the run in .*, got 1"):
        train(out, resume=True, samples=1)
    (tmp_path / "settings.json").write_text('{"model": "of a comparison"}')
    with pytest.raises(CheckpointError, match=r"settings\.json is of no run of this kind; choose another folder"):
        train(tmp_path, resume=True)
    (tmp_path / "settings.json").unlink()
    for name in ("notes.txt", ".draft.unfinished"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidInputError, match="`out` must be a new folder, or one with a run to go on with"):
        train(tmp_path, resume=True)
    assert (tmp_path / ".draft.unfinished").read_text() == "mine"  # a folder that is no run's is left alone
    train(tmp_path / "run", tasks=TASKS[:1], samples=1)
    damaged = tmp_path / "run" / "samples" / "0-0-0.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(
        CheckpointError, match=r"0-0-0\.safetensors holds no sample: .*; remove it, and it is collected again"
    ):
        train(tmp_path / "run", tasks=TASKS[:1], samples=1, resume=True)
    damaged.unlink()
    assert len(samples(tmp_path / "run")) == 0
    train(tmp_path / "run", tasks=TASKS[:1], samples=1, resume=True)
    assert len(samples(tmp_path / "run")) == 1


def with_heads(count):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=count, intermediate_size=37
    )
    return Subject(AutoModel.from_config(config), tiny_tokenizer())


def test_what_nothing_can_be_learned_from_is_refused(tmp_path):
    with pytest.raises(
        InvalidInputError, match=r"masks all cost the same on the texts of task same, .*; give texts that"
    ):
        train(tmp_path / "run", tasks=[Task("same", ["good film"] * 20)], samples=1)
    with pytest.raises(
        UnsupportedModelError, match="reads pixel_values; a meta-pruner learns on models that read texts"
    ):
        Subject(tiny_model("vit"), tiny_tokenizer())
    # A quarter of a site's two heads is none, so those trials would all be the whole model.
    train(tmp_path / "two", subject=with_heads(2), samples=1)
    for sample in samples(tmp_path / "two").values():
        assert sample.trial_sets.unique().tolist() == [2, 3, 4, 5, 6]
        assert not bool(sample.masks.all(dim=1).any())
    with pytest.raises(
        InvalidInputError, match=r"no head of .* can be removed at any of the ratios \(0.25, 0.5, 0.75\)"
    ):
        train(tmp_path / "one", subject=with_heads(1))


def test_the_mode_of_the_model_changes_nothing(whole, tmp_path):
    subject = Subject(tiny_model("bert"), tiny_tokenizer())
    subject.model.train()
    train(tmp_path / "run", subject=subject, tasks=TASKS[:1], samples=1)
    assert subject.model.training
    (found,) = samples(tmp_path / "run").values()
    expected = samples(whole[0])["0-0-0.safetensors"]
    assert torch.equal(found.evidence.features, expected.evidence.features)
    assert torch.equal(found.masks, expected.masks)
    assert torch.equal(found.losses, expected.losses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": -1}, "`search` must be a whole number from 0, got -1"),
        ({"samples": 0}, "`samples` must be a whole number from 1, got 0"),
        ({"num_texts": 3}, "`num_texts` must be a whole number from 4, got 3"),
        ({"evaluation_batches": 0}, "`evaluation_batches` must be a whole number from 1, got 0"),
        ({"batch_size": 2}, "`batch_size` must be a whole number from 3, got 2"),
        ({"max_length": 3}, "`max_length` must be a whole number from 4, got 3"),
        ({"bf16": "yes"}, "`bf16` must be"),
        ({"seed": -1}, "`seed` must be"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        JointTrainingConfig(**settings)


def test_from_the_command_line_to_a_pruned_model(tmp_path, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    task = tmp_path / "words"
    task.mkdir()
    for split, count, seed in (("train", 30, 0), ("dev", 12, 1)):
        (task / f"{split}.tsv").write_text("\n".join(["sentence", *tiny_texts(count, seed)]) + "\n")
    out = tmp_path / "run"
    words = ["joint-train", "--model", str(tmp_path / "model"), "--data", str(task), "--out", str(out)]
    words += ["--texts", "8", "--judges", "2", "--batch-size", "4", "--max-length", "16"]
    assert cli.main([*words, "--resume"]) == 2
    assert f"there is no run to go on with in {out}; leave --resume out" in capsys.readouterr().err
    assert cli.main([*words, "--samples", "1"]) == 0
    printed = capsys.readouterr()
    assert "half of the heads removed; lower is better" in printed.out
    assert f"use it with --scorer smp-plus --pruner {out / 'pruner'}" in printed.out
    assert cli.main(words) == 2
    assert "`out` must be a new or empty folder" in capsys.readouterr().err
    assert cli.main([*words, "--resume", "--json"]) == 0
    printed = capsys.readouterr()
    assert "going on: 1 of 2 samples are there" in printed.err
    found = json.loads(printed.out)
    assert found["pruner"] == str(out / "pruner")
    assert [(row["task"], row["allocation"]) for row in found["held_out"]] == [
        ("words", "uniform"),
        ("words", "ranking"),
    ]
    prune = ["prune", str(tmp_path / "model"), "--data", str(task), "--scorer", "smp-plus", "--pruner", found["pruner"]]
    assert cli.main([*prune, "--max-length", "16", "--out", str(tmp_path / "small")]) == 0
    kept = json.loads((tmp_path / "small" / "config.json").read_text())["head_pruning"]["kept_heads"]
    assert {len(heads) for heads in kept.values()} == {2}
