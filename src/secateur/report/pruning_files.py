"""What a pruning leaves in its folder for a page, beside the model."""

from __future__ import annotations

import shutil
from pathlib import Path

from secateur.pruning_report import PruningReport
from secateur.support.run_files import ATTENTION_MAPS, PRUNING


def save_pruning(report: PruningReport, folder: Path) -> None:
    """Write the report, and the attention maps where it has them."""
    report.save(folder / PRUNING)
    if report.attention_maps is not None:
        report.attention_maps.save(folder / ATTENTION_MAPS)


def copy_pruning(source: str | Path, folder: Path) -> None:
    """Copy what `save_pruning` wrote into `source`, where there is any, to another folder."""
    for name in (PRUNING, ATTENTION_MAPS):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
