"""The tasks of a comparison: train and dev of each, read once a process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from secateur.errors import InvalidInputError, invalid
from secateur.support.fingerprints import fingerprint
from secateur.texts.data import Task, has_splits, load_task


@lru_cache(maxsize=2)
def splits(data: str) -> tuple[Task, Task]:
    """Return the train and the dev split of a task, both with labels."""
    return load_task(data, "train", need_labels=True), load_task(data, "dev", need_labels=True)


def check_tasks(places: Sequence[str]) -> dict[str, str]:
    """Read every split once before anything is computed, and return fingerprints of the texts and labels of each task,
    by its name.

    Refuses two tasks of one name, and data without a dev split.
    """
    splits.cache_clear()  # an earlier comparison of this process may have read what has changed since
    names: dict[str, str] = {}
    found = {}
    for data in places:
        if not has_splits(data):
            raise invalid("data", "have train and dev apart", data, "give a folder with both, or a Hub id")
        train, dev = splits(data)
        if train.name in names:
            raise InvalidInputError(f"{data} and {names[train.name]} have the same task name {train.name!r}")
        names[train.name] = data
        found[train.name] = fingerprint(repr((split.texts, split.labels)).encode() for split in (train, dev))
    return found
