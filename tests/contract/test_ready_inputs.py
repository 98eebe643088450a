"""Ready inputs instead of texts, example by example: all steps of a pruning on images, sounds and tokens."""

import pytest
import torch
from sklearn.datasets import load_digits
from transformers import AutoModel, ViTConfig, ViTForImageClassification, Wav2Vec2Config

import secateur
from secateur.errors import InvalidInputError
from secateur.models.inputs import example_inputs
from secateur.restoring.quality import QualityJudge
from secateur.settings import Cut, Reading
from secateur.sites.finding import find_units
from secateur.texts.calibration import PreparedModel
from secateur.texts.examples import examples_of
from secateur.texts.sources import reading_order
from tests.support.scoring import condition
from tests.support.tiny import _stirred, tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer
from tests.support.units import even_mask

READING = Reading(batch_size=8, max_length=16, device="cpu")
TEXTS = tiny_texts(40)


def images(model, count, seed=0):
    return [example_inputs(model, batch=12, seed=seed + number) for number in range(count // 12)]


def speech_model():
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, conv_dim=(16, 16),
        conv_stride=(20, 8), conv_kernel=(20, 8), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True, feat_extract_norm="layer",
    )  # fmt: skip
    return _stirred(AutoModel.from_config(config))


def tokens_of(texts):
    """Batches of unlike sizes, all padded to one length."""
    made = dict(tiny_tokenizer()(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt"))
    starts = [0, 7, 25]
    return [
        {name: rows[one:other] for name, rows in made.items()}
        for one, other in zip(starts, [*starts[1:], len(texts)], strict=True)
    ]


def trained_on_digits():
    """A small vision model that tells handwritten digits apart, and the images."""
    pixels, labels = load_digits(return_X_y=True)
    torch.manual_seed(0)
    order = torch.randperm(len(pixels))
    pixels = (torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1)[order]
    labels = torch.tensor(labels)[order]
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8,
            patch_size=4, num_channels=1, num_labels=10,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        for rows in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            model(pixel_values=pixels[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
    return model.eval(), pixels, labels


@torch.no_grad()
def accuracy(model, pixels, labels):
    return float((model(pixel_values=pixels[1200:]).logits.argmax(dim=1) == labels[1200:]).float().mean())


def test_half_of_a_vision_model_still_tells_digits_apart():
    model, pixels, labels = trained_on_digits()
    before = condition(model)
    given = {"inputs": [{"pixel_values": part} for part in pixels[:200].split(100)], "budget": "macs=0.5"}
    smaller, report = secateur.prune(model, **given, steps=30)
    assert condition(model) == before
    assert report.budget[0].reached <= 0.5
    assert (report.allocation, report.steps, report.num_texts) == ("sensitivity", 30, 180)
    assert report.units.keys() == {"heads", "neurons"}
    assert report.reconstruction[1] < report.reconstruction[0]
    assert report.distillation[1] < report.distillation[0]
    assert report.quality.num_texts == 20
    assert report.quality.cosine > 0.8
    bare, _ = secateur.prune(model, **given, cut=Cut(allocation="uniform"), restore="none", scorer="random")
    found = [accuracy(one, pixels, labels) for one in (model, smaller, bare)]
    assert found[0] > 0.9
    assert found[1] > found[0] - 0.15 > found[2] + 0.1


def test_every_step_reads_sounds():
    smaller, report = secateur.prune(
        speech_model(), inputs=images(speech_model(), 72), budget="macs=0.7", steps=2,
        cut=Cut(units=["heads", "neurons", "layers"]), reading=READING,
    )  # fmt: skip
    assert report.budget[0].reached <= 0.7
    assert (report.num_texts, report.quality.num_texts) == (65, 7)
    assert len(report.reconstruction) == len(report.distillation) == 2
    assert report.max_difference <= 1e-4
    assert len(smaller.encoder.layers) == report.units["layers"][1]


def test_tokens_do_what_their_texts_do():
    """Batches of token ids, of other sizes than a step's own, are the same texts to every step."""
    model, texts, ready = tiny_model("bert"), {"texts": TEXTS, "tokenizer": tiny_tokenizer()}, tokens_of(TEXTS)
    cut = Cut(budget="macs=0.7", allocation="sensitivity")
    given = {"cut": cut, "restore": "reconstruct", "reading": READING}
    report, found = (secateur.prune(model, **read, **given)[1] for read in (texts, {"inputs": ready}))
    assert found.mask == report.mask
    assert found.num_texts == report.num_texts == 40
    assert found.reconstruction == pytest.approx(report.reconstruction, rel=1e-3)
    heads = even_mask(find_units(model, ["heads"]))
    wanted, refined = (
        secateur.refine_mask(model, heads, steps=3, reading=READING, **read) for read in (texts, {"inputs": ready})
    )
    assert refined[0] == wanted[0]
    assert refined[1] == pytest.approx(wanted[1], rel=1e-3)


def test_a_pruned_model_learns_from_ready_inputs():
    teacher, student = tiny_model("vit"), tiny_model("vit")
    secateur.remove_(student, even_mask(find_units(student, ["heads"])))
    before, after = secateur.distill_(
        student, teacher, inputs=images(teacher, 96), steps=20, learning_rate=3e-3, reading=READING
    )
    assert after < before / 2


def test_inputs_of_unlike_shapes_never_share_a_batch():
    model = speech_model()
    sounds = [{"input_values": torch.randn(12, length)} for length in (800, 960, 800, 960, 800, 960)]
    prepared, rows = PreparedModel(model), examples_of(None, sounds)
    batches = list(prepared.batches(rows, 8))
    assert [tuple(batch["input_values"].shape) for batch in batches[:4]] == [(8, 800), (4, 800), (8, 960), (4, 960)]
    assert torch.equal(torch.cat([batch["input_values"] for batch in batches[:2]]), sounds[0]["input_values"])
    chosen = [rows[i] for i in reading_order(rows, Reading(stop=60))]
    assert [len(batch["input_values"]) for batch in prepared.batches(chosen, 32)] == [27, 32, 1]
    quality = QualityJudge(prepared, rows, READING)()
    assert (quality.num_texts, quality.cosine) == (72, pytest.approx(1, abs=1e-5))
    _, report = secateur.prune(model, inputs=sounds, restore="distill", steps=2, reading=READING)
    assert (report.num_texts, len(report.distillation)) == (65, 2)
    sounds = [{"input_values": torch.randn(2, 800 + 160 * number)} for number in range(4)]
    with pytest.raises(InvalidInputError, match=r"`inputs` must be at least 3 a batch.*got 2; give more of one shape"):
        secateur.prune(model, inputs=sounds, restore="reconstruct", reading=READING)


def test_labels_go_with_their_examples():
    """In whatever order the examples are read: of two shapes here, in turn."""
    model, draw = tiny_classifier("bert"), torch.Generator().manual_seed(0)
    shapes = [(4, 9), (4, 5), (4, 9), (4, 5)]
    ready = [{"input_ids": torch.randint(4, 99, shape, generator=draw)} for shape in shapes]
    labels = torch.randint(0, 3, (16,), generator=draw).tolist()
    wanted = secateur.score(model, scorer="fisher", inputs=ready, labels=labels)
    _, report = secateur.prune(model, inputs=ready, labels=labels, scorer="fisher", reading=READING)
    for site, row in report.scores.items():
        assert torch.allclose(row, wanted[site], rtol=1e-4)


def test_switches_and_what_a_model_does_not_take_come_along():
    model, extra = tiny_model("bert"), {"return_dict": True, "labels": None}
    ready = [{**extra, **batch, "weights": torch.ones(len(batch["input_ids"]))} for batch in tokens_of(TEXTS)]
    _, report = secateur.prune(model, inputs=ready, cut=Cut(refine=2), restore="reconstruct", reading=READING)
    assert len(report.refinement) == 3
    assert report.num_texts == 40


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], r"`inputs` must be a list of at least one batch, got \[\]"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, "`inputs` must be a list of at least one batch"),
        ([{}], r"`inputs\[0\]` must be a mapping"),
        ([{"use_cache": False}], r"`inputs\[0\]` must hold a tensor with a row for each example"),
        ([{"pixel_values": torch.zeros(0, 3, 16, 16)}], r"`inputs\[0\]` must hold at least one example"),
        (
            [{"pixel_values": torch.zeros(4, 3, 16, 16), "grid": torch.zeros(9, 2)}],
            r"`inputs\[0\]\['grid'\]` must have a row for each of the 4 examples, got \(9, 2\)",
        ),
        ([{"pixel_values": [[0.0]]}], r"`inputs\[0\]\['pixel_values'\]` must be a tensor or a switch"),
    ],
)
def test_inputs_that_are_no_examples_are_refused(inputs, message):
    model = tiny_model("vit")
    mask = even_mask(find_units(model, ["heads"]))
    calls = [
        lambda: secateur.prune(model, inputs=inputs),
        lambda: secateur.reconstruct_(model, mask, inputs=inputs),
        lambda: secateur.distill_(model, tiny_model("vit"), inputs=inputs),
        lambda: secateur.refine_mask(model, mask, inputs=inputs),
    ]
    for call in calls:
        with pytest.raises(InvalidInputError, match=message):
            call()


def test_what_does_not_go_with_ready_inputs_is_refused_by_name():
    model = tiny_model("vit")
    mask, ready = even_mask(find_units(model, ["heads"])), images(model, 12)
    with pytest.raises(InvalidInputError, match="`texts` must be left out where `inputs` are given"):
        secateur.prune(model, TEXTS, inputs=ready)
    with pytest.raises(InvalidInputError, match="`texts` must be given, or `inputs`"):
        secateur.reconstruct_(model, mask)
    with pytest.raises(InvalidInputError, match=r"`inputs` must be at least 6, 3 for each half.*got 4"):
        secateur.reconstruct_(model, mask, inputs=[example_inputs(model, batch=4)])
    with pytest.raises(InvalidInputError, match="`inputs` must be at least 21, as every tenth judges, got 12"):
        secateur.distill_(model, tiny_model("vit"), inputs=ready)
    with pytest.raises(InvalidInputError, match="`inputs` must be at least 8 with allocation 'sensitivity', got 4"):
        secateur.prune(model, inputs=[example_inputs(model, batch=4)], cut=Cut(allocation="sensitivity"))
    with pytest.raises(InvalidInputError, match="`inputs` hold no texts to fine-tune a classification head on"):
        secateur.prune(model, inputs=ready, scorer="taylor", labels=[0, 1] * 6)
    with pytest.raises(InvalidInputError, match="ViTModel takes `pixel_values` and no texts; give `inputs`"):
        secateur.reconstruct_(model, mask, TEXTS, tiny_tokenizer())
