"""The study's bookkeeping: order, failures, restarts; and its intervals and verdicts by hand."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rewards
from benchmarks import miniature, miniature_tables
from support import vlm


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
    # Looking runs nothing: what has failed is known, what was not begun is not done yet.
    plan["s/c"] = ([], "good c")
    expected["s/c"] = miniature.NOT_YET
    assert miniature.run_all(tmp_path / "out", plan, 1, miniature.look) == expected
    assert (tmp_path / "ran").read_text().split() == ["a", "b"]
    another = {"s/a": ([], "good again")}  # another command is another task
    miniature.run_all(tmp_path / "out", another, jobs=1)
    assert (tmp_path / "ran").read_text().split() == ["a", "b", "again"]


def test_whole_seeds_end_one_after_another_and_each_trains_before_it_is_asked(tmp_path):
    plan = miniature.tasks(tmp_path, 0) | miniature.tasks(tmp_path, 1)
    begun = []
    miniature.run_all(tmp_path, plan, 1, lambda out, name, command: begun.append(name))
    assert begun == list(plan)
    assert len(plan) == 2 * 49
    half = len(plan) // 2
    assert {name.split("/")[0] for name in begun[:half]} == {"seed0"}
    for name, (needs, _) in plan.items():
        assert all(begun.index(need) < begun.index(name) for need in needs)


def test_the_scripts_take_every_command(tmp_path, monkeypatch):
    monkeypatch.setattr(vlm, "is_demo", lambda name: True)
    for _, command in miniature.tasks(tmp_path, 0).values():
        script, *argv = command.split()
        args = importlib.import_module(Path(script).stem).parse_args(argv)
        assert args.out.is_relative_to(tmp_path)


def test_a_stopped_task_has_not_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    for code in (130, 143, 1):
        (tmp_path / "task").write_text(f"exit {code}")
        assert miniature.run(tmp_path, "s/a", "task") == f"exit {code}: (nothing)"
        kept = f"exit {code}: (nothing)" if code == 1 else miniature.NOT_YET
        assert miniature.look(tmp_path, "s/a", "task") == kept


def test_only_finished_seeds_are_reported(tmp_path, monkeypatch, capsys):
    """Of three seeds one is done, one has a failed run, one is not finished."""
    monkeypatch.setattr(miniature, "stamp", lambda command: "")
    out, seen = tmp_path / "out", []
    for seed in (0, 1, 2):
        for name in miniature.tasks(out, seed):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / f"{name}.done").touch()
    (out / "seed1" / "rl_direct.done").unlink()
    (out / "seed1" / "rl_direct.failed").write_text("exit 1: oh")
    (out / "seed2" / "eval_rl.done").unlink()
    monkeypatch.setattr(miniature, "report", lambda *args: seen.append(args) or "the report")
    run = out / "seed0" / "rl"
    run.mkdir()
    row = {"step": 1, "kl": 0.123456789, "seconds_rollout": 1.0, "peak_memory_gib": 2.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    logs = tmp_path / "logs"
    argv = ["--out", str(out), "--seeds", "0", "1", "2", "--report", "--logs", str(logs)]
    with pytest.raises(SystemExit) as end:
        miniature.main(argv)
    failed = {"seed1/rl_direct": "exit 1: oh"}
    failed["seed1/eval_rl_direct"] = "not run: seed1/rl_direct failed"
    assert seen == [(out, [0, 1], failed)]
    assert end.value.code == 1
    text = capsys.readouterr().out
    assert "the report\nleft out, not finished: seed2\n" in text
    assert f"{logs}: the training logs of seed 0, 0 kB" in text
    assert [file.name for file in logs.iterdir()] == ["rl.jsonl"]


def test_logs_are_copied_without_times_and_memory(tmp_path):
    """Two runs that differ in times alone leave the same bytes."""
    sizes = []
    for time in (1.5, 2.5):
        for arm in ("sft", "rl"):
            row = {"step": 1, "loss": 0.12345678 * time / time, "tokens": 31.0}
            row |= {"seconds": time, "seconds_rollout": time, "peak_memory_gib": time}
            folder = tmp_path / f"run{time}" / arm
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        sizes.append(miniature.copy_logs(tmp_path / f"run{time}", tmp_path / f"logs{time}"))
    expected = '{"step": 1, "loss": 0.123457, "tokens": 31.0}\n'
    assert sizes == [2 * len(expected)] * 2
    for time in (1.5, 2.5):
        found = {file.name: file.read_text() for file in (tmp_path / f"logs{time}").iterdir()}
        assert found == {"sft.jsonl": expected, "rl.jsonl": expected}


def interval(mean: float, half: float) -> dict:
    return {"mean": mean, "interval": [mean - half, mean + half]}


def test_interval_over_seeds_by_hand():
    """Values 1, 2, 3 have standard deviation 1; t with 2 degrees of freedom is 4.3027.

    Or the patients' error, where that is larger.
    """
    seeds = [interval(m, 0.1) for m in (1, 2, 3)]
    mean, low, high = miniature_tables.over_seeds(seeds)
    half = pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert mean == 2 and high - mean == mean - low == half
    wide = [interval(2, 1.96 * 5)] * 3  # equal seeds, a standard error of 5 each
    mean, low, high = miniature_tables.over_seeds(wide)
    assert high - mean == pytest.approx(1.96 * 5 / math.sqrt(3))
    assert miniature_tables.over_seeds(seeds[:1]) == (1, 0.9, 1.1)


@pytest.mark.parametrize(
    ("low", "high", "sign", "expected"),
    [
        (1, 2, "+", "agrees"),
        (-2, -1, "+", "disagrees"),
        (-1, 6, "+", "not resolved"),
        (-6, 1, "+", "not resolved"),
        (-5, 5, "+", "equivalent within 5"),
        (-2, -1, "-", "agrees"),
        (1, 2, "-", "disagrees"),
        (-1, 1, "-", "equivalent within 5"),
        (-4, 4, "kept", "agrees"),
        (6, 9, "kept", "agrees"),
        (-9, -6, "kept", "disagrees"),
        (-9, -1, "kept", "not resolved"),
        (-4, 4, "", "equivalent within 5"),
        (1, 2, "", "equivalent within 5"),
        (1, 9, "", "differs"),
        (-9, -1, "", "differs"),
        (-9, 1, "", "not resolved"),
    ],
)
def test_verdicts(low, high, sign, expected):
    assert miniature_tables.verdict(low, high, sign) == expected


EVALUATIONS = [name for name in miniature.tasks(Path("out"), 4) if "/eval_" in name]


def write_answers(out, count):
    """Patients of one slice each: the base is always wrong, others are right on even ones.

    With a wrong box nothing is right. Where the reasoning is swapped, SFT keeps its answer, RL
    moves to the donor's class.
    """
    same = {"predicted": None, "format": 1.0, "validity": 1.0, "judged": None}
    for name in EVALUATIONS:
        folder = out / name
        folder.mkdir(parents=True)
        wrong = any(box in name for box in ("base", "_iou_", "_whole"))
        lines, swapped = "", ""
        for i in range(count):
            row = {"id": str(i), "patient": str(i), "label": rewards.CLASSES[i % 2]}
            for mode in ("direct", "think"):
                answer = {"mode": mode, **row, **same}
                answer["correctness"] = float(not wrong and i % 2 == 0)
                lines += json.dumps(answer) + "\n"
            row |= {"predicted": "one", "judged": "one", "donor": "7", "donor_class": "two"}
            row |= {"swapped": "two" if "eval_rl" in name else "one", "empty": None}
            if i == 0:  # right without reasoning, and no donor
                row |= {"donor": None, "donor_class": None, "swapped": None, "empty": row["label"]}
            if "eval_base" in name:  # neither answer can be read
                row |= {"predicted": None, "swapped": None}
            swapped += json.dumps(row) + "\n"
        (folder / "predictions.jsonl").write_text(lines)
        if name.rpartition("eval_")[2] in miniature_tables.SWAPPED:
            (folder / "swapped.jsonl").write_text(swapped)


def test_the_report_counts_what_was_answered(tmp_path):
    write_answers(tmp_path, 2)
    text = miniature_tables.report(tmp_path, [4], {"seed4/eval_rl_no_sft": "exit 1: oh"})
    assert (tmp_path / "report.md").read_text() == text
    assert "| base | 0.0 (0.0) | 23.86 | 0.0 (0.0) | 22.38 |" in text
    assert "| SFT | 50.0 (50.0) | 48.54 | 50.0 (50.0) | 37.60 |" in text
    assert f"| {rewards.CLASSES[0]} | 0.0 (0.0) | 100.0 (100.0) | 100.0 (100.0) |" in text
    assert "| SFT + RL, all rewards, think | 1 |" in text  # items of two classes: one is all wrong
    assert "| RL without SFT, think | failed |" in text
    assert "| RL without SFT | failed | 46.95 | failed |" in text
    assert "- seed4/eval_rl_no_sft: exit 1: oh" in text
    zoom = "| Table 3: the zoomed patch helps (SFT, direct) | +3.22 | too few patients"
    assert f"{zoom} in common |  | not resolved |" in text
    assert (
        "| Fig. 3: RL makes reasoning and answer agree | +6.81 | too few patients in common |"
        in text
    )
    assert "| Table 4: RL needs SFT before it | +5.23 | a run failed |  | not resolved |" in text


def test_the_three_measures_by_hand(tmp_path):
    """Twenty patients; the reward's log has 30 steps: 0.5 in the first half, then 1."""
    write_answers(tmp_path, 20)
    run = tmp_path / "seed4" / "rl"
    run.mkdir()
    lines = ""
    for step in range(1, 31):
        row = {"step": step, "format": 0.5 + 0.5 * (step > 15), "validity": float(step > 5)}
        row["correctness"] = 0.5 * (step > 20)
        lines += json.dumps(row) + "\n"
    (run / "metrics.jsonl").write_text(lines)
    (tmp_path / "seed4" / "before_sft").mkdir()
    before = "".join(lines.splitlines(keepends=True)[:10])
    (tmp_path / "seed4" / "before_sft" / "metrics.jsonl").write_text(before)
    text = miniature_tables.report(tmp_path, [4], {"seed4/rl_no_format": "exit 1: oh"})
    nothing, all_of = "0.0 (0.0)", "100.0 (100.0)"
    assert f"| base | {nothing} | {nothing} |  | {nothing} |" in text
    assert f"| SFT | {nothing} | {all_of} |  | 50.0 (50.0) | 5.0 (5.0) |" in text
    assert f"| SFT + RL, all rewards | {all_of} | {nothing} |  | 50.0 (50.0) | 5.0 (5.0) |" in text
    moved = "Swapped reasoning moves more answers of RL than of SFT | none (open) "
    moved += "| +100.0 (+100.0 to +100.0)"
    assert f"| {moved} | +100.0 | differs |" in text
    assert "| 1 | 50.0 (50.0) |  | 50.0 (50.0) |  |" in text
    for overlap in ("0.7", "0.5", "0.3", "0", "whole"):
        assert f"| {overlap} | {nothing} | -50.0 (-" in text
    earned = f"50.0 (50.0) | {all_of} | 50.0 (50.0) | {all_of} | {nothing} | 50.0 (50.0)"
    assert f"| SFT + RL, all rewards | {earned} |" in text
    half = "50.0 (50.0) | failed"
    row = f"{half} | {half} | {nothing} | failed"
    assert f"| SFT + RL, without format | {row} |" in text
    # Predicted boxes are right on half of the items, none on none: they keep all.
    assert "predicted ones keep: SFT direct 100.0 (100.0) %." in text
    assert "| predicted | 50.0 (50.0) | +0.0" in text
    assert f"| base | {nothing} | {nothing} |" in text  # of locating
    row = "0.0 | 0.0 | 50.0 | 50.0 | nan | nan | 50.0 | 50.0 | nan | nan | 50.0"
    assert "| seed | base: direct | base: think |" in text and f"\n| 4 | {row} |\n" in text
    same = "+0.0 (+0.0 to +0.0) | +0.0 | equivalent within 5 |"
    assert f"| Table 3: the farthest corner (SFT, direct) | none (open) | {same}" in text
    assert f"| RL with thinking beats RL without | none (+) | {same}" in text
    assert "by chance alone 1.2 of 24 intervals would exclude 0." in text


