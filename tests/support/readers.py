"""Every reader of files that others may send: what it reads, and what is done with it. See fuzzing.py.

What transformers, tokenizers and datasets read by themselves is theirs, such as the other entries of a config.json.
"""

import contextlib
import gzip
import io
import json
import math
import shutil
from functools import cache
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import AutoModel

from secateur import cli
from secateur.cli.compare import compare
from secateur.errors import InvalidInputError
from secateur.measuring.latency_table import Kind, LatencyTable, Level
from secateur.measuring.onnx_graph import graphs_in
from secateur.models.loading import TOKENIZER_FILES
from secateur.models.originals import recorded_original
from secateur.models.places import check_no_kernels, check_tokenizer_files
from secateur.models.sentence_transformers import copy_modules, embedding_of, transformer_folder
from secateur.pruners.joint_network import JointPruner
from secateur.pruners.map_network import MetaPruner
from secateur.removal.digest import RECIPES, WEIGHTS, changed_tensors, check_recipes, tensor_digest
from secateur.removal.legacy import has_v4_pruning
from secateur.removal.remove import remove_
from secateur.report.how_to_load import how_to_load
from secateur.scorers.smp import load_pruner, read_pruner
from secateur.settings import Shape
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_units
from secateur.sites.recipe import KEY, Recipe
from secateur.support.files import read_json
from secateur.texts.data import load_task
from secateur.units.masks import Mask
from secateur.units.scores import Scores
from secateur.units.select import select
from tests.support.fuzzing import Reader, fuzz, one
from tests.support.run_readers import RUN_READERS
from tests.support.tiny import CONFIGS, tiny_model, uneven_mask
from tests.support.units import ragged_mask

__all__ = ["READERS", "fuzz", "one"]

PLACES = ("encoder.layer.0.attention.self", "encoder.layer.0.attention.self.forward", "config", "layers.0", "10x4 1x4")
KINDS = ("bert", "t5", "llama", "vit")


def dump(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))


@cache
def recipes():
    """Recipes: a BERT with an emptied site, a T5, whose sites share a bias, a Llama with grouped queries, a ViT without
    some neurons.
    """
    found = {}
    for kind in KINDS:
        model = tiny_model(kind)
        if kind == "vit":
            remove_(model, ragged_mask(find_units(model, ["heads", "neurons"])))
        else:
            remove_(model, uneven_mask(find_sites(model), empty=kind == "bert"))
        found[kind] = json.loads(json.dumps(getattr(model.config, KEY)))
    return found


def write_recipes(folder):
    for kind, recipe in recipes().items():
        dump(folder / f"{kind}.json", recipe)


def read_recipe(folder, name):
    recipe = Recipe.from_json(json.loads((folder / name).read_text()))
    again = Recipe.from_json(recipe.to_json())
    assert (again.kept, again.sites, again.bypassed) == (recipe.kept, recipe.sites, recipe.bypassed)
    assert all(max(kept, default=0) < again.sites[name].num_units for name, kept in again.kept.items())


def build_model(folder, name):
    config = CONFIGS[name.removesuffix(".json")]()
    setattr(config, KEY, json.loads((folder / name).read_text()))
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    hidden = {
        (name, key) for name, module in model.named_modules() for key in vars(module)
        if callable(getattr(type(module), key, None)) and not callable(vars(module)[key])
    }  # fmt: skip
    assert hidden == set(), "a recipe has hidden methods behind values of its own"


def write_heads_of_4(folder):
    dump(folder / "pruned_heads.json", {"0": [1, 2], "2": [0]})


def build_model_of_4(folder, name):
    config = CONFIGS["bert"]()
    config.pruned_heads = json.loads((folder / name).read_text())
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert KEY in vars(model.config) or not config.pruned_heads


