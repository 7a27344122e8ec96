"""The second task: boxes as answers, their grid, clean slices, predicted boxes, the chain."""

import copy
import importlib
import json
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

import rewards
from rewards import Boxes, iou, predicted_box
from support import vlm
from support.files import BadInput, open_picture
from support.grounding import ask_where, box_grid, read_boxes, rescale
from support.log import read_log
from support.records import load_split, read_records
from tests import launch

launch.server()
draw = importlib.import_module("02_zoom_augment")
BOX = '{"bbox_2d": [10, 20, 40, 60], "label": "lesion"}'

# The answer's text, and whether it is one box inside a picture of 100 x 80.
PARSED = [
    (BOX, True),
    ('{"bbox_2d": [10, 20, 40, 60]}', True),  # a label is not needed
    ('{"bbox_2d":[10,20,40,60],"label":""}', True),
    (f"\n ```json\n[\n\t{BOX}\n]\n``` \n", True),  # as Qwen2.5-VL writes a list of one
    (f"[{BOX}]", True),
    ('{"bbox_2d": [0, 0, 100, 80]}', True),  # the whole picture
    ('{"bbox_2d": [0, 0, 101, 80]}', False),  # outside
    ('{"bbox_2d": [0, 0, 100, 81]}', False),
    ('{"bbox_2d": [-1, 0, 40, 60]}', False),
    ('{"bbox_2d": [10, 20, 10, 60]}', False),  # no area
    ('{"bbox_2d": [40, 20, 10, 60]}', False),  # edges in the wrong order
    ('{"bbox_2d": [10, 60, 40, 20]}', False),
    ('{"bbox_2d": [10, 20, 40]}', False),
    ('{"bbox_2d": [10, 20, 40, 60, 70]}', False),
    ('{"bbox_2d": [10.0, 20, 40, 60]}', False),  # whole numbers
    ('{"bbox_2d": [1e1, 20, 40, 60]}', False),
    ('{"bbox_2d": ["10", 20, 40, 60]}', False),
    ('{"bbox_2d": [NaN, 20, 40, 60]}', False),
    ('{"bbox_2d": [true, 20, 40, 60]}', False),
    ('{"bbox_2d": [10, 20, 40, 999999999999999999999]}', False),
    ('{"bbox_2d": [1\u0660, 20, 40, 60]}', False),  # an Arabic digit
    ('{"bbox": [10, 20, 40, 60]}', False),  # another key
    ("[10, 20, 40, 60]", False),
    (f"{BOX}, {BOX}", False),  # one box only
    (f"[{BOX}, {BOX}]", False),
    ('{"bbox_2d": [10, 20, 40, 60], "bbox_2d": [0, 0, 100, 80]}', False),
    ('{"bbox_2d": [10, 20, 40, 60], "label": "a", "score": 1}', False),
    (f"The lesion is at {BOX}", False),
    (f"{BOX} or so", False),
    (f"[{BOX}", False),
    (f"{BOX}]", False),
    (f"{BOX}\n```", False),  # a code fence that was not opened
    (f"```json\n{BOX}", False),  # or not closed
    ('{"bbox_2d": [010, 020, 40, 60]}', False),  # no JSON
    ('{"bbox_2d": [10, 20, 40, 60], "label": "a\nb"}', False),
    ("", False),
]


@pytest.mark.parametrize(("text", "right"), PARSED)
def test_one_box_and_nothing_else_is_an_answer(text, right):
    found = predicted_box(f"<answer>{text}</answer>", 100, 80)
    assert (found is not None) == right
    if right:
        assert [type(edge) for edge in found] == [int] * 4


@pytest.mark.parametrize(
    "completion",
    [
        BOX,  # no tags
        f"<answer>{BOX}</answer><answer>{BOX}</answer>",
        f"<answer>{BOX}",
        f"<think>{BOX}</think><answer></answer>",
        f"</answer>{BOX}<answer>",
        f"<answer><answer>{BOX}</answer></answer>",
        f"</answer>so<answer>{BOX}",
    ],
)
def test_a_box_counts_in_a_single_answer_pair_alone(completion):
    truth = Boxes([[10, 20, 40, 60]], 100, 80)
    got = rewards.reward(completion, truth, task="locate")
    assert (got.validity, got.correctness, got.predicted) == (0, 0, None)


def test_iou_by_hand():
    """10 x 10 and 10 x 10, moved by 5: they share 50 of 150; end-exclusive boxes that touch, 0."""
    assert iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0
    assert iou([0, 0, 10, 10], [2, 3, 7, 7]) == pytest.approx(0.2)
    assert iou([0, 0, 10, 10], [20, 20, 21, 21]) == 0


