"""Readers that do with a damaged file what none may do."""

import json
import os
import signal
import warnings

from secateur.errors import InvalidInputError
from tests.support.fuzzing import Reader


def write_list(folder):
    (folder / "list.json").write_text(json.dumps([1, 2, 3]))


def raises(folder, name):
    raise KeyError("layouts")


def runs_away(folder, name):
    while True:
        pass


def takes_all(folder, name):
    return bytearray(2**30)


def warns(folder, name):
    warnings.warn("overflow encountered", RuntimeWarning, stacklevel=1)


def dies(folder, name):
    os.kill(os.getpid(), signal.SIGSEGV)


def says_nothing(folder, name):
    raise InvalidInputError("invalid literal for int()")


BAD = {
    "KeyError('layouts')": raises,
    "TooLate('more than 0.1 seconds')": runs_away,
    "MemoryError()": takes_all,
    "warns: overflow encountered": warns,
    "the process ended with -11": dies,
    "names neither a file nor a parameter": says_nothing,
}
BAD_READERS = {message: Reader("a list", write_list, ("list.json",), read) for message, read in BAD.items()}
