"""Tasks from local files or the Hub, as plain Python lists."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from secateur.errors import InvalidInputError, invalid, shown
from secateur.support.checks import check_whole, did_you_mean, is_number
from secateur.texts.hub import hub_id, hub_split
from secateur.texts.rows import FILE_FORMATS, SPLIT_NAMES, read_columns, stem_and_format
from secateur.texts.tokenization import Text, check_texts, is_text

# Pairs come first because QNLI's columns are `question` and `sentence`.
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
_TAKE_OTHERS = "`secateur score`, `prune`, `distill`, `finetune` and `evaluate` take others with"
_MOST_LISTED = 500  # characters of the names of columns
MOST_CLASSES = 100_000
"""A model needs an output for each class up to the highest; a larger number was not meant as one."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read: those of one text or two, and that of labels; None = by their usual names.

    `needs_label` refuses a table without labels. Raises `InvalidInputError` for anything but one name or two, and for
    one column in two places.
    """

    texts: tuple[str, ...] | None = None
    label: str | None = None
    needs_label: bool = False

    def __post_init__(self) -> None:
        names = [*(self.texts or ()), *([] if self.label is None else [self.label])]
        if self.texts is not None and len(self.texts) not in (1, 2):
            raise invalid("text_column", "name one column, or two with a comma for pairs", ",".join(self.texts))
        if not all(names) or len(set(names)) < len(names):
            raise invalid("text_column", "name columns, none of them twice or the labels'", ",".join(names))

    def chosen(self, found: Sequence[str], source: str) -> tuple[tuple[str, ...], str | None]:
        """Return the text columns among those that were `found`, and that of labels, None where there is none.

        Raises `InvalidInputError` where one that is named or needed is missing, or there are two of a name.
        """
        listed = ", ".join(map(repr, found))
        listed = listed if len(listed) <= _MOST_LISTED else listed[: _MOST_LISTED - 3] + "..."
        for option, name in [*(("text", name) for name in self.texts or ()), ("label", self.label)]:
            if name is not None and name not in found:
                guess = did_you_mean(name, found)
                said = f"{source} has no column {name!r}, which `{option}_column` names: found {listed}"
                raise InvalidInputError(f"{said}; {guess}" if guess else said)
        texts = self.texts or next((names for names in TEXT_COLUMNS if all(name in found for name in names)), None)
        if texts is None:
            expected = "expected `sentence`, `text`, or `sentence1` and `sentence2`"
            remedy = f"{_TAKE_OTHERS} --text-column"
            raise InvalidInputError(f"{source} has no text columns: {expected}, found {listed}; {remedy}")
        label = self.label or ("label" if "label" in found and "label" not in texts else None)
        if label is None and self.needs_label:
            said = f"{source} has no labels; this step needs a `label` column, found {listed}"
            raise InvalidInputError(f"{said}; {_TAKE_OTHERS} --label-column")
        for name in (*texts, label):
            if list(found).count(name) > 1:  # type: ignore[arg-type]
                raise InvalidInputError(f"{source} has more than one column {name!r}")
        return texts, label

    def needed(self, found: Sequence[str], source: str) -> list[str]:
        """Return all columns that are read. Raises what `chosen` raises."""
        texts, label = self.chosen(found, source)
        return [*texts, *([] if label is None else [label])]


USUAL_COLUMNS = Columns()


@dataclass(frozen=True)
class Task:
    """The texts of one split of a task, all single strings or all pairs, with their labels if there are any.

    `labels` holds whole numbers from 0 up for a classification and floats for a regression. `name` chooses the main
    metric (see `secateur.finetuning.evaluate.main_metric`) and appears in reports.

    Raises `InvalidInputError` for no texts, for a mixture of single texts and pairs, and for labels that are not one
    finite number for each text.
    """

    name: str
    texts: list[Text]
    labels: list[int] | list[float] | None = None

    def __post_init__(self) -> None:
        check_texts(self.texts)
        if self.labels is None:
            return
        if len(self.labels) != len(self.texts):
            raise invalid("labels", f"hold one label for each of the {len(self.texts)} texts", len(self.labels))
        regression = self.is_regression
        for index, label in enumerate(self.labels):
            if not is_number(label):
                raise invalid(f"labels[{index}]", "be a finite number", label)
            if not regression and not 0 <= label < MOST_CLASSES:
                raise invalid(f"labels[{index}]", f"be a class from 0 up, below {MOST_CLASSES:,}", label)

    @property
    def is_pair(self) -> bool:
        """Whether each text is a pair of strings."""
        return isinstance(self.texts[0], tuple)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are floats; False where there are no labels."""
        return self.labels is not None and any(isinstance(label, float) for label in self.labels)

    @property
    def num_labels(self) -> int:
        """The outputs that a model needs: 1 for a regression, else the highest class + 1 and at least 2.

        Raises `InvalidInputError` where the task has no labels.
        """
        if self.labels is None:
            raise invalid("task", "have labels", self.name, "give data with a `label` column")
        if self.is_regression:
            return 1
        # One class is still a classification: transformers takes a model with one output for a regression.
        return max(2, int(max(self.labels)) + 1)

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, n: int, seed: int | None = None) -> Task:
        """Return a task with the first `n` rows or, with a `seed`, with `n` random ones; all rows if there are fewer.

        Raises `InvalidInputError` where `n` is below 1.
        """
        if n < 1:
            raise invalid("n", "be at least 1", n)
        count = min(n, len(self))
        rows = range(count) if seed is None else random.Random(seed).sample(range(len(self)), count)
        labels: Any = None if self.labels is None else [self.labels[i] for i in rows]
        return Task(self.name, [self.texts[i] for i in rows], labels)


