"""Stage 02: every pixel of the augmented picture in both arms, awkward and wrong boxes, the patch's
corner and statistics, the twin folder, one picture, restart, bad input."""

import importlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

import rewards
from support import files, grounding, records
from support.files import BadInput, open_picture, write_atomic
from support.records import load_split, read_records
from tests import ct_fixtures as ct
from tests import launch

launch.server()
stage = importlib.import_module("02_zoom_augment")
RED, GREEN = (255, 0, 0), (0, 255, 0)
DRAW = stage.draw_overview


@pytest.fixture(scope="module", autouse=True)
def no_overview():
    """Leaves out the figures, which take most of a small run's time; test_overview makes one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("01_make_dataset", "02_zoom_augment"):
            patch.setattr(importlib.import_module(name), "draw_overview", lambda *_: None)
        yield


def noise(width: int = 140, height: int = 140, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))


def red_outline(size: tuple[int, int], box: list[int], line: int) -> np.ndarray:
    """bool [height, width]: the frame of `line` px around `box`, inside where the picture ends."""
    x0, y0 = max(box[0] - line, 0), max(box[1] - line, 0)
    x1, y1 = min(box[2] + line, size[0]), min(box[3] + line, size[1])
    frame = np.zeros((size[1], size[0]), bool)
    frame[y0:y1, x0:x1] = True
    frame[y0 + line : y1 - line, x0 + line : x1 - line] = False
    return frame


BOXES = {
    "middle": [80, 70, 108, 92],
    "left edge": [0, 60, 20, 90],
    "lower right corner": [120, 125, 140, 140],
    "under the patch": [10, 12, 40, 44],
    "one pixel": [70, 71, 71, 72],
    "one pixel in the corner": [139, 139, 140, 140],
    "thin and long": [5, 100, 135, 103],
    "whole picture": [0, 0, 140, 140],
}


@pytest.mark.parametrize("name", BOXES)
def test_every_pixel_without_the_patch(name):
    picture, box = noise(), BOXES[name]
    result = np.array(stage.augment(picture, box, patch=0))
    red = red_outline(picture.size, box, 1)
    assert (result[red] == RED).all()
    np.testing.assert_array_equal(result[~red], np.array(picture.convert("RGB"))[~red])
    inside = np.zeros_like(red)
    inside[box[1] : box[3], box[0] : box[2]] = True
    at_edge = box[0] == 0 or box[1] == 0 or box[2] == 140 or box[3] == 140
    on_lesion = bool((red & inside).any())
    assert on_lesion == at_edge  # the line is on the lesion only where the picture ends


@pytest.mark.parametrize("name", BOXES)
def test_every_pixel_with_the_patch(name):
    picture, box = noise(), BOXES[name]
    result = np.array(stage.augment(picture, box, patch=0.4, margin=0.25, border=0.03))
    red = red_outline(picture.size, box, 1)
    side, width = 56, 2  # 0.4 * 140; 0.03 * 56 = 1.7
    crop = picture.crop(stage.crop_square(picture.size, box, 0.25)).convert("RGB")
    expected = np.array(picture.convert("RGB"))
    expected[:side, :side] = GREEN
    crop = crop.resize((52, 52), Image.Resampling.BICUBIC)
    expected[width : side - width, width : side - width] = np.array(crop)
    expected[red] = RED  # drawn last: the patch never hides it
    np.testing.assert_array_equal(result, expected)


def test_the_patch_shows_the_clean_lesion_enlarged():
    picture = Image.new("L", (140, 140), 10)
    picture.paste(200, (90, 60, 110, 80))  # a 20 px lesion; margin 0.5: a square of 40 px
    result = np.array(stage.augment(picture, [90, 60, 110, 80], patch=0.4, margin=0.5))
    patch = result[2:54, 2:54].astype(int)  # 52 px: 1.3 times as large
    assert (patch[16:36, 16:36] == 200).all()  # the lesion: 13 to 39
    assert (patch[:10] == 10).all()  # its surroundings, and no red line
    assert (patch[:, 42:] == 10).all()
    bright = (patch[26, :, 0] > 105).sum()
    assert bright == 26


@pytest.mark.parametrize(("side", "patch", "line"), [(140, 56, 1), (512, 205, 2), (768, 307, 3)])
def test_sizes_grow_with_the_slice(side, patch, line):
    box = [300 * side // 768, side // 2, side // 2, 400 * side // 512]
    result = np.array(stage.augment(noise(side, side), box))
    green = (result == GREEN).all(axis=-1)
    assert np.argwhere(green).max(axis=0).tolist() == [patch - 1, patch - 1]
    assert green[0, :patch].all()
    column = (result[:, side // 2 - 5] == RED).all(axis=-1)
    assert column.sum() == 2 * line


def test_crop_square_by_hand():
    crop, square, wide = stage.crop_square, (140, 140), (200, 100)
    assert crop(square, [60, 60, 80, 70], 0.25) == (55, 50, 85, 80)  # 20 * 1.5 around (70, 65)
    assert crop(square, [0, 60, 20, 70], 0.25) == (0, 50, 30, 80)  # shifted inside
    assert crop(square, [130, 135, 140, 140], 0.5) == (120, 120, 140, 140)
    assert crop(square, [20, 20, 130, 120], 0.25) == (0, 0, 140, 140)  # gives up margin to fit
    assert crop(wide, [20, 30, 170, 60], 0.25) == (20, -25, 170, 125)  # black above and below
    assert crop(square, [70, 70, 71, 71], 0) == (70, 70, 71, 71)


def test_a_box_longer_than_the_shorter_side_gets_black_bars():
    picture = Image.new("L", (200, 100), 90)
    patch = np.array(stage.zoom_patch(picture, [20, 30, 170, 60], 60, 0.25, 0.05))
    patch = patch[3:57, 3:57]  # 150 px in 54
    assert (patch[:6] == 0).all() and (patch[-6:] == 0).all()  # 25 px are 9
    assert (patch[13:41] == 90).all()


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.integers(28, 300), st.integers(28, 300), st.data(), st.floats(0, 10))
def test_the_crop_is_a_square_that_holds_the_box(width, height, data, margin):
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = [x0, y0, data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))]
    left, top, right, bottom = stage.crop_square((width, height), box, margin)
    assert right - left == bottom - top
    assert left <= box[0] and top <= box[1] and right >= box[2] and bottom >= box[3]
    if max(box[2] - box[0], box[3] - box[1]) <= min(width, height):
        assert 0 <= left and 0 <= top and right <= width and bottom <= height


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_augment_takes_any_picture_and_leaves_it_alone(mode):
    picture = Image.new("I;16", (64, 64), 77) if mode == "I;16" else noise(64, 64).convert(mode)
    before = picture.tobytes()
    result = stage.augment(picture, [30, 30, 50, 50])
    assert (result.mode, result.size) == ("RGB", (64, 64)) and picture.tobytes() == before


@pytest.mark.parametrize(
    "box", [[0, 0, 0, 5], [5, 5, 4, 9], [-1, 0, 5, 5], [0, 0, 141, 5], [0, 0, 5, 141]]
)
def test_a_box_that_is_not_in_the_picture_is_refused(box):
    with pytest.raises(BadInput, match="does not lie in the picture"):
        stage.augment(noise(), box)


def test_a_patch_too_small_to_see_is_refused():
    with pytest.raises(BadInput, match="raise --patch"):
        stage.augment(noise(), [60, 60, 70, 70], patch=0.05)


# ==== A wrong box ====


def random_box(generator: random.Random, side: int) -> list[int]:
    """A box that 01 would keep on a slice of `side` px, at its edge as often as not."""
    while True:
        width, height = generator.randint(1, side), generator.randint(1, side)
        if width * height > 1300 / 512**2 * side**2:
            break
    x = generator.choice([0, side - width, generator.randint(0, side - width)])
    y = generator.choice([0, side - height, generator.randint(0, side - height)])
    return [x, y, x + width, y + height]


def iou_by_pixels(a: list[int], b: list[int]) -> float:
    masks = np.zeros((2, 520, 520), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, (a, b), strict=True):
        mask[y0:y1, x0:x1] = True
    return (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()


@pytest.mark.parametrize("side", [140, 512])
@pytest.mark.parametrize("iou", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_jittered_box_has_the_iou(side, iou):
    tolerance = 0.005 if side == 512 else 0.01 if iou <= 0.7 else 0.03
    generator, drawn = random.Random(side), []
    for i in range(60):
        box = random_box(generator, side)
        drawn.append((box, grounding.jitter_box((side, side), box, iou, f"slice_{i}")))
    for box, other in drawn:
        assert 0 <= other[0] < other[2] <= side and 0 <= other[1] < other[3] <= side
        assert abs(iou_by_pixels(box, other) - iou) <= tolerance
    # Both are random: some are larger, some smaller, and they go both ways.
    assert len({stage.area(other) > stage.area(box) for box, other in drawn}) == 2
    assert len({other[0] + other[2] > box[0] + box[2] for box, other in drawn}) == 2
    assert len({other[1] + other[3] > box[1] + box[3] for box, other in drawn}) == 2


@pytest.mark.parametrize("box", [[2, 2, 3, 3], [0, 0, 2, 2], [1, 0, 4, 3], [4, 1, 5, 4]])
def test_a_box_of_few_pixels_comes_about_as_near_as_they_allow(box):
    every = []
    for x0, y0, x1, y1 in itertools.product(range(6), repeat=4):
        if x0 < x1 and y0 < y1:
            every.append([x0, y0, x1, y1])
    reachable = [rewards.iou(box, other) for other in every]
    for iou in (0.2, 0.5, 0.7, 0.9):
        drawn = grounding.jitter_box((5, 5), box, iou, "x")
        assert drawn in every
        error = abs(iou_by_pixels(box, drawn) - iou)
        assert error <= min(abs(other - iou) for other in reachable) + 0.035


@pytest.mark.parametrize("side", [140, 512])
def test_iou_1_is_the_box_and_0_one_of_its_size_that_does_not_touch_it(side):
    generator, places = random.Random(side), set()
    for i in range(200):
        box = random_box(generator, side)
        assert grounding.jitter_box((side, side), box, 1, f"{i}") == box
        width, height = box[2] - box[0], box[3] - box[1]
        gaps = [box[0] - 1, side - box[2] - 1, box[1] - 1, side - box[3] - 1]
        if max(gaps) < 1:
            continue  # it fills the slice
        drawn = grounding.jitter_box((side, side), box, 0, f"{i}")
        assert 0 <= drawn[0] < drawn[2] <= side and 0 <= drawn[1] < drawn[3] <= side
        wider = [box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1]
        assert rewards.shared_area(wider, drawn) == 0
        sizes = drawn[2] - drawn[0], drawn[3] - drawn[1]
        room = max(gaps[:2]) >= width or max(gaps[2:]) >= height
        assert (sizes == (width, height)) == room
        assert sizes[0] <= width and sizes[1] <= height
        places.add((drawn[0] > box[0], drawn[1] > box[1]))
    assert len(places) == 4


def test_a_box_that_leaves_no_room_beside_it():
    beside = grounding.box_beside
    drawn = beside((140, 140), [0, 0, 140, 99], random.Random(0))
    assert (drawn[1], drawn[2] - drawn[0], drawn[3]) == (100, 56, 140)  # 140 x 99 times 40 / 99
    for box in ([0, 0, 140, 140], [1, 1, 139, 139]):
        with pytest.raises(BadInput, match="leaves no room beside it"):
            beside((140, 140), box, random.Random(0))


# ==== The patch's corner ====


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ([80, 70, 108, 92], "upper left"),
        ([20, 70, 48, 92], "upper right"),
        ([80, 20, 108, 42], "lower left"),
        ([20, 20, 48, 42], "lower right"),
        ([60, 60, 80, 80], "upper left"),  # the centre, four ties
        ([60, 20, 80, 40], "lower left"),  # two ties
        ([0, 60, 100, 138], "upper right"),  # the left ones are nearer or hide more of it
        ([0, 0, 140, 140], "upper left"),
        ([0, 0, 85, 140], "upper right"),
        ([30, 30, 140, 85], "lower left"),  # the upper right is hidden, the others hide less
    ],
)
def test_the_corner_by_hand(box, place):
    corners = {"upper left": (0, 0), "upper right": (84, 0)}
    corners |= {"lower left": (0, 84), "lower right": (84, 84)}
    x, y = corners[place]
    assert stage.patch_square((140, 140), box, 56, "auto") == (x, y, x + 56, y + 56)
    assert stage.patch_square((140, 140), box, 56, "upper-left") == (0, 0, 56, 56)
    result = np.array(stage.augment(noise(), box, patch_corner="auto"))
    expected = np.array(stage.augment(noise(), box, patch=0))
    patch = np.array(stage.zoom_patch(noise(), box, 56, 0.25, 0.03))
    expected[y : y + 56, x : x + 56] = patch
    expected[red_outline((140, 140), box, 1)] = RED
    np.testing.assert_array_equal(result, expected)


def test_the_far_corner_hides_no_lesion_where_that_can_be():
    generator, hidden = random.Random(0), 0
    for _ in range(300):
        size = generator.randint(100, 200), generator.randint(100, 200)
        box = random_box(generator, 100)
        side = stage.patch_side(size, 0.4)
        shares = []
        for y in (0, size[1] - side):
            for x in (0, size[0] - side):
                shares.append(rewards.shared_area((x, y, x + side, y + side), box))
        square = stage.patch_square(size, box, side, "auto")
        assert rewards.shared_area(square, box) == min(shares)
        hidden += shares[0] > 0 == min(shares)
    assert hidden > 100  # lesions that the paper's corner hides


# ==== Statistics ====


def test_magnification_and_cover_by_hand():
    zoom = {"patch": 0.4, "margin": 0.25, "border": 0.03}  # 56 px with 52 px in the border
    figures = stage.patch_figures
    assert figures((140, 140), [90, 60, 110, 80], zoom) == (52 / 30, 0)
    assert figures((140, 140), [50, 40, 60, 60], zoom) == (52 / 30, 6 * 16 / 200)
    assert figures((140, 140), [0, 0, 140, 140], zoom) == (52 / 140, 56 * 56 / 140**2)
    auto = {**zoom, "patch_corner": "auto"}
    assert figures((140, 140), [50, 40, 60, 60], auto) == (52 / 30, 0)


def test_statistics_by_hand():
    figures = [(3.0, 0.0), (0.5, 0.5), (1.0, 0.75), (0.99994, 0.0), (2.0, 0.01)]
    magnification = {"min": 0.5, "lower_quartile": 0.9999, "median": 1.0}
    magnification |= {"upper_quartile": 2.0, "max": 3.0}
    expected = {"magnification": magnification, "shrunk": 0.4}
    expected |= {"box_touched": 0.6, "box_half_hidden": 0.2}
    assert stage.patch_statistics(figures) == expected
    assert stage.patch_statistics(figures[::-1]) == expected
    one = stage.patch_statistics([(0.7, 0.6)])
    assert set(one["magnification"].values()) == {0.7}
    assert (one["shrunk"], one["box_touched"], one["box_half_hidden"]) == (1, 1, 1)


# ==== The folder ====


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """01's folder of three small volumes; slices 4 and 5 of each carry two findings."""
    root = tmp_path_factory.mktemp("zoom")
    lesions = [ct.block((3, 6), [25, 6, 33, 12]), ct.block((4, 7), [0, 30, 12, 48])]
    names = [f"train_{n}_a_1.nii.gz" for n in (1, 2, 3)]
    entries = []
    for i, name in enumerate(names):
        entries.append(ct.add_case(root, name, lesions, ("2b", "2e"), ct.chest(i)))
    flags = [*ct.write_index(root, entries), "--out", str(root / "data")]
    importlib.import_module("01_make_dataset").main(flags)
    return root / "data"


