"""`secateur verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import Place, device_option, json_option, print_json


@click.command()
@click.argument("folder", type=Place())
@click.option("--against", default=None, help="The unpruned model [default: the one that the recipe names].")
@device_option
@json_option
def verify(folder: Path, against: str | None, device: str | None, as_json: bool) -> None:
    """Reload the pruned model in FOLDER and compare its weights and outputs with its gated original.

    Ends with exit code 1 where they differ, unless the recipe says that the model was trained since, and digests say
    that its weights are what training made of them.
    """
    from secateur.models.loading import check_device
    from secateur.removal.verify import verify_checkpoint

    result = verify_checkpoint(folder, against, check_device(device))
    if as_json:
        print_json(result)
    else:
        click.echo("\n".join(_lines(folder, result)))
    is_as_trained = result["verdict"] == "trained" and result["weights"] == "as saved"
    if not result["equal"] and not is_as_trained:
        raise click.exceptions.Exit(1)


def _lines(folder: Path, result: dict[str, Any]) -> list[str]:
    """Return the verdict, then what it rests on."""
    counts, differing = result["tensors"], result["differing"]
    relation = {"equal": "equal to", "trained": "comes from", "differs": "DIFFERS from"}[result["verdict"]]
    refitted = " and its output projections refitted" if result["reconstructed"] else ""
    lost = [f"{before - after} {kind}" for kind, (before, after) in result["units"].items()]
    verdict = f"{folder} {relation} {result['against']} with {' and '.join(lost)} gated{refitted}"
    if result["verdict"] == "trained":
        done = {"distilled": "distilled", "finetuned": "fine-tuned"}
        words = " and ".join(word for name, word in done.items() if result[name])
        verdict += f", and was {words} since: {counts['trained']} of {sum(counts.values())} tensors differ; "
        verdict += "units removed as the recipe says"
    elif set(counts) & {"other"} and result["weights"] == "as saved":
        verdict += ": it has another original, or was trained since by what the recipe does not record"
    odd = [one["name"] for one in differing if one["state"] in ("not finite", "missing", "other")]
    # A bias may have been near 0.
    refits = (one for one in differing if one["state"] == "refitted" and not one["name"].endswith("bias"))
    most = max((one["change"] or 0.0 for one in refits), default=0.0)
    by = {"refitted": f" (weights by up to {most:.2g} of their norm)", "trained": " since"}
    states = ", ".join(f"{count} {state}{by.get(state, '')}" for state, count in counts.items())
    step = result["max_step_difference"]
    cached = "" if step is None else f", {step:.1e} with a cache"
    return [
        verdict,
        f"tensors: {states}{_such_as(odd)}",
        {
            "as saved": "weights: as they were saved",
            "changed": f"weights: {len(result['changed'])} changed since they were saved{_such_as(result['changed'])}",
            "unknown": "weights: saved without digests, so that a change since does not show",
        }[result["weights"]],
        f"largest difference {result['max_difference']:.1e}{cached} (at most {result['tolerance']:g} is accepted)",
    ]


def _such_as(names: list[str]) -> str:
    """Return the first few names."""
    return f": {', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else ""
