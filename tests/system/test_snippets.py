"""Every command and every Python block of README.md and docs/*.md, run as it stands.

The blocks of a page run in order, in one folder and one namespace, where what they name is small: folders `MODEL` and
`DECODER`, a file `texts.csv`, tasks in `GLUE`. A block that cannot run here says why in a comment before it,
`<!-- not run: … -->`.
"""

import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

import secateur
from secateur import cli
from secateur.comparing.splits import splits
from secateur.meta_training.fitting import FitConfig
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.joint_training import train_joint_pruner
from secateur.restoring.distillation import distill_
from tests.support.legacy import v4_folder
from tests.support.tiny import tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}

# Pages with tests of their own, on real models or with packages of their own: page, kind of block → the test.
ELSEWHERE = {
    ("README.md", "python"): "test_readme.py",
    ("deployment.md", "python"): "test_deployment_page.py",
    ("deployment.md", "sh"): "test_deployment_page.py",
    ("examples.md", "python"): "test_worked_examples.py",
}

# Put behind a command, where the last value of an option counts: as little work as there can be.
LITTLE = {
    "bench": "--rounds 1",
    "compare": "--jobs 1",
    "distill": "--steps 2",
    "finetune": "--epochs 1",
    "joint-train": "--samples 1 --texts 8 --batch-size 4 --judges 1",
    "prune": "--steps 2",
    "reproduce": "--scale tiny --model MODEL --data DATA --jobs 1",
    "meta-train": "--steps 1 --batch-size 4 --batches-per-step 1",
}

BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n+)?^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks_of(name):
    """Kind and text of each block that runs here."""
    found = BLOCK.findall(PAGES[name].read_text(encoding="utf-8"))
    return [(kind, text) for reason, kind, text in found if not reason and (name, kind) not in ELSEWHERE]