boxes = st.builds(
    lambda x, y, w, h: [x, y, x + w, y + h],
    *[st.integers(0, 400)] * 2,
    *[st.integers(1, 300)] * 2,
)


@given(boxes, boxes)
def test_iou_is_symmetric_and_one_for_equal_boxes_alone(a, b):
    """Against the count of px in both and in either."""
    assert iou(a, b) == iou(b, a) and 0 <= iou(a, b) <= 1
    assert (iou(a, b) == 1) == (a == b)
    grid = np.zeros((2, 700, 700), bool)
    for plane, (x0, y0, x1, y1) in zip(grid, (a, b), strict=True):
        plane[y0:y1, x0:x1] = True
    assert iou(a, b) == pytest.approx((grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum())


def test_the_reward_by_hand():
    """1 format + 1 validity + 2 IoU, with the right box that is met best."""
    right = Boxes([[0, 0, 10, 10], [10, 20, 40, 60]], 100, 80)
    for mode, think in (("think", "<think>a</think>"), ("direct", "")):
        got = rewards.reward(f"{think}<answer>{BOX}</answer>", right, mode=mode, task="locate")
        assert (got.format, got.validity, got.correctness, got.total) == (1, 1, 1, 4)
    text = '<answer>{"bbox_2d": [5, 0, 15, 10]}</answer>'
    got = rewards.reward(text, right, (1, 1, 2), "think", "locate")
    assert (got.format, got.validity) == (0, 1)
    assert got.total == pytest.approx(1 + 2 / 3)
    assert got.predicted == [5, 0, 15, 10]
    none = rewards.reward("<think>a</think><answer>here</answer>", right, task="locate")
    assert (none.format, none.validity, none.correctness, none.total) == (1, 0, 0, 1)


def test_what_is_taught_earns_everything():
    right = Boxes([[10, 20, 40, 60], [0, 0, 5, 5]], 100, 80)
    text = rewards.target(right, "locate")
    assert text == f"<answer>{BOX}</answer>"
    assert rewards.reward(text, right, mode="direct", task="locate").total == 4
    assert json.loads(rewards.box_text([1, 2, 3, 4])) == {
        "bbox_2d": [1, 2, 3, 4],
        "label": "lesion",
    }


def test_the_prompts_ask_for_what_the_parser_reads():
    for mode in rewards.MODES:
        text = rewards.prompt(rewards.LOCATE.format("the lesion"), mode, "locate")
        assert "box in JSON" in text and "<answer> </answer>" in text
        assert ("<think>" in text) == (mode == "think")


# ==== Grids ====


@pytest.mark.parametrize("patch", [14, 16])
@hypothesis_settings(max_examples=20, deadline=None)
@given(width=st.integers(40, 700), height=st.integers(40, 700))
def test_the_grid_is_the_picture_that_the_processor_makes(processor, patch, width, height):
    """Of odd sizes, too: width and height must not be exchanged."""
    assume(max(width, height) / min(width, height) < 20)
    processor = copy.deepcopy(processor)
    cut = processor.image_processor
    cut.patch_size = patch
    _, rows, columns = cut(images=[Image.new("RGB", (width, height))])["image_grid_thw"][0]
    made = int(columns) * cut.patch_size, int(rows) * cut.patch_size
    assert box_grid(processor, (width, height)) == made


def test_another_familys_boxes_are_not_guessed(folders, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="no other family's"):
        box_grid(object(), (640, 480))
    # Nor is such a model asked for hours first.
    evaluation = importlib.import_module("05_eval")
    monkeypatch.setattr(vlm, "any_processor", lambda name: object())
    monkeypatch.setattr(evaluation, "ask", lambda *args: pytest.fail("asked"))
    flags = f"--task locate --data {folders[1]} --model {vlm.TINY} --out {tmp_path / 'where'}"
    with pytest.raises(SystemExit, match="no other family's"):
        evaluation.main(flags.split())
    assert not (tmp_path / "where").exists()


sizes = st.tuples(st.integers(1, 900), st.integers(1, 900))


@given(sizes, sizes, st.data())
def test_a_box_stays_in_its_picture_and_comes_back(source, grid, data):
    """On a finer grid and back it is the same box; on a coarser one its edges move by half a step,
    and by one more where the box would have no width."""
    edges = []
    for length in source:
        low = data.draw(st.integers(0, length - 1))
        edges.append((low, data.draw(st.integers(low + 1, length))))
    box = [edges[0][0], edges[1][0], edges[0][1], edges[1][1]]
    there = rescale(box, source, grid)
    assert 0 <= there[0] < there[2] <= grid[0] and 0 <= there[1] < there[3] <= grid[1]
    if grid[0] >= source[0] and grid[1] >= source[1]:
        assert rescale(there, grid, source) == box
    assert rescale(box, source, source) == box
    mirrored = [box[i] for i in (1, 0, 3, 2)]
    turned = rescale(mirrored, source[::-1], grid[::-1])
    assert turned == [there[i] for i in (1, 0, 3, 2)]
    for i, edge in enumerate(box):
        step = source[i % 2] / grid[i % 2]
        assert abs(there[i] * step - edge) <= 1.5 * step + 1e-9


# ==== Clean slices and predicted boxes ====


@pytest.fixture(scope="module")
def folders(data, tmp_path_factory):
    """01's slices, and their clean twin."""
    root = tmp_path_factory.mktemp("clean")
    slices = data.parent / "slices"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "draw_overview", lambda *_: None)
        draw.main(f"--data {slices} --clean --out {root / 'clean'} --workers 1".split())
    return slices, root / "clean"


