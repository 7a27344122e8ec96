"""One function over many jobs in worker processes, with a progress bar."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from support.files import BadInput


def parallel(function: Callable, jobs: list[tuple], workers: int, label: str) -> Iterator:
    """Yields `function(*job)` for each job as it is finished, in no particular order.

    `workers` is the number of processes; 0 takes one a core, 1 stays in this process. The first exception of a job
    comes out here and cancels the jobs that have not begun. Raises BadInput when a worker process was killed.
    """
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        for job in tqdm(jobs, desc=label):
            yield function(*job)
        return
    # Spawned, not forked: the same on every system, and safe when the caller (a notebook) has threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare_worker)
    main_thread = threading.current_thread() is threading.main_thread()  # only there may signals be set
    try:
        # Workers inherit that Ctrl-C is ignored: it is the parent's to handle, also while they are still importing.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main_thread else None
        try:
            futures = [pool.submit(function, *job) for job in jobs]
        finally:
            if main_thread:
                signal.signal(signal.SIGINT, handler)
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
    """Leaves Ctrl-C to the parent, and ends when the parent is killed, so that no worker stays behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
