"""Lists in a config that are as long as there are layers, and about something else."""

import torch
from transformers import DebertaV2Config, DebertaV2Model

from secateur.models.inputs import example_inputs
from secateur.removal.proof import hidden_states, largest_difference
from secateur.removal.remove import remove_
from secateur.units.masks import Mask


def test_a_list_about_something_else_keeps_its_entries(tmp_path):
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16, position_buckets=8,
    )  # fmt: skip
    model = DebertaV2Model(config).eval()
    inputs = example_inputs(model)
    remove_(model, Mask({"encoder.layer": torch.tensor([True, False])}))
    assert list(model.config.pos_att_type) == ["p2c", "c2p"]
    model.save_pretrained(tmp_path)
    again = DebertaV2Model.from_pretrained(tmp_path).eval()
    assert largest_difference(hidden_states(model, inputs), hidden_states(again, inputs)) == 0
