"""Starts stages as a user does, without the seconds that importing torch and transformers takes.

A server, begun with the first start, has imported the stages and what they import later. Each start
is a fork of it: a process and session of its own, with its own folder, environment and limits. It
runs the stage's `main` and ends as `python 0N_*.py` ends. `ranks` > 1 sets what torchrun would set.

The server answers one line of JSON by one line of JSON. It has a single thread, so that forking it
is safe.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = "01_make_dataset 02_zoom_augment 03_sft 04_grpo 05_eval".split()
# What the stages import where they use it.
LATER = "torch._dynamo torch.utils.checkpoint torch.distributed.fsdp torch.distributed.tensor"
LATER += " torch.distributed.device_mesh matplotlib.backends.backend_agg matplotlib.figure"
LATER += " transformers.models.auto.modeling_auto transformers.models.auto.processing_auto"
LATER += " transformers.models.qwen2_5_vl.modeling_qwen2_5_vl transformers.models.qwen2"
LATER += " transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"
OUTPUTS = ((1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY))  # named pipes


# ==== The server, and what it forks ====


def serve() -> dict:
    """Answers requests to the end; a forked child returns its request."""
    for name in [*STAGES, *LATER.split()]:
        importlib.import_module(name)
    gc.freeze()  # what is here already need not be looked at, nor copied, again
    assert len(os.listdir("/proc/self/task")) == 1
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    os._exit(0)


def become(request: dict) -> None:
    """Makes this fork the process that was asked for, and runs the stage."""
    os.setsid()
    os.chdir(request["cwd"])
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), *OUTPUTS):
        file = os.open(Path(request["folder"]) / name, flags)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, size in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (size, size))
    sys.argv = [f"{request['script']}.py", *request["argv"]]
    if request["before"]:
        module, function, *arguments = request["before"]
        getattr(importlib.import_module(module), function)(*arguments)
    code = 1
    try:
        importlib.import_module(request["script"]).main(request["argv"])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    # The exception and what it kept alive, a progress bar for instance, have gone by now.
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    LAST.append(code)


LAST = []


def leave() -> None:
    """Python's last deed, threads having ended: it spares half a second of freeing everything."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LAST[0])


def fill_stdout() -> None:
    """For `before`: whatever is printed meets a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


# ==== What tests use ====


@functools.cache
def server() -> subprocess.Popen:
    """Begins the server; calling this early lets it import while something else is done."""
    command = [sys.executable, "-m", "tests.launch"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    atexit.register(process.communicate)  # an end of its input is its end
    return process


def ask(request: dict) -> int | None:
    print(json.dumps(request), file=server().stdin, flush=True)
    return json.loads(server().stdout.readline())


class Process:
    """The ranks of a started stage, and what they have written so far."""

    def __init__(self):
        self.folder, self.codes, self.texts = tempfile.mkdtemp(), {}, {}
        for _, name, _ in OUTPUTS:
            path = Path(self.folder) / name
            os.mkfifo(path)
            self.texts[os.open(path, os.O_RDONLY | os.O_NONBLOCK)] = bytearray()

    def read(self) -> bool:
        """Takes what has been written; whether nothing holds the output open any more."""
        ended = True
        for pipe, text in self.texts.items():
            with contextlib.suppress(BlockingIOError):
                while part := os.read(pipe, 2**16):
                    text += part
                continue
            ended = False
        return ended

    @property
    def stdout(self) -> str:
        return next(iter(self.texts.values())).decode()

    @property
    def stderr(self) -> str:
        return list(self.texts.values())[1].decode()

    def poll(self) -> int | None:
        """The exit code once all ranks have ended: that of a rank that failed, if any did."""
        self.read()
        for pid, code in self.codes.items():
            if code is None:
                self.codes[pid] = ask({"pid": pid})
        codes = list(self.codes.values())
        failed = [code for code in codes if code]
        if failed and None in codes:  # the others may wait for it for ever
            self.kill()
        return None if None in codes else (failed or [0])[0]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """A signal for all ranks, not for what they have started."""
        for pid, code in self.codes.items():
            if code is None:
                os.kill(pid, number)

    def wait(self, seconds: float = 300) -> int:
        """The exit code, once the ranks and all that they have started have ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            code = self.poll()
            if code is not None and self.read():
                for pipe in self.texts:
                    os.close(pipe)
                shutil.rmtree(self.folder)
                return code
            time.sleep(0.005)
        self.kill()
        raise TimeoutError(f"still running after {seconds} s:\n{self.stderr}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(
    script: str,
    *argv: object,
    ranks: int = 1,
    machines: int = 1,
    cwd: Path = ROOT,
    limits: dict[str, int] | None = None,
    before: list | None = None,
) -> Process:
    """Starts a stage, "03_sft" for instance, in the folder `cwd`.

    `machines`: over how many the ranks believe to be spread. `limits`: resource limits by their
    names, as {"RLIMIT_FSIZE": 1000}. `before`: a module, a function of it and its arguments, called
    before the stage begins.
    """
    process = Process()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks // machines)}
    request = {"script": script, "argv": list(map(str, argv)), "cwd": str(cwd)}
    request |= {"folder": process.folder, "limits": limits or {}, "before": before}
    for rank in range(ranks):
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        pid = ask({**request, "environment": environment})
        process.codes[pid] = None
    return process


def run(script: str, *argv: object, **options) -> subprocess.CompletedProcess:
    """Starts a stage and waits for its end."""
    process = start(script, *argv, **options)
    code = process.wait()
    return subprocess.CompletedProcess([script, *argv], code, process.stdout, process.stderr)


def start_python(script: str, *argv: object, ranks: int = 1, **options) -> subprocess.Popen:
    """Starts a stage for real: by `python`, or by `torchrun`.

    Tests start it early, do something else in this process, and then wait for it by `ended`.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [f"{script}.py", *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **options)


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Waits for the end of a process."""
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


if __name__ == "__main__":
    atexit.register(leave)  # the first to be registered is the last to be called
    become(serve())