def write_digests(folder):
    tensors = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2, dtype=torch.bfloat16)}
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    about = {RECIPES: json.dumps(["0123", "4567"]), WEIGHTS: json.dumps(digests)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt", **about})


def read_digests(folder, name):
    check_recipes({"0123"}, [folder / name])
    changed = changed_tensors([folder / name])
    assert changed is None or {*map(type, changed)} <= {str}


def write_scores(folder):
    """A scores file with all there can be in it."""
    Scores(
        {"a.0": torch.tensor([0.5, -math.inf, 2.0, 1.0]), "a.1": torch.arange(6.0)},
        {"a.1": 3}, "random", {"a.0": torch.eye(4)}, num_texts=7, agreement=0.9,
    ).save(folder / "scores.json")  # fmt: skip


def read_scores(folder, name):
    scores = Scores.load(folder / name)
    for ratio, allocation, least in ((0.5, "uniform", 1), (0.9, "ranking", 0)):
        mask = select(scores, ratio, allocation, least)
        for site, vector in scores.items():
            present = vector > -math.inf
            assert not bool((mask[site] & ~present).any())
            assert int(mask[site].sum()) >= min(least, int(present.sum()))
    assert json.loads(json.dumps(Scores.from_json(scores.to_json()).to_json())) == scores.to_json()
    assert scores._repr_html_()


def write_mask(folder):
    Mask({"a": torch.tensor([True, False, True]), "b": torch.tensor([False, False])}).save(folder / "mask.json")


def read_mask(folder, name):
    mask = Mask.load(folder / name)
    assert Mask.from_json(mask.to_json()) == mask
    assert 0 <= mask.pruning_ratio <= 1
    assert mask._repr_html_()


ROWS = [{"sentence1": f"a {n}", "sentence2": 'b, "c"', "label": n % 2, "score": n / 2} for n in range(3)]


def write_data(folder):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    comma = b'sentence,label\ngood film,1\n"bad, ""very"" bad",0\n'
    tab = b"premise\thypothesis\tlabel\na b\tc d\t0.5\ne\tf\t-1\n"
    for name, content in {
        "train.csv": comma, "train.tsv": tab, "train.jsonl": lines, "train.json": json.dumps(ROWS).encode(),
        "train.csv.gz": gzip.compress(comma, 1), "train.jsonl.gz": gzip.compress(lines, 1),
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)


def write_parquet(folder):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "train.parquet")


def read_data(folder, name):
    task = load_task(folder / name)
    assert len(task.head(2)) == min(2, len(task))
    assert task.labels is None or task.num_labels


def write_settings(folder):
    settings = {"model": str(folder), "data": ["a", "b"], "scorer": "random", "out": "there", "ratio": [0.25, 0.5]}
    dump(folder / "compare.yaml", {**settings, "seeds": 2, "bf16": True, "learning-rate": 0.1})


def read_settings(folder, name):
    given, said = {}, io.StringIO()
    with patch.object(compare, "callback", given.update), contextlib.redirect_stderr(said):
        code = cli.main(["compare", "--config", str(folder / name)])
    if code == 2:
        raise InvalidInputError(said.getvalue().removesuffix("\n"))
    assert {"model", "data", "out"} <= set(given)