def load_task(
    data: str | Path,
    split: Literal["train", "dev", "test"] = "train",
    *,
    need_labels: bool = False,
    max_rows: int | None = None,
    columns: Columns = USUAL_COLUMNS,
) -> Task:
    """Read one split of a task from a file, a folder or the Hugging Face Hub.

    `data` is one of

    - a file .csv, .tsv (without quoting), .jsonl, .json (one object a line, or a list of objects) or .parquet, the
      text formats also with .gz behind; its rows serve as whichever split is asked for;
    - a folder with such files named train, dev (or validation, valid) and test (or test_matched);
    - where no such path exists, a Hub id: `glue/sst2`, `owner/name` or `owner/name:config`.

    Columns: those that `columns` names, or `sentence` or `text`, or a pair `sentence1` and `sentence2` (or GLUE's own
    names), and `label`; others are ignored. Labels are whole numbers from 0 up (classes) or numbers with a decimal
    point (regression); one label with a decimal point makes the task a regression. Where every label is -1, as in
    GLUE's hidden test sets, the task has none. `max_rows` keeps the first rows only. The task is named after the folder
    or the file.

    Raises `InvalidInputError` for whatever is missing or unreadable, naming the file and the row (counted from 1, the
    header left out).
    """
    if split not in SPLIT_NAMES:
        raise invalid("split", "be train, dev or test", split)
    if max_rows is not None:
        check_whole("max_rows", max_rows)
    if not isinstance(data, str | Path) or not str(data).strip():
        raise invalid("data", "name a file, a folder or a Hub id", data)
    path = Path(data).expanduser()
    if need_labels:
        columns = replace(columns, needs_label=True)
    if path.exists():
        file = _split_file(path, split) if path.is_dir() else path
        source, table = str(file), _read_file(file, columns)
        stem = stem_and_format(file)[0]
        is_split_name = any(stem in names for names in SPLIT_NAMES.values())
        name = file.absolute().parent.name if is_split_name else stem
    else:
        repository, config = hub_id(data)
        rows = hub_split(data, split)
        source, table = str(data), rows.select_columns(columns.needed(rows.column_names, str(data)))[:]
        name = config if repository == "nyu-mll/glue" and config else str(data)

    names, label = columns.chosen(list(table), source)
    texts = _texts({name: table[name] for name in names}, source)
    labels = None if label is None else _labels(table[label], label, source)
    if labels is None and need_labels:
        raise InvalidInputError(f"{source} has no labels; this step needs a `label` column with known labels")
    kept_labels: Any = None if labels is None else labels[:max_rows]
    return Task(name, texts[:max_rows], kept_labels)


def has_splits(data: str | Path) -> bool:
    """Whether `data` can give one split apart from another: anything but a single file, whose rows serve as any."""
    return not Path(data).expanduser().is_file()


def _split_file(folder: Path, split: str) -> Path:
    """Find the one file of a folder that holds the split."""
    files = [path for path in sorted(folder.iterdir()) if stem_and_format(path)[1] in FILE_FORMATS]
    for name in SPLIT_NAMES[split]:
        found = [path for path in files if stem_and_format(path)[0] == name]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise InvalidInputError(f"{folder} holds more than one {split} file ({names}); name the file itself")
        if found:
            return found[0]
    raise InvalidInputError(
        f"{folder} holds no {split} file: expected {' or '.join(SPLIT_NAMES[split])} with one of the endings "
        f"{', '.join(FILE_FORMATS)}"
    )


def _read_file(path: Path, columns: Columns) -> dict[str, list[Any]]:
    """Load a local file into the columns that a task needs."""
    if not path.is_file() or stem_and_format(path)[1] not in FILE_FORMATS:
        raise invalid("data", f"be a file with one of the endings {', '.join(FILE_FORMATS)}", str(path))
    return read_columns(path, columns.needed)


def _texts(columns: dict[str, list[Any]], source: str) -> list[Text]:
    names = list(columns)
    for name in names:
        for row, value in enumerate(columns[name], start=1):
            if not is_text(value):
                raise InvalidInputError(f"{source}: `{name}` in row {row} must be text, got {shown(value)}")
    if not columns[names[0]]:
        raise InvalidInputError(f"{source} holds no rows")
    if not any(any(columns[name]) for name in names):
        raise InvalidInputError(f"{source}: every text is empty")
    if len(names) == 1:
        return list(columns[names[0]])
    return list(zip(columns[names[0]], columns[names[1]], strict=True))


def _labels(values: list[Any], name: str, source: str) -> list[int] | list[float] | None:
    numbers = [_number(value, row, name, source) for row, value in enumerate(values, start=1)]
    if all(number == -1 for number in numbers):
        return None
    if any(isinstance(number, float) for number in numbers):
        return [float(number) for number in numbers]
    for row, number in enumerate(numbers, start=1):
        if not 0 <= number < MOST_CLASSES:
            rule = f"must be a class from 0 up, below {MOST_CLASSES:,}"
            raise InvalidInputError(f"{source}: `{name}` in row {row} {rule}, got {number}")
    return [int(number) for number in numbers]


def _number(value: Any, row: int, name: str, source: str) -> int | float:
    """Read a label; text files give strings, the other formats numbers."""
    where = f"{source}: `{name}` in row {row}"
    if value is None or value == "" or value != value:
        raise InvalidInputError(f"{where} is missing")
    number = value
    if isinstance(value, str) and "_" not in value:  # Python reads 1_0 as 10
        for kind in (int, float):
            try:
                number = kind(value)
                break
            except ValueError:
                continue
    if not is_number(number):
        raise InvalidInputError(
            f"{where} must be a number, 0 to n - 1 for classes or a float for a regression, got {shown(value)}"
        )
    return number
