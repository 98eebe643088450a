"""`secateur info`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from secateur.cli.options import device_option, json_option, print_json


@click.command()
@click.argument("model")
@device_option
@json_option
def info(model: str, device: str | None, as_json: bool) -> None:
    """Show MODEL's heads, neurons, layers, parameters, multiply-accumulates, and whether they can be removed."""
    from secateur.cli.tables import info_table, print_table
    from secateur.errors import UnsupportedModelError
    from secateur.measuring.cost import count_parameters, measure_cost
    from secateur.models.loading import check_device, load_model
    from secateur.sites.attention import find_sites

    loaded = load_model(model, check_device(device))
    facts: dict[str, Any] = {"model": model, "class": type(loaded).__name__, "parameters": count_parameters(loaded)}
    try:
        sites = find_sites(loaded)
        facts |= {"prunable": True, "cost": measure_cost(loaded).to_json()}
        facts["sites"] = [
            {
                "name": site.name,
                "heads": site.num_units,
                "key_value_heads": site.num_groups,
                "original_heads": site.original_num_units,
            }
            for site in sites.values()
        ]
        facts["others"] = other_units(loaded)
    except UnsupportedModelError as error:
        facts |= {"prunable": False, "reason": str(error)}
    if as_json:
        print_json(facts)
    else:
        print_table(info_table(facts))


def other_units(model: Any) -> list[str]:
    """Say in a line each what else can go: neurons, by the size of their sites, and layers; or why not."""
    from secateur.errors import UnsupportedModelError
    from secateur.sites.finding import find_layers, find_neurons

    lines = []
    try:
        found, refused = find_neurons(model)
        sizes = Counter(site.num_units for site in found.values())
        text = ", ".join(f"{count} sites of {size:,}" for size, count in sizes.items())
        lines.append(f"neurons: {text}" + (f"; {len(refused)} blocks are refused" if refused else ""))
    except UnsupportedModelError as error:
        lines.append(f"neurons: none, {error}")
    try:
        lines.append("layers: " + ", ".join(f"{name} has {s.num_units}" for name, s in find_layers(model).items()))
    except UnsupportedModelError as error:
        lines.append(f"layers: none, {error}")
    return lines
