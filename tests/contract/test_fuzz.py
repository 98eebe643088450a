"""Damaged files: each reader refuses them in the one form, or reads them whole. `make fuzz` tries far more of them.

The cases are the same in every run of the suite, and a hundred times as many in `make robustness`; `make fuzz` draws
others each time.
"""

import os
import re
import secrets

import pytest

from tests.support.bad_readers import BAD_READERS
from tests.support.fuzzing import fuzz
from tests.support.readers import READERS

FULL = 2000
CASES = int(os.environ.get("FUZZ_CASES", FULL // 100))
SEED = 0 if CASES <= FULL else secrets.randbelow(2**32)
SECTION = "Damaged files"
# The suite has no time for a process each.
GROUPS = [[reader] for reader in READERS.values()] if CASES >= FULL else [[*READERS.values()]]


@pytest.mark.parametrize("readers", GROUPS, ids=lambda readers: readers[0].tried if len(readers) == 1 else "all")
def test_damaged_files_are_refused_or_whole(readers, outcome):
    found = fuzz(readers, SEED, CASES)
    assert sum(tally.refused for tally in found.values()) > 0 < sum(tally.whole for tally in found.values())
    for tried, tally in found.items():
        outcome(SECTION, tried, tally)


@pytest.mark.parametrize("message", BAD_READERS)
def test_what_ends_otherwise_is_told_with_its_numbers(message):
    with pytest.raises(AssertionError, match=f"a list, case 0.* of seed 7.*{re.escape(message)}"):
        fuzz([BAD_READERS[message]], 7, 5, most=0.1)
