"""Models and tokenizers from folders: what is not there, and what is there but cannot be loaded."""

import pytest

from secateur.errors import InvalidInputError
from secateur.model.loading import find_tokenizer, load_model, load_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    return tmp_path


def test_a_tokenizer_is_found_where_there_is_one(folder):
    assert find_tokenizer(folder) is None
    tiny_tokenizer().save_pretrained(folder)
    assert find_tokenizer(folder)("good film")["input_ids"] == load_tokenizer(folder)("good film")["input_ids"]


def test_a_tokenizer_that_is_damaged_is_no_absent_one(folder):
    tiny_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    for load in (load_tokenizer, find_tokenizer):
        with pytest.raises(InvalidInputError, match="has no tokenizer that can be loaded: ") as caught:
            load(folder)
        assert len(str(caught.value).splitlines()) == 1


def test_a_hub_id_that_is_out_of_reach_has_no_tokenizer():
    assert find_tokenizer("no-such-owner/no-such-model") is None  # the tests run offline


def test_a_gguf_file_that_is_not_there(tmp_path):
    with pytest.raises(InvalidInputError, match=r"`model` must be a .gguf file that exists"):
        load_model(tmp_path / "model.gguf")
