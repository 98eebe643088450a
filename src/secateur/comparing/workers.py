"""Processes that share independent calls, each with its threads and its GPU; none outlives the one that started it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from tqdm import tqdm

from secateur.errors import SecateurError


def _start_worker(threads: int, gpus: Any, parent: Connection, silenced: int) -> None:
    logging.disable(silenced)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent says what follows
    torch.set_num_threads(threads)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpus.get())
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Connection) -> None:
    """End this process when its parent closes the connection, or has been killed, which does that too."""
    parent.poll(None)
    os._exit(1)


@contextmanager
def workers(jobs: int, threads: int, device: str) -> Iterator[ProcessPoolExecutor | None]:
    """Yield a pool of fresh processes, each with its threads and its GPU, or None where one job runs in this one."""
    if jobs == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield None
        finally:
            torch.set_num_threads(before)
        return
    spawn = multiprocessing.get_context("spawn")
    gpus = None
    if device == "cuda" and torch.cuda.device_count() > 1:
        gpus = spawn.Queue()
        for number in range(jobs):
            gpus.put(number % torch.cuda.device_count())
    theirs, ours = spawn.Pipe(duplex=False)
    pool = ProcessPoolExecutor(jobs, spawn, _start_worker, (threads, gpus, theirs, logging.root.manager.disable))
    try:
        yield pool
    except KeyboardInterrupt:
        ours.close()  # ends them at once, not after the runs that have begun
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def each(
    pool: ProcessPoolExecutor | None,
    work: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    what: str,
    progress: bool,
) -> Iterator[Any]:
    """Yield the results as they come; the first error stops the rest, after what had finished was yielded."""
    with tqdm(total=len(calls), desc=what, unit="run", disable=not progress) as bar:
        if pool is None:
            for call in calls:
                yield work(*call)
                bar.update(1)
            return
        waiting, error = {pool.submit(work, *call) for call in calls}, None
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            failed = [f for f in finished if f.exception() is not None]
            for future in finished - set(failed):
                yield future.result()
                bar.update(1)
            if failed:
                # What is running may still finish, and is not lost then.
                waiting = {future for future in waiting if not future.cancel()}
                error = error or failed[0].exception()
        if isinstance(error, BrokenProcessPool):
            raise SecateurError(
                "a process was killed, perhaps for want of memory; go on with fewer jobs (`--jobs`)"
            ) from error
        if error is not None:
            raise error