@pytest.fixture(scope="module", autouse=True)
def folder_by_python(data, tmp_path_factory):
    """Starts drawing a folder; meanwhile tests in this process run."""
    flags = ["--patch", "0.5", "--data", data, "--out", tmp_path_factory.mktemp("python") / "out"]
    return flags, launch.start_python("02_zoom_augment", *flags)


def augmented(data: Path, out: Path, *flags: str) -> Path:
    stage.main(["--data", str(data), "--out", str(out), "--workers", "1", *flags])
    return out


def pictures_of(out: Path) -> list[Path]:
    return sorted(out.glob("*/images/[!.]*.png"))


@pytest.mark.parametrize("flags", [(), ("--no-patch",)])
def test_the_twin_folder(data, tmp_path, flags):
    out = augmented(data, tmp_path / "out", *flags)
    for split in ("train", "test"):
        old, new = ct.read_lines(data, split), ct.read_lines(out, split)
        assert len(old) == len(new) == {"train": 12, "test": 6}[split]
        for before, after in zip(old, new, strict=True):
            name = f"images/{before['id']}.png"
            assert after == {**before, "file_name": name, "patch": 0 if flags else 16}
            with Image.open(out / split / after["file_name"]) as picture:
                assert (picture.format, picture.mode) == ("PNG", "RGB")
                assert picture.size == (ct.WIDTH, ct.HEIGHT)
                clean = Image.open(data / split / before["file_name"])
                expected = stage.augment(clean, before["box"], 0 if flags else 0.4)
                np.testing.assert_array_equal(np.array(picture), np.array(expected))
        named = {record["image"] for record in read_records(out, split)}
        assert named == set((out / split / "images").iterdir())
    info = json.loads((out / "dataset_info.json").read_text())
    before = json.loads((data / "dataset_info.json").read_text())
    zoom = {"patch": 0 if flags else 0.4, "margin": 0.25, "border": 0.03}
    expected = {**before, "stage": "02", "zoom": zoom}
    if not flags:  # 14 px show a crop of 27 or 12 px; both boxes lie beside the patch
        low, high = round(14 / 27, 4), round(14 / 12, 4)
        magnification = {"min": low, "lower_quartile": low, "median": low}
        magnification |= {"upper_quartile": high, "max": high}
        shares = {"shrunk": 0.5, "box_touched": 0, "box_half_hidden": 0}
        expected["patch_statistics"] = {"magnification": magnification, **shares}
    assert info == records.dataset_info(out) == expected
    # A folder drawn before there were other flags goes on.
    settings = json.loads((out / ".work" / "settings.json").read_text())
    assert set(settings) == {"script", "patch", "margin", "border", "source_sha256"}


