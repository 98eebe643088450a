"""Models of which `device_map` keeps weights in CPU memory or on disk: scored, selected and gated, not cut."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModel

import secateur
from secateur import cli
from secateur.errors import UnsupportedModelError
from secateur.models.inputs import example_inputs
from secateur.models.offload import is_offloaded
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.units.select import select
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")

DISK = {
    "bert": {
        "embeddings": "disk", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "encoder.layer.2": "disk",
        "pooler": "cpu",
    },
    "llama": {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "disk", "layers.2": "disk", "norm": "disk",
              "rotary_emb": "cpu"},
}  # fmt: skip


def on_disk(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path / "model")
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


def test_what_would_hold_all_weights_is_refused_and_told_what_works(tmp_path):
    model, tokenizer, texts = on_disk("bert", tmp_path), tiny_tokenizer(), tiny_texts(8)
    mask = uneven_mask(find_sites(model))
    for what, attempt in (
        ("removing units", lambda: secateur.remove_(model, mask)),
        ("pruning", lambda: secateur.prune(model, texts, tokenizer=tokenizer)),
        ("back-propagates", lambda: secateur.score(model, texts, "relational_taylor", tokenizer)),
    ):
        with pytest.raises(UnsupportedModelError, match=f"{what}.*load the model without `device_map`"):
            attempt()
    # What the message says works.
    whole = tiny_model("bert")
    secateur.remove_(whole, mask)
    batch = example_inputs(whole)
    with secateur.gated(model, mask), torch.no_grad():
        torch.testing.assert_close(whole(**batch)[0], model(**batch)[0])


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
