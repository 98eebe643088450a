"""The commands as a person types them: results, one-line errors with exit code 2, nothing half-written."""

import json
import subprocess
import sys
import typing
from dataclasses import MISSING, fields
from functools import partial

import pytest
from transformers import AutoModel

import secateur
from secateur import cli, demo
from secateur.comparing.plan import Settings
from secateur.errors import SecateurError
from secateur.settings import Cut
from tests.support.sentences import SENTENCES
from tests.support.tiny import tiny_model, tiny_tokenizer


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("sentence,label\n" + "\n".join(f'"{s}",{i % 2}' for i, s in enumerate(SENTENCES * 4)) + "\n")
    return path


@pytest.mark.real
def test_prune_verify_prune_again(minilm_folder, texts, tmp_path, capsys):
    out = tmp_path / "pruned"
    code, text, _ = run(capsys, "prune", minilm_folder, "--data", texts, "--ratio", "0.5", "--out", out)
    assert code == 0
    assert "kept 36 of 72 heads (pruning ratio 0.50)" in text
    assert "22,713,216" in text
    assert "proof: largest difference" in text
    assert f"model: {out}" in text
    report = json.loads((out / "pruning_report.json").read_text())
    assert report["max_difference"] <= 1e-4
    page = (out / "report.html").read_text()
    assert "</html>" in page
    assert 'class="maps"' in page
    again = tmp_path / "again.html"
    assert run(capsys, "report", out, "--out", again)[0] == 0
    assert again.read_text() == page
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}

    code, text, _ = run(capsys, "verify", out)
    assert code == 0
    assert "with 36 heads gated" in text
    code, text, _ = run(capsys, "verify", out, "--against", minilm_folder, "--json")
    assert json.loads(text)["equal"] is True

    code, text, _ = run(capsys, "info", out, "--json")
    assert [site["heads"] for site in json.loads(text)["sites"]] == [6] * 6

    twice = tmp_path / "twice"
    again = ("--ratio", "0.5", "--allocation", "ranking", "--refine", 3, "--out", twice)
    code, text, _ = run(capsys, "prune", out, "--data", texts, *again)
    assert code == 0
    assert "relational KL on these texts" in text
    assert len(json.loads((twice / "pruning_report.json").read_text())["refinement"]) == 4
    assert "kept 18 of 36 heads" in text
    config = json.loads((twice / "config.json").read_text())["head_pruning"]
    assert sum(map(len, config["kept_heads"].values())) == 18
    assert config["pruning_ratio"] == 0.75