def test_overview(data, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "draw_overview", DRAW)
    path = augmented(data, tmp_path / "out", "--whole") / "overview.png"
    with Image.open(path) as overview:
        assert overview.size == (1600, 500)
    first = path.read_bytes()
    augmented(data, tmp_path / "out", "--whole")
    assert path.read_bytes() == first


@pytest.mark.parametrize("flags", ["--jitter 0.5 --patch-corner auto", "--jitter 0", "--jitter 1"])
def test_a_folder_of_jittered_boxes(data, tmp_path, flags):
    out = augmented(data, tmp_path / "out", *flags.split())
    iou = float(flags.split()[1])
    corner = "auto" if "auto" in flags else "upper-left"
    for split in ("train", "test"):
        load_split(out, split)  # as 03 to 05 read it
        for before, after in zip(
            ct.read_lines(data, split), ct.read_lines(out, split), strict=True
        ):
            box = after.pop("drawn_box", after["box"])
            name = f"images/{before['id']}.png"
            assert after == {**before, "file_name": name, "patch": 16}  # the true box stays
            assert abs(iou_by_pixels(before["box"], box) - iou) <= 0.01
            clean = Image.open(data / split / before["file_name"])
            expected = stage.augment(clean, box, patch_corner=corner)
            drawn = np.array(Image.open(out / split / name))
            np.testing.assert_array_equal(drawn, np.array(expected))
    info = records.dataset_info(out)
    zoom = {"patch": 0.4, "margin": 0.25, "border": 0.03, "jitter": iou}
    assert info["zoom"] == (zoom if corner == "upper-left" else zoom | {"patch_corner": "auto"})
    if iou == 1:
        plain = augmented(data, tmp_path / "plain")
        for path in pictures_of(out):
            assert path.read_bytes() == (plain / path.relative_to(out)).read_bytes()


