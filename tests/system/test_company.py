"""A pruned model among the libraries that people use models with: each is used as its own manual says."""

import json
import warnings

import huggingface_hub
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from secateur.errors import InvalidInputError, UnsupportedModelError
from secateur.exporting.export import export_standalone
from secateur.models.inputs import example_inputs
from secateur.models.model_content import fingerprint_of_files
from secateur.models.sentence_transformers import copy_modules
from secateur.pruning import prune
from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from tests.support.hub import REPOSITORY, Hub
from tests.support.pruned import assert_equal, pruned_classifier
from tests.support.tiny import CONFIGS, tiny_classifier, tiny_model, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs_of(model, **more):
    return {k: v for k, v in example_inputs(model, **more).items() if isinstance(v, torch.Tensor)}


def rows(model, count=16):
    made = inputs_of(model, batch=count, padding=0)
    return [{k: v[i] for k, v in made.items()} | {"labels": i % 3} for i in range(count)]


def train(model, folder, resume=None):
    arguments = TrainingArguments(
        output_dir=folder, max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, seed=3,
        report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(model))
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.eval()


def test_a_trainer_checkpoint_resumes(tmp_path):
    start = pruned_classifier()
    start.save_pretrained(tmp_path / "start")
    through = train(AutoModelForSequenceClassification.from_pretrained(tmp_path / "start"), tmp_path / "run")
    half = tmp_path / "run" / "checkpoint-2"
    loaded = AutoModelForSequenceClassification.from_pretrained(half)
    assert [s.units for s in find_sites(loaded).values()] == [s.units for s in find_sites(start).values()]
    resumed = train(loaded, tmp_path / "again", resume=str(half))
    assert_equal(through, resumed)
    assert not torch.equal(through.classifier.weight, start.classifier.weight)


def test_a_trainer_saves_a_model_whose_inner_model_lost_heads(tmp_path):
    model = tiny_classifier("bert")
    remove_(model.bert, uneven_mask(find_sites(model)))
    assert_equal(train(model, tmp_path), AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_lora_adapter_trains_comes_back_and_merges(tmp_path):
    import peft

    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path / "pruned")
    inputs = inputs_of(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # B starts at zero, so A only learns in the second step
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()(**inputs).logits
        wanted = adapted(**inputs).logits
        assert torch.equal(again(**inputs).logits, wanted)
        assert (wanted - plain).abs().max() > 1e-3
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), merged)


def test_a_sentence_transformer_trains(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    model = tiny_model("bert")
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path / "pruned")
    tiny_tokenizer().save_pretrained(tmp_path / "pruned")
    embedder = SentenceTransformer(str(tmp_path / "pruned"), device="cpu")
    loss = CosineSimilarityLoss(embedder)
    optimizer = torch.optim.SGD(embedder.parameters(), lr=0.1)
    pair = [embedder.preprocess(["good film", "bad plot"]), embedder.preprocess(["good story", "red scene"])]
    values = []
    for _ in range(3):
        value = loss(pair, torch.tensor([1.0, 0.0]))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.item())
    assert values[-1] < values[0]
    embedder.save_pretrained(str(tmp_path / "tuned"))
    again = SentenceTransformer(str(tmp_path / "tuned"), device="cpu")
    assert (again.encode(["good film"]) == embedder.eval().encode(["good film"])).all()
    site = find_sites(again[0].auto_model)["encoder.layer.2.attention.self"]
    assert site.units == (1, 2)


