"""`secateur verify` sees every kept weight, and what changed since a pruned model was saved."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import secateur
from secateur.cli import main
from secateur.errors import CheckpointError
from secateur.finetuning.finetune import finetune
from secateur.models.inputs import example_inputs
from secateur.removal.remove import remove_
from secateur.removal.verify import verify_checkpoint
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_units
from secateur.texts.data import Task
from tests.support.tiny import CONFIGS, tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask
from tests.support.units import ragged_mask, small_model


def saved(model, folder, record=None):
    """Save a model as `whole` and, with heads removed, as `small`; return the two folders."""
    model.save_pretrained(folder / "whole")
    remove_(model, uneven_mask(find_sites(model)), record={"base_model": str(folder / "whole"), **(record or {})})
    model.save_pretrained(folder / "small")
    return folder / "whole", folder / "small"


def damage(folder, name, change, keep_digest=False):
    """Change one tensor of a saved model, by a tool that knows no digests unless `keep_digest`."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() if keep_digest else {"format": "pt"}
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata=metadata)


def edit_recipe(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["head_pruning"])
    (folder / "config.json").write_text(json.dumps(config))


def with_nan_in_an_unread_row(tensor):
    read = set(example_inputs(tiny_model("bert"))["input_ids"].flatten().tolist())
    tensor[min(set(range(99)) - read), 0] = torch.nan
    return tensor


def without_far_positions(tensor):
    tensor[24:] = 0
    return tensor


@pytest.mark.parametrize(
    ("kind", "empty"), [("bert", False), ("albert", False), ("llama", False), ("t5", True), ("gpt2", True)]
)
def test_what_was_pruned_is_equal_weight_by_weight(kind, empty, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "whole")
    remove_(model, uneven_mask(find_sites(model), empty))
    model.save_pretrained(tmp_path / "small")
    found = verify_checkpoint(tmp_path / "small", tmp_path / "whole")
    assert found["equal"]
    assert (found["verdict"], found["weights"], found["differing"]) == ("equal", "as saved", [])
    assert found["tensors"] == {"equal": len(model.state_dict())}
    assert (found["max_step_difference"] is not None) == (kind in ("gpt2", "llama", "t5"))


def test_weights_that_no_example_reads_are_compared(tmp_path, capsys):
    whole, small = saved(tiny_model("bert"), tmp_path)
    words, positions = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position"))
    damage(small, words, with_nan_in_an_unread_row)
    damage(small, positions, without_far_positions)
    found = verify_checkpoint(small, whole)
    assert found["max_difference"] <= found["tolerance"]  # the outputs alone say nothing of it
    assert (found["equal"], found["verdict"], found["weights"]) == (False, "differs", "unknown")
    states = {one["name"]: one["state"] for one in found["differing"]}
    assert states == {words: "not finite", positions: "other"}
    assert main(["verify", str(small)]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS from" in out
    assert "1 not finite" in out
    assert "1 other" in out
    assert positions in out


def test_the_head_of_a_task_model_is_compared(tmp_path):
    whole, small = saved(tiny_classifier("bert"), tmp_path)
    assert verify_checkpoint(small)["equal"]
    damage(small, "classifier.weight", torch.zeros_like)
    found = verify_checkpoint(small)
    assert not found["equal"]
    assert [(one["name"], one["state"]) for one in found["differing"]] == [("classifier.weight", "other")]
    # A base model has none to compare with.
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "base")
    found = verify_checkpoint(small, tmp_path / "base")
    assert found["equal"]
    assert found["tensors"]["not in the original"] == 2