def test_a_record_is_jittered_alike_wherever_it_stands(data, tmp_path):
    rows = read_records(data, "train")
    zoom, wrong = {"patch": 0.4, "margin": 0.25, "border": 0.03}, {"jitter": 0.5}
    drawn = {}
    for record, figures in stage.draw_records(rows, tmp_path / "all", zoom, wrong):
        drawn[record["id"]] = record, figures
    assert len({tuple(record["drawn_box"]) for record, _ in drawn.values()}) > 6  # 2 true ones
    for row in rows[::-3]:
        (alone,) = stage.draw_records([row], tmp_path / "alone", zoom, wrong)
        assert alone == drawn[row["id"]]
    box = grounding.jitter_box((140, 140), [20, 30, 60, 80], 0.5, "slice")
    assert box == [24, 33, 74, 94]  # on every machine


def test_the_whole_slice_by_hand(data, tmp_path):
    out = augmented(data, tmp_path / "out", "--whole")
    record = read_records(out, "test")[0]
    assert record["drawn_box"] == [0, 0, 40, 48] != record["box"]
    clean = open_picture(read_records(data, "test")[0]["image"])
    expected = np.array(clean.convert("RGB"))
    square = Image.new("RGB", (48, 48))  # black on the left and right
    square.paste(clean, (4, 0))
    expected[:16, :16] = GREEN
    expected[1:15, 1:15] = np.array(square.resize((14, 14), Image.Resampling.BICUBIC))
    expected[[0, -1]] = expected[:, [0, -1]] = RED
    np.testing.assert_array_equal(np.array(open_picture(record["image"])), expected)
    info = records.dataset_info(out)
    assert info["zoom"] == {"patch": 0.4, "margin": 0.25, "border": 0.03, "whole": True}
    statistics = info["patch_statistics"]
    assert set(statistics.pop("magnification").values()) == {round(14 / 48, 4)}
    assert statistics == {"shrunk": 1, "box_touched": 1, "box_half_hidden": 0}


