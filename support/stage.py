"""How a stage runs and ends: its flags, its worker processes, its exit code and last line."""

import argparse
import math
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

GOES_ON = "interrupted; the same command goes on from here, 03 and 04 with --resume"

# ==== Flags: what argparse's `type=` takes ====


def bounded(kind: type, low: float, high: float, words: str) -> Callable[[str], float]:
    """A type of numbers from `low` to `high`, called `words` where another is refused."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # NaN is in no range
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not {words}")
        return value

    return parse


def at_least(low: int) -> Callable[[str], float]:
    """A type of whole numbers from `low` up to 2**31 - 1, which every library takes."""
    return bounded(int, low, 2**31 - 1, f"a whole number from {low}")


natural, positive_int = at_least(0), at_least(1)
finite = bounded(float, -sys.float_info.max, sys.float_info.max, "a finite number")
non_negative = bounded(float, 0, sys.float_info.max, "a finite number from 0")
positive = bounded(float, sys.float_info.min, sys.float_info.max, "a finite number above 0")
fraction = bounded(float, 0, 1, "a fraction from 0 to 1")


def parse_flags(
    parser: argparse.ArgumentParser, argv: list[str] | None, demo: dict
) -> argparse.Namespace:
    """Parses the flags; for the tiny demo checkpoint `demo` replaces the defaults.

    Explicit flags win over both. Raises BadInput when a checkpoint cannot be had.
    """
    args = parser.parse_args(argv)
    from support import vlm  # here, so that --help need not wait for it

    names = args.model if isinstance(args.model, list) else [args.model]
    if all(vlm.is_demo(name) for name in names):
        if os.environ.get("RANK", "0") == "0":
            print(f"tiny demo checkpoint: defaults replaced by DEMO = {demo}", flush=True)
        parser.set_defaults(**demo)
        args = parser.parse_args(argv)
    return args


# ==== The end of a stage ====


class Interrupted(KeyboardInterrupt):
    """A stage was stopped by the signal of this number; SIGTERM is treated as Ctrl-C is."""

    def __init__(self, number: int, message: str = GOES_ON):
        super().__init__(message)
        self.number = number


def run_stage(work: Callable[[], None]) -> None:
    """Calls `work`; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""

    def interrupt(number, frame):
        raise Interrupted(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # only there may signals be set
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGTERM, interrupt)
    try:
        work()
    except BadInput as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(stop.args[0] if stop.args else GOES_ON, file=sys.stderr)
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this file does not import
            raise
        cures = "lower --micro-batch (03, 04), --prompts-per-step (04) or --batch-size (05)"
        reason = str(error).splitlines()[0]
        sys.exit(f"error: the GPU's memory is used up; {cures}, or use --shard: {reason}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ==== Worker processes ====


def parallel(function: Callable, jobs: list[tuple], workers: int, label: str) -> Iterator:
    """Yields `function(*job)` for each job as it is finished, in no particular order.

    `workers` is the number of processes; 0 takes one per core, 1 stays in this process. The first
    exception of a job comes out here and cancels the jobs that have not begun; use it
    `with closing(...)`, so that an exception of the caller does so, too. Raises BadInput when a
    worker was killed.
    """
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        for job in tqdm(jobs, desc=label):
            yield function(*job)
        return
    # Spawned, not forked: the same on every system, and safe when a notebook has threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow_parent)
    try:
        # Workers inherit that these signals wait for ever: the parent handles them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            futures = [pool.submit(function, *job) for job in jobs]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in tqdm(as_completed(futures), total=len(jobs), desc=label):
            yield future.result()
    except BrokenProcessPool as error:
        cause = "a worker process was killed, most likely for want of memory"
        raise BadInput(
            f"{cause}; start again with fewer --workers, finished work is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """Ends this worker when the parent is killed, so that none stays behind."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
