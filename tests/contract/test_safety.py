"""What a model, a recipe, a data file or a result may not do to the machine that reads it."""

import json
import pickle
import socket
from html.parser import HTMLParser

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from secateur import cli
from secateur.cli.tables import print_table, scores_table
from secateur.errors import SecateurError
from secateur.models.loading import load_model, load_tokenizer
from secateur.removal.remove import remove_
from secateur.removal.verify import verify_checkpoint
from secateur.report import render_report
from secateur.report.plots import write_plots
from secateur.report.reading import read_runs
from secateur.scorers import make_scorer
from secateur.sites.attention import find_sites
from secateur.units.scores import Scores
from tests.support.report_data import EVIL, comparison_rows, pruning_json, write_comparison, write_pruned
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")
CODE, NETWORK, PLACES, SHOWN = "Code in files", "The network", "Places that files name", "Text that files hold"


@pytest.fixture
def folder(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# --- code ------------------------------------------------------------------------------------------------------------


class Payload:
    """Pickled, a call that leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_code_beside_a_model_is_not_run_nor_asked_about(folder, tmp_path, monkeypatch, outcome):
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    code = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", None]}
    change(folder / "config.json", auto_map=code)
    change(folder / "tokenizer_config.json", auto_map=code)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    assert type(load_model(folder)).__name__ == "BertModel"
    load_tokenizer(folder)
    outcome(CODE, "a model of a known kind with Python files named in `auto_map`", "read by transformers' own class")
    change(folder / "config.json", model_type="own")
    with pytest.raises(SecateurError) as caught:
        load_model(folder)
    assert not mark.exists()
    outcome(CODE, "a model of an unknown kind with Python files named in `auto_map`", caught.value)


def test_weights_that_are_a_pickle_run_nothing(folder, tmp_path, outcome):
    mark = tmp_path / "ran"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    load_model(folder)  # an old model without safetensors is read, by torch's restricted loader
    torch.save({"embeddings.word_embeddings.weight": Payload(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(SecateurError) as caught:
        load_model(folder)
    assert not mark.exists()
    outcome(CODE, "`pytorch_model.bin` with a call in its pickle", caught.value)
    pickled = tmp_path / "pruner.bin"
    pickled.write_bytes(pickle.dumps(Payload(mark), protocol=2))
    with pytest.raises(SecateurError) as caught:
        make_scorer("smp", pruner=str(pickled))
    assert not mark.exists()
    outcome(CODE, "a meta-pruner's `.bin` with a call in its pickle", caught.value)


@pytest.mark.parametrize("named", ["pipeline", "AutoTokenizer", "Trainer", "__class__", "", None, 3, ["BertModel"]])
def test_a_config_can_name_a_model_class_and_nothing_else(named, folder):
    change(folder / "config.json", architectures=[named])
    assert type(load_model(folder)).__name__ == "BertModel"


def test_a_recipe_changes_numbers_and_nothing_else(folder, outcome):
    model = load_model(folder)
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(folder)
    recipe = model.config.head_pruning
    for path in ("self.forward", "self.__class__", "self.training", "self.dropout", "output.dense.weight"):
        changed = json.loads(json.dumps(recipe))
        changed["layouts"][0]["attributes"] = {path: "heads"}
        change(folder / "config.json", head_pruning=changed)
        with pytest.raises(SecateurError, match="has no number 'encoder") as caught:
            load_model(folder)
    outcome(CODE, "a recipe that sets an attribute of a module that is no number, such as its `forward`", caught.value)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """No socket connects, and who tried is listed; the libraries believe that there is a network."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    huggingface_hub.close_session()
    yield tried
    huggingface_hub.close_session()


def test_local_models_and_data_ask_nobody(folder, tmp_path, asked, capsys, outcome):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "dev"):
        rows = [f"{text},{i % 2}" for i, text in enumerate(tiny_texts(8))]
        (data / f"{split}.csv").write_text("\n".join(["sentence,label", *rows]))
    change(folder / "config.json", _name_or_path="someone/else")
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    commands = {
        "info": [folder],
        "score": [folder, "--data", data],
        "prune": [folder, "--data", data, "--out", small, "--no-maps"],
        "verify": [small],
        "finetune": [small, "--data", data, "--out", tuned, "--epochs", 1],
        "evaluate": [tuned, "--data", data],
        "export": [small, "--format", "standalone", "--out", tmp_path / "alone"],
        "report": [small, "--out", tmp_path / "page.html"],
    }
    for command, arguments in commands.items():
        code = cli.main([command, *map(str, arguments)])
        assert code == 0, (command, capsys.readouterr().err)
        assert not asked, (command, asked)
    outcome(NETWORK, f"{', '.join(commands)} with local models and data, every socket forbidden", "none was asked for")