@pytest.mark.parametrize("wrong", [{}, {"jitter": 0.5}, {"jitter": 0}, {"whole": True}])
def test_no_flag_makes_a_box_beside_the_picture_right(wrong):
    for box in ([0, 0, 41, 10], [50, 50, 60, 60]):
        with pytest.raises(BadInput, match="does not lie in the picture of 40 x 48 px"):
            stage.box_to_draw((40, 48), {"id": "x", "box": box}, wrong)


def test_two_findings_on_one_slice_are_two_pictures(data, tmp_path):
    out = augmented(data, tmp_path / "out", "--no-patch")
    pictures = {}
    for record in read_records(out, "train") + read_records(out, "test"):
        place = record["volume"], record["slice"]
        pictures.setdefault(place, []).append(record["image"].read_bytes())
    assert sorted(map(len, pictures.values())) == [1] * 6 + [2] * 6
    for same_slice in pictures.values():
        assert len(set(same_slice)) == len(same_slice)


def test_two_workers_an_interruption_and_a_second_run_change_no_byte(data, tmp_path, monkeypatch):
    jitter = ("--jitter", "0.5")  # chance, too, is the same
    whole = ct.tree(augmented(data, tmp_path / "whole", *jitter))
    monkeypatch.setattr(stage, "CHUNK", 4)
    assert ct.tree(augmented(data, tmp_path / "two", "--workers", "2", *jitter)) == whole

    def interrupt() -> None:
        raise KeyboardInterrupt

    for writes in (0, 1, 4, 11, 19, 20, 21):  # the settings come first, then 18 pictures
        out = tmp_path / str(writes)
        with monkeypatch.context() as patch:
            torn = ct.torn_write(writes, interrupt)
            for module in (stage, files, records):
                patch.setattr(module, "write_atomic", torn)
            with pytest.raises(SystemExit) as stop:
                augmented(data, out, *jitter)
        assert stop.value.code == 130
        images = ct.times(pictures_of(out))
        assert len(images) == min(max(writes - 1, 0), 18)
        assert ct.tree(augmented(data, out, *jitter)) == whole
        assert images == ct.times(images)