def test_models_of_two_classes_are_compared_by_what_is_inside(tmp_path):
    """ERNIE has BERT's weights under the same names; here without a pooler, which is random then."""
    whole, small = saved(tiny_classifier("bert"), tmp_path)
    AutoModel.from_pretrained(whole).save_pretrained(whole)
    config = json.loads((whole / "config.json").read_text())
    other = {"model_type": "ernie", "architectures": ["ErnieModel"]}
    (whole / "config.json").write_text(json.dumps(config | other))
    tensors = load_file(whole / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    save_file(rest, whole / "model.safetensors", metadata={"format": "pt"})
    found = verify_checkpoint(small)
    assert found["equal"]
    assert found["tensors"] == {"equal": len(rest), "not in the original": 4}
    damage(small, "bert.embeddings.position_embeddings.weight", without_far_positions)
    assert not verify_checkpoint(small)["equal"]


def test_weights_that_neither_file_has_are_not_compared(tmp_path):
    """A pooler that was not saved is random in both."""
    whole, small = saved(tiny_model("bert"), tmp_path)
    for folder in (whole, small):
        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(secateur.errors.SecateurWarning, match="lacks weights of BertModel, such as pooler"):
        assert verify_checkpoint(small, whole)["equal"]
    tiny_model("bert").save_pretrained(whole)
    with pytest.warns(secateur.errors.SecateurWarning, match="lacks weights of BertModel, such as pooler"):
        found = verify_checkpoint(small, whole)
    assert not found["equal"]
    assert found["tensors"]["missing"] == 2


def test_half_precision_is_compared_as_it_was_saved(tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "whole")
    remove_(model, uneven_mask(find_sites(model)))
    model.bfloat16().save_pretrained(tmp_path / "small")
    found = verify_checkpoint(tmp_path / "small", tmp_path / "whole")
    assert found["equal"]
    assert found["tensors"] == {"equal": len(model.state_dict())}


def reconstructed(folder):
    whole, small = folder / "whole", folder / "small"
    tiny_model("bert").save_pretrained(whole)
    smaller, _ = secateur.prune(
        whole, tiny_texts(32), scorer="contribution", tokenizer=tiny_tokenizer(), restore="reconstruct",
        reading=Reading(device="cpu"),
    )  # fmt: skip
    assert smaller.config.head_pruning["reconstructed"] is True
    smaller.save_pretrained(small)
    return whole, small


def test_refitted_projections_are_known_by_what_was_saved(tmp_path, capsys):
    _, small = reconstructed(tmp_path)
    found = verify_checkpoint(small)
    assert (found["equal"], found["weights"]) == (True, "as saved")
    names = {f"encoder.layer.{n}.attention.output.dense.{kind}" for n in range(3) for kind in ("weight", "bias")}
    assert {one["name"] for one in found["differing"]} <= names
    assert {one["state"] for one in found["differing"]} == {"refitted"}
    changes = {one["name"]: one["change"] for one in found["differing"] if one["name"].endswith("weight")}
    assert all(0 < change < 2 for change in changes.values())
    name = next(iter(changes))
    damage(small, name, lambda tensor: -3 * tensor, keep_digest=True)
    found = verify_checkpoint(small)
    assert (found["equal"], found["verdict"], found["weights"]) == (False, "differs", "changed")
    assert found["changed"] == [name]
    assert {one["name"]: one["change"] for one in found["differing"]}[name] > 2
    capsys.readouterr()
    assert main(["verify", str(small)]) == 1
    assert f"1 changed since they were saved: {name}" in capsys.readouterr().out


def test_a_file_without_digests_says_so(tmp_path, capsys):
    _, small = saved(tiny_model("bert"), tmp_path)
    damage(small, "pooler.dense.bias", lambda tensor: tensor)
    assert main(["verify", str(small)]) == 0
    assert "saved without digests" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "site"), [("mpnet", "encoder.layer.0"), ("t5", "encoder.block.0"), ("bloom", "h.0")])
