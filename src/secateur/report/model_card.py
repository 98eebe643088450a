"""The model card of a pruned folder: what went, how it is loaded and what was measured, for who finds it there."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from secateur.errors import invalid
from secateur.models.originals import on_this_machine, recorded_original
from secateur.report.how_to_load import how_to_load
from secateur.report.numbers import DASH, counted
from secateur.report.pruning_report import PruningReport
from secateur.report.reading import cost_rows
from secateur.report.relational_kl import distillation_line
from secateur.support.files import write_text
from secateur.support.run_files import CARD, CARD_BESIDE
from secateur.support.versions import __version__

_PRUNED = """
Import secateur before the model is loaded. Without it the weights do not fit the layers that transformers builds.
Never set `ignore_mismatched_sizes=True`: it puts random weights in place of the smaller ones, with no more than a
warning.

Where secateur is not installed, a folder made by `secateur export FOLDER --format standalone --out OTHER` loads, with
`trust_remote_code=True`.
"""
_PLAIN = (
    "\nThe config tells the smaller sizes by its own numbers, so the folder loads where secateur is not installed.\n"
)


def write_model_card(report: PruningReport, folder: Path) -> Path:
    """Write the card of the pruned model that was saved in `folder`, and return its file.

    That is README.md, or PRUNING.md beside a README.md that is there already. Raises `InvalidInputError` for a folder
    without a model.
    """
    loading = how_to_load(folder)
    if loading is None:
        raise invalid("folder", "hold a model", str(folder), "save the pruned model there first")
    data = ModelCardData(
        library_name=loading["library"], base_model=hub_id_of(report.model), tags=["secateur", "pruned"]
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {_title(report.model)}, pruned\n",
        f"secateur {__version__} made this model smaller: {report}.\n{_scored(report)}\n",
        _table(report),
        f"## How to load it\n\n```python\n{loading['code']}\n```",
        _PRUNED if loading["needs_secateur"] else _PLAIN,
        f"## What was measured\n\n{_measured(report)}\n",
    ]
    file = folder / (CARD_BESIDE if (folder / CARD).exists() else CARD)
    write_text(file, str(ModelCard("\n".join(parts))))
    return file


def hub_id_of(model: str | Path) -> str | None:
    """Return the Hub id of a model, or for a folder of the model that it was pruned from; None where none is known.

    A name counts as an id where no folder has it and the Hub's files are on this machine, as after loading from there.
    """
    name, seen = str(model), set[str]()
    while Path(name).is_dir() and name not in seen:
        seen.add(name)
        name = recorded_original(name) or ""
    is_id = bool(name) and not Path(name).exists() and on_this_machine(name) is not None
    return name if is_id else None


def _title(model: str) -> str:
    """Return a model's name without its folders, which are those of a machine, and without marks of Markdown."""
    name = hub_id_of(model) or Path(model).name or "model"
    return "".join(c if c.isalnum() or c in " ._-/+" else " " for c in name).strip() or "model"


def _scored(report: PruningReport) -> str:
    """Say by what the units were chosen."""
    return f"What went was chosen by `{report.scorer}`, given {counted(report.num_texts, 'text')}."


def _table(report: PruningReport) -> str:
    """Return units, parameters and multiply-accumulates before and after as a table in Markdown."""
    lines = ["| | before | after | left |", "|---|---|---|---|"]
    for row in cost_rows(report.before.to_json(), report.after.to_json(), report.units):
        name = f"{row['name']}, {row['note']}" if "note" in row else row["name"]
        left = f"{row['pruned'] / row['dense']:.1%}" if row["dense"] else DASH
        lines.append(f"| {name} | {row['dense']:,} | {row['pruned']:,} | {left} |")
    return "\n".join(lines) + "\n"


def _measured(report: PruningReport) -> str:
    """Return a list in Markdown of what is known of the model's quality and of the proof."""
    lines = [
        f"quality: {report.quality}"
        if report.quality is not None
        else "quality: not measured, as no texts were held out for it"
    ]
    lines += [f"budget: {outcome}" for outcome in report.budget]
    if report.reconstruction:
        lines.append(_refitted(*report.reconstruction))
    if report.distillation:
        before, after = report.distillation
        lines.append("distillation: " + distillation_line(before, after, report.steps))
    lines.append(
        f"proof of the removal: outputs differ by at most {report.max_difference:.1e} from those of the model with the "
        f"same units switched off ({report.tolerance:g} is accepted)"
    )
    return "\n".join(f"- {line[:1].upper()}{line[1:]}." for line in lines)


def _refitted(before: float, after: float) -> str:
    what = f"relational KL {before:.4f} before, {after:.4f} after"
    if not after < before:
        what = f"relational KL no lower than {before:.4f}, so the weights are those before it"
    return f"reconstruction, on the texts that chose what went: {what}"
