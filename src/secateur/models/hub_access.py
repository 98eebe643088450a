"""Can the Hub be asked? Its client tries for half a minute where there is no network, so a short question comes first.

What was fetched before is then read from where it lies; a name that is nowhere is refused at once.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache

from secateur.errors import InvalidInputError

WAIT = 3.0
"""Seconds that the Hub has to answer; a name server may take longer than any time-out of a request."""
_REMEMBERED = 60  # seconds, after which the network may be back


def answers() -> bool:
    """Return whether the Hub answers, whatever it says, by its answer of the last minute if there is one."""
    return _asked(int(time.monotonic() / _REMEMBERED), constants.HF_HUB_OFFLINE, constants.ENDPOINT)


def check_in_reach(name: str, is_there: bool | None = None) -> None:
    """Raise `InvalidInputError` for a name on the Hub that was never fetched, where the Hub does not answer.

    `is_there` says whether it was; None looks for a model of that name.
    """
    if not (_is_fetched(name) if is_there is None else is_there) and not answers():
        raise InvalidInputError(f"cannot reach the Hub for {name}, and there is no folder {name} here")


def _is_fetched(model: str) -> bool:
    with suppress(ValueError):  # no name that the Hub could have
        return isinstance(try_to_load_from_cache(model, "config.json", constants.HF_HUB_CACHE), str)
    return False


def is_data_fetched(repository: str, cache: str | Path) -> bool:
    """Return whether a data set lies in the `cache` of the package datasets, or in that of the Hub's files."""
    owner, name = repository.split("/")
    places = Path(cache) / f"{owner}___{name}", Path(constants.HF_HUB_CACHE) / f"datasets--{owner}--{name}"
    return any(place.is_dir() for place in places)


@lru_cache(maxsize=1)
def _asked(minute: int, is_offline: bool, endpoint: str) -> bool:
    if is_offline:
        return False
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):  # of the network, each package of which has its own
            get_session().head(endpoint, timeout=WAIT)
            answered.set()
        done.set()

    done = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    done.wait(WAIT)
    return answered.is_set()