def commands_in(block):
    """The words of each command of secateur, also under accelerate's launcher, which one process does without."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("accelerate launch -m secateur.cli", "secateur"), comments=True)
        if words and words[0] == "secateur":
            yield words[1:]


def has_work(name):
    return any(kind == "python" or list(commands_in(text)) for kind, text in blocks_of(name))


RUN_HERE = [name for name in PAGES if has_work(name)]


def test_each_block_runs_somewhere():
    for (name, kind), file in ELSEWHERE.items():
        blocks = [text for _, found, text in BLOCK.findall(PAGES[name].read_text(encoding="utf-8")) if found == kind]
        assert blocks, (name, kind)
        assert name in (ROOT / "tests" / "system" / file).read_text(encoding="utf-8")
    fences = sum(len(re.findall(r"^```(?:sh|python)$", p.read_text(encoding="utf-8"), re.M)) for p in PAGES.values())
    assert fences == sum(len(BLOCK.findall(page.read_text(encoding="utf-8"))) for page in PAGES.values())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the pages name."""
    place = tmp_path_factory.mktemp("snippets")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=20,
        max_position_embeddings=512,
    )  # fmt: skip
    for name in ("MODEL", "MINILM"):
        AutoModel.from_config(config).save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
            vocab_size=20, pad_token_id=0,
        )
    ).save_pretrained(place / "DECODER")  # fmt: skip
    tiny_tokenizer().save_pretrained(place / "DECODER")
    small, _ = secateur.prune(place / "MODEL", tiny_texts(8))
    small.save_pretrained(place / "small")
    v4_folder(place / "OLD", {0: [1]})
    pandas.DataFrame({"sentence": tiny_texts(24)}).to_csv(place / "texts.csv", index=False)
    (place / "shards").mkdir()
    pandas.DataFrame({"text": tiny_texts(24)}).to_parquet(place / "shards" / "train-0.parquet")
    for name in ("DATA", "A", "B", "TASK", "ANOTHER", "cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "stsb"):
        folder = place / (name if name.isupper() else f"GLUE/{name}")
        folder.mkdir(parents=True)
        for split, count in (("train", 24), ("dev", 36)):
            pairs = name not in ("DATA", "A", "TASK", "cola", "sst2")
            rows = pandas.DataFrame(tiny_texts(count, pairs=pairs))
            rows.columns = ["sentence1", "sentence2"] if pairs else ["sentence"]
            rows["label"] = [0.5 * (i % 5) if name == "stsb" else i % 2 for i in range(count)]
            rows.to_csv(folder / f"{split}.tsv", sep="\t", index=False)
    return place


def names_of():
    """What the pages take as read in Python."""
    model, tokenizer, texts = AutoModel.from_pretrained("MODEL"), tiny_tokenizer(), tiny_texts(24)
    mask = secateur.select(secateur.score(model, texts, tokenizer=tokenizer))
    rows = [{"text": text} for text in texts]
    datasets = SimpleNamespace(load_dataset=lambda *_, **__: rows)  # the real ones come over the network
    return {
        "secateur": secateur, "torch": torch, "AutoModel": AutoModel, "datasets": datasets, "NAME": "MODEL",
        "model": model, "tokenizer": tokenizer, "texts": texts, "mask": mask,
    }  # fmt: skip


def made_up(settings, run, out, device):
    """The row of a comparison's run, whose work tests/system/test_compare.py is about."""
    return {
        "data": run.data, "task": splits(run.data)[0].name, "scorer": run.scorer, "ratio": run.ratio, "seed": run.seed,
        "metric": "accuracy", "value": 0.9 - run.ratio / 10, "constant": 0.5, "kept_heads": None,
        "cost": {"scoring_seconds": 1.0, "training_seconds": 1.0},
    }  # fmt: skip


@pytest.fixture
def in_place(place, tmp_path, monkeypatch):
    """A copy of the folder to work in, and little work for what takes long by itself."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("secateur.comparing.compare.score_run", lambda *_: None)
    monkeypatch.setattr("secateur.comparing.compare.train_run", made_up)
    monkeypatch.setattr("secateur.exporting.export.export_onnx", graph)
    for module in ("bench", "cost", "latency_table"):
        monkeypatch.setattr(f"secateur.measuring.{module}.time_in_turn", computed_in_turn)
    monkeypatch.setattr("secateur.restoring.distillation.distill_", partial(distill_, steps=2))
    monkeypatch.setattr(secateur, "distill_", partial(distill_, steps=2))
    monkeypatch.setattr("secateur.meta_training.joint_training.FitConfig", partial(FitConfig, epochs=1))
    few = JointTrainingConfig(samples=1, num_texts=8, batch_size=4, evaluation_batches=1)
    if_none = lambda subjects, tasks, out, config=few, **rest: train_joint_pruner(subjects, tasks, out, config, **rest)  # noqa: E731
    monkeypatch.setattr(secateur, "train_joint_pruner", if_none)  # first: it looks the real one up, to put it back
    monkeypatch.setattr("secateur.meta_training.joint_training.train_joint_pruner", if_none)


def graph(folder, out, quantize):
    """What an export says that it did; tests/system/test_onnx.py and test_deployment_page.py are about its work."""
    assert (Path(folder) / "config.json").is_file()
    return {
        "class": "BertModel",
        "opset": 18,
        "inputs": ["input_ids"],
        "max_difference": 0.0,
        "file": "onnx/model.onnx",
    }


def computed_in_turn(runs, rounds, **_):
    """What a clock would show that counts operations: no budget of time hangs on how busy the machine is."""
    counted = {}
    for name, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            run()
        counted[name] = [counter.get_total_flops() / 1e9] * rounds
    return counted


@pytest.mark.parametrize("name", RUN_HERE)
@pytest.mark.filterwarnings("ignore")  # a model of this size is at odds with some settings, and says so
def test_the_blocks_of_a_page_run(name, in_place):
    names, earlier = names_of(), {}
    for kind, block in blocks_of(name):
        if kind == "python":
            shutil.rmtree("run", ignore_errors=True)
            exec(block, names)
            continue
        for words in commands_in(block):
            command = earlier.setdefault(words[0], words)
            if "…" in words:  # the options of the line before
                at = words.index("…")
                words = [*words[:at], *command[1 : command.index("--out")], *words[at + 1 :]]
            if "--out" in words and "--resume" not in words:  # lines of a block are alternatives
                out = Path(words[words.index("--out") + 1])
                shutil.rmtree(out, ignore_errors=True)
            little = shlex.split(LITTLE.get(words[0], ""))
            assert cli.main([*words, *little]) == 0, " ".join(words)
