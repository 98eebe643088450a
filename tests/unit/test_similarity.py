"""Encoders without a head, evaluated by the cosines of their embeddings."""

import json

import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from secateur import cli
from secateur.errors import InvalidInputError
from secateur.finetuning.similarity import POOLINGS, evaluate_similarity
from secateur.models.sentence_transformers import embedding_of, pooling_of
from secateur.settings import Reading
from secateur.texts.data import Task
from tests.support.sentences import SENTENCES
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

PAIRS = tiny_texts(12, pairs=True)
TASK = Task("pairs", PAIRS, [0.5 * (i % 7) for i in range(12)])
READING = Reading(batch_size=5, max_length=16)


def test_poolings_by_hand():
    states = torch.tensor([[[1.0, 4.0], [3.0, 2.0], [9.0, 9.0]], [[8.0, 8.0], [2.0, -4.0], [4.0, -2.0]]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])[..., None]  # padded on the right, and on the left
    root = 2**0.5
    for name, expected in {
        "mean": [[2, 3], [3, -3]],
        "mean_sqrt_len_tokens": [[4 / root, 6 / root], [6 / root, -6 / root]],
        "weightedmean": [[7 / 3, 8 / 3], [10 / 3, -8 / 3]],
        "max": [[3, 4], [4, -2]],
        "cls": [[1, 4], [2, -4]],
        "lasttoken": [[3, 2], [4, -2]],
    }.items():
        torch.testing.assert_close(POOLINGS[name](states, mask), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_correlations_of_the_cosines_of_each_text_alone(kind):
    """No padding, no batches: text by text, as the embeddings are defined."""
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    encoder = model.get_encoder() if kind == "t5" else model

    @torch.no_grad()
    def embedding(text):
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=16, return_token_type_ids=False)
        states = encoder(**tokens).last_hidden_state[0]
        return torch.cat([states.mean(0), states[0]])

    cosines = [float(torch.cosine_similarity(embedding(a), embedding(b), dim=0)) for a, b in PAIRS]
    found = evaluate_similarity(model, tokenizer, TASK, ("mean", "cls"), reading=READING)
    assert found["pearson"] == pytest.approx(pearsonr(cosines, TASK.labels).statistic, abs=1e-4)
    assert found["spearman"] == pytest.approx(spearmanr(cosines, TASK.labels).statistic, abs=1e-4)


def test_what_cannot_be_measured_so():
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    for task in (Task("one", ["a", "b"], [0.5, 1.0]), Task("classes", PAIRS, [0, 1] * 6), Task("none", PAIRS)):
        with pytest.raises(InvalidInputError, match="`task` must have pairs of texts with a score each"):
            evaluate_similarity(model, tokenizer, task)
    with pytest.raises(InvalidInputError, match=r"`pooling` must be among mean, .*got 'median'"):
        evaluate_similarity(model, tokenizer, TASK, ("median",))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, ("mean", "lasttoken")),
        ({"pooling_mode": "max"}, ("max",)),
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
    ],
)
def test_the_folder_says_how_tokens_are_pooled(settings, expected, tmp_path):
    assert pooling_of(tmp_path) == ("mean",)  # a plain encoder's
    assert embedding_of(tmp_path) is None
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InvalidInputError, match="holds no settings of a pooling"):
        pooling_of(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **settings}))
    assert pooling_of(tmp_path) == expected
    assert embedding_of(tmp_path) == (expected, True)
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))
    assert embedding_of(tmp_path) == (expected, False)
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"path": "", "type": "models.Dense"}]))
    with pytest.raises(InvalidInputError, match=r"`model` must have no modules but .* got 'Dense'; evaluate it with"):
        pooling_of(tmp_path)
    with pytest.raises(InvalidInputError, match=r"got 'Dense'; export it without its modules.json"):
        embedding_of(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([modules[0], {"path": "", "type": "models.LogitScore"}]))
    assert embedding_of(tmp_path) is None  # it scores pairs


@pytest.mark.real
def test_the_command_measures_what_sentence_transformers_does(minilm_folder, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    pairs = list(zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True))
    scores = [0.5 * ((3 * i) % 7) for i in range(len(pairs))]
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(
            json.dumps({"sentence1": a, "sentence2": b, "label": score}) + "\n"
            for (a, b), score in zip(pairs, scores, strict=True)
        )
    )
    line = ["evaluate", str(minilm_folder), "--data", str(file), "--device", "cpu"]
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    vectors = torch.tensor(SentenceTransformer(str(minilm_folder), device="cpu").encode(SENTENCES))
    cosines = torch.cosine_similarity(vectors, vectors.roll(-1, 0)).tolist()
    assert found["metrics"]["pearson"] == pytest.approx(pearsonr(cosines, scores).statistic, abs=1e-4)
    assert found["metrics"]["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-4)
    assert (found["texts"], found["pooling"]) == (len(pairs), "mean")
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    assert out.startswith("measured: cosine similarity of embeddings, no trained head\npooling: mean\n")
    assert "(main metric)" in out