def test_another_recipe_than_the_weights_were_saved_with_is_refused(kind, site, tmp_path, capsys):
    _, small = saved(tiny_model(kind), tmp_path)
    AutoModel.from_pretrained(small)

    def other_heads(recipe):
        name = next(name for name in recipe["kept_heads"] if name.startswith(site))
        assert recipe["kept_heads"][name] == [0, 2, 3]
        recipe["kept_heads"][name] = [1, 2, 3]

    edit_recipe(small, other_heads)
    message = "recipe in the config is not the one that the weights .*model.safetensors were saved with"
    with pytest.raises(CheckpointError, match=message):
        AutoModel.from_pretrained(small)
    assert main(["verify", str(small)]) == 2
    assert "is not the one that the weights" in capsys.readouterr().err


def test_what_a_recipe_records_may_be_edited(tmp_path):
    whole, small = saved(tiny_model("bert"), tmp_path)
    moved = whole.rename(tmp_path / "moved")
    edit_recipe(small, lambda recipe: recipe.update(base_model=str(moved)))
    assert verify_checkpoint(small)["equal"]


def test_every_shard_has_the_digests_and_models_with_all_heads_have_none(tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "whole")
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    shards = sorted((tmp_path / "small").glob("*.safetensors"))
    assert len(shards) > 1
    assert verify_checkpoint(tmp_path / "small", tmp_path / "whole")["weights"] == "as saved"
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    tensors = load_file(shards[-1])
    with safe_open(shards[-1], "pt") as opened:
        metadata = opened.metadata()
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, shards[-1], metadata=metadata)
    assert verify_checkpoint(tmp_path / "small", tmp_path / "whole")["changed"] == [name]


def test_a_model_that_is_saved_again_has_the_same_bytes(tmp_path):
    model = tiny_model("bert")
    remove_(model, uneven_mask(find_sites(model)))
    for number in range(4):
        model.save_pretrained(tmp_path / str(number))
    assert len({file.read_bytes() for file in tmp_path.glob("*/model.safetensors")}) == 1


def test_two_recipes_in_one_config_are_both_known(tmp_path):
    """An encoder-decoder of two pruned models has a recipe in the config of each."""
    from transformers import EncoderDecoderModel

    for name in ("encoder", "decoder"):
        model = tiny_model("bert")
        remove_(model, uneven_mask(find_sites(model)))
        model.save_pretrained(tmp_path / name)
    both = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder")
    both.save_pretrained(tmp_path / "both")
    again = EncoderDecoderModel.from_pretrained(tmp_path / "both")
    assert all(torch.equal(tensor, both.state_dict()[name]) for name, tensor in again.state_dict().items())
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    config["decoder"]["head_pruning"]["kept_heads"]["encoder.layer.0.attention.self"] = [1, 2, 3]
    (tmp_path / "both" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not the one that the weights"):
        EncoderDecoderModel.from_pretrained(tmp_path / "both")


def test_a_fine_tuned_folder_is_said_to_be_trained(tmp_path, capsys):
    _, small = saved(tiny_model("bert"), tmp_path)
    texts = tiny_texts(16)
    reading = Reading(batch_size=8, device="cpu", progress=False)
    tuned, _ = finetune(
        small, Task("toy", texts, [i % 2 for i in range(16)]), tokenizer=tiny_tokenizer(), out=tmp_path / "tuned",
        epochs=1, reading=reading,
    )  # fmt: skip
    assert tuned.config.head_pruning["finetuned"] is True
    found = verify_checkpoint(tmp_path / "tuned")
    assert (found["equal"], found["verdict"], found["finetuned"]) == (False, "trained", True)
    assert set(found["tensors"]) == {"trained", "not in the original"}
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "tuned")]) == 0
    out = capsys.readouterr().out
    count, total = found["tensors"]["trained"], sum(found["tensors"].values())
    assert f"comes from {tmp_path / 'whole'}" in out
    assert f"and was fine-tuned since: {count} of {total} tensors differ; units removed as the recipe says" in out
    # Without digests nothing says that these are the weights that training made.
    weights = tmp_path / "tuned" / "model.safetensors"
    with_digests = weights.read_bytes()
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    assert verify_checkpoint(tmp_path / "tuned")["weights"] == "unknown"
    assert main(["verify", str(tmp_path / "tuned")]) == 1
    weights.write_bytes(with_digests)
    # Training explains no NaN, and no change after the folder was written.
    damage(tmp_path / "tuned", "bert.embeddings.word_embeddings.weight", with_nan_in_an_unread_row)
    assert verify_checkpoint(tmp_path / "tuned")["verdict"] == "differs"
    # Pruned again, the fine-tuned model is the original, of which nothing was trained.
    again, _ = secateur.prune(tuned, None, 0.2, scorer="magnitude")
    tuned.save_pretrained(tmp_path / "tuned")
    again.save_pretrained(tmp_path / "again")
    found = verify_checkpoint(tmp_path / "again", tmp_path / "tuned")
    assert (found["equal"], found["finetuned"]) == (True, False)


