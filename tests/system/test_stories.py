"""The first hour of four people with secateur: what each of them does, from the model to what they wanted it for."""

import json
import re
from html.parser import HTMLParser

import numpy
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import secateur
from secateur import cli
from secateur.removal.checkpoint import without_hook
from secateur.support.run_files import ROWS
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = tiny_texts(64)
HEADS = 12  # of the tiny BERT, four in each of three layers


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model's folder, and labelled sentences in `data`: is the word good in it?"""
    folder = tmp_path_factory.mktemp("stories")
    tiny_model("bert").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split, texts in (("train", TEXTS), ("dev", tiny_texts(16, seed=1))):
        rows = "\n".join(f"{text},{int('good' in text)}" for text in texts)
        (folder / "data" / f"{split}.csv").write_text(f"sentence,label\n{rows}\n")
    return folder


@pytest.fixture
def secateur_says(capsys):
    """Runs a command line that ends with `code`, and returns what it prints: an object with `--json`, else text."""

    def run(*words, code=0):
        assert cli.main([str(word) for word in words]) == code
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in words else out

    return run


class Grid(HTMLParser):
    """What a notebook's grid has in its cells, without the names of rows."""

    def __init__(self, text):
        super().__init__()
        self.titles = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "td" and "title" in dict(attributes):
            self.titles.append(dict(attributes)["title"])


def embeddings(model, tokenizer, texts):
    """Mean-pooled last states `[texts, width]`."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    there = batch["attention_mask"].unsqueeze(2)
    return (states * there).sum(dim=1) / there.sum(dim=1)


def test_a_newcomer_in_a_notebook(work, tmp_path):
    out = tmp_path / "small"
    small, report = secateur.prune(str(work / "model"), TEXTS, budget="heads=0.5", out=out)

    assert "kept 6 of 12 heads" in repr(report)
    for shown in (report, report.mask):
        titles = Grid(shown._repr_html_()).titles
        assert len(titles) == HEADS
        assert sum(title.endswith("kept") for title in titles) == 6

    loaded, tokenizer = AutoModel.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    vectors = embeddings(loaded, tokenizer, TEXTS[:4])
    assert vectors.shape == (4, 32)
    torch.testing.assert_close(vectors, embeddings(small.eval(), tokenizer, TEXTS[:4]))
    assert loaded.num_parameters() < tiny_model("bert").num_parameters()


def test_a_practitioner_on_the_command_line(work, tmp_path, secateur_says):
    data, small, tuned = work / "data", tmp_path / "small", tmp_path / "tuned"
    before = secateur_says("info", work / "model", "--json")
    secateur_says("prune", work / "model", "--data", data, "--budget", "macs=0.5", "--steps", 2, "--out", small)
    after = secateur_says("info", small, "--json")
    assert 0.4 * before["cost"]["macs"] < after["cost"]["macs"] <= 0.5 * before["cost"]["macs"]
    verified = secateur_says("verify", small, "--json")
    assert (verified["verdict"], verified["weights"], verified["distilled"]) == ("trained", "as saved", True)
    assert verified["tensors"].keys() <= {"equal", "refitted", "trained"}

    card = (small / "README.md").read_text()
    assert f"{before['parameters']:,} | {after['parameters']:,}" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names = {}
    exec(code.replace("FOLDER", str(small)), names)
    assert names["model"].num_parameters() == after["parameters"]

    learned = secateur_says("finetune", small, "--data", data, "--epochs", 1, "--out", tuned, "--json")
    judged = secateur_says("evaluate", tuned, "--data", data, "--json")
    assert judged["metrics"] == pytest.approx(learned["metrics"])
    assert secateur_says("info", tuned, "--json")["sites"] == after["sites"]


def test_a_researcher_compares_two_criteria(work, tmp_path, secateur_says):
    model, tokenizer = AutoModel.from_pretrained(work / "model").eval(), AutoTokenizer.from_pretrained(work / "model")
    masks = {}
    for scorer in ("magnitude", "contribution"):
        scores = secateur.score(model, TEXTS, scorer=scorer, tokenizer=tokenizer)
        mask = secateur.select(scores, 0.5, allocation="ranking")
        assert (scores.scorer, mask.num_kept) == (scorer, HEADS // 2)
        masks[scorer] = mask
    mask = masks["contribution"]
    assert mask != masks["magnitude"]

    dense = embeddings(model, tokenizer, TEXTS[:4])
    with secateur.gated(model, mask):
        preview = embeddings(model, tokenizer, TEXTS[:4])
    torch.testing.assert_close(embeddings(model, tokenizer, TEXTS[:4]), dense)
    assert (preview - dense).abs().max() > 1e-3
    secateur.remove_(model, mask)
    torch.testing.assert_close(embeddings(model, tokenizer, TEXTS[:4]), preview, atol=1e-4, rtol=1e-4)

    runs, page = tmp_path / "runs", tmp_path / "page.html"
    scorers = ("--scorer", "magnitude", "--scorer", "contribution")
    secateur_says(
        "compare", "--model", work / "model", "--data", work / "data", *scorers, "--seeds", 1, "--epochs", 1,
        "--texts", 16, "--jobs", 1, "--out", runs,
    )  # fmt: skip
    assert len((runs / ROWS).read_text().splitlines()) == 3  # the dense model, and each criterion's
    secateur_says("report", runs, "--out", page)
    assert all(name in page.read_text() for name in ("magnitude", "contribution", "</html>"))


def test_an_engineer_of_a_search_engine(work, tmp_path, secateur_says, remote_code):
    from sentence_transformers import SentenceTransformer

    whole, small, alone = tmp_path / "whole", tmp_path / "small", tmp_path / "alone"
    dense = SentenceTransformer(str(work / "model"), device="cpu")
    dense.save_pretrained(str(whole))
    index = dense.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    data = work / "data"
    secateur_says("prune", whole, "--data", data, "--budget", "heads=0.75", "--scorer", "matching", "--out", small)

    embedder = SentenceTransformer(str(small), device="cpu")
    asked = embedder.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    assert asked.shape == index.shape == (64, 32)
    cosines = asked @ index.T
    assert numpy.diag(cosines).mean() > 0.9
    assert numpy.diag(cosines).mean() > cosines.mean()

    secateur_says("export", small, "--format", "standalone", "--out", alone)
    with without_hook():
        served = SentenceTransformer(str(alone), device="cpu", trust_remote_code=True)
    assert type(served[0].auto_model).__module__.startswith("transformers_modules")
    vectors = served.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    numpy.testing.assert_array_equal(vectors, asked)
