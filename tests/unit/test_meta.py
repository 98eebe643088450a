"""The meta-pruner's network and the relational loss, against the paper's text and examples by hand."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BloomConfig, BloomModel, CodeGenConfig, CodeGenModel, XGLMConfig, XGLMModel

import secateur
from secateur.errors import CheckpointError, InvalidInputError
from secateur.models.inputs import example_inputs
from secateur.pruners.corners import score_corners
from secateur.pruners.map_network import PAIR, SINGLE, MetaPruner, to_network_size
from secateur.relations import by_first_token, gated_representations, relational_kl, relations, represent
from secateur.scorers.smp import load_pruner
from tests.support.tiny import tiny_model


def test_the_network_is_the_papers():
    pruner = MetaPruner()
    convolutions = [m for m in pruner.main if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0], c.padding[0]) for c in convolutions] == [
        (1, 8, 2, 1), (8, 16, 2, 1), (16, 32, 2, 1), (32, 64, 2, 1), (64, 128, 2, 1), (128, 2, 1, 0),
    ]  # fmt: skip
    assert all(c.kernel_size == (4, 4) and c.bias is None for c in convolutions)
    assert [i for i, m in enumerate(pruner.main) if isinstance(m, nn.BatchNorm2d)] == [3, 6, 9, 12]
    assert [i for i, m in enumerate(pruner.main) if isinstance(m, nn.Conv2d)] == [0, 2, 5, 8, 11, 14]
    assert sum(p.numel() for p in pruner.parameters()) == 178_784
    assert convolutions[4].weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_scores_lie_between_0_and_2_and_channels_serve_their_kind():
    pruner = MetaPruner().eval()
    maps = torch.rand(3, 4, 10, 10).softmax(-1)
    both = pruner(to_network_size(maps).flatten(0, 1)).view(3, 4, 2)
    assert bool((both > 0).all())
    assert bool((both < 2).all())
    torch.testing.assert_close(pruner.score_maps(maps, None, is_pair=True), both[..., PAIR])
    torch.testing.assert_close(pruner.score_maps(maps, None, is_pair=False), both[..., SINGLE])


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 128), st.integers(1, 128)),
    edge=st.sampled_from([None, 1, 62, 63, 64, 125, 126, 127, 128]),
)
def test_leaving_the_padding_out_changes_no_score(seed, shape, edge):
    """Against the plain network on the whole 128×128, with BatchNorm that makes padding far from 0."""
    torch.manual_seed(seed)
    rows, columns = shape if edge is None else (edge, shape[1])
    pruner = MetaPruner(initial_std=0.1).double().eval()
    for layer in pruner.main:
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.normal_()
            layer.running_var.uniform_(0.5, 2)
    pruner.main[-2].weight.data.mul_(0.01)  # or the sigmoid saturates, and all scores are 2
    maps = torch.rand(2, 3, rows, columns, dtype=torch.float64)
    with torch.no_grad():
        plain = pruner(to_network_size(maps).flatten(0, 1)).view(2, 3, 2)
        found = pruner.score_maps(maps, None, is_pair=True)
        torch.testing.assert_close(found, plain[..., PAIR], atol=1e-12, rtol=0)
        assert plain[..., PAIR].unique().numel() == 6  # all maps differ


@pytest.mark.parametrize("sizes", [[(9, 9)], [(1, 3), (40, 33), (128, 128)]])
def test_training_on_corners_is_training_on_whole_maps(sizes):
    """Scores, gradients and running statistics are those of the plain network, BatchNorm sees all maps as one batch."""
    torch.manual_seed(0)
    pruner = MetaPruner(initial_std=0.1).double()
    plain = copy.deepcopy(pruner)
    corners = [torch.rand(2 + number, *size, dtype=torch.float64) for number, size in enumerate(sizes)]
    whole = torch.cat([nn.functional.pad(x, (0, 128 - x.shape[2], 0, 128 - x.shape[1])) for x in corners])
    found, wanted = torch.cat(score_corners(pruner.main, corners)), plain(whole)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    (found * torch.arange(found.numel()).view_as(found)).sum().backward()
    (wanted * torch.arange(found.numel()).view_as(found)).sum().backward()
    for one, other in zip(pruner.parameters(), plain.parameters(), strict=True):
        assert other.grad.abs().max() > 0
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-9 * float(other.grad.abs().max()))
    for one, other in zip(pruner.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_short_maps_lie_in_the_corner():
    maps = torch.rand(1, 2, 3, 5)
    padded = to_network_size(maps)
    assert torch.equal(padded[..., :3, :5], maps)
    assert padded.count_nonzero() == maps.count_nonzero()


def test_long_maps_are_averaged_over_queries_and_summed_over_keys():
    maps = torch.rand(1, 1, 256, 384).softmax(-1)
    fitted = to_network_size(maps)
    by_hand = maps.view(1, 1, 128, 2, 128, 3).mean(3).sum(-1)
    torch.testing.assert_close(fitted, by_hand)
    torch.testing.assert_close(fitted.sum(-1), torch.ones(1, 1, 128))


@pytest.mark.parametrize("length", [5, 128, 200])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_taken_out(length, side):
    maps = torch.rand(1, 2, length, length)
    before, after = (0, 7) if side == "right" else (7, 0)
    wide = nn.functional.pad(maps, (before, after, before, after), value=0.3)
    mask = nn.functional.pad(torch.ones(1, length), (before, after))
    torch.testing.assert_close(to_network_size(wide, mask), to_network_size(maps))


def test_saving_and_loading(tmp_path, capsys):
    pruner = MetaPruner()
    pruner.save_pretrained(tmp_path / "pruner")
    assert (tmp_path / "pruner" / "model.safetensors").is_file()
    again = MetaPruner.from_pretrained(tmp_path / "pruner")
    assert capsys.readouterr().out == ""
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in pruner.state_dict().items())


def test_authors_checkpoints_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="there is no meta-pruner checkpoint"):
        MetaPruner.from_authors_checkpoint(tmp_path / "none.bin")
    state = MetaPruner().state_dict()
    torch.save(state, tmp_path / "whole.bin")
    assert MetaPruner.from_authors_checkpoint(tmp_path / "whole.bin").training is False
    (tmp_path / "short.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read as a meta-pruner checkpoint"):
        MetaPruner.from_authors_checkpoint(tmp_path / "short.bin")
    torch.save({**state, "main.0.weight": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(CheckpointError, match=r"no meta-pruner of this architecture, see main\.0\.weight"):
        MetaPruner.from_authors_checkpoint(tmp_path / "other.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(CheckpointError, match="no meta-pruner of this architecture"):
        MetaPruner.from_authors_checkpoint(tmp_path / "list.bin")


class _Runs:
    def __reduce__(self):
        return (print, ("code from a pickle has run",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"main.0.weight": _Runs()}, tmp_path / "evil.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        MetaPruner.from_authors_checkpoint(tmp_path / "evil.bin")
    assert "has run" not in capsys.readouterr().out


def test_relations_by_hand():
    # Three texts in two dimensions. Their mean is (0, 0), their lengths 1, 1 and sqrt(2).
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    half = -1 / math.sqrt(2)
    similarities = [10 * x for x in (1, 0, half, 0, 1, half, half, half, 1)]
    pairs = [(similarities[i], similarities[i + 1]) for i in (0, 2, 4, 6)]  # the ninth is left out
    rows = relations(texts)
    assert rows.shape == (4, 2)
    for row, (x, y) in zip(rows.tolist(), pairs, strict=True):
        total = math.log(math.exp(x) + math.exp(y))
        assert row == pytest.approx([x - total, y - total], abs=1e-5)


def test_relational_kl_by_hand():
    dense = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    pruned = dense + torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    p, q = relations(dense), relations(pruned)
    by_hand = (
        sum(math.exp(a) * (a - b) for a, b in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True)) / p.numel()
    )
    assert float(relational_kl(dense, pruned)) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 0


def test_relational_kl_wants_the_same_texts():
    with pytest.raises(InvalidInputError, match="`pruned` must have the shape of `dense`"):
        relational_kl(torch.ones(3, 2), torch.ones(2, 2))
    # Two texts always lie opposite each other once centred: their relations are known, and equal.
    with pytest.raises(InvalidInputError, match="hold at least 3 texts"):
        relations(torch.ones(2, 2))


class _Outputs:
    def __init__(self, hidden, pooled=None):
        self.last_hidden_state, self.pooler_output = hidden, pooled


def test_representations():
    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    plain = nn.Linear(1, 1)
    assert represent(plain, _Outputs(hidden), batch, False).tolist() == [[2.0]]
    assert represent(plain, _Outputs(hidden), batch, True).tolist() == [[1.0]]
    assert represent(plain, _Outputs(hidden, torch.tensor([[9.0]])), batch, True).tolist() == [[9.0]]


@pytest.mark.parametrize("kind", ["bert", "llama", "bloom", "xglm", "codegen"])
def test_pairs_are_not_represented_by_a_first_token_that_sees_nothing_else(kind):
    model = tiny_model("bert") if kind == "bert" else causal_model(kind)
    assert by_first_token(model, False) is False
    assert by_first_token(model, True) is (kind == "bert")
    batch = example_inputs(model, batch=6)
    batch["input_ids"][:, 0] = batch["input_ids"][0, 0]  # pairs often begin with the same word
    found = gated_representations(model, batch, {}, True)
    assert float((found - found[0]).detach().abs().amax(dim=1)[1:].min()) > 1e-3


def causal_model(kind):
    """Most causal models say so; the last three do not."""
    torch.manual_seed(0)
    return {
        "llama": lambda: tiny_model("llama"),
        "bloom": lambda: BloomModel(BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4)),
        "xglm": lambda: XGLMModel(XGLMConfig(vocab_size=99, d_model=32, ffn_dim=32, num_layers=1, attention_heads=4)),
        "codegen": lambda: CodeGenModel(CodeGenConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)),
    }[kind]().eval()


def test_a_meta_pruner_lacks_no_weights(tmp_path):
    """A file of another network, or half of one, must not become a network of random weights."""
    with pytest.raises(CheckpointError, match="smp-plus"):
        load_pruner(Path(secateur.__file__).parent / "assets" / "smp-plus")
    pruner = MetaPruner()
    pruner.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("main.14")}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be loaded as a MetaPruner"):
        load_pruner(tmp_path)


@pytest.mark.parametrize("tokens", [129, 150, 200, 256, 300])
def test_rows_of_long_maps_still_sum_to_1(tokens):
    maps = torch.rand(2, 3, tokens, tokens, generator=torch.Generator().manual_seed(0))
    maps = maps / maps.sum(dim=-1, keepdim=True)
    maps[0, 0] = torch.eye(tokens)
    maps[0, 1] = torch.eye(tokens)[:1]  # all look at the first token
    found = to_network_size(maps)
    assert found.shape == (2, 3, 128, 128)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 3, 128))
    # What a token is given stays, as a share of all that queries give.
    torch.testing.assert_close(found.mean(dim=2).sum(dim=-1), torch.ones(2, 3))
    torch.testing.assert_close(found[0, 1, :, 0], torch.ones(128))
