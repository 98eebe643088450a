"""What a model that lost heads says of itself to other libraries, and to transformers' own code."""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import secateur
from secateur.models.inputs import example_inputs
from secateur.models.names import original_name
from secateur.removal import proof
from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from secateur.units.masks import Mask
from tests.support.tiny import tiny_classifier, tiny_texts, tiny_tokenizer, uneven_mask


@pytest.fixture
def dense(tmp_path):
    tiny_classifier("bert").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def cut(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    remove_(model, uneven_mask(find_sites(model)))
    return model


def test_a_pruned_model_does_not_call_itself_the_original(dense, tmp_path):
    model = cut(dense)
    assert {model.name_or_path, model.bert.name_or_path, model.config.name_or_path, model.bert.config.name_or_path} == {
        ""
    }
    assert original_name(model) == original_name(model.bert) == str(dense)
    assert model.config.head_pruning["base_model"] == str(dense)
    model.save_pretrained(tmp_path / "pruned")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert again.name_or_path == again.config.name_or_path == original_name(again) == str(tmp_path / "pruned")
    site = "encoder.layer.2.attention.self"
    remove_(again, Mask({site: torch.tensor([False, True, False, False])}))
    assert (again.name_or_path, again.config.head_pruning["base_model"]) == ("", str(dense))


def test_a_refused_removal_leaves_the_name(dense, monkeypatch):
    monkeypatch.setattr(proof, "largest_difference", lambda one, other: 1.0)
    model = AutoModel.from_pretrained(dense)
    with pytest.raises(secateur.RemovalError):
        remove_(model, uneven_mask(find_sites(model)))
    assert model.name_or_path == model.config.name_or_path == original_name(model) == str(dense)


def test_the_tokenizer_of_a_model_that_lost_heads_is_still_found(dense):
    model = AutoModel.from_pretrained(dense)
    remove_(model, uneven_mask(find_sites(model)))
    pruned, report = secateur.prune(model, tiny_texts(4), 0.2, scorer="contribution")
    assert report.model == pruned.config.head_pruning["base_model"] == str(dense)


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
def test_an_adapter_of_a_pruned_model_is_not_put_onto_the_original(dense, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["query"], r=2, task_type="SEQ_CLS")
    model = cut(dense)
    model.save_pretrained(tmp_path / "pruned")
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert not named
    with pytest.raises((ValueError, OSError)):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    peft.get_peft_model(loaded, settings).save_pretrained(tmp_path / "other")
    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "other")
    assert again.get_base_model().bert.encoder.layer[0].attention.self.query.out_features == 24


def test_model_cards_do_without_a_name(dense, tmp_path):
    model = cut(dense)
    trainer = Trainer(model=model, args=TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True))
    trainer.create_model_card()
    assert str(dense) not in (tmp_path / "run" / "README.md").read_text()
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformer(str(dense), device="cpu")
    remove_(embedder[0].auto_model, uneven_mask(find_sites(embedder[0].auto_model)))
    embedder.save_pretrained(str(tmp_path / "embedder"))
    again = SentenceTransformer(str(tmp_path / "embedder"), device="cpu")
    assert (again.encode(["good film"]) == embedder.encode(["good film"])).all()


def whisper():
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = WhisperConfig(
        **sizes, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=99, num_mel_bins=8,
        max_source_positions=20, max_target_positions=20, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def drop(model, layer, heads):
    site = next(name for name in find_sites(model) if name.endswith(f"decoder.layers.{layer}.encoder_attn"))
    return Mask({site: torch.tensor([head not in heads for head in range(4)])})


def test_alignment_heads_of_whisper_are_those_that_they_were(tmp_path):
    model = whisper()
    model.set_attn_implementation("eager")
    shared = model.generation_config
    shared._from_model_config = False  # it would be made anew of the model's config
    shared.alignment_heads = [[0, 3], [1, 0], [1, 2], [1, 3]]
    inputs = example_inputs(model)
    before = model(**inputs, output_attentions=True).cross_attentions
    with secateur.gated(model, drop(model, 1, [0, 1])):
        gated = model(**inputs, output_attentions=True).cross_attentions
    remove_(model, drop(model, 1, [0, 1]))
    after = model(**inputs, output_attentions=True).cross_attentions
    pairs = model.generation_config.alignment_heads
    assert pairs == [[0, 3], [1, 0], [1, 1]]
    assert shared.alignment_heads == [[0, 3], [1, 0], [1, 2], [1, 3]]
    for (layer, head), (_, original) in zip(pairs, [[0, 3], [1, 2], [1, 3]], strict=True):
        torch.testing.assert_close(after[layer][:, head], gated[layer][:, original])
    assert not torch.equal(before[1][:, 0], before[1][:, 1])
    model.save_pretrained(tmp_path)
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert again.generation_config.alignment_heads == pairs
    remove_(again, drop(again, 1, [0, 1, 2]))  # in the original's numbering
    assert again.generation_config.alignment_heads == [[0, 3], [1, 0]]


@pytest.mark.parametrize("pairs", [[[1, 0], [1, 1]], None, "none", [3]])
def test_where_no_alignment_head_is_left_there_is_no_entry(pairs):
    model = whisper()
    model.generation_config.alignment_heads = pairs
    remove_(model, drop(model, 1, [0, 1]))
    if pairs == [[1, 0], [1, 1]]:
        assert not hasattr(model.generation_config, "alignment_heads")
    else:
        assert model.generation_config.alignment_heads == pairs


def test_alignment_heads_stay_where_a_removal_is_refused(monkeypatch):
    model = whisper()
    model.generation_config.alignment_heads = [[1, 0], [1, 3]]
    mask = drop(model, 1, [0])
    monkeypatch.setattr(proof, "largest_difference", lambda one, other: 1.0)
    with pytest.raises(secateur.RemovalError):
        remove_(model, mask)
    assert model.generation_config.alignment_heads == [[1, 0], [1, 3]]
