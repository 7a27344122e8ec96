"""03 and 04 interrupted, resumed, refused: nothing is lost, nobody else's run is overwritten."""

import importlib
import json
import random
import shutil
import signal
import time

import pytest
import torch

from benchmarks import kill_resume
from support import vlm
from support.checkpoint import checkpoints
from support.log import read_log
from tests import launch

launch.server()
FLAGS = {
    "03_sft": "--max-steps 3 --batch-size 4 --micro-batch 4 --save-every 1",
    "04_grpo": f"--model {vlm.TINY} --steps 3 --prompts-per-step 2 --micro-batch 2 "
    "--max-new-tokens 6 --save-every 1",
}
SCRIPTS = pytest.mark.parametrize("script", FLAGS)


def main(script, data, out, *flags):
    """Runs a stage in this process."""
    flags = [*FLAGS[script].split(), *map(str, flags)]
    importlib.import_module(script).main(["--data", str(data), "--out", str(out), *flags])


def start(script, data, out, *flags) -> launch.Process:
    """Starts a longer run, that of benchmarks/kill_resume.py."""
    flags = [*kill_resume.RUNS[f"{script}.py"].split(), *flags]
    return launch.start(script, "--data", data, "--out", out, *flags)


def finish(process: launch.Process) -> None:
    assert process.wait() == 0, process.stderr


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Leaves out a figure that takes half a second; test_scripts.py looks for it."""
    for script in FLAGS:
        stage = importlib.import_module(script)
        monkeypatch.setattr(stage, "plot_curves", lambda *_: None)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    for script in FLAGS:
        main(script, data, root / script)
    return root


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The longer runs, which nobody disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    processes = [start(script, data, root / script) for script in FLAGS]
    for process in processes:
        finish(process)
    return root


# ==== Kills and signals ====


@SCRIPTS
def test_killed_while_it_saves_and_resumed_equals_undisturbed(undisturbed, data, tmp_path, script):
    process, out = start(script, data, tmp_path), tmp_path
    while not (out / ".checkpoint.tmp").exists():
        assert process.poll() is None, process.stderr
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "config.json").exists()
    finish(start(script, data, out, "--resume"))
    assert kill_resume.results(out) == kill_resume.results(undisturbed / script)
    assert len(checkpoints(out)) == 2 and not (out / ".checkpoint.tmp").exists()


@pytest.mark.slow
@SCRIPTS
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment_and_resumed_equals_undisturbed(data, tmp_path, script, ranks):
    """By `python` and `torchrun`, at a random moment; by `python` also while it saves the third
    time (the test above: the first)."""
    rng, undisturbed = random.Random(f"{script} {ranks}"), tmp_path / "undisturbed"
    began = time.monotonic()
    kill_resume.finish(kill_resume.start(f"{script}.py", data, undisturbed, ranks))
    seconds = time.monotonic() - began
    for saves in (0, 3) if ranks == 1 else (0,):
        out = tmp_path / f"killed{saves}"
        delay = rng.uniform(0, 0.02 if saves else seconds)
        kill_resume.interrupted_run(f"{script}.py", data, out, ranks, delay, saves)
        assert kill_resume.results(out) == kill_resume.results(undisturbed)
        assert len(checkpoints(out)) == 2 and not (out / ".checkpoint.tmp").exists()


SLOW = pytest.mark.slow
SIGNALS = [
    ("03_sft", signal.SIGTERM, 143),
    pytest.param("04_grpo", signal.SIGINT, 130, marks=SLOW),
    pytest.param("03_sft", signal.SIGINT, 130, marks=SLOW),
    pytest.param("04_grpo", signal.SIGTERM, 143, marks=SLOW),
]


@pytest.mark.parametrize(("script", "number", "code"), SIGNALS)
def test_a_signal_lets_the_step_end_and_saves(undisturbed, data, tmp_path, script, number, code):
    out = tmp_path / "out"
    process = start(script, data, out, "--save-every", "99")
    while not read_log(out / "metrics.jsonl"):  # until the first step is done
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.kill(number)
    assert process.wait() == code and "Traceback" not in process.stderr
    step = read_log(out / "metrics.jsonl")[-1]["step"]
    last = process.stderr.strip().splitlines()[-1]
    assert last == f"stopped and saved after step {step}; --resume goes on"
    assert [folder.name for folder in checkpoints(out)] == [f"checkpoint-{step:06d}"]
    finish(start(script, data, out, "--resume"))
    assert kill_resume.results(out) == kill_resume.results(undisturbed / script)


# ==== Files that are damaged, missing, or another run's ====


@SCRIPTS
@pytest.mark.parametrize("fault", ["cut", "one bit"])
def test_a_corrupt_newest_checkpoint_falls_back(finished, data, tmp_path, capsys, script, fault):
    out = shutil.copytree(finished / script, tmp_path / "out")
    state = out / "checkpoint-000003" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 16  # in the middle of a tensor: it would still load
    state.write_bytes(content[:5000] if fault == "cut" else content)
    main(script, data, out, "--resume")
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "trying" in line]
    assert "checkpoint-000003/state.pt: cannot be read" in told
    assert kill_resume.results(out) == kill_resume.results(finished / script)
    for folder in checkpoints(out):
        (folder / "state.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="no checkpoint can be read; start anew with --overwrite"):
        main(script, data, out, "--resume")


@SCRIPTS
def test_resume_without_a_checkpoint_begins_at_the_beginning(finished, data, tmp_path, script):
    main(script, data, tmp_path / "new", "--resume")
    assert kill_resume.results(tmp_path / "new") == kill_resume.results(finished / script)


@SCRIPTS
def test_another_run_is_refused_unless_overwritten(finished, data, tmp_path, script):
    out = shutil.copytree(finished / script, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=f"{out}: holds .* of another run; go on with it by --re"):
        main(script, data, out)
    with pytest.raises(SystemExit, match=r"run.json: .*--lr was \S+ and is 0.25 now"):
        main(script, data, out, "--resume", "--lr", "0.25")
    other = shutil.copytree(data, tmp_path / "other")
    lines = (other / "train" / "metadata.jsonl").read_text().splitlines()
    (other / "train" / "metadata.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(SystemExit, match="run.json: .*--data was"):
        main(script, other, out, "--resume")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    main(script, data, out, "--overwrite", "--seed", "1")
    assert json.loads((out / "run.json").read_text())["seed"] == 1
    assert kill_resume.results(out) != kill_resume.results(finished / script)
    assert (out / "notes.txt").read_text() == "mine"


# ==== No room left ====


@SCRIPTS
def test_a_disk_that_is_full_is_one_line(data, tmp_path, script):
    """A limit of 1 MB per file stands for the full disk: the write fails as it would there."""
    flags = ["--data", data, "--out", tmp_path, *FLAGS[script].split()]
    done = launch.run(script, *flags, limits={"RLIMIT_FSIZE": 10**6})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "File too large" in last
    assert not checkpoints(tmp_path)


def test_a_gpu_without_memory_is_one_line(data, tmp_path, monkeypatch):
    stage = importlib.import_module("04_grpo")

    def rollout(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(stage, "rollout", rollout)
    with pytest.raises(SystemExit) as stop:
        main("04_grpo", data, tmp_path)
    message = stop.value.code
    assert message.startswith("error: the GPU's memory is used up; lower --micro-batch")
    assert "\n" not in message


def test_a_bug_keeps_its_traceback(data, tmp_path, monkeypatch):
    stage = importlib.import_module("04_grpo")
    monkeypatch.setattr(stage, "advantages", lambda reward: reward.no_such_attribute)
    with pytest.raises(AttributeError):
        main("04_grpo", data, tmp_path)