def test_training_that_nothing_records_differs(tmp_path, capsys):
    whole, small = saved(tiny_classifier("bert"), tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(small)
    found = verify_checkpoint(small, whole)
    assert (found["verdict"], found["weights"]) == ("differs", "as saved")
    assert found["tensors"] == {"other": len(model.state_dict())}
    assert main(["verify", str(small)]) == 1
    assert "trained since by what the recipe does not record" in capsys.readouterr().out


def test_models_of_no_file_and_other_kinds_load_as_before(tmp_path):
    """Weights handed over need no digest, and a config without a recipe no check."""
    _, small = saved(tiny_model("bert"), tmp_path)
    model = AutoModel.from_pretrained(small)
    config = AutoConfig.from_pretrained(small)
    again = type(model).from_pretrained(None, config=config, state_dict=model.state_dict())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert AutoModel.from_config(CONFIGS["bert"]()).config.num_attention_heads == 4


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gated t5"])
def test_neurons_and_layers_that_went_are_compared_too(kind, tmp_path):
    model = small_model(kind)
    model.save_pretrained(tmp_path / "whole")
    sites = find_units(model)
    remove_(model, ragged_mask(sites))
    model.save_pretrained(tmp_path / "small")
    found = verify_checkpoint(tmp_path / "small", tmp_path / "whole")
    assert (found["equal"], found["weights"]) == (True, "as saved")
    assert found["tensors"] == {"equal": len(model.state_dict())}
    assert found["units"].keys() == {"heads", "neurons", "layers"}
    last = [site.output for site in find_units(model, ["neurons"]).values()][-1]
    name = next(name for name in model.state_dict() if name.endswith(f"{last}.weight"))
    damage(tmp_path / "small", name, lambda tensor: tensor + 1, keep_digest=True)
    found = verify_checkpoint(tmp_path / "small", tmp_path / "whole")
    assert (found["verdict"], found["changed"]) == ("differs", [name])
    assert [one["name"] for one in found["differing"]] == [name]


def test_refitted_neurons_and_their_biases_are_known(tmp_path, capsys):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "whole")
    mask = ragged_mask(find_units(model, ["heads", "neurons"]))
    before, after = secateur.reconstruct_(model, mask, tiny_texts(32), tiny_tokenizer(), reading=Reading(device="cpu"))
    assert after < before
    remove_(model, mask, record={"reconstructed": True})
    model.save_pretrained(tmp_path / "small")
    found = verify_checkpoint(tmp_path / "small", tmp_path / "whole")
    assert (found["equal"], found["tensors"].keys()) == (True, {"equal", "refitted"})
    assert {name for one in found["differing"] if ".attention." not in (name := one["name"])} <= {
        f"encoder.layer.{n}.output.dense.{kind}" for n in range(3) for kind in ("weight", "bias")
    }
    assert main(["verify", str(tmp_path / "small"), "--against", str(tmp_path / "whole")]) == 0
    assert "heads and 6 neurons gated and its output projections refitted" in capsys.readouterr().out
