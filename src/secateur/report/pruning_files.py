"""What a pruning leaves in its folder: the model, and beside it the report and its page."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from secateur.models.model_saving import save_model
from secateur.models.places import copy_file
from secateur.report import write_report
from secateur.report.model_card import write_model_card
from secateur.report.pruning_report import PruningReport
from secateur.report.reading import read_runs
from secateur.support.run_files import ATTENTION_MAPS, PAGE, PRUNING


def save_all(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, source: str, report: PruningReport, folder: Path
) -> None:
    """Write a pruned model as `save_model` does, with its report, the page of that and a model card."""
    save_model(model, tokenizer, source, folder)
    save_pruning(report, folder)
    write_model_card(report, folder)
    write_report(read_runs([folder]), folder / PAGE)


def save_pruning(report: PruningReport, folder: Path) -> None:
    """Write the report, and the attention maps where it has them."""
    report.save(folder / PRUNING)
    if report.attention_maps is not None:
        report.attention_maps.save(folder / ATTENTION_MAPS)


def copy_pruning(source: str | Path, folder: Path) -> None:
    """Copy what `save_pruning` wrote into `source`, where there is any, to another folder."""
    for name in (PRUNING, ATTENTION_MAPS):
        if (Path(source) / name).is_file():
            copy_file(Path(source) / name, Path(source), folder / name)