def test_a_clean_slice_has_nothing_drawn_and_asks_where(folders):
    slices, clean = folders
    before, after = read_records(slices, "train"), load_split(clean, "train", "locate")
    several = 0
    for old, new in zip(before, after, strict=True):
        one, other = open_picture(old["image"]).convert("RGB"), open_picture(new["image"])
        assert np.array_equal(np.asarray(one), np.asarray(other))
        assert new["question"] == rewards.LOCATE.format("the lesion")
        assert new["boxes"][0] == new["box"] == old["box"]
        same = [r for r in before if r["file_name"] == old["file_name"]]
        for record in same:  # the boxes of every finding on the slice
            assert all(box in new["boxes"] for box in record["boxes"])
        several += len(same) > 1
        assert new["answer"] == f"<answer>{rewards.box_text(new['box'])}</answer>"
        assert not any(name in new["question"] for name in rewards.CLASSES)
    assert several > 5


def test_a_findings_own_words_and_boxes(folders):
    record = {"id": "a", "box": [1, 2, 3, 4], "boxes": [[1, 2, 3, 4]], "text": "Solid lesion. "}
    record["slice_boxes"] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    named, any_of_them = ask_where(record, True), ask_where(record, False)
    assert named["question"] == rewards.LOCATE.format("this finding: solid lesion")
    assert named["boxes"] == [[1, 2, 3, 4]]
    assert any_of_them["boxes"] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    with pytest.raises(BadInput, match="record a: no field 'text'; leave out --name-finding"):
        ask_where(record | {"text": " "}, True)


def test_each_task_refuses_the_others_folder(folders, data):
    with pytest.raises(BadInput, match="--task diagnose needs a folder drawn without --clean"):
        load_split(folders[1], "train")
    with pytest.raises(BadInput, match="--task locate needs a folder drawn with --clean"):
        load_split(data, "train", "locate")


def test_predicted_boxes_are_drawn_and_a_missing_one_is_the_whole_slice(folders, tmp_path):
    slices, _ = folders
    chosen = read_records(slices, "test")[:3]
    predicted = [[20, 30, 50, 70], None, chosen[2]["box"]]
    rows = []
    for record, box in zip(chosen, predicted, strict=True):
        rows.append(json.dumps({"id": record["id"], "box": box, "iou": 0.5}) + "\n")
    (tmp_path / "boxes.jsonl").write_text("".join(rows))
    flags = f"--data {slices} --boxes {tmp_path / 'boxes.jsonl'} --workers 1 --out"
    draw.main([*flags.split(), str(tmp_path / "drawn")])
    drawn = load_split(tmp_path / "drawn", "test")
    assert [record["id"] for record in drawn] == [record["id"] for record in chosen]
    assert read_records(tmp_path / "drawn", "train") == []
    info = json.loads((tmp_path / "drawn" / "dataset_info.json").read_text())
    assert info["records"] == {"train": 0, "test": 3}
    assert not {"volumes", "patients", "slices", "classes"} & set(info)  # 01's would be false
    for old, new, box in zip(chosen, drawn, predicted, strict=True):
        picture = open_picture(old["image"])
        box = box or [0, 0, *picture.size]
        assert np.array_equal(open_picture(new["image"]), draw.augment(picture, box))
        assert new["box"] == old["box"] and new.get("drawn_box", new["box"]) == box


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a", "box": [1, 2, 3, 4]}'] * 2, "line 2: .*'a' has a box already.*--think"),
        (['{"id": "a", "box": [1, 2, 3]}'], "line 1: field 'box'"),
        (['{"id": "a", "box": [3, 2, 1, 4]}'], "line 1: field 'box'"),
        (['{"id": 7, "box": null}'], "line 1: field 'id'"),
        (["[]"], "line 1: not a JSON object"),
        (["{"], "line 1: "),
    ],
)
def test_a_faulty_file_of_boxes_is_named(tmp_path, lines, message):
    (tmp_path / "boxes.jsonl").write_text("\n".join(lines))
    with pytest.raises(BadInput, match=message):
        read_boxes(tmp_path / "boxes.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "nobody", "box": null}', "names no record of"),
        ('{"id": "%s", "box": [0, 0, 900, 900]}', "does not lie in the picture"),
    ],
)
def test_boxes_that_do_not_belong_to_the_slices(folders, tmp_path, content, message):
    slices, _ = folders
    name = read_records(slices, "test")[0]["id"]
    (tmp_path / "boxes.jsonl").write_text(content.replace("%s", name))
    flags = f"--data {slices} --boxes {tmp_path / 'boxes.jsonl'} --workers 1 --out {tmp_path / 'x'}"
    with pytest.raises(SystemExit) as error:
        draw.main(flags.split())
    assert message in str(error.value)