def test_the_figure_shows_seeds_intervals_and_the_papers_effects(tmp_path):
    """Blue is drawn for effects that were measured, orange for those that the paper has."""

    def pixels(found, color):
        miniature_tables.draw_effects(tmp_path / "effects.png", found)
        picture = np.asarray(Image.open(tmp_path / "effects.png").convert("RGB"))
        return int((picture == color).all(2).sum())

    count = len(miniature_tables.EFFECTS)
    nothing, measured = ["a run failed"] * count, [[interval(3, 2), interval(5, 2)]] * count
    blue, orange = (31, 119, 180), (255, 127, 14)
    assert pixels(nothing, blue) == 0
    assert pixels(measured, blue) > 100 * count
    assert pixels(nothing, orange) > 20 * 10


def test_what_is_readable_is_counted_apart(tmp_path):
    lines = ""
    for i, (right, valid) in enumerate([(1, 1), (0, 1), (0, 0), (0, 0)]):
        row = {"id": str(i), "patient": "p", "label": "Emphysema", "mode": "think", "format": 1}
        row |= {"correctness": right, "validity": valid, "judged": None, "predicted": None}
        lines += json.dumps(row) + "\n"
    (tmp_path / "predictions.jsonl").write_text(lines)
    items = miniature_tables.read_items(tmp_path)
    assert [value for value, _, _ in items["think"].values()] == [1, 0, 0, 0]
    assert [value for value, _, _ in items["readable"].values()] == [1, 0]


