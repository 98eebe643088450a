"""Fit the joint meta-pruner from the samples here, as what ships was: bit for bit on a CPU with AVX-512.

    python -m benchmarks.joint_pruner.fit --check               # what ships, again, and whether it is the same
    python -m benchmarks.joint_pruner.fit --out DIR [--without-tasks qnli …] [--without-subjects rxnfp …]
    python -m benchmarks.joint_pruner.fit --out DIR --unseen    # one fit without each task and each family of models

Without --samples the fits are on samples.tar.xz. --samples and --remembered name folders of `collect` instead; of
samples of one name that in the last folder counts. Of the models in the samples of --remembered a fit remembers which
heads the masks keep that searches found there. --forget fits the networks alone.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from benchmarks.joint_pruner.collect import OWN, family, task_of
from benchmarks.subjects import SUBJECTS

from secateur.meta_training.fitting import BESIDE_FOUND, FitConfig, fit
from secateur.meta_training.remembering import remember
from secateur.meta_training.sample import Sample
from secateur.pruners.joint_network import JointPruner
from secateur.pruners.writes import fingerprints_of, output_weights
from secateur.scorers.smp_plus import SHIPPED
from secateur.sites.attention import find_sites

PACKED = Path(__file__).parent / "samples.tar.xz"
TAUGHT, REMEMBERED = ("tried", "found"), ("remembered",)  # folders in it: a found sample replaces the tried one


def load(
    folders: Sequence[Path], tasks: tuple[str, ...] = (), families: tuple[str, ...] = ()
) -> tuple[list[Sample], list[Sample]]:
    """Return the samples to fit on and those of the tasks and families that are left out.

    A sample takes the place of one of the same name in an earlier folder.
    """
    paths = {path.name: path for folder in folders for path in sorted(folder.glob("*.safetensors"))}
    every = [Sample.load(paths[name]) for name in sorted(paths)]
    out = [task_of(sample.task) in tasks or family(sample.subject) in families for sample in every]
    return [s for s, o in zip(every, out, strict=True) if not o], [s for s, o in zip(every, out, strict=True) if o]


def fitted(samples: list[Sample], seed: int = 0) -> JointPruner:
    torch.manual_seed(seed)
    pruner = JointPruner(**(BESIDE_FOUND if any(sample.found is not None for sample in samples) else {}))
    fit(pruner, samples, FitConfig(seed=seed))
    return pruner


@cache
def fingerprints(subject: str) -> torch.Tensor:
    """Return what tells the heads of a model from others, `[heads, numbers]`."""
    model = SUBJECTS[subject]().model
    return torch.cat([fingerprints_of(output_weights(model, site)) for site in find_sites(model).values()])


def recognisable(sample: Sample) -> Sample:
    """Return a sample with its model's fingerprints, which those of earlier versions lack."""
    return replace(sample, evidence=replace(sample.evidence, fingerprints=fingerprints(sample.subject)))


def make(
    out: Path, samples: list[Path], remembered: list[Path], seed: int, tasks: Sequence[str], families: Sequence[str]
) -> int:
    """Fit a pruner without some tasks and families, write it, and return on how many samples it was fitted."""
    left_out = tuple(tasks), tuple(families)
    kept, _ = load(samples, *left_out)
    pruner = fitted(kept, seed)
    known, _ = load(remembered, *left_out)
    remember(pruner, [recognisable(sample) for sample in known])
    pruner.save_pretrained(out)
    return len(kept)


def is_as_shipped(folder: Path) -> bool:
    """Say of each file whether it is the same as in the package."""
    names = ("config.json", "model.safetensors")
    same = {name: filecmp.cmp(folder / name, SHIPPED / name, shallow=False) for name in names}
    print(*(f"{name}: {'the same' if one else 'OTHERWISE'}" for name, one in same.items()), sep="\n")
    return all(same.values())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with what ships")
    parser.add_argument("--unseen", action="store_true", help="a fit without each task and each family")
    parser.add_argument("--samples", type=Path, nargs="+", help="folders; of one name: the last counts")
    parser.add_argument("--remembered", type=Path, nargs="*", help="folders of found masks to remember")
    parser.add_argument("--forget", action="store_true", help="remember nothing: the networks alone")
    parser.add_argument("--without-tasks", nargs="*", default=[])
    parser.add_argument("--without-subjects", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out is None and not options.check:
        parser.error("--out DIR, or --check")
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(PACKED) as packed:
            packed.extractall(place, filter="data")
        samples = options.samples or [Path(place) / name for name in TAUGHT]
        remembered = options.remembered
        if remembered is None:
            remembered = [] if options.samples else [Path(place) / name for name in REMEMBERED]
        given = samples, [] if options.forget else remembered, options.seed
        out = options.out or Path(place) / "pruner"
        if options.unseen:
            every = load(samples)[0]
            for name in sorted({task_of(sample.task) for sample in every} - {OWN}):
                make(out / name, *given, (name,), ())
            families = sorted({family(sample.subject) for sample in every})
            for name in families if len(families) > 1 else []:
                make(out / name, *given, (), (name,))
            return
        count = make(out, *given, options.without_tasks, options.without_subjects)
        print(f"fitted on {count} samples: {out}")
        if options.check:
            sys.exit(not is_as_shipped(out))


if __name__ == "__main__":
    main()