@pytest.mark.parametrize("workers", ct.STOPS)
def test_stopped_again_and_again_by_signals(data, tmp_path, workers):
    whole = ct.tree(augmented(data, tmp_path / "whole"))
    out, done = tmp_path / "out", {}
    flags = ["--data", str(data), "--out", str(out), "--workers", workers]
    for stop in ct.STOPS[workers]:
        ct.run_stopped("02_zoom_augment", stop, flags)
        assert not (out / "dataset_info.json").exists()  # it was stopped before its end
        assert done == ct.times(done)  # nothing was done twice
        done = ct.times(pictures_of(out))
    assert 0 < len(done) <= 18
    stage.main(flags)
    assert ct.tree(out) == whole
    assert done == ct.times(done)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line(data, tmp_path, workers):
    # The system's own refusal: no file may be longer than 1000 bytes, pictures have more.
    out = tmp_path / "out"
    flags = ["--data", data, "--out", out, "--workers", workers]
    done = launch.run("02_zoom_augment", *flags, limits={"RLIMIT_FSIZE": 1000})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].endswith("cannot be written: File too large")
    assert not pictures_of(out)


def test_overwrite_replaces_what_the_scripts_write_and_nothing_else(data, tmp_path):
    whole = ct.tree(augmented(data, tmp_path / "whole"))
    out = augmented(data, tmp_path / "out", "--no-patch")
    (out / "thesis.txt").write_text("keep")
    assert ct.tree(augmented(data, out, "--overwrite")) == {**whole, "thesis.txt": b"keep"}
    for around in (data, data.parent):
        with pytest.raises(SystemExit, match="data: lies in --out"):
            augmented(data, around, "--overwrite")


