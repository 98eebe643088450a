"""Pruned tiny models, and whether two models are one."""

import torch

from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from tests.support.tiny import tiny_classifier, tiny_model, uneven_mask


def pruned_classifier(kind="bert"):
    model = tiny_classifier(kind)
    remove_(model, uneven_mask(find_sites(model)))
    return model


def pruned(kind, empty=False):
    model = tiny_model(kind)
    remove_(model, uneven_mask(find_sites(model), empty))
    return model


def assert_equal(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
