"""Mean attention maps: the mean by hand, padding on either side, the bound on their size, and models without maps."""

import base64

import numpy as np
import pytest
import torch

from secateur.errors import UnsupportedModelError
from secateur.pruning import prune
from secateur.removal.remove import remove_
from secateur.settings import Reading
from secateur.sites import attention_maps
from secateur.sites.attention import find_sites
from secateur.sites.attention_maps import AttentionMaps, mean_maps
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(lengths, side="right", seed=0):
    """Texts of these lengths, the same tokens whichever side the padding is on."""
    random = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest).long()
    for row, length in enumerate(lengths):
        start = 0 if side == "right" else longest - length
        ids[row, start : start + length] = torch.randint(5, 90, (length,), generator=random)
        mask[row, start : start + length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def test_the_mean_by_hand():
    model = tiny_model("bert")
    model.set_attn_implementation("eager")
    given = batch([9, 6, 4])
    found = mean_maps(model, find_sites(model), given)
    assert (found.texts, found.tokens, found.reason) == (3, 6, "")  # two of three texts have six tokens
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions
    for number, site in enumerate(find_sites(model)):
        wanted = torch.zeros(4, 6, 6)
        for query in range(6):
            having = [row for row, length in enumerate([9, 6, 4]) if length > query]
            wanted[:, query] = torch.stack([maps[number][row, :, query, :6] for row in having]).mean(dim=0)
        torch.testing.assert_close(found.maps[site], wanted)
    assert all(bool((m.sum(dim=2) <= 1 + 1e-5).all()) for m in found.maps.values())


def test_padding_on_the_left_is_skipped():
    model = tiny_model("llama")
    alone = mean_maps(model, find_sites(model), batch([5]))
    left = batch([9, 5], "left")
    left = {name: values[1:] for name, values in left.items()}
    left["input_ids"][0, -5:] = batch([5])["input_ids"][0]
    left["position_ids"] = torch.tensor([[0] * 4 + list(range(5))])
    found = mean_maps(model, find_sites(model), left)
    for site in alone.maps:
        torch.testing.assert_close(found.maps[site], alone.maps[site], atol=1e-5, rtol=1e-4)


def test_bytes_are_the_maps_and_their_number_is_bounded(monkeypatch):
    model = tiny_model("bert")
    found = mean_maps(model, find_sites(model), batch([20, 20]))
    data = found.to_json()
    for site, entry in data["sites"].items():
        levels = np.frombuffer(base64.b64decode(entry["levels"]), dtype=np.uint8).reshape(4, 20, 20)
        back = torch.tensor(levels / 255.0) * torch.tensor(entry["peaks"])[:, None, None]
        assert (back - found.maps[site]).abs().max() <= max(entry["peaks"]) / 255
    monkeypatch.setattr(attention_maps, "MAX_BYTES", 12 * 7 * 7 + 5)
    assert mean_maps(model, find_sites(model), batch([20, 20])).tokens == 7


@pytest.mark.parametrize("kind", ["albert", "bart", "t5", "falcon", "gpt2"])
def test_other_kinds_have_maps_for_every_head(kind):
    model = tiny_model(kind)
    sites = find_sites(model)
    given = batch([8, 7])
    if kind in ("bart", "t5"):
        given["decoder_input_ids"] = given["input_ids"]
    if kind == "gpt2":
        given["use_cache"] = False
    found = mean_maps(model, sites, given)
    assert {site: len(maps) for site, maps in found.maps.items()} == {n: s.num_units for n, s in sites.items()}
    assert all(bool(torch.isfinite(maps).all()) and float(maps.max()) > 0 for maps in found.maps.values())


def test_heads_keep_their_original_numbers():
    model = tiny_model("bert")
    mask = uneven_mask(find_sites(model))
    remove_(model, mask)
    assert mean_maps(model, find_sites(model), batch([6, 6])).heads == mask.kept


def test_a_model_without_maps_says_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise UnsupportedModelError("site x does not compute attention maps; use a scorer that needs none")

    monkeypatch.setattr(attention_maps, "probe", refuse)
    model = tiny_model("bert")
    found = mean_maps(model, find_sites(model), batch([6, 6]))
    assert found.maps == {}
    assert found.to_json()["reason"] == "site x does not compute attention maps"


def test_prune_keeps_maps_where_asked():
    model, texts = tiny_model("bert"), tiny_texts(20)
    _, report = prune(model, texts, tokenizer=tiny_tokenizer(), reading=Reading(maps=True))
    assert isinstance(report.attention_maps, AttentionMaps)
    assert report.attention_maps.texts == 16
    assert "attention_maps" not in report.to_json()
    _, report = prune(model, texts, tokenizer=tiny_tokenizer())
    assert report.attention_maps is None
