"""Models of which `device_map` keeps weights in CPU memory or on disk: scored, gated, reconstructed and cut."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModel

import secateur
from secateur import cli
from secateur.errors import InvalidInputError, RemovalError, UnsupportedModelError
from secateur.finetuning.evaluate import evaluate_model
from secateur.finetuning.finetune import finetune
from secateur.models.inputs import example_inputs
from secateur.models.offload import is_offloaded
from secateur.pruning import prune_in_steps
from secateur.pruning_steps import Steps
from secateur.settings import Cut, Reading
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_units
from secateur.texts.data import Task
from secateur.units.masks import Mask, PresentMask
from secateur.units.select import select
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")

DISK = {
    "bert": {
        "embeddings": "disk", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "encoder.layer.2": "disk",
        "pooler": "cpu",
    },
    "llama": {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "disk", "layers.2": "disk", "norm": "disk",
              "rotary_emb": "cpu"},
}  # fmt: skip


def on_disk(kind, tmp_path, dtype=torch.float32):
    tiny_model(kind).to(dtype).save_pretrained(tmp_path / "model")
    places = {"device_map": DISK[kind], "offload_folder": str(tmp_path / "offloaded")}
    return AutoModel.from_pretrained(tmp_path / "model", **places).eval()


@pytest.mark.parametrize("kind", DISK)
def test_weights_on_disk_give_the_scores_and_gates_of_weights_in_memory(tmp_path, kind):
    whole, model, tokenizer, texts = tiny_model(kind), on_disk(kind, tmp_path), tiny_tokenizer(), tiny_texts(9)
    pairs = list(zip(texts, texts[1:] + texts[:1], strict=True))
    assert is_offloaded(model)
    assert not is_offloaded(whole)
    places = {name: parameter.device for name, parameter in model.named_parameters()}
    calls = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert find_sites(model) == find_sites(whole)
    for scorer in ("contribution", "matching", "smp", "smp-plus", "entropy", "magnitude"):
        given = pairs if scorer == "matching" else texts
        expected = secateur.score(whole, given, scorer, tokenizer, reading=Reading(batch_size=4))
        found = secateur.score(model, given, scorer, tokenizer, reading=Reading(batch_size=4))
        for site in expected:
            torch.testing.assert_close(found[site], expected[site], rtol=0, atol=0)
        assert select(found).to_json() == select(expected).to_json()
    rounded = [secateur.score(m, texts, "contribution", tokenizer, reading=Reading(bf16=True)) for m in (whole, model)]
    for site in rounded[0]:
        assert torch.equal(rounded[0][site], rounded[1][site])
    mask, batch = uneven_mask(find_sites(whole)), example_inputs(whole)
    with secateur.gated(model, mask), secateur.gated(whole, mask), torch.no_grad():
        torch.testing.assert_close(model(**batch)[0], whole(**batch)[0], rtol=0, atol=0)
    assert {name: parameter.device for name, parameter in model.named_parameters()} == places
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == calls


def test_half_precision_in_cpu_memory_or_spread_is_never_widened(monkeypatch):
    whole = tiny_model("llama").to(torch.bfloat16)
    sites, batch = find_sites(whole), example_inputs(whole)
    scores = secateur.score(whole, inputs=[batch])
    fetched = cpu_offload(tiny_model("llama").to(torch.bfloat16), execution_device=torch.device("cpu"))
    places = dict.fromkeys(DISK["llama"], "cpu")
    spread = dispatch_model(tiny_model("llama").to(torch.bfloat16), places, force_hooks=True)
    assert not is_offloaded(spread)
    monkeypatch.setattr("secateur.sites.attention.in_float32", lambda _: 1 / 0)  # a copy that might not fit
    for model in (fetched, spread):
        assert find_sites(model) == sites
        found = secateur.score(model, inputs=[batch])
        assert all(torch.equal(found[site], scores[site]) for site in scores)


def test_a_block_is_put_back_also_after_an_exception(tmp_path, monkeypatch):
    model = on_disk("bert", tmp_path)
    calls = {name: vars(module).get("forward") for name, module in model.named_modules()}
    monkeypatch.setattr("secateur.sites.ownership.Ownership.slices", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find_sites(model)
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == calls
    assert model.encoder.layer[1].attention.self.query.weight.is_meta
    monkeypatch.undo()
    assert find_sites(model) == find_sites(tiny_model("bert"))
    assert torch.is_grad_enabled()


def half_of(sites):
    """Drop half of the key-value groups, a third of the neurons, and one layer."""
    keeps = {
        "heads": lambda site: torch.arange(site.num_units) // site.group_size % 2 == 0,
        "neurons": lambda site: torch.arange(site.num_units) % 3 != 1,
        "layers": lambda site: torch.arange(site.num_units) != 1,
    }
    return PresentMask({name: keeps[site.kind](site) for name, site in sites.items()}).original(sites)


def outputs(model):
    with torch.no_grad():
        return [value for value in model(**example_inputs(model)).values() if isinstance(value, torch.Tensor)]


def looks(model):
    """What a removal that fails has to leave."""
    weights = {n: (p.device, p.dtype, p.shape, p.requires_grad) for n, p in model.named_parameters()}
    maps = {name: id(getattr(vars(m).get("_hf_hook"), "weights_map", None)) for name, m in model.named_modules()}
    return weights, maps, [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.bfloat16) for kind in ("bert", "gpt2", "llama", "t5")), ("vit", torch.float32)]
)
def test_units_are_found_and_cut_as_in_memory(kind, dtype):
    whole = tiny_model(kind).to(dtype)
    for parameter in list(whole.parameters())[::2]:
        parameter.requires_grad_(False)
    model = cpu_offload(copy.deepcopy(whole), execution_device=torch.device("cpu"))
    before = looks(model)
    sites = find_units(model)
    assert sites == find_units(whole)
    assert looks(model) == before
    mask = half_of(sites)
    assert secateur.remove_(model, mask) == secateur.remove_(whole, mask)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(whole), strict=True))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in whole.parameters()}
    assert find_units(model) == find_units(whole)


@pytest.mark.parametrize(("kind", "dtype"), [("bert", torch.float32), ("llama", torch.bfloat16)])
def test_what_was_reconstructed_and_cut_on_disk_is_saved_whole(kind, dtype, tmp_path):
    model = on_disk(kind, tmp_path, dtype)
    whole = AutoModel.from_pretrained(tmp_path / "model").eval()
    mask = half_of(find_units(whole, ("heads", "neurons")))
    for one in (whole, model):
        reading = Reading(batch_size=4)
        before, after = secateur.reconstruct_(one, mask, tiny_texts(24), tiny_tokenizer(), reading=reading)
        assert after < before
        secateur.remove_(one, mask)
    files = {file: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    model.save_pretrained(tmp_path / "small")
    found = AutoModel.from_pretrained(tmp_path / "small").state_dict()
    assert found.keys() == whole.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in whole.state_dict().items())
    assert files == {file: file.read_bytes() for file in (tmp_path / "model").iterdir()}


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_a_removal_that_fails_leaves_fetched_weights_as_they_were(place, tmp_path, monkeypatch):
    if place == "disk":
        model = on_disk("bert", tmp_path, torch.bfloat16)
    else:
        model = cpu_offload(tiny_model("bert").to(torch.bfloat16), execution_device=torch.device("cpu"))
    mask, expected = half_of(find_units(model)), outputs(model)
    before = looks(model)
    monkeypatch.setattr("secateur.removal.remove.TOLERANCE", -1.0)
    with pytest.raises(RemovalError, match="the model is unchanged"):
        secateur.remove_(model, mask)
    assert looks(model) == before
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))
    monkeypatch.undo()
    assert secateur.remove_(model, mask).max_difference <= 1e-4


def test_a_fetched_weight_that_no_pass_uses_is_seen():
    whole = tiny_model("bert")
    module = whole.encoder.layer[1].attention.self
    module.spare = torch.nn.Parameter(torch.ones(module.num_attention_heads))
    model = cpu_offload(whole, execution_device=torch.device("cpu"))
    mask = Mask({"encoder.layer.1.attention.self": torch.tensor([True, False, True, True])})
    before = looks(model)
    with pytest.raises(UnsupportedModelError, match=r"layer\.1\.attention\.self: no pass .* its parameter spare"):
        secateur.remove_(model, mask)
    assert looks(model) == before


@pytest.mark.parametrize("budget", ["macs=0.5", "heads=0.5"])
def test_a_model_that_is_spread_is_pruned_by_its_name_but_not_taught(budget, tmp_path, monkeypatch):
    model, texts = on_disk("bert", tmp_path), tiny_texts(60)
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def prune(device, **others):
        reading = Reading(batch_size=4, device=device)
        return secateur.prune(tmp_path / "model", texts, budget=budget, reading=reading, **others)

    expected, report = prune("cpu", restore="reconstruct")
    monkeypatch.setattr("secateur.pruning_work.load_model", lambda name, device: model if device == "auto" else 1 / 0)
    _, found = prune("auto", restore="reconstruct", out=tmp_path / "small")
    assert found.mask == report.mask
    assert (found.reconstruction, found.left_out) == (report.reconstruction, ())
    small = AutoModel.from_pretrained(tmp_path / "small").state_dict()
    assert all(torch.equal(small[name], weight) for name, weight in expected.state_dict().items())


def test_a_refit_that_was_kept_is_fetched_too(tmp_path, monkeypatch):
    """A run that was stopped where memory held the model goes on where it does not."""
    model, steps = on_disk("bert", tmp_path), Steps(tmp_path / "steps")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    steps.folder.mkdir()
    run = partial(
        prune_in_steps, steps, tmp_path / "model", tiny_texts(20), Cut(0.5), scorer="contribution",
        restore="reconstruct", steps=1, labels=None, tokenizer=None,
    )  # fmt: skip
    expected, _ = run(reading=Reading(batch_size=4, device="cpu"))
    assert "refit" in steps.names()
    monkeypatch.setattr("secateur.pruning_work.load_model", lambda *_: model)
    monkeypatch.setattr("secateur.pruning_work.reconstruct_", lambda *_: 1 / 0)
    found, _ = run(reading=Reading(batch_size=4, device="auto"))
    assert found is model
    assert all(torch.equal(a, b) for a, b in zip(outputs(found), outputs(expected), strict=True))


def test_what_would_hold_all_weights_is_left_out_or_refused(tmp_path, monkeypatch):
    texts, tokenizer = tiny_texts(60), tiny_tokenizer()
    model = on_disk("bert", tmp_path)
    for what, attempt in (
        ("a copy of a model", lambda: secateur.prune(model, texts, tokenizer=tokenizer)),
        ("back-propagates", lambda: secateur.score(model, texts, "relational_taylor", tokenizer)),
    ):
        with pytest.raises(UnsupportedModelError, match=f"{what}.*load the model without `device_map`"):
            attempt()
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("secateur.pruning_work.load_model", lambda *_: model)
    reading = Reading(batch_size=4, device="auto")
    with pytest.raises(UnsupportedModelError, match="distillation needs all weights"):
        secateur.prune(tmp_path / "model", texts, budget="macs=0.5", restore="distill", reading=reading)
    _, report = secateur.prune(tmp_path / "model", texts, budget="macs=0.5", reading=reading)
    assert report.left_out == ("not distilled: `device_map` left some weights on CPU or disk",)
    assert report.reconstruction
    assert report.quality


def test_a_device_for_all_is_none_to_train_or_evaluate_on():
    model, tokenizer, task = tiny_classifier("bert", 2), tiny_tokenizer(), Task("a task", tiny_texts(8), [0, 1] * 4)
    spread = Reading(device="auto")
    for attempt in (
        lambda: finetune(model, task, tokenizer=tokenizer, reading=spread),
        lambda: evaluate_model(model, tokenizer, task, device="auto"),
    ):
        with pytest.raises(InvalidInputError, match="`device` must be a device that this machine has"):
            attempt()


def test_weights_that_nothing_fetches_are_refused():
    model = cpu_offload(tiny_model("bert"), execution_device=torch.device("cpu"))
    sites, mask = find_sites(model), Mask({"encoder.layer.1.attention.self": torch.tensor([True, False, True, True])})
    model.encoder.layer[0].output.dense = torch.nn.Linear(37, 32, device="meta")
    with pytest.raises(UnsupportedModelError, match=r"dense\.weight is on the meta device, and nothing fetches"):
        secateur.remove_(model, mask, sites=sites)


def test_refining_needs_no_gradients(tmp_path):
    model, tokenizer, texts = on_disk("bert", tmp_path), tiny_tokenizer(), tiny_texts(8)
    start = select(secateur.score(model, texts, "random", tokenizer))
    mask, losses = secateur.refine_mask(model, start, texts, tokenizer, steps=8)
    # Judged as in memory; which exchanges are tried is drawn there.
    expected = secateur.refine_mask(tiny_model("bert"), start, texts, tokenizer, steps=0)[1]
    assert losses[0] == pytest.approx(expected[0])
    assert secateur.refine_mask(tiny_model("bert"), mask, texts, tokenizer, steps=0)[1][0] == pytest.approx(min(losses))


def test_attention_past_the_interface_is_refused_and_the_command_line_spreads_a_model(tmp_path, capsys):
    model = cpu_offload(tiny_model("mpnet"), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="finding heads past transformers' attention interface needs all"):
        find_sites(model)
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.tsv").write_text("\n".join(["sentence", *tiny_texts(9)]) + "\n")
    scored = []
    for device in ("auto", "cpu"):
        command = [
            "score",
            str(tmp_path / "model"),
            "--data",
            str(tmp_path / "texts.tsv"),
            "--device",
            device,
            "--json",
        ]
        assert cli.main(command) == 0
        scored.append(capsys.readouterr().out)
    assert scored[0] == scored[1]
