"""What files of a model's folder may not bring in: files from outside it, and code of a Hub repository."""

import json

import pytest
from transformers import AutoModel, PreTrainedModel

from secateur.errors import SecateurError
from secateur.models.loading import load_model, load_tokenizer
from secateur.models.model_saving import save_model
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
