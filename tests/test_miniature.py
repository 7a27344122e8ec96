"""The study's bookkeeping: order, failures, restarts; and its intervals and verdicts by hand."""

import json
import math
import sys

import pytest

import rewards
from benchmarks import miniature


def test_tasks_run_in_order_once_and_failures_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    for name, body in {"good": "echo $1 >> ran", "bad": "echo no luck; exit 3"}.items():
        (tmp_path / name).write_text(body)
    plan = {"s/b": (["s/a"], "good b"), "s/a": ([], "good a"), "s/x": ([], "bad x")}
    plan |= {"s/y": (["s/x"], "good y"), "s/z": (["s/y"], "good z")}
    expected = {"s/x": "exit 3: no luck"}
    expected |= {"s/y": "not run: s/x failed", "s/z": "not run: s/y failed"}
    for _ in range(2):  # the second call repeats only what failed
        assert miniature.run_all(tmp_path / "out", plan, jobs=2) == expected
        assert (tmp_path / "ran").read_text().split() == ["a", "b"]
    another = {"s/a": ([], "good again")}  # another command is another task
    miniature.run_all(tmp_path / "out", another, jobs=1)
    assert (tmp_path / "ran").read_text().split() == ["a", "b", "again"]


def interval(mean: float, half: float) -> dict:
    return {"mean": mean, "interval": [mean - half, mean + half]}


def test_interval_over_seeds_by_hand():
    """Values 1, 2, 3 have standard deviation 1; t with 2 degrees of freedom is 4.3027.

    Or the patients' error, where that is larger.
    """
    seeds = [interval(m, 0.1) for m in (1, 2, 3)]
    mean, low, high = miniature.over_seeds(seeds)
    half = pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert mean == 2 and high - mean == mean - low == half
    wide = [interval(2, 1.96 * 5)] * 3  # equal seeds, a standard error of 5 each
    mean, low, high = miniature.over_seeds(wide)
    assert high - mean == pytest.approx(1.96 * 5 / math.sqrt(3))
    assert miniature.over_seeds(seeds[:1]) == (1, 0.9, 1.1)


@pytest.mark.parametrize(
    ("low", "high", "sign", "expected"),
    [
        (1, 2, 1, "agrees"),
        (-2, -1, 1, "disagrees"),
        (-1, 1, 1, "not resolved"),
        (-2, -1, -1, "agrees"),
        (1, 2, -1, "disagrees"),
        (-4, 4, 0, "agrees"),
        (6, 9, 0, "agrees"),
        (-9, -6, 0, "disagrees"),
        (-9, -1, 0, "not resolved"),
    ],
)
def test_verdicts(low, high, sign, expected):
    assert miniature.verdict(low, high, sign) == expected


def test_the_report_counts_what_was_answered(tmp_path):
    """Two patients of one slice: the base is always wrong, the others are right on the first."""
    same = {"predicted": None, "format": 1.0, "validity": 1.0, "judged": None}
    for arm in miniature.ARMS:
        lines = ""
        for mode in ("direct", "think"):
            for i in (0, 1):
                row = {"mode": mode, "id": str(i), "patient": str(i), "label": rewards.CLASSES[i]}
                row |= {**same, "correctness": float(arm != "base" and i == 0)}
                lines += json.dumps(row) + "\n"
        folder = tmp_path / "seed4" / f"eval_{arm}"
        folder.mkdir(parents=True)
        (folder / "predictions.jsonl").write_text(lines)
    text = miniature.report(tmp_path, [4], {"seed4/eval_rl_no_sft": "exit 1: oh"})
    assert "| base | 0.0 (0.0) | 23.86 | 0.0 (0.0) | 22.38 |" in text
    assert "| SFT | 50.0 (50.0) | 48.54 | 50.0 (50.0) | 37.60 |" in text
    assert f"| {rewards.CLASSES[0]} | 0.0 (0.0) | 100.0 (100.0) | 100.0 (100.0) |" in text
    assert "| RL without SFT | failed | 46.95 | failed |" in text
    assert "- seed4/eval_rl_no_sft: exit 1: oh" in text
    zoom = "| Table 3: the zoomed patch helps (SFT, direct) | +3.22 | too few patients"
    assert f"{zoom} in common |  | not resolved |" in text
    assert (
        "| Fig. 3: RL makes reasoning and answer agree | +6.81 | too few patients in common |"
        in text
    )
    assert "| Table 4: RL needs SFT before it | +5.23 | a run failed |  | not resolved |" in text
