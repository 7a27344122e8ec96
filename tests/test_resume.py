"""03 and 04 interrupted, resumed, refused: nothing is lost, and nobody else's run is overwritten."""

import importlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import kill_resume
from support import train

FLAGS = {
    "03_sft": ["--max-steps", "3", "--batch-size", "4", "--micro-batch", "4", "--save-every", "1"],
    "04_grpo": ["--model", "assets/tiny-qwen2.5-vl", "--steps", "3", "--prompts-per-step", "2", "--micro-batch", "2",
                "--max-new-tokens", "6", "--save-every", "1"],
}  # fmt: skip
SCRIPTS = pytest.mark.parametrize("script", FLAGS)


def main(script, data, out, *flags):
    importlib.import_module(script).main(["--data", str(data), "--out", str(out), *FLAGS[script], *map(str, flags)])


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    for script in FLAGS:
        main(script, data, root / script)
    return root


@SCRIPTS
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_equals_undisturbed(data, tmp_path, script, ranks):
    """At a random moment and, with one rank, twice while a checkpoint is being written."""
    script, rng = f"{script}.py", random.Random(f"{script} {ranks}")
    began = time.monotonic()
    kill_resume.finish(kill_resume.start(script, data, tmp_path / "undisturbed", ranks))
    seconds = time.monotonic() - began
    for i, writing in enumerate((0, 1, 3) if ranks == 1 else (0,)):
        out = tmp_path / f"killed{i}"
        kill_resume.interrupted_run(script, data, out, ranks, rng.uniform(0, 0.02 if writing else seconds), writing)
        assert kill_resume.results(out) == kill_resume.results(tmp_path / "undisturbed")
        assert len(train.checkpoints(out)) == 2 and not (out / ".checkpoint.tmp").exists()


@pytest.mark.parametrize(("number", "code", "ranks"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 1)])
@pytest.mark.parametrize("script", kill_resume.RUNS)
def test_a_signal_lets_the_step_end_and_saves(data, tmp_path, script, number, code, ranks):
    process = kill_resume.start(script, data, tmp_path / "out", ranks, "--save-every", "99")
    while not train.read_log(tmp_path / "out" / "metrics.jsonl"):  # until the first step is done
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode == code and "Traceback" not in said
    step = train.read_log(tmp_path / "out" / "metrics.jsonl")[-1]["step"]
    assert said.strip().endswith(f"stopped and saved after step {step}; --resume goes on")
    assert [folder.name for folder in train.checkpoints(tmp_path / "out")] == [f"checkpoint-{step:06d}"]
    kill_resume.finish(kill_resume.start(script, data, tmp_path / "out", 1, "--resume"))
    kill_resume.finish(kill_resume.start(script, data, tmp_path / "undisturbed", 1))
    assert kill_resume.results(tmp_path / "out") == kill_resume.results(tmp_path / "undisturbed")


@SCRIPTS
def test_a_corrupt_newest_checkpoint_falls_back_to_the_one_before(finished, data, tmp_path, capsys, script):
    shutil.copytree(finished / script, tmp_path / "out")
    state = tmp_path / "out" / "checkpoint-000003" / "state.pt"
    state.write_bytes(state.read_bytes()[:5000])
    main(script, data, tmp_path / "out", "--resume")
    assert "checkpoint-000003/state.pt cannot be read; trying the checkpoint before it" in capsys.readouterr().err
    assert kill_resume.results(tmp_path / "out") == kill_resume.results(finished / script)
    for folder in train.checkpoints(tmp_path / "out"):
        (folder / "state.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="no checkpoint can be read; start anew with --overwrite"):
        main(script, data, tmp_path / "out", "--resume")


@SCRIPTS
def test_resume_without_a_checkpoint_begins_at_the_beginning(finished, data, tmp_path, script):
    main(script, data, tmp_path / "new", "--resume")
    assert kill_resume.results(tmp_path / "new") == kill_resume.results(finished / script)


@SCRIPTS
def test_another_run_is_refused_unless_overwritten(finished, data, tmp_path, script):
    out = tmp_path / "out"
    shutil.copytree(finished / script, out)
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="another run; choose another --out, go on with it by --resume, or delete it"):
        main(script, data, out)
    with pytest.raises(SystemExit, match=r"run.json: --lr was \S+ and is 0.25 now"):
        main(script, data, out, "--resume", "--lr", "0.25")
    other = tmp_path / "other"
    shutil.copytree(data, other)
    lines = (other / "train" / "metadata.jsonl").read_text().splitlines()
    (other / "train" / "metadata.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(SystemExit, match="run.json: --data was"):
        main(script, other, out, "--resume")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    main(script, data, out, "--overwrite", "--seed", "1")
    assert json.loads((out / "run.json").read_text())["seed"] == 1
    assert kill_resume.results(out) != kill_resume.results(finished / script)
    assert (out / "notes.txt").read_text() == "mine"


@SCRIPTS
def test_a_disk_that_is_full_is_one_line(data, tmp_path, script):
    """A limit of 1 MB a file stands for the full disk: the write fails as it would there."""
    done = subprocess.run([sys.executable, f"{script}.py", "--data", data, "--out", tmp_path / "out", *FLAGS[script]],
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "File too large" in done.stderr
    assert not train.checkpoints(tmp_path / "out")


def test_a_gpu_without_memory_is_one_line(data, tmp_path, monkeypatch):
    stage = importlib.import_module("04_grpo")

    def rollout(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(stage, "rollout", rollout)
    with pytest.raises(SystemExit, match="error: the GPU's memory is used up; lower --micro-batch"):
        main("04_grpo", data, tmp_path)


def test_a_bug_keeps_its_traceback(data, tmp_path, monkeypatch):
    stage = importlib.import_module("04_grpo")
    monkeypatch.setattr(stage, "advantages", lambda reward: reward.no_such_attribute)
    with pytest.raises(AttributeError):
        main("04_grpo", data, tmp_path)