def test_a_folder_that_names_a_repository_asks_nobody(folder, asked, outcome):
    adapter = {"base_model_name_or_path": "someone/base", "peft_type": "LORA", "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    change(folder / "config.json", auto_map={"AutoModel": "someone/code--own.Own"}, model_type="own")
    with pytest.raises(SecateurError) as caught:
        load_model(folder)
    assert not asked
    outcome(NETWORK, "a folder whose adapter and `auto_map` name Hub repositories", caught.value)


@pytest.mark.parametrize(("offline", "attempts"), [(False, True), (True, False)])
def test_a_hub_id_asks_unless_offline(offline, attempts, asked, capsys, monkeypatch, outcome):
    """With a network this shows too that the sockets are watched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    assert cli.main(["info", "someone/model"]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert bool(asked) is attempts
    tried = f"a Hub id, {'`HF_HUB_OFFLINE=1`' if offline else 'no network'}"
    outcome(NETWORK, tried, f"{'asked for' if asked else 'not asked for'}; {message.strip()}")


def test_what_a_recipe_names_is_not_fetched(folder, tmp_path, asked, outcome):
    model = load_model(folder)
    record = {"base_model": "someone/original"}
    remove_(model, uneven_mask(find_sites(model)), record=record)
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(SecateurError, match="give the original with `--against`") as caught:
        verify_checkpoint(tmp_path / "small")
    assert not asked
    outcome(NETWORK, "`verify` of a checkpoint whose recipe names a Hub id", caught.value)
    change(tmp_path / "small" / "config.json", head_pruning={**model.config.head_pruning, "base_model": {"a": 1}})
    with pytest.raises(SecateurError, match="does not say what it was pruned from"):
        verify_checkpoint(tmp_path / "small")
    assert verify_checkpoint(tmp_path / "small", folder)["equal"]


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/../../outside"])
def test_modules_of_a_folder_stay_in_it(path, folder, tmp_path, outcome):
    (folder / "modules.json").write_text(json.dumps([
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": path, "type": "sentence_transformers.models.Pooling"},
    ]))  # fmt: skip
    data = tmp_path / "texts.csv"
    data.write_text("sentence\ngood\nbad\n")
    with pytest.raises(SecateurError, match="names a path outside its folder") as caught:
        load_model(folder)
    assert cli.main(["prune", str(folder), "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "texts.csv"]
    outcome(PLACES, f"`modules.json` with the path `{path}`", caught.value)


def test_a_site_is_no_file(folder, tmp_path, outcome):
    model = load_model(folder)
    remove_(model, uneven_mask(find_sites(model)))
    recipe = json.loads(json.dumps(model.config.head_pruning).replace("encoder.layer.0.attention", "../../outside"))
    change(folder / "config.json", head_pruning=recipe)
    with pytest.raises(SecateurError, match=r"names the site .* does not have") as caught:
        load_model(folder)
    outcome(PLACES, "a recipe with a site named `../../outside.self`", caught.value)


def test_plots_stay_in_their_folder(tmp_path, outcome):
    rows = comparison_rows(("../../outside",), {("../$x$", 0.5): (0.1, 0.2)})
    write_comparison(tmp_path / "c", rows, scores=False)
    files = write_plots(read_runs([tmp_path / "c"]), tmp_path / "plots")
    assert files
    assert all(file.resolve().parent == tmp_path / "plots" for file in files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "plots"]
    outcome(PLACES, "plots of a task named `../../outside`", "written in the folder that was asked for")


# --- text ------------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.words = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, sorted(name for name, _ in attrs)))

    def handle_data(self, data):
        self.words += data


def test_a_page_shows_text_as_text(tmp_path, outcome):
    """The same elements with evil names as with good ones, so that no name became markup."""
    pages = []
    for name, word in (("good", "word"), ("evil", EVIL), ("event", '" onmouseover="alert(1)" x="')):
        report = pruning_json(model=word, scorer=word, created=word, command=word, versions={word: word})
        for part in ("scores", "kept_heads"):
            report[part] = {f"{word}.{site}": row for site, row in report[part].items()}
        write_pruned(tmp_path / name / "p", **report)
        rows = [
            {**row, "task": f"{row['task']} {word}", "metric": word, "environment": {word: word},
             "scorer": f"{row['scorer']} {word}" if row["scorer"] == "smp" else row["scorer"]}
            for row in comparison_rows()
        ]  # fmt: skip
        write_comparison(tmp_path / name / "c", rows, scores=False, model=word, protocol=word, allocation=word)
        pages.append(Elements(render_report(read_runs([tmp_path / name / "p", tmp_path / name / "c"]))))
    good, evil, event = pages
    assert evil.found == good.found == event.found
    assert evil.words.count("<script>alert('x')</script>") > 10
    assert event.words.count('onmouseover="alert(1)"') > 10
    tried = "`<script>`, quotation marks and `onmouseover=` in the names of models, sites, tasks, scorers and metrics"
    outcome(SHOWN, f"{tried}, on a page", "shown as text: the page has the same elements as with plain names")


def test_a_page_has_no_characters_that_steer_a_display(tmp_path):
    controls = "\x00\x1b[2J\x7f\x9b\u202e\u2066\u200f\u061c"
    report = pruning_json(model=f"model{controls}end\n", scorer=f"{controls}x", versions={controls: controls})
    for part in ("scores", "kept_heads"):
        report[part] = {f"{controls}.{site}": row for site, row in report[part].items()}
    write_pruned(tmp_path / "p", **report)
    page = render_report(read_runs([tmp_path / "p"]))
    assert "model\ufffd\ufffd[2J\ufffd" in page
    assert not set(controls.replace("[2J", "")) & set(page)


def test_a_terminal_shows_text_as_text(capsys, outcome):
    names = ["[red]a[/red]", "[/b]", ":smile:", "[link=http://x]y[/link]"]
    print_table(scores_table(Scores({name: torch.ones(2) for name in names}, scorer="[/x]")))
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*names, "[/x]"])
    outcome(SHOWN, "brackets and colons in the names of sites, in a table on the terminal", "shown as text")


def test_an_error_is_one_line_without_control_characters(tmp_path, capsys, outcome):
    assert cli.main(["info", f"{tmp_path}/a\x1b[2Jb\nc\x07"]) == 2
    shown = capsys.readouterr().err
    assert shown.endswith("\n")
    assert shown[:-1].isprintable()
    outcome(SHOWN, "a path with control characters of the terminal, in an error", "one line, without them")