# ==== The chain ====


@pytest.mark.slow
def test_the_chain_from_clean_slices_to_a_diagnosis(folders, tmp_path):
    """Locate by SFT and GRPO, predict, draw, diagnose: each stage a process of its own."""
    slices, clean = folders
    base = ["--task", "locate", "--data", clean, "--out"]
    sft = [*base, tmp_path / "sft", *"--max-steps 2 --batch-size 4 --micro-batch 2".split()]
    grpo = [*base, tmp_path / "grpo", "--model", tmp_path / "sft"]
    grpo += "--steps 2 --prompts-per-step 2 --micro-batch 1 --group-size 3 --kl 0".split()
    where = [*base, tmp_path / "where", "--model", tmp_path / "grpo", *"--think no".split()]
    boxes = ["--data", slices, "--boxes", tmp_path / "where" / "boxes.jsonl", "--workers", "1"]
    what = ["--data", tmp_path / "drawn", "--model", vlm.TINY, *"--think no --no-skill".split()]
    stages = [
        ("03_sft", *sft),
        ("04_grpo", *grpo),
        ("05_eval", *where),
        ("02_zoom_augment", *boxes, "--out", tmp_path / "drawn"),
        ("05_eval", *what, "--out", tmp_path / "what"),
    ]
    for stage in stages:
        done = launch.run(*stage)
        assert done.returncode == 0, done.stderr
    records = load_split(clean, "test", "locate")
    rows = read_log(tmp_path / "where" / "boxes.jsonl")
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    for row, record in zip(rows, records, strict=True):
        best = max(iou(row["box"], box) for box in record["boxes"]) if row["box"] else 0
        assert row["iou"] == pytest.approx(best)
    assert any(row["box"] for row in rows)
    metrics = json.loads((tmp_path / "where" / "metrics.json").read_text())
    shown = metrics["models"]["grpo"]["modes"]["direct"]
    assert shown["iou"] == pytest.approx(np.mean([row["iou"] for row in rows]))
    assert shown["half"] == pytest.approx(np.mean([row["iou"] > 0.5 for row in rows]))
    for name in ("boxes.png", "table.md", "report.html"):
        assert (tmp_path / "where" / name).stat().st_size > 200
    for line in read_log(tmp_path / "grpo" / "rollouts.jsonl"):
        parts = line["format"] + line["validity"] + 2 * line["correctness"]
        assert line["reward"] == pytest.approx(parts)
    answered = json.loads((tmp_path / "what" / "metrics.json").read_text())
    assert answered["n"] == len(records)


def test_one_slice_of_ones_own_is_located_drawn_and_diagnosed(folders, tmp_path, capsys):
    evaluation = importlib.import_module("05_eval")
    record, zoomed = read_records(folders[0], "test")[0], str(tmp_path / "zoomed.png")
    where = ["--task", "locate", "--think", "no", "--model", str(vlm.TINY), "--image"]
    evaluation.main([*where, str(record["image"])])
    told = capsys.readouterr().out
    assert "tiny-qwen2.5-vl, direct" in told
    box = re.search(r"answers: \[(\d+), (\d+), (\d+), (\d+)\]\n", told).groups()
    x0, y0, x1, y1 = map(int, box)
    width, height = open_picture(record["image"]).size
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    draw.main(["--image", str(record["image"]), "--box", *box, "--out", zoomed])
    evaluation.main(["--model", str(vlm.TINY), "--image", zoomed])
    told = capsys.readouterr().out
    assert any(f"answers: {name}\n" in told for name in rewards.CLASSES)
