"""Evidence of tiny models, and pruners that make something of it."""

import torch

from secateur.models.inputs import forward_arguments
from secateur.pruners.evidence import Evidence, gather_evidence
from secateur.pruners.features import FEATURES
from secateur.pruners.joint_network import JointPruner
from secateur.sites.attention import find_sites
from secateur.texts.data import Task
from secateur.texts.tokenization import batches
from tests.support.tiny import tiny_texts, tiny_tokenizer


def batches_of(model, count=8, size=4, seed=0):
    return forward_arguments(model, batches(tiny_tokenizer(), tiny_texts(count, seed), size, 16))


def evidence_of(model, made=None, is_pair=False):
    return gather_evidence(model, find_sites(model), batches_of(model) if made is None else made, is_pair)


def column(evidence, name):
    return evidence.features[:, FEATURES.index(name)]


def learned(seed=0, **options):
    """A pruner whose scores depend on everything it sees; a new one looks at the size alone, as do several at odds."""
    torch.manual_seed(seed)
    pruner = JointPruner(**{"members": 1, **options})
    for parameter in pruner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return pruner.eval()


def permuted(evidence, order):
    return Evidence(evidence.features[order], evidence.likeness[order][:, order], evidence.heads)


TASKS = [Task("singles", tiny_texts(40)), Task("pairs", tiny_texts(24, seed=1, pairs=True))]
SMALL = {"num_texts": 8, "evaluation_batches": 3, "batch_size": 4, "max_length": 16}