def test_what_predicted_boxes_keep_by_hand():
    def items(*values: float) -> dict:
        return {"think": {str(i): (value, "p", "Emphysema") for i, value in enumerate(values)}}

    seed = items(1, 1, 1, 1), items(1, 1, 0, 0), items(1, 0, 0, 0)
    assert miniature_tables.kept(seed, "think", None) == pytest.approx(100 / 3)
    assert miniature_tables.kept(seed, "think", {"1", "2"}) == pytest.approx(50)
    assert math.isnan(miniature_tables.kept(seed, "think", {"0"}))  # nothing is gained there


def table_rows(text: str, title: str) -> dict[str, list[str]]:
    """First cell -> the others, of the first table after `title`."""
    found = {}
    for line in text[text.index(title) :].split("\n|", 1)[1].split("\n\n", 1)[0].splitlines():
        name, *others = [cell.strip() for cell in line.strip("|").split("|")]
        found[name] = others
    return found


def test_the_readme_shows_the_means_of_the_studys_page():
    readme = (miniature.ROOT / "README.md").read_text(encoding="utf-8")
    page = (miniature.ROOT / "benchmarks" / "miniature.md").read_text(encoding="utf-8")
    shown = table_rows(readme, "## Results")
    one, three = table_rows(page, "**Table 1."), table_rows(page, "**Table 3.")
    four = table_rows(page, "**Table 4.")
    wrong = table_rows(page, "**What a wrong box costs.** Accuracy")
    expected = {
        "base": (one["base"][0], one["base"][2]),
        "SFT": (one["SFT"][0], one["SFT"][2]),
        "SFT + GRPO": (one["SFT + RL, all rewards"][0], one["SFT + RL, all rewards"][2]),
        "SFT + GRPO, trained without reasoning": (
            one["SFT + RL, without thinking"][0],
            one["SFT + RL, without thinking"][2],
        ),
        "SFT without the zoomed patch": (three["SFT without the patch"][0], ""),
        "GRPO without SFT": (four["RL without SFT"][4], four["RL without SFT"][0]),
    }
    assert len(shown) == len(expected) + 2  # the header and the line below it
    for name, means in expected.items():
        assert [shown[name][0], shown[name][2]] == [mean.split(" ")[0] for mean in means]
    boxes = table_rows(readme, "With its boxes")
    for name, column in (("SFT, direct", 0), ("SFT + GRPO, with reasoning", 2)):
        cells = [wrong[box][column] for box in ("1", "predicted", "whole")]
        assert boxes[name] == [mean.split(" ")[0] for mean in cells]


def test_the_shipped_logs_are_seed_0_of_the_studys_page():
    page = (miniature.ROOT / "benchmarks" / "miniature.md").read_text(encoding="utf-8")
    rewarded = table_rows(page, "**Where the reward goes.**")
    for run, arm in (("rl", "SFT + RL, all rewards"), ("rl_no_sft", "RL without SFT")):
        lines = (miniature.ROOT / "benchmarks" / "logs" / f"{run}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows] == list(range(1, 201))
        right = 100 * np.mean([row["correctness"] for row in rows[-10:]])
        first = rewarded[arm][5].partition(" (")[2].split(",")[0]
        assert float(first) == pytest.approx(right, abs=0.06)
