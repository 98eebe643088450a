"""`secateur info`."""

from __future__ import annotations

from typing import Any

import click

from secateur.cli.options import device_option, json_option, print_json


@click.command()
@click.argument("model")
@device_option
@json_option
def info(model: str, device: str | None, as_json: bool) -> None:
    """Show MODEL's attention sites, heads, parameters, multiply-accumulates, and whether heads can be removed."""
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
    except UnsupportedModelError as error:
        facts |= {"prunable": False, "reason": str(error)}
    if as_json:
        print_json(facts)
    else:
        print_table(info_table(facts))
