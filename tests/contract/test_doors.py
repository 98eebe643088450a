"""What files of a model's folder may not bring in: files from outside it, and code of a Hub repository."""

import json
import os
import shutil
import stat
import threading

import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from secateur.errors import SecateurError
from secateur.models.loading import load_model, load_tokenizer
from secateur.models.model_saving import save_model
from secateur.removal.legacy import has_v4_pruning
from secateur.removal.verify import verify_checkpoint
from secateur.report.pruning_files import copy_pruning
from secateur.report.reading import read_runs
from tests.contract.test_safety import change
from tests.support.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


LINKED = {
    "a pooling's settings": "1_Pooling/config.json",
    "a folder in a module's": "1_Pooling/more",
    "a processor's settings": "preprocessor_config.json",
    "a tokenizer's words": "vocab.txt",
}


@pytest.mark.parametrize("what", LINKED)
def test_links_out_of_a_folder_are_not_followed(what, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("hunter2")
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps([
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]))  # fmt: skip
    (folder / LINKED[what]).symlink_to(secret if what.startswith("a folder") else secret / "file")
    tokenizer = tiny_tokenizer()

    def read_or_save():
        if what == "a tokenizer's words":
            load_tokenizer(folder)
        else:
            save_model(tiny_model("bert"), tokenizer, str(folder), tmp_path / "out")

    with pytest.raises(SecateurError, match=r"must lie in its folder, got a link to .*; put the file itself there"):
        read_or_save()
    saved = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert all(b"hunter2" not in file.read_bytes() for file in saved)


def test_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    store = tmp_path / "models--a--b"
    (store / "snapshots").mkdir(parents=True)
    (store / "blobs").mkdir()
    snapshot = folder.rename(store / "snapshots" / "1")
    for file in list(snapshot.iterdir()):
        file.rename(store / "blobs" / file.name)
        file.symlink_to(store / "blobs" / file.name)
    assert load_tokenizer(snapshot)("good").input_ids == tiny_tokenizer()("good").input_ids


def test_a_tokenizers_settings_name_no_file_outside(folder, tmp_path):
    words = tmp_path / "words"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hunter2", *"abcdef"]))
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer", vocab=str(words))
    with pytest.raises(SecateurError, match=r"`vocab` must name no file outside the folder, got .*words"):
        load_tokenizer(folder)
    (folder / "words").write_bytes(words.read_bytes())
    change(folder / "tokenizer_config.json", vocab=str(folder / "words"), old_file="/no/such/folder/here")
    assert "hunter2" in load_tokenizer(folder).get_vocab()


@pytest.mark.parametrize("name", ["someone/kernel", "kernels-community/flash-attn:f", {"": "someone/kernel"}])
def test_a_config_fetches_no_attention(name, folder, monkeypatch):
    asked, own = [], PreTrainedModel._check_and_adjust_attn_implementation
    spy = lambda self, name, *args, **kwargs: asked.append(name) or own(self, name, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", spy)
    change(folder / "config.json", attn_implementation=name)
    for model_class in (None, AutoModel):
        with pytest.raises(SecateurError, match="`attn_implementation` in the config must name code that is installed"):
            load_model(folder, model_class=model_class)
    assert not asked
    assert load_model(folder, attn_implementation="eager").config._attn_implementation == "eager"
    assert asked == ["eager"]


READ = {
    "model": (
        *("config.json", "model.safetensors", "model.safetensors.index.json", "a.safetensors"),
        *("generation_config.json", "adapter_config.json", "modules.json"),
    ),
    "tokenizer": ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
    "rest": (
        *("config.json", "modules.json", "preprocessor_config.json", "processor_config.json"),
        *("config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling", "1_Pooling/config.json"),
        *("1_Pooling/more", "pruning_report.json", "attention_maps.json"),
    ),
}
"""Files of a model's folder, by what reads or copies them."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of a sentence-transformers model, with a report."""
    place = tmp_path_factory.mktemp("whole") / "model"
    tiny_model("bert").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    (place / "1_Pooling").mkdir()
    (place / "modules.json").write_text(json.dumps([
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]))  # fmt: skip
    (place / "1_Pooling" / "config.json").write_text("{}")
    return place


class Unwritten(torch.nn.Module):
    def save_pretrained(self, place):
        """Leave it to what is copied."""


def readings(part, folder, out):
    """Calls that read and copy what a model's folder may hold."""
    out.mkdir(parents=True)
    return {
        "model": [lambda: verify_checkpoint(folder)],
        "tokenizer": [lambda: load_tokenizer(folder)],
        "rest": [
            lambda: save_model(Unwritten(), None, str(folder), out),
            lambda: copy_pruning(folder, out),
            lambda: read_runs([folder]),
            lambda: has_v4_pruning(folder),
        ],
    }[part]


def pipe(place, secret):
    os.mkfifo(place)


def device(place, secret):
    try:
        os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except OSError as error:
        pytest.skip(f"no permission to make a device: {error}")


STRANGE = {
    "a pipe": pipe,
    "a device": device,
    "a link out of the folder": lambda place, secret: place.symlink_to(secret / "file"),
    "a link to nothing": lambda place, secret: place.symlink_to("nothing"),
    "a link to itself": lambda place, secret: place.symlink_to(place.name),
    "a folder": lambda place, secret: place.mkdir(),
}


class Opener(threading.Thread):
    """Opens a pipe at which something has hung for long, so that a test fails rather than to wait for ever."""

    def __init__(self, place):
        super().__init__()
        self.place, self.over, self.hung = place, threading.Event(), False

    def run(self):
        while not self.over.wait(5):
            self.hung = True
            os.close(os.open(self.place, os.O_RDWR | os.O_NONBLOCK))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


def left_by(calls, out):
    """Return what is wrong with what calls raise and leave."""
    for call in calls:
        try:
            call()
        except SecateurError as error:
            if "\n" in str(error):
                return f"more than a line: {error}"
        except Exception as error:
            return repr(error)
    for one in out.rglob("*"):
        if one.is_symlink() or not (one.is_dir() or (one.is_file() and b"hunter2" not in one.read_bytes())):
            return f"leaves {one.name}"
    return None


@pytest.mark.filterwarnings("ignore")  # of what is read without the file
@pytest.mark.parametrize("what", STRANGE)
def test_what_is_no_file_in_a_models_folder_is_refused_or_passed_over(what, whole, tmp_path, outcome):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text('{"hunter2": 2}')
    os.mkfifo(secret / "pipe")
    found = {}
    for part, name in [(part, name) for part, names in READ.items() for name in names]:
        folder, out = tmp_path / part / str(len(found)), tmp_path / "out" / str(len(found))
        shutil.copytree(whole, folder, copy_function=os.link)
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        STRANGE[what](place, secret)
        with Opener(place if what == "a pipe" else secret / "pipe") as opener:
            found[part, name] = left_by(readings(part, folder, out), out)
        if opener.hung:
            found[part, name] = "hangs"
    assert {where: wrong for where, wrong in found.items() if wrong} == {}
    count = len({name for _, name in found})
    came = "refused in one line, or passed over as if it were not there"
    outcome("Places that files name", f"{what} in the place of each of {count} files of a model's folder", came)
