"""How a stage runs and ends: flags and schedule, worker processes, exit code and last line."""

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

from support import GOES_ON, leave
from support.files import BadInput

# ==== Flags: types for argparse's `type=`, the demo's defaults, the schedule ====


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
# Libraries compute with it in fp32, where its multiples must be finite, too.
positive = bounded(float, 1e-30, 1e30, "a number from 1e-30 to 1e30")
fraction = bounded(float, 0, 1, "a fraction from 0 to 1")
lora_rank = bounded(int, 1, 1024, "a whole number from 1 to 1024")


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


def lr_factor(step: int, steps: int, warmup_ratio: float, schedule: str) -> float:
    """The learning rate's factor at `step` (from 0): linear warm-up, then "constant", that is 1, or
    "cosine", half a cosine from 1 to 0."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ==== The end of a stage ====


class Interrupted(KeyboardInterrupt):
    """A stage was stopped by the signal of this number; SIGTERM is treated as Ctrl-C is."""

    def __init__(self, number: int, message: str = GOES_ON):
        super().__init__(message)
        self.number = number


def run_stage(work: Callable[[], None]) -> None:
    """Calls `work`; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    before, stopped = {}, False

    def ignore() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    def interrupt(number, frame):
        ignore()  # once is enough: a second signal would only disturb the end
        raise Interrupted(number)

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
    try:
        if threading.current_thread() is threading.main_thread():  # only there may signals be set
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, interrupt)
        try:
            work()
        finally:
            for bar in list(tqdm._instances):  # or the last line would go on with one of them
                bar.close()
            sys.stdout.flush()
    except BadInput as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        ignore()
        stopped = True
        print(stop.args[0] if stop.args else GOES_ON, file=sys.stderr)
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))
    except OSError as error:
        try:
            print(flush=True)
        except OSError:  # still: it is stdout that cannot be written
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own last flush
            sys.exit(f"error: the standard output cannot be written: {error.strerror}")
        raise
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this file does not import
            raise
        cures = "lower --micro-batch (03, 04), --prompts-per-step (04) or --batch-size (05)"
        reason = str(error).splitlines()[0]
        sys.exit(f"error: the GPU's memory is used up; {cures}, or use --shard: {reason}")
    finally:
        for number, handler in before.items():
            if not (stopped and handler is leave):  # a program ends now, undisturbed
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
            pool.submit(int)  # a submission makes the pool watch all workers begun before it
        except (OSError, ValueError) as error:
            # One was killed so soon that the pool has closed its pipes, whose numbers then name
            # nothing, or another file.
            raise BrokenProcessPool from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with tqdm(total=len(jobs), desc=label) as bar:
            for future in as_completed(futures):
                yield future.result()
                bar.update()
    except BrokenProcessPool as error:
        # The pool asks the others to end by SIGTERM, which waits in them, and then waits for them.
        for process in multiprocessing.active_children():
            process.kill()
        remedy = "start again with fewer --workers, finished work is kept"
        raise BadInput(f"a worker was killed, most likely for want of memory; {remedy}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """Ends this worker when the parent is killed, so that none stays behind."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
