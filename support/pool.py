"""A stage's work, whole or in worker processes, and how it ends: in one line, whether done, refused or stopped."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from support.files import BadInput


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C is."""


def run_stage(work: Callable, *args) -> None:
    """Calls `work(*args)`; the user's mistakes end in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""

    def terminate(*_):
        raise Terminated

    main_thread = threading.current_thread() is threading.main_thread()  # only there may signals be set
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main_thread else {}
    if main_thread:
        signal.signal(signal.SIGTERM, terminate)
    try:
        work(*args)
    except BadInput as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        told = stop.args[0] if stop.args else "interrupted; the same command goes on from here, 03 and 04 with --resume"
        print(told, file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parallel(function: Callable, jobs: list[tuple], workers: int, label: str) -> Iterator:
    """Yields `function(*job)` for each job as it is finished, in no particular order.

    `workers` is the number of processes; 0 takes one a core, 1 stays in this process. The first exception of a job
    comes out here and cancels the jobs that have not begun; use it `with closing(...)`, so that an exception of the
    caller does so too. Raises BadInput when a worker process was killed.
    """
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        for job in tqdm(jobs, desc=label):
            yield function(*job)
        return
    # Spawned, not forked: the same on every system, and safe when the caller (a notebook) has threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare_worker)
    try:
        # Workers inherit that these signals wait for ever: they are the parent's to handle. Its own wait a moment.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            futures = [pool.submit(function, *job) for job in jobs]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in tqdm(as_completed(futures), total=len(jobs), desc=label):
            yield future.result()
    except BrokenProcessPool as error:
        raise BadInput(
            "a worker process was killed, most likely for want of memory; start again with fewer --workers, "
            "finished work is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare_worker() -> None:
    """Ends this worker when the parent is killed, so that none stays behind."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
