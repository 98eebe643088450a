"""What a model would cost without some of its units, counted from one pass over the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from secateur.measuring.cost import ModelCost, count_macs, count_parameters
from secateur.models.base_model import base_of
from secateur.sites.layers import LayerSite
from secateur.sites.layout import AttentionSite, Site
from secateur.units.masks import Mask, is_within, layers_gone


class UnitCosts:
    """Tells for any mask the cost that `measure_cost` would measure after the removal; `dense` is the cost before it.

    Weights shrink by the indices that units own, products with a weight as the weight does, and the products that
    attention makes without one (queries with keys, maps with values) as the number of query heads. A layer takes all
    that is in it. `heads` counts those of the attention sites among `sites`.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], batch: int = 1, length: int = 128) -> None:
        self.sites = sites
        base = base_of(model)
        macs, length = count_macs(base, batch, length)
        heads = sum(site.num_units for site in sites.values() if isinstance(site, AttentionSite))
        self.dense = ModelCost(heads, count_parameters(model), macs[""], batch, length)
        owned = {piece.parameter for site in sites.values() for piece in site.slices}
        self._shapes = {name: tuple(base.get_parameter(name).shape) for name in owned}
        # Only matrices are multiplied with; a bias lies in the same module and must not count a second time.
        self._by_weight = {
            name: macs.get(name.rpartition(".")[0], 0) if len(shape) > 1 else 0 for name, shape in self._shapes.items()
        }
        self._by_heads = {
            name: _own(name, base.get_submodule(name), macs) if isinstance(site, AttentionSite) else 0
            for name, site in sites.items()
        }
        self._layers = {
            f"{site.name}.{number}": (count, macs.get(f"{site.name}.{number}", 0))
            for site in sites.values()
            if isinstance(site, LayerSite)
            for number, count in enumerate(_parameters_of_layers(base.get_submodule(site.name)))
        }

    def after(self, mask: Mask) -> ModelCost:
        """Return the cost without the units that `mask` drops."""
        kept = mask.present(self.sites)
        gone = layers_gone(self.sites, kept)
        heads, parameters, macs = 0, 0, 0.0
        for name, site in self.sites.items():
            if is_within(name, gone):
                continue
            heads += int(kept[name].sum()) if isinstance(site, AttentionSite) else 0
            weights, work = self._saved(site, kept[name])
            parameters += weights
            macs += work
        dense = self.dense
        return ModelCost(heads, dense.parameters - parameters, dense.macs - round(macs), dense.batch, dense.length)

    def saved_macs(self, site: str, kept: Tensor) -> float:
        """Return the multiply-accumulates that a site saves with the units in `kept` (bool `[units there now]`)."""
        return self.saved(site, kept)[1]

    def saved(self, site: str, kept: Tensor) -> tuple[int, float]:
        """Return the parameters and the multiply-accumulates that a site saves with the units in `kept`."""
        return self._saved(self.sites[site], kept)

    def saved_by_layer(self, path: str) -> tuple[int, float]:
        """Return the parameters and the multiply-accumulates of a whole layer."""
        return self._layers[path]

    def _saved(self, site: Site, kept: Tensor) -> tuple[int, float]:
        """Return the parameters and the multiply-accumulates that a site saves."""
        if bool(kept.all()):
            return 0, 0.0
        if isinstance(site, LayerSite):
            of_layers = [self._layers[path] for path in layers_gone({site.name: site}, {site.name: kept})]
            return sum(count for count, _ in of_layers), float(sum(macs for _, macs in of_layers))
        shapes = {piece.parameter: list(self._shapes[piece.parameter]) for piece in site.slices}
        for (name, axis), indices in site.kept_indices(kept).items():
            shapes[name][axis] = len(indices)
        parameters, macs = 0, self._by_heads[site.name] * (1 - int(kept.sum()) / site.num_units)
        for name, shape in shapes.items():
            before, after = math.prod(self._shapes[name]), math.prod(shape)
            parameters += before - after
            macs += self._by_weight[name] * (1 - after / before)
        return parameters, macs


def _parameters_of_layers(layers: Any) -> list[int]:
    """Return how many parameters go with each layer: what only the first one has besides is handed on (T5's biases)."""
    counts = [count_parameters(layer) for layer in layers]
    names = [{name for name, _ in layer.named_parameters()} for layer in layers]
    if len(layers) > 1 and names[1] < names[0]:
        counts[0] -= sum(layers[0].get_parameter(name).numel() for name in names[0] - names[1])
    return counts


def _own(name: str, module: nn.Module, macs: Mapping[str, int]) -> int:
    """Return what a module multiplies itself, outside the modules in it."""
    return macs.get(name, 0) - sum(macs.get(f"{name}.{child}", 0) for child, _ in module.named_children())
