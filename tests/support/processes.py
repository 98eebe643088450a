"""Real processes for tests, forked from one that has imported everything: a start takes milliseconds, not seconds.

`command` runs a command line of secateur in such a process. `moment` counts what the process does to files and folders
below a folder, and at that number sends the process a signal: `SIGKILL` is a kill at that very moment.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal as signals
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_FORKED = multiprocessing.get_context("forkserver")
_PRELOADED = [
    *("secateur.cli", "secateur.cli.tables", "secateur.comparing.run", "secateur.meta_training.joint_training"),
    *("secateur.report.comparison", "secateur.report.pruned", "secateur.removal.verify"),
    *("datasets", "transformers.trainer", "transformers.models.bert.modeling_bert"),
]
assert all(map(find_spec, _PRELOADED)), "what cannot be imported would be passed over"
_FORKED.set_forkserver_preload(_PRELOADED)
_TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Ended:
    """How a process ended: `code` is its exit code, or minus the signal that ended it."""

    code: int | None
    out: str
    err: str


class Command:
    """A running command."""

    def __init__(self, line: list[object], log: Path, *options: object) -> None:
        self.log = log
        log.mkdir(exist_ok=True)
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # of the process that all others are forked from
        try:
            self.process = _FORKED.Process(target=_run, args=([str(word) for word in line], str(log), *options))
            self.process.start()
        finally:
            os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)

    def wait(self, seconds: float = 300) -> Ended:
        """Return how it ended."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the command has not ended"
        return Ended(self.process.exitcode, *((self.log / name).read_text() for name in ("out", "err")))


def command(
    line: list[object],
    log: Path,
    moment: int = 0,
    signal: int = 0,
    below: Path | None = None,
    forked_workers: bool = False,
    memory: int = 0,
) -> Command:
    """Start `secateur LINE`; what it prints goes into the folder `log`.

    With `forked_workers` the processes that it starts itself are forked as it was, and have nothing to import. `memory`
    is how many MiB more it may take than it has at first.
    """
    return Command(line, log, moment, signal, str(below or ""), forked_workers, memory)


def outcome_within(
    memory: int, function: Callable[..., object], *args: object, seconds: float = 300
) -> tuple[str, str]:  # fmt: skip
    """Call a function of a module in a process that may take `memory` MiB more than it has, and `seconds`.

    Returns the name and the text of what it raised, both empty where it raised nothing.
    """
    queue = _FORKED.SimpleQueue()
    process = _FORKED.Process(target=_call, args=(queue, memory, function, args))
    process.start()
    process.join(seconds)
    ended = process.exitcode
    process.kill()
    assert ended == 0, f"the process ended with {ended}"
    return queue.get()


def _call(queue: Any, memory: int, function: Callable[..., object], args: tuple[object, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    _limit_memory(memory)
    try:
        function(*args)
        queue.put(("", ""))
    except BaseException as error:
        queue.put((type(error).__name__, str(error)))


def _limit_memory(memory: int) -> None:
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + memory * 2**20,) * 2)


def touches(ended: Ended) -> int:
    """Return how many moments a command had that was started with `moment=-1`."""
    return int(ended.err.rpartition("moments ")[2])


def _run(line: list[str], log: str, moment: int, signal: int, below: str, forked_workers: bool, memory: int) -> None:
    os.setsid()
    gc.freeze()  # what is imported is no garbage, and stays shared with the other processes
    # A test run that was started in the background ignores Ctrl-C, and so would everything that comes of it.
    signals.signal(signals.SIGINT, signals.default_int_handler)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import torch

    torch.set_num_threads(1)
    from secateur import cli

    if forked_workers:
        forked = multiprocessing.get_context("fork")  # a fork server of its own would import everything once more
        multiprocessing.get_context = lambda method=None: forked  # type: ignore[assignment]
    if memory:
        _limit_memory(memory)
    seen = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in _TOUCHES or not isinstance(arguments[0], str | Path):
            return
        writes = event != "open" or bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))  # type: ignore[call-overload]
        if writes and str(arguments[0]).startswith(below):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal)

    if below:
        sys.addaudithook(count)
    code = cli.main(line)
    if moment < 0:
        print("moments", seen, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launched(count: int, function: Callable[..., object], *args: object) -> None:
    """Call `function(accelerator, *args)` in `count` processes, forked from this one, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=_work, args=(rank, count, port, function, args)) for rank in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join(600)  # a guard against waiting for ever, no measure of speed
        process.kill()
    assert [process.exitcode for process in running] == [0] * count


def _work(rank: int, count: int, port: int, function: Callable[..., object], args: tuple[object, ...]) -> None:
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state()
    PartialState._reset_state()
    accelerator = Accelerator()
    torch.set_num_threads(1)  # accelerate takes a number of its own where OMP_NUM_THREADS does not say one
    assert accelerator.num_processes == count
    function(accelerator, *args)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # a process that just leaves can make the other abort
