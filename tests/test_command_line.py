"""What all five scripts share: numbers that the parser refuses, --help, and what is imported."""

import importlib
import subprocess
import sys

import pytest

from support import stage
from tests import launch

# Of each script every flag that takes a number, by the kind of number it takes.
COUNTS = {  # from 1
    "01_make_dataset": "--phantoms --max-slices",
    "02_zoom_augment": "",
    "03_sft": "--lora-rank --max-steps --batch-size --micro-batch --save-every",
    "04_grpo": "--lora-rank --prompts-per-step --steps --max-new-tokens --inner-epochs "
    "--micro-batch --save-every",
    "05_eval": "--limit --max-new-tokens --batch-size",
}
FROM_ZERO = {
    "01_make_dataset": "--seed --workers",
    "02_zoom_augment": "--workers",
    "03_sft": "--seed",
    "04_grpo": "--seed",
    "05_eval": "",
}
POSITIVE = {"03_sft": "--epochs --lr", "04_grpo": "--temperature --lr"}
FRACTIONS = {
    "01_make_dataset": "--min-box-fraction --test-fraction",
    "02_zoom_augment": "--patch --border --jitter",
    "03_sft": "--warmup-ratio",
    "04_grpo": "--clip --warmup-ratio",
}
NON_NEGATIVE = {"02_zoom_augment": "--margin", "04_grpo": "--kl"}
NO_NUMBER = ["nan", "inf", "-inf", "1e400", "x", "", "1,5", "0x10"]
NO_COUNT = [*NO_NUMBER, "-1", "1.5", str(2**31), str(2**63), "9" * 5000]


def cases() -> list[tuple[str, str, str]]:
    """(script, flag, value) that must be refused."""
    kinds = [(COUNTS, [*NO_COUNT, "0"]), (FROM_ZERO, NO_COUNT)]
    kinds += [(POSITIVE, [*NO_NUMBER, "0", "-1", "-1e-9", "1e-300", "1e300"])]
    kinds += [(FRACTIONS, [*NO_NUMBER, "-0.1", "1.1"]), (NON_NEGATIVE, [*NO_NUMBER, "-0.1"])]
    rows = []
    for flags_of, values in kinds:
        for script, flags in flags_of.items():
            for flag in flags.split():
                rows += [(script, flag, value) for value in values]
    rows += [("04_grpo", "--group-size", value) for value in [*NO_COUNT, "0", "1"]]
    return rows


def refusal(capsys, script: str, *flags: str) -> str:
    """The last line of a parser that refuses these flags: exit code 2, nothing else is done."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(list(flags))
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", launch.STAGES)
def test_every_number_is_checked_by_the_parser(script, capsys):
    """nan, inf, 1e400, 2**63, negative values: argparse's own error, which names the flag."""
    rows = [row for row in cases() if row[0] == script]
    assert len(rows) > 10
    for _, flag, value in rows:
        last = refusal(capsys, script, f"{flag}={value}")
        assert f"error: argument {flag}: " in last and len(last) < 200, (flag, value, last)


@pytest.mark.parametrize("values", [("nan", "5"), ("0", "inf"), ("x", "5"), ("1e400", "1")])
def test_a_window_is_two_finite_numbers(capsys, values):
    last = refusal(capsys, "01_make_dataset", "--window", *values)
    assert "error: argument --window: " in last


@pytest.mark.parametrize("value", ["nan", "inf", "x"])
def test_reward_weights_are_finite(capsys, value):
    last = refusal(capsys, "04_grpo", "--reward-weights", "1", "1", value)
    assert "error: argument --reward-weights: " in last


def test_every_number_has_its_kind():
    """No flag of a number is left out above."""
    known = " ".join([*COUNTS.values(), *FROM_ZERO.values(), *POSITIVE.values()])
    known += " ".join(["", *FRACTIONS.values(), *NON_NEGATIVE.values()])
    known += " --group-size --window --reward-weights --box"
    for script in launch.STAGES:
        text = (launch.ROOT / f"{script}.py").read_text()
        for line in text.splitlines():
            if 'add("--' in line and any(f"type={kind}" in line for kind in KINDS):
                assert line.split('"')[1] in known.split(), line
            assert "type=int" not in line and "type=float" not in line


KINDS = "natural positive_int at_least finite non_negative positive fraction".split()


def test_the_kinds_by_hand():
    assert stage.natural("0") == 0 and stage.positive_int("7") == 7 and stage.at_least(2)("2") == 2
    assert stage.natural(str(2**31 - 1)) == 2**31 - 1
    assert stage.fraction("0") == 0 and stage.fraction("1") == 1 and stage.fraction("1e-9") == 1e-9
    assert stage.finite("-2.5") == -2.5 and stage.positive("1e-30") == 1e-30
    assert stage.non_negative("0") == 0


# ==== What is imported ====


HELP = """
import contextlib, importlib, io
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
    importlib.import_module("{}").main(["--help"])
assert "--out" in text.getvalue() and "usage: " in text.getvalue()
"""
SUPPORT = "files stage records log nifti rexgroundingct report tables stats vqa_metrics"
PROGRAMS = {
    "help of 01 and 02": [HELP.format(script) for script in launch.STAGES[:2]],
    "help of 03, 04 and 05": [HELP.format(script) for script in launch.STAGES[2:]],
    "support": [f"import support.{name}\n" for name in SUPPORT.split()],
}
HEAVY = {"transformers", "matplotlib", "torch.distributed.fsdp", "torch._dynamo"}


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Starts a fresh Python for each of PROGRAMS; meanwhile the parsers are tested."""
    processes, pipes = {}, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for name, lines in PROGRAMS.items():
        code = "".join([*lines, "\nimport sys; print(*sys.modules)"])
        command = [sys.executable, "-c", code]
        processes[name] = subprocess.Popen(command, cwd=launch.ROOT, **pipes)
    return processes


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_imported_that_is_not_needed(name, programs):
    done = launch.ended(programs[name])
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.splitlines()[-1].split())
    assert not HEAVY & modules
    assert ("torch" in modules) == ("03" in name)
