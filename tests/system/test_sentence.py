"""Folders of sentence-transformers stay such folders."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
from huggingface_hub import ModelCard

from secateur import cli
from secateur.errors import InvalidInputError
from secateur.models.sentence_transformers import copy_modules, transformer_folder
from secateur.removal.remove import gated
from secateur.units.masks import Mask
from tests.support.bare import BARE
from tests.support.sentences import SENTENCES

pytestmark = [
    pytest.mark.real, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(minilm_folder, tmp_path_factory):
    """The same model as sentence-transformers saves it today, and with the transformer in a folder of its own."""
    from sentence_transformers import SentenceTransformer

    root = tmp_path_factory.mktemp("sentence")
    model = SentenceTransformer(str(minilm_folder), device="cpu")
    model.max_seq_length = 64
    model.save_pretrained(str(root / "flat"))
    shutil.copytree(root / "flat", root / "nested")
    inner = root / "nested" / "0_Transformer"
    inner.mkdir()
    modules = json.loads((root / "nested" / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (root / "nested" / "modules.json").write_text(json.dumps(modules))
    for file in (root / "nested").iterdir():
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            file.rename(inner / file.name)
    data = root / "texts.csv"
    data.write_text("sentence\n" + "\n".join(f'"{s}"' for s in SENTENCES) + "\n")
    return root


def embed(folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return model, model.encode(SENTENCES, show_progress_bar=False)


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_a_pruned_folder_is_still_a_sentence_transformer(layout, folders, tmp_path, capsys):
    source, out = folders / layout, tmp_path / "small"
    code = cli.main(
        [
            "prune",
            str(source),
            "--data",
            str(folders / "texts.csv"),
            "--scorer",
            "magnitude",
            "--restore",
            "none",
            "--out",
            str(out),
        ]
    )
    assert code == 0
    model, found = embed(out)
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert model.max_seq_length == 64
    whole, dense = embed(source)
    kept = json.loads((out / "pruning_report.json").read_text())["kept_heads"]
    vectors = {name: torch.tensor([h in heads for h in range(12)]) for name, heads in kept.items()}
    assert sum(int(v.sum()) for v in vectors.values()) == 36
    with gated(whole[0].auto_model, Mask(vectors)):
        preview = whole.encode(SENTENCES, show_progress_bar=False)
    numpy.testing.assert_allclose(found, preview, atol=1e-5)
    assert abs(found - dense).max() > 1e-2
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["library_name"] == "sentence-transformers"
    names = {}
    exec(re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[0].replace("FOLDER", str(out)), names)
    numpy.testing.assert_array_equal(names["model"].encode(SENTENCES, show_progress_bar=False), found)
    names["model"].save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "README.md").read_text() == (out / "README.md").read_text()
    capsys.readouterr()
    assert cli.main(["info", str(out), "--json"]) == 0
    assert sum(site["heads"] for site in json.loads(capsys.readouterr().out)["sites"]) == 36

    alone = tmp_path / "alone"
    assert cli.main(["export", str(out), "--format", "standalone", "--out", str(alone)]) == 0
    printed = capsys.readouterr().out
    (code,) = alone.rglob("modeling_pruned.py")
    assert f"by the code in {code} alone" in printed
    assert f"model: {code.parent} " in printed
    # In a process where secateur cannot be imported.
    script = BARE.split("import torch")[0] + (
        "import numpy\nfrom sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu', trust_remote_code=True)\n"
        "numpy.save(sys.argv[3], model.encode(json.loads(sys.argv[2]), show_progress_bar=False))\n"
    )
    if layout == "flat":
        saved = tmp_path / "found.npy"
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
        arguments = [sys.executable, "-c", script, str(alone), json.dumps(SENTENCES), str(saved)]
        subprocess.run(arguments, check=True, capture_output=True, env=environment)
        numpy.testing.assert_array_equal(numpy.load(saved), found)


def test_a_sentence_transformer_in_memory_is_pruned_to_one(folders, tmp_path):
    import secateur

    whole, dense = embed(folders / "flat")
    small, report = secateur.prune(whole, SENTENCES, 0.5, restore="none")
    assert type(small) is type(whole)
    assert small is not whole
    assert [type(module).__name__ for module in small] == ["Transformer", "Pooling", "Normalize"]
    numpy.testing.assert_array_equal(whole.encode(SENTENCES, show_progress_bar=False), dense)
    found = small.encode(SENTENCES, show_progress_bar=False)
    with gated(whole[0].auto_model, report.mask):
        preview = whole.encode(SENTENCES, show_progress_bar=False)
    numpy.testing.assert_allclose(found, preview, atol=1e-5)
    assert report.after.heads == 36
    small.save_pretrained(str(tmp_path / "small"))
    numpy.testing.assert_array_equal(embed(tmp_path / "small")[1], found)

    # Scores are those of the transformer inside, read with the embedder's own tokenizer.
    inside = secateur.score(whole[0].auto_model, SENTENCES, tokenizer=whole.tokenizer)
    for site, row in secateur.score(whole, SENTENCES).items():
        torch.testing.assert_close(row, inside[site], rtol=0, atol=0)


def test_other_folders_have_no_modules(minilm_folder, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "out").mkdir()
    assert transformer_folder(tmp_path / "plain") == tmp_path / "plain"
    assert copy_modules(tmp_path / "plain", tmp_path / "out") == tmp_path / "out"
    assert copy_modules("some/id-that-is-not-there", tmp_path / "out") == tmp_path / "out"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is no list of modules"),
        ("{", "is no list of modules"),
        ('[{"path": "../elsewhere", "type": "sentence_transformers.models.Transformer"}]', "a path outside its folder"),
    ],
)
def test_damaged_lists_are_refused(content, message, tmp_path):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        transformer_folder(tmp_path)