def test_other_settings_other_data_and_strange_folders_are_refused(data, tmp_path):
    out = augmented(data, tmp_path / "out")
    before = ct.tree(out)
    changes = {"--margin 0.5": "margin", "--no-patch": "patch", "--border 0.1": "border"}
    changes |= {"--jitter 0": "jitter", "--whole": "whole", "--patch-corner auto": "patch-corner"}
    for flags, words in changes.items():
        with pytest.raises(SystemExit, match=f"other settings .--{words} was"):
            augmented(data, out, *flags.split())
    assert ct.tree(out) == before
    with pytest.raises(SystemExit, match="augmented already"):
        augmented(out, tmp_path / "twice")
    with pytest.raises(SystemExit, match="lies in --out"):
        augmented(data, data)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    for flags in ((), ("--overwrite",)):
        with pytest.raises(SystemExit, match="mine: holds thesis.txt of another run"):
            augmented(data, tmp_path / "mine", *flags)
    assert ct.tree(tmp_path / "mine") == {"thesis.txt": b"keep"}
    with pytest.raises(SystemExit, match="cannot be read"):
        augmented(tmp_path / "nowhere", tmp_path / "out2")


# ==== Bad input, beside what tests/test_hostile.py tries ====


@pytest.mark.parametrize("error", [RuntimeError, KeyError, ValueError, OSError])
def test_an_internal_bug_still_raises(data, tmp_path, monkeypatch, error):
    def bug(*_, **__):
        raise error("a bug of ours")

    monkeypatch.setattr(stage, "augment", bug)
    with pytest.raises(error, match="a bug of ours"):
        augmented(data, tmp_path / "out")


def test_open_picture_gives_the_pixels_and_refuses_other_sizes(tmp_path):
    path = tmp_path / "x.png"
    noise(40, 28).save(path)
    np.testing.assert_array_equal(np.array(open_picture(path)), np.array(noise(40, 28)))
    for size in [(1, 1), (27, 40), (40, 27), (4097, 28)]:
        noise(*size).save(path)
        with pytest.raises(BadInput, match="each side must be 28 to 4096"):
            open_picture(path)


