"""benchmarks/gpu_check.py in emulation: it must be ready when there is a GPU."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, grpo_step
from support.distributed import World
from tests import launch

launch.server()
EMULATED = World(0, 1, torch.device("cpu"), torch.bfloat16)
PARTS = ("whole", "rollout", "reference", "forward", "backward", "held", "peak")


def test_the_memory_table_is_what_the_readme_shows():
    readme = (launch.ROOT / "benchmarks" / "README.md").read_text()
    for row in gpu_check.memory_table():
        assert row in readme


def test_held_memory_by_hand():
    """The 3B's llm: 0.67 G frozen, 3.09 G trained; weights 1.34 + 12.36, gradients 12.36, AdamW
    24.72, twin and reference 6.18 each."""
    assert gpu_check.held(0.67e9, 3.09e9) == pytest.approx(63.14e9)


def test_a_check_that_breaks_off_is_a_line_that_fails(tmp_path, capsys):
    def check_memory(at):
        yield gpu_check.Line("first", "1", "1", True)
        raise torch.OutOfMemoryError("CUDA out of memory. | Tried to allocate 2 GiB.\nmore")

    lines = list(gpu_check.run_check(check_memory, gpu_check.setup(EMULATED, tmp_path)))
    assert [line.passed for line in lines] == [True, False]
    assert (
        lines[1].measured == "OutOfMemoryError: CUDA out of memory. / Tried to allocate 2 GiB. more"
    )


def test_against_trl_it_reads_what_grpo_step_prints(tmp_path, capsys, monkeypatch):
    pytest.importorskip("trl", reason="pip install -r benchmarks/requirements.txt")
    sides = {"trl": [dict.fromkeys(PARTS, 6.0)], "04": [dict.fromkeys(PARTS, 4.0)]}
    grpo_step.print_table(
        grpo_step.parse_args(["--warmup", "0"]), {k: v[0] for k, v in sides.items()}, sides
    )
    output = capsys.readouterr().out
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=output))
    lines = list(gpu_check.check_trl(gpu_check.setup(EMULATED, tmp_path)))
    assert [line.measured for line in lines] == 2 * ["trl 6.00, 04 4.00: 1.50 times"]
    assert all(line.passed for line in lines)


@pytest.mark.slow
def test_every_check_on_one_device_passes(capsys):
    gpu_check.main(["--only", "equality", "decode", "sft", "grpo"])
    out = capsys.readouterr().out
    assert out.count("| pass |") == 12 and "12 of 12 pass" in out


@pytest.mark.slow
def test_shards_equal_one_process():
    done = launch.run("benchmarks.gpu_check", "--only", "shards", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 pass" in done.stdout