@pytest.mark.parametrize("empty", [False, True])
def test_torchao_quantises_weights_and_activations_to_int8(empty, tmp_path):
    """After pruning, while the model is loaded: the way that transformers 5 has for it.

    torchao does not quantise weights of size 0, which an emptied site has; the page says to leave the site out.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    model = tiny_classifier("llama")
    remove_(model, uneven_mask(find_sites(model), empty))
    model.save_pretrained(tmp_path)
    left_out = ["model.layers.1.self_attn", "score"] if empty else None
    settings = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=left_out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's, on what it renames
        small = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=settings).eval()
    query = small.base_model.layers[0].self_attn.q_proj.weight
    assert query.shape == (24, 32)
    assert type(query) is not torch.nn.Parameter
    inputs = inputs_of(model)
    with torch.no_grad():
        wanted, found = model.base_model(**inputs)[0], small.base_model(**inputs)[0]
    error = (wanted - found).norm() / wanted.norm()
    assert 0 < error < 0.05


def on_meta(model):
    return model.to("meta")


def by_torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def by_torch(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's, on its own quantisation
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (on_meta, "the model's weights are on the meta device; load them before pruning"),
        (by_torchao, "the model is quantised; prune the full-precision model, then quantise the result"),
        (by_torch, "the model is quantised; prune the full-precision model, then quantise the result"),
    ],
    ids=["meta", "torchao", "torch"],
)
def test_weights_that_cannot_be_cut_are_refused_before_anything_is_computed(change, reason):
    model = tiny_classifier("bert")
    mask = uneven_mask(find_sites(model))
    model = change(model)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made"))
    for act in (lambda: prune(model, scorer="magnitude"), lambda: remove_(model, mask)):
        with pytest.raises(UnsupportedModelError, match=reason):
            act()


@pytest.mark.parametrize(("kind", "backend"), [("bert", "aot_eager"), ("phi3", "eager"), ("mpnet", "eager")])
def test_compiled_outputs_are_equal(kind, backend):
    """Everything of `torch.compile` but its code generator, which takes a minute: the capture is ours to break."""
    model = tiny_model(kind)
    remove_(model, uneven_mask(find_sites(model)))
    inputs = example_inputs(model)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        torch.testing.assert_close(torch.compile(model, backend=backend)(**inputs)[0], wanted, atol=1e-5, rtol=1e-5)


def test_bfloat16_runs_and_comes_back(tmp_path):
    model = pruned_classifier()
    model.save_pretrained(tmp_path / "one")
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one", dtype=torch.bfloat16).eval()
    inputs = inputs_of(model)
    with torch.no_grad():
        found, wanted = half(**inputs).logits, model(**inputs).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.1, rtol=0.1)
    half.save_pretrained(tmp_path / "two")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert_equal(half, again)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Everything of huggingface_hub and transformers but the network, with a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    made = Hub()
    huggingface_hub.set_client_factory(made.client)
    yield made
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def test_pushing_and_loading_by_hub_id(hub):
    model = pruned_classifier()
    model.push_to_hub(REPOSITORY, token="hf_of_nobody")
    assert "head_pruning" in json.loads(hub.files["config.json"])
    assert_equal(AutoModelForSequenceClassification.from_pretrained(REPOSITORY), model)
    assert fingerprint_of_files(REPOSITORY) == "a" * 40  # its commit
    with pytest.raises(InvalidInputError, match="no-such/model is no folder, and the Hub did not give it: "):
        fingerprint_of_files("no-such/model")


def test_pushing_a_standalone_model_brings_its_code(hub, remote_code, tmp_path):
    pruned_classifier().save_pretrained(tmp_path / "pruned")
    export_standalone(tmp_path / "pruned", tmp_path / "alone")
    model = AutoModel.from_pretrained(tmp_path / "alone", trust_remote_code=True)
    model.push_to_hub(REPOSITORY, token="hf_of_nobody")
    assert b"class BertModel(Rebuilt" in hub.files["modeling_pruned.py"]
    again = AutoModel.from_pretrained(REPOSITORY, trust_remote_code=True)
    assert type(again).__module__.endswith("modeling_pruned")
    assert_equal(again, model)


def test_modules_of_sentence_transformers_come_from_the_hub(hub, tmp_path):
    """What `prune ID` does for an embedding model; the transformer's own weights are not among them."""
    hub.files = {
        "modules.json": json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
            ]
        ).encode(),
        "sentence_bert_config.json": b'{"max_seq_length": 64}',
        "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
        "model.safetensors": b"weights",
    }
    assert copy_modules(REPOSITORY, tmp_path) == tmp_path
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert found == {
        "modules.json", "sentence_bert_config.json", "1_Pooling", "1_Pooling/config.json", "2_Normalize"
    }  # fmt: skip
