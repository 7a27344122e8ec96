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
    plan = {"s/b": (["s/a"], "good b"), "s/a": ([], "good a"), "s/x": ([], "bad x"), "s/y": (["s/x"], "good y"),
            "s/z": (["s/y"], "good z")}  # fmt: skip
    for _ in range(2):  # the second call repeats only what failed
        failed = miniature.run_all(tmp_path / "out", plan, jobs=2)
        assert failed == {"s/x": "exit 3: no luck", "s/y": "not run: s/x failed", "s/z": "not run: s/y failed"}
        assert (tmp_path / "ran").read_text().split() == ["a", "b"]
    miniature.run_all(tmp_path / "out", {"s/a": ([], "good again")}, jobs=1)  # another command is another task
    assert (tmp_path / "ran").read_text().split() == ["a", "b", "again"]


def test_interval_over_seeds_by_hand():
    """Spread 1, 2, 3: standard deviation 1, t with 2 degrees of freedom 4.3027; or the patients' error, if larger."""
    seeds = [{"mean": m, "interval": [m - 0.1, m + 0.1]} for m in (1, 2, 3)]
    mean, low, high = miniature.over_seeds(seeds)
    assert mean == 2 and high - mean == mean - low == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    wide = [{"mean": 2, "interval": [2 - 1.96 * 5, 2 + 1.96 * 5]}] * 3  # equal seeds, a standard error of 5 each
    mean, low, high = miniature.over_seeds(wide)
    assert high - mean == pytest.approx(1.96 * 5 / math.sqrt(3))
    assert miniature.over_seeds(seeds[:1]) == (1, 0.9, 1.1)


@pytest.mark.parametrize(("low", "high", "sign", "expected"), [
    (1, 2, 1, "agrees"), (-2, -1, 1, "disagrees"), (-1, 1, 1, "not resolved"), (-2, -1, -1, "agrees"),
    (1, 2, -1, "disagrees"), (-4, 4, 0, "agrees"), (6, 9, 0, "agrees"),
    (-9, -6, 0, "disagrees"), (-9, -1, 0, "not resolved"),
])  # fmt: skip
def test_verdicts(low, high, sign, expected):
    assert miniature.verdict(low, high, sign) == expected


def test_the_report_counts_what_was_answered(tmp_path):
    """Two patients of one slice: the base is always wrong, the others are right on the first of them."""
    for arm in miniature.ARMS:
        rows = [{"mode": mode, "id": str(i), "patient": str(i), "label": rewards.CLASSES[i], "predicted": None,
                 "correctness": float(arm != "base" and i == 0), "format": 1.0, "validity": 1.0, "judged": None}
                for mode in ("direct", "think") for i in (0, 1)]  # fmt: skip
        folder = tmp_path / "seed4" / f"eval_{arm}"
        folder.mkdir(parents=True)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = miniature.report(tmp_path, [4], {"seed4/eval_rl_no_sft": "exit 1: oh"})
    assert "| base | 0.0 (0.0) |  | 0.0 (0.0) |  |" in text
    assert "| SFT | 50.0 (50.0) | 48.54 | 50.0 (50.0) | 37.60 |" in text
    assert f"| {rewards.CLASSES[0]} | 0.0 (0.0) | 100.0 (100.0) | 100.0 (100.0) |" in text
    assert "| RL without SFT | failed | 46.95 | failed |" in text and "- seed4/eval_rl_no_sft: exit 1: oh" in text
    assert (
        "| Table 3: the zoomed patch helps (SFT, direct) | +3.22 | +0.0 (+0.0 to +0.0) | +0.0 | not resolved |" in text
    )
    assert "| Fig. 3: RL makes reasoning and answer agree | +6.81 | no items in common |" in text
    assert "| Table 4: RL needs SFT before it | +5.23 | a run failed |  | not resolved |" in text