def write_sentence_transformer(folder):
    place = "sentence_transformers"
    kinds = {"models.Transformer": "", "models.Pooling": "1_Pooling", "models.Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{place}.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    dump(folder / "modules.json", modules)
    dump(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    dump(folder / "sentence_bert_config.json", {"max_seq_length": 16})
    dump(folder / "config_sentence_transformers.json", {"model_type": "SentenceTransformer"})
    dump(folder / "config.json", {"architectures": ["BertModel"], KEY: {}})
    (folder / "2_Normalize").mkdir()


def read_sentence_transformer(folder, name):
    assert transformer_folder(folder).is_relative_to(folder)
    target = folder / ".copy"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    assert copy_modules(folder, target).is_relative_to(target)
    assert (how_to_load(folder) or {"code": "…"})["code"]
    embedding_of(folder)


def write_model_settings(folder):
    dump(folder / "tokenizer_config.json", {"vocab_file": "vocab.txt", "model_max_length": 16, "merges_file": None})
    (folder / "vocab.txt").write_text("a\nb\n")
    config = {"architectures": ["BertModel"], "attn_implementation": {"": "sdpa"}, "text_config": {"hidden_size": 4}}
    dump(folder / "config.json", {**config, KEY: {"base_model": "x"}, "pruned_heads": {"0": [1]}})


def read_model_settings(folder, name):
    check_tokenizer_files(folder, TOKENIZER_FILES)
    check_no_kernels(read_json(folder / "config.json"), str(folder))
    assert isinstance(recorded_original(folder), str | None)
    assert isinstance(has_v4_pruning(folder), bool)
    assert how_to_load(folder)["code"]


def write_latency_table(folder):
    levels = [Level(4, 0, [2.0, 2.5]), Level(2, 10, [1.5, 1.5]), Level(1, 15.5, [1.0, 1.5])]
    dump(folder / "table.json", LatencyTable(Shape(8, 16), (Kind(("a", "b"), tuple(levels)),)).to_json())


def read_latency_table(folder, name):
    table = LatencyTable.load(folder / name)
    assert LatencyTable.load(folder / name).to_json() == table.to_json()
    for kind in table.kinds:
        assert 0 <= kind.saved(7) <= 1
        assert kind.rounded(2) >= 2


def write_graph(folder):
    tiny_model("bert").config.save_pretrained(folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").touch()


def read_graph(folder, name):
    (graph,) = graphs_in(folder).values()
    assert all(not parameter.is_meta for parameter in graph.base.parameters())


def write_meta_pruner(folder):
    torch.manual_seed(0)
    MetaPruner().save_pretrained(folder)


def read_meta_pruner(folder, name):
    check_pruner(load_pruner(folder))


def check_pruner(pruner):
    assert pruner.score_maps(torch.rand(1, 1, 4, 4), None, True).shape == (1, 1)


def write_authors_pruner(folder):
    torch.manual_seed(0)
    torch.save(MetaPruner().state_dict(), folder / "authors.bin")


def read_authors_pruner(folder, name):
    check_pruner(load_pruner(folder / name))


def write_joint_pruner(folder):
    torch.manual_seed(0)
    JointPruner(width=4, layers=1, attention_heads=2, members=1, remembered=[(2, 1)]).save_pretrained(folder)


def read_joint_pruner(folder, name):
    pruner = read_pruner(JointPruner, folder)
    pruner.save_pretrained(folder / ".copy")


HEADS_FILES = ("pruned_heads.json",)
PRUNER_FILES = ("config.json", "model.safetensors")
JSON_FILES = tuple(f"{kind}.json" for kind in KINDS)
DATA_FILES = tuple(f"train.{ending}" for ending in ("csv", "tsv", "jsonl", "json", "csv.gz", "jsonl.gz"))
SENTENCE_FILES = ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "config.json")
READERS = {
    reader.tried: reader
    for reader in [
        Reader("`head_pruning` of a config.json", write_recipes, JSON_FILES, read_recipe, values=PLACES, bytes=False),
        # A model of transformers is built in each, which takes many times as long as the reading.
        Reader("a model built from such a config", write_recipes, JSON_FILES, build_model, 5, PLACES, bytes=False),
        Reader("`pruned_heads` of transformers 4", write_heads_of_4, HEADS_FILES, build_model_of_4, 20, bytes=False),
        Reader("digests in a safetensors file", write_digests, ("model.safetensors",), read_digests),
        Reader("a scores file, and masks selected from it", write_scores, ("scores.json",), read_scores),
        Reader("a mask file", write_mask, ("mask.json",), read_mask),
        Reader("what units cost, of `bench --table`", write_latency_table, ("table.json",), read_latency_table),
        Reader("the config beside an exported graph", write_graph, ("config.json",), read_graph, 20, bytes=False),
        Reader("texts and labels of .csv, .tsv, .jsonl, .json, .gz", write_data, DATA_FILES, read_data),
        Reader("texts and labels of .parquet", write_parquet, ("train.parquet",), read_data),
        Reader("the YAML of `compare --config`", write_settings, ("compare.yaml",), read_settings),
        Reader("a folder of sentence-transformers", write_sentence_transformer, SENTENCE_FILES,
               read_sentence_transformer, values=("0/1", "modules.json", "..", ".")),
        Reader("what a model's settings name", write_model_settings, ("config.json", "tokenizer_config.json"),
               read_model_settings),
        Reader("a meta-pruner's folder", write_meta_pruner, PRUNER_FILES, read_meta_pruner),
        Reader("a meta-pruner of the paper's authors", write_authors_pruner, ("authors.bin",), read_authors_pruner),
        Reader("a joint pruner's folder", write_joint_pruner, PRUNER_FILES, read_joint_pruner),
        *RUN_READERS,
    ]
}  # fmt: skip