def test_write_atomic_replaces_whole_files_only(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    write_atomic(path, "old")
    write_atomic(path, b"whole")
    assert ct.tree(tmp_path) == {"new/file.json": b"whole"}  # no temporary file stays

    def full_disk(self, data):
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(BadInput, match="file.json: cannot be written: No space left on device"):
        write_atomic(path, "newer")
    assert path.read_bytes() == b"whole"


def test_an_output_folder_that_cannot_be_made_is_one_line(data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit, match="cannot be written"):
        augmented(data, tmp_path / "file" / "out")


# ==== The command line ====


@pytest.mark.parametrize(
    "flags",
    [
        ["--patch", "0"],
        ["--patch", "1.5"],
        ["--margin", "-1"],
        ["--border", "0.5"],
        ["--workers", "-1"],
        ["--jitter", "1.1"],
        ["--jitter", "nan"],
        ["--jitter", "0.5", "--whole"],
        ["--patch-corner", "left"],
    ],
)
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        stage.main(flags)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


def test_default_folders():
    assert stage.parse_args([]).out == Path("data/ct_rate_vqa_zoom")
    assert stage.parse_args(["--no-patch"]).out == Path("data/ct_rate_vqa_nopatch")
    assert stage.parse_args(["--no-patch", "--out", "x"]).out == Path("x")
    assert stage.parse_args(["--whole"]).out == Path("data/ct_rate_vqa_zoom_whole")
    jitter = stage.parse_args(["--jitter", "0", "--no-patch"])
    assert jitter.out == Path("data/ct_rate_vqa_nopatch_jitter_0")


def test_end_to_end_by_python(folder_by_python):
    flags, process = folder_by_python
    done, out = launch.ended(process), flags[-1]
    assert done.returncode == 0 and str(out) in done.stdout, done.stderr
    assert {record["patch"] for record in read_records(out, "train")} == {20}
    done = launch.run("02_zoom_augment", *flags, "--margin", "1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")


# ==== One picture ====


@pytest.mark.parametrize("flags", ["", "--no-patch", "--patch 0.5 --margin 1 --patch-corner auto"])
def test_one_picture_is_drawn_as_in_the_folder(data, tmp_path, flags):
    out = augmented(data, tmp_path / "out", *flags.split())
    before, after = read_records(data, "train")[5], read_records(out, "train")[5]
    picture = tmp_path / "new" / "zoomed.png"
    one = ["--image", before["image"], "--box", *before["box"], "--out", picture]
    stage.main([*map(str, one), *flags.split()])
    assert picture.read_bytes() == after["image"].read_bytes()
    assert [path.name for path in picture.parent.iterdir()] == ["zoomed.png"]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ("0 0 41 10", "does not lie in the picture"),
        ("5 5 5 9", "does not lie in the picture"),
    ],
)
def test_a_box_beside_the_one_picture_is_one_line(tmp_path, box, words):
    noise(40, 48).save(tmp_path / "slice.png")
    flags = ["--image", str(tmp_path / "slice.png"), "--out", str(tmp_path / "out.png")]
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*$"):
        stage.main([*flags, "--box", *box.split()])
    assert not (tmp_path / "out.png").exists()


def test_one_picture_that_cannot_be_read_or_replaced_is_one_line(tmp_path):
    noise(40, 48).save(tmp_path / "slice.png")
    box = "--box 5 5 20 20".split()
    with pytest.raises(SystemExit, match="none.png: cannot be read"):
        stage.main(["--image", "none.png", *box, "--out", str(tmp_path / "out.png")])
    flags = ["--image", str(tmp_path / "slice.png"), *box, "--out", str(tmp_path / "x.png")]
    (tmp_path / "x.png").write_bytes(b"thesis")
    with pytest.raises(SystemExit, match="x.png: exists"):
        stage.main(flags)
    assert (tmp_path / "x.png").read_bytes() == b"thesis"
    stage.main([*flags, "--overwrite"])
    drawn = open_picture(tmp_path / "x.png")
    expected = stage.augment(noise(40, 48), [5, 5, 20, 20])
    np.testing.assert_array_equal(np.array(drawn), np.array(expected))


@pytest.mark.parametrize(
    "flags",
    [
        "--image x.png --out y.png",
        "--box 1 2 3 4 --out y.png",
        "--image x.png --box 1 2 3 4",
        "--image x.png --box 1 2 3 --out y.png",
        "--image x.png --box -1 2 3 4 --out y.png",
        "--image x.png --box 1 2 3 4 --out y.png --data z",
        "--image x.png --box 1 2 3 4 --out y.png --jitter 0",
        "--image x.png --box 1 2 3 4 --out y.png --whole",
    ],
)
def test_flags_of_one_picture_go_together(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        stage.main(flags.split())
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]