@pytest.mark.real
def test_a_changed_model_does_not_verify(minilm_folder, texts, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "pruned"
    run(capsys, "prune", minilm_folder, "--data", texts, "--scorer", "magnitude", "--no-maps", "--out", out)
    assert not (out / "attention_maps.json").exists()
    assert "No attention maps were stored" in (out / "report.html").read_text()
    weights = load_file(out / "model.safetensors")
    weights["encoder.layer.0.attention.self.value.weight"][0] += 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    code, text, _ = run(capsys, "verify", out)
    assert code == 1
    assert "DIFFERS" in text


@pytest.mark.real
def test_a_model_of_another_vocabulary_does_not_verify(minilm_folder, texts, tmp_path, capsys):
    run(capsys, "prune", minilm_folder, "--data", texts, "--scorer", "magnitude", "--no-maps", "--out", tmp_path / "p")
    other = AutoModel.from_pretrained(minilm_folder)
    other.resize_token_embeddings(30600, mean_resizing=False)
    other.save_pretrained(tmp_path / "other")
    code, _, err = run(capsys, "verify", tmp_path / "p", "--against", tmp_path / "other")
    assert code == 2
    assert "their vocabularies have [30522, 30600] tokens" in err


@pytest.mark.real
def test_score_writes_what_select_reads(minilm_folder, texts, tmp_path, capsys):
    import secateur

    out = tmp_path / "scores.json"
    code, text, _ = run(capsys, "score", minilm_folder, "--data", texts, "--out", out)
    assert (code, text) == (0, "")
    mask = secateur.select(secateur.Scores.load(out), 0.25)
    assert mask.num_kept == 54
    code, text, _ = run(capsys, "score", minilm_folder, "--data", texts, "--scorer", "random", "--seed", "3")
    assert "encoder.layer.5.attention.self" in text


def test_scorers_that_need_labels_read_them_from_the_data(tmp_path, capsys, one_thread):
    from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "texts.csv"
    data.write_text("sentence,label\n" + "\n".join(f"{t},{i % 2}" for i, t in enumerate(tiny_texts(8))) + "\n")
    given = (tmp_path / "model", "--data", data, "--scorer", "taylor", "--option", "warmup_epochs=1")
    found = {}
    for normalize in ("true", "false"):
        code, text, _ = run(capsys, "score", *given, "--option", f"normalize={normalize}", "--json")
        assert code == 0
        found[normalize] = json.loads(text)["scores"]["encoder.layer.0.attention.self"]
    assert sum(x * x for x in found["true"]) == pytest.approx(1)
    assert sum(x * x for x in found["false"]) != pytest.approx(1)
    code, text, _ = run(capsys, "prune", *given, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(text)["scorer"] == "taylor"
    assert json.loads(text)["after"]["heads"] == 6


@pytest.mark.real
def test_finetune_and_evaluate_a_pruned_model(minilm_folder, texts, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.csv").write_text(texts.read_text())
    pruned, tuned = tmp_path / "pruned", tmp_path / "tuned"
    run(capsys, "prune", minilm_folder, "--data", texts, "--out", pruned)
    code, text, _ = run(
        capsys, "finetune", pruned, "--data", folder, "--out", tuned, "--epochs", "2", "--batch-size", "8",
        "--learning-rate", "1e-3", "--json",
    )  # fmt: skip
    assert code == 0
    metrics = json.loads(text)["metrics"]
    code, text, _ = run(capsys, "evaluate", tuned, "--data", folder, "--json")
    assert code == 0
    assert json.loads(text)["metrics"] == pytest.approx(metrics)
    config = json.loads((tuned / "config.json").read_text())
    assert (
        config["head_pruning"]["kept_heads"]
        == json.loads((pruned / "config.json").read_text())["head_pruning"]["kept_heads"]
    )
    assert config["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.real
def test_the_demo_end_to_end_on_less_data(minilm_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_TEXTS", 32)
    monkeypatch.setattr(demo, "DEV_TEXTS", 16)
    monkeypatch.setattr(demo, "OTHER_TEXTS", 30)
    monkeypatch.setattr(demo, "prune", partial(demo.prune, cut=Cut(allocation="uniform")))
    monkeypatch.setattr(demo, "CALIBRATION_TEXTS", 16)
    monkeypatch.setattr(demo, "compare_latency", partial(demo.compare_latency, rounds=1))
    out = tmp_path / "demo"
    code, text, err = run(capsys, "demo", "--out", out)
    assert code == 0
    for word in (
        "half of the heads",
        "half of the model",
        "neurons",
        "accuracy",
        "parameters",
        "latency",
        "fine-tuning",
    ):
        assert word in text
    assert "fine-tuning pruned" in err
    result = json.loads((out / "result.json").read_text())
    assert result["reload_bit_exact"] is True
    assert {verified["verdict"] for verified in result["verify"].values()} <= {"equal", "trained"}
    macs = next(row for row in result["rows"] if row["name"].startswith("multiply"))
    assert 0.8 * macs["dense"] < macs["heads"]
    assert 0.4 * macs["dense"] < macs["pruned"] <= 0.5 * macs["dense"]
    page = (out / "report.html").read_text()
    assert page.count("data-verdict=") == 72
    assert run(capsys, "report", out, "--out", tmp_path / "again.html")[0] == 0
    assert (tmp_path / "again.html").read_text() == page


def test_the_home_folder_is_found_where_the_shell_leaves_it(tmp_path, capsys, monkeypatch):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, _ = run(capsys, "score", tmp_path / "model", "--scorer", "magnitude", "--out=~/s.json", "--data", "x.csv")
    assert code == 2  # the data is missed, not the folder
    (tmp_path / "x.csv").write_text("sentence\ngood film\n")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code, _, err = run(capsys, "score", tmp_path / "model", "--scorer", "magnitude", "--out=~/s.json", "--data=~/x.csv")
    assert (code, (tmp_path / "s.json").is_file()) == (0, True), err
    monkeypatch.chdir(tmp_path)
    code, _, _ = run(capsys, "score", "model", "--scorer", "magnitude", "--out=~draft.json", "--data", "x.csv")
    assert (code, (tmp_path / "~draft.json").is_file()) == (0, True)  # nobody's home


def config_of(function):
    return typing.get_args(typing.get_type_hints(function)["config"])[0]


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("compare", Settings),
        ("meta-train", config_of(secateur.train_meta_pruner)),
        ("joint-train", config_of(secateur.train_joint_pruner)),
    ],
)
def test_defaults_are_those_of_the_settings(command, config):
    defaults = {one.name: one.default for one in fields(config) if one.default is not MISSING}
    shown = {one.name: one.default for one in cli.cli.commands[command].params if getattr(one, "show_default", None)}
    assert len(shown) > 5
    assert shown == {name: defaults[name] for name in shown}


def test_help_imports_no_torch():
    script = "import sys; from secateur.cli import main; main(['prune', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "leave_one_out" in done.stdout


def test_tables_wait_for_no_package_that_they_do_not_need():
    script = "import sys, secateur.cli.tables; sys.exit(bool({'torch', 'scipy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("reached", ["errors.WriteError", "settings.Reading"])
def test_modules_are_reached_by_attribute_and_the_package_stays_cheap(reached):
    script = (
        "import sys, secateur; assert not {'torch', 'transformers'} & set(sys.modules); "
        f"assert {reached.partition('.')[0]!r} in dir(secateur); print(secateur.{reached}.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == reached.partition(".")[2], done.stderr


GOOD = "sentence,label\nfine,1\nbad,0\n"


@pytest.mark.real
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--ratio": "1.2"}, r"must be in [0, 1), got 1.2"),
        ({"--ratio": "-0.1"}, r"must be in [0, 1), got -0.1"),
        ({"--ratio": "half"}, r"must be in [0, 1), got half"),
        ({"--data": "missing.csv"}, "missing.csv"),
        ({"--data": "columns.csv"}, "columns.csv"),
        ({"--data": "empty.csv"}, "empty.csv"),
        ({"--scorer": "best"}, "scorer` must be one of block_influence, confidence, "),
        ({"--scorer": "smp", "--pruner": "nowhere"}, "cannot be loaded as a MetaPruner"),
        ({"--scorer": "smp", "--pruner": "none.bin"}, "there is no meta-pruner checkpoint"),
        ({"--pruner": "x"}, "goes with `--scorer smp` and"),
        ({"--out": "full"}, "be a new or empty folder"),
        ({"--scorer": "taylor", "--data": "plain.csv"}, "plain.csv has no labels; this step needs a `label` column"),
        ({"--scorer": "fisher", "--option": "warmup_epochs=-1"}, "`warmup_epochs` must be None or a number from 0"),
        ({"--option": "speed"}, "`option` must be NAME=VALUE, got speed"),
        ({"--option": "speed=3"}, "scorer matching: "),
        ({"--device": "abacus"}, "`device` must be a device that this machine has"),
        ({"--texts": "0"}, "0 is not in the range"),
        ({"MODEL": "columns.csv"}, "be a folder with a config.json"),
        ({"MODEL": "full"}, "be a folder with a config.json"),
        ({"MODEL": "./nowhere"}, "be a folder that exists"),
        ({"MODEL": "fnet"}, "has no attention whose heads can be told apart"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(change, message, minilm_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.csv").write_text(GOOD)
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "plain.csv").write_text("sentence\nfine\nbad\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    if change.get("MODEL") == "fnet":
        _save_fnet(minilm_folder, tmp_path / "fnet")
        capsys.readouterr()
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    given = {"MODEL": str(minilm_folder), "--data": "good.csv", "--out": "out", **change}
    arguments = [given.pop("MODEL"), *(x for pair in given.items() for x in pair)]
    code, out, err = run(capsys, "prune", *arguments)
    lines = [line for line in err.splitlines() if "scoring" not in line and line.strip()]
    assert code == 2
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("secateur: error: ")
    assert message in lines[0]
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def _save_fnet(minilm_folder, folder):
    from transformers import AutoTokenizer, FNetConfig, FNetModel

    FNetModel(FNetConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=8)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder).save_pretrained(folder)


@pytest.mark.real
def test_other_commands_with_bad_input(minilm_folder, texts, tmp_path, capsys):
    for arguments, message in (
        (("verify", minilm_folder), "is not pruned"),
        (("verify", tmp_path / "none"), "be a folder that exists"),
        (("info", tmp_path), "be a folder with a config.json"),
        (("evaluate", minilm_folder, "--data", tmp_path / "none.csv"), "none.csv"),
        (("evaluate", minilm_folder, "--data", texts), "fine-tune it first"),
        (("score", minilm_folder, "--data", texts, "--option", "name=x", "--out", tmp_path / "s"), "got 'name'"),
        (("report", tmp_path / "no.jsonl", "--out", tmp_path / "r.html"), "there is no such file"),
        (("finetune", minilm_folder, "--data", texts, "--out", tmp_path), "be a new or empty folder"),
        (("score", minilm_folder, "--data", texts, "--out", tmp_path / "no" / "s.json"), "folder that exists"),
        (("demo", "--out", tmp_path), "be a new or empty folder"),
        (("nothing",), "No such command"),
    ):
        code, out, err = run(capsys, *arguments)
        assert code == 2, arguments
        assert out == ""
        assert message in err
        assert len(err.strip().splitlines()) == 1, err


def test_a_failure_while_saving_leaves_no_folder(minilm_folder, texts, tmp_path, capsys, monkeypatch):
    from secateur.report import pruning_files

    def broken(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(pruning_files, "write_report", broken)
    code, _, err = run(capsys, "prune", minilm_folder, "--data", texts, "--out", tmp_path / "out", "--texts", "8")
    assert code == 2
    assert "no space left on device" in err
    assert [p.name for p in tmp_path.iterdir()] == ["texts.csv"]


def test_ctrl_c_is_not_an_error_message(capsys, monkeypatch, texts):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.models.loading.load_model", interrupted)
    code, _, err = run(capsys, "info", "anything")
    assert code == 130
    assert "stopped" in err


def test_errors_have_one_base():
    from secateur import errors

    own = [
        e
        for e in vars(errors).values()
        if isinstance(e, type) and issubclass(e, Exception) and not issubclass(e, Warning)
    ]
    assert len(own) == 7
    assert all(issubclass(e, SecateurError) for e in own)
