"""One whole update of the paper, written from its equations, beside ours: every text padded to 128 tokens, no gates of
ours, no network of ours. The models have as many layers as heads, as BERT-base has, and not, as BERT-large."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModel, BertConfig

from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.meta_step import MetaTraining
from secateur.meta_training.paper import run
from secateur.meta_training.subjects import Subject
from secateur.support.randomness import generator
from secateur.texts.data import Task
from tests.support.tiny import tiny_texts, tiny_tokenizer

TEXTS, BATCHES, RATE = 5, 2, 0.02  # an odd number of texts: the last similarity has no partner
SEED = 1  # with which both kinds of task are drawn


def network():
    layers = [nn.Conv2d(1, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for before, after in ((8, 16), (16, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(128, 2, 4, 1, 0, bias=False), nn.Sigmoid())


def drawn_heads(scores, kept, random):
    """Hard Gumbel-softmax samples, united until `kept` distinct heads are in; softmax gradients."""
    samples = []
    while not samples or int((torch.stack(samples).detach().round().amax(0)).sum()) < kept:
        soft = (scores - (-torch.rand(len(scores), generator=random).log()).log()).softmax(0)
        samples.append(nn.functional.one_hot(soft.argmax(), len(scores)) - soft.detach() + soft)
    return torch.stack(samples).max(0).values


def relations(rows):
    """The softmax over each two similarities that follow each other, row by row."""
    rows = rows - rows.mean(0)
    rows = rows / rows.norm(dim=1, keepdim=True)
    flat = [10 * (one * other).sum() for one in rows for other in rows]
    return torch.stack([torch.stack(flat[k : k + 2]).softmax(0) for k in range(0, len(flat) - 1, 2)])


def represented(model, tokens, is_pair, gates=None, maps=False):
    """What stands for each text, `[texts, width]`, with head h of layer l multiplied by `gates[l][h]`; and the maps."""

    def gate(row):
        return lambda _, inputs: ((inputs[0].unflatten(-1, (len(row), -1)) * row[:, None]).flatten(-2),)

    hooks = [
        model.encoder.layer[number].attention.output.dense.register_forward_pre_hook(gate(row))
        for number, row in (gates or {}).items()
    ]
    # Maps come with other kernels, which round otherwise; ours has them in the dense pass alone.
    out = model(**tokens, output_attentions=maps)
    for hook in hooks:
        hook.remove()
    mask = tokens["attention_mask"].unsqueeze(-1)
    rows = out.pooler_output if is_pair else (out.last_hidden_state * mask).sum(1) / mask.sum(1)
    return (rows, out.attentions) if maps else rows


def paper_loss(model, tokenizer, tasks, pruner, number):
    """The loss of one batch of update 0 (paper, steps 1 to 5)."""
    random = generator(SEED, 0, number)
    torch.randint(1, (1,), generator=random)  # which model: there is one
    weights = torch.tensor([float(math.floor(len(task) ** 0.2)) for task in tasks], dtype=torch.float64)
    task = tasks[int(torch.multinomial(weights, 1, generator=random))]
    texts = [task.texts[i] for i in torch.randperm(len(task), generator=random)[:TEXTS].tolist()]
    both = list(zip(*texts, strict=True)) if task.is_pair else [texts]
    tokens = tokenizer(*map(list, both), padding="max_length", max_length=128, return_tensors="pt")
    with torch.no_grad():
        dense, maps = represented(model, tokens, task.is_pair, maps=True)
    layers, heads = len(maps), maps[0].shape[1]
    flat = (torch.stack(maps) * tokens["attention_mask"][None, :, None, :, None]).view(-1, 1, 128, 128)
    scores = 2 * pruner(flat.double())[:, 0 if task.is_pair else 1, 0, 0].view(layers, TEXTS, heads).mean(1).float()
    whole = torch.randperm(layers, generator=random)[: layers // 2].tolist()
    gates = {
        layer: drawn_heads(scores[layer], heads - heads // 2, random) for layer in range(layers) if layer not in whole
    }
    kept = (torch.rand(dense.shape[1], generator=random) >= 0.8).float()
    p = relations(dense * kept)
    q = relations(represented(model, tokens, task.is_pair, gates) * kept)
    loss = (p * (p.log() - q.log())).mean()
    return task.name, {layer: row.detach() for layer, row in gates.items()}, loss * (1 if task.is_pair else 10)


def tasks_of_all_lengths():
    """Texts of 4 to 90 tokens, so that a batch has parts of several lengths."""
    words = tiny_texts(400)
    singles = [" ".join(words[i : i + 1 + i % 9]) for i in range(300)]
    return [Task("singles", singles), Task("pairs", list(zip(singles[:40], singles[40:80], strict=True)))]


@pytest.mark.parametrize("layers", [4, 3])
def test_an_update_is_the_papers(layers, tmp_path, monkeypatch):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 99}
    model = AutoModel.from_config(BertConfig(**sizes, num_hidden_layers=layers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # so that every head matters
    reference = AutoModel.from_config(model.config, attn_implementation="eager").eval()
    reference.load_state_dict(model.state_dict())
    tokenizer, tasks = tiny_tokenizer(), tasks_of_all_lengths()
    tokenizer.model_max_length = 128
    config = MetaTrainingConfig(steps=1, batch_size=TEXTS, batches_per_step=BATCHES, initial_std=0.05, seed=SEED)
    training = MetaTraining([Subject(model, tokenizer)], tasks, config, Accelerator(cpu=True))
    pruner = network().double()  # in float32, padding makes gradients inexact that ours has exact
    pruner.load_state_dict(
        {
            k.removeprefix("main."): v.double() if v.is_floating_point() else v
            for k, v in training.pruner.state_dict().items()
        }
    )

    from secateur.meta_training import signals

    gated, drawn, plain = [], [], signals.gated_representations
    monkeypatch.setattr(signals, "gated_representations", lambda m, b, g, p: gated.append(g) or plain(m, b, g, p))
    losses: dict[str, list[float]] = {}
    for number in range(BATCHES):
        name, gates, loss = paper_loss(reference, tokenizer, tasks, pruner, number)
        (loss / BATCHES).backward()
        losses.setdefault(name, []).append(float(loss.detach()))
        drawn.append({f"encoder.layer.{layer}.attention.self": row for layer, row in gates.items()})
    assert len(losses) == 2

    found = training.gradients(0)
    ours = []
    for gates in gated:  # once for each part of a batch
        row = {site: gate.detach() for site, gate in gates.items()}
        if not ours or any(not torch.equal(gate, ours[-1].get(site, gate[:0])) for site, gate in row.items()):
            ours.append(row)
    assert [set(row) for row in ours] == [set(row) for row in drawn]
    for one, other in zip(ours, drawn, strict=True):
        assert all(torch.equal(gate, other[site].round()) for site, gate in one.items())
    assert len(gated) > BATCHES, "a batch has parts of several lengths"
    assert {name: pytest.approx(row, rel=1e-4) for name, row in losses.items()} == found
    of_ours, of_paper = (dict(net.named_parameters()) for net in (training.pruner, pruner))
    for name, parameter in of_paper.items():
        close = {"rtol": 1e-4, "atol": 1e-4 * float(parameter.grad.abs().max())}
        torch.testing.assert_close(of_ours[f"main.{name}"].grad.double(), parameter.grad, **close)

    norm = torch.stack([p.grad.norm() for p in of_paper.values()]).norm()
    start = {name: value.detach().clone() for name, value in of_paper.items()}
    run(training, tmp_path, progress=False)
    for name, parameter in of_paper.items():
        step = -RATE * parameter.grad * min(1.0, 1 / float(norm))
        close = {"rtol": 1e-3, "atol": 1e-4 * float(step.abs().max()) + 1e-7}  # float32 holds a gain of 1 to 1e-7
        torch.testing.assert_close(of_ours[f"main.{name}"].detach() - start[name], step, **close)
