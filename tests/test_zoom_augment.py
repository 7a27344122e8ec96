"""Stage 02: every pixel of the augmented picture in both arms, awkward boxes, the twin folder, restart, bad input."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from support.files import BadInput, open_picture, read_records, write_atomic
from tests import ct_fixtures as ct

stage = importlib.import_module("02_zoom_augment")
ROOT = Path(__file__).resolve().parents[1]
RED, GREEN = (255, 0, 0), (0, 255, 0)


def noise(width: int = 140, height: int = 140, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8))


def red_outline(size: tuple[int, int], box: list[int], line: int) -> np.ndarray:
    """bool [height, width]: the frame of `line` px around `box`, moved inwards where the picture ends."""
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
    assert at_edge == bool((red & inside).any())  # the line is on the lesion only where the picture ends


@pytest.mark.parametrize("name", BOXES)
def test_every_pixel_with_the_patch(name):
    picture, box = noise(), BOXES[name]
    result = np.array(stage.augment(picture, box, patch=0.4, margin=0.25, border=0.03))
    red = red_outline(picture.size, box, 1)
    side, width = 56, 2  # 0.4 * 140; 0.03 * 56 = 1.7
    crop = picture.crop(stage.crop_square(picture.size, box, 0.25)).convert("RGB")
    expected = np.array(picture.convert("RGB"))
    expected[:side, :side] = GREEN
    expected[width : side - width, width : side - width] = np.array(crop.resize((52, 52), Image.Resampling.BICUBIC))
    expected[red] = RED  # drawn last: the patch never hides it
    np.testing.assert_array_equal(result, expected)


def test_the_patch_shows_the_clean_lesion_enlarged():
    picture = Image.new("L", (140, 140), 10)
    picture.paste(200, (90, 60, 110, 80))  # a 20 px lesion; margin 0.5: a square of 40 px
    result = np.array(stage.augment(picture, [90, 60, 110, 80], patch=0.4, margin=0.5))
    patch = result[2:54, 2:54].astype(int)  # 52 px: 1.3 times as large
    assert (patch[16:36, 16:36] == 200).all()  # the lesion: 13 to 39
    assert (patch[:10] == 10).all() and (patch[:, 42:] == 10).all()  # its surroundings, and no red line
    bright = (patch[26, :, 0] > 105).sum()
    assert bright == 26


@pytest.mark.parametrize(("side", "patch", "line"), [(140, 56, 1), (512, 205, 2), (768, 307, 3)])
def test_sizes_grow_with_the_slice(side, patch, line):
    result = np.array(stage.augment(noise(side, side), [300 * side // 768, side // 2, side // 2, 400 * side // 512]))
    green = (result == GREEN).all(axis=-1)
    assert np.argwhere(green).max(axis=0).tolist() == [patch - 1, patch - 1] and green[0, :patch].all()
    column = (result[:, side // 2 - 5] == RED).all(axis=-1)
    assert column.sum() == 2 * line


def test_crop_square_by_hand():
    assert stage.crop_square((140, 140), [60, 60, 80, 70], 0.25) == (55, 50, 85, 80)  # 20 * 1.5 = 30 around (70, 65)
    assert stage.crop_square((140, 140), [0, 60, 20, 70], 0.25) == (0, 50, 30, 80)  # shifted inside
    assert stage.crop_square((140, 140), [130, 135, 140, 140], 0.5) == (120, 120, 140, 140)
    assert stage.crop_square((140, 140), [20, 20, 130, 120], 0.25) == (0, 0, 140, 140)  # gives up margin to fit
    assert stage.crop_square((200, 100), [20, 30, 170, 60], 0.25) == (20, -25, 170, 125)  # black above and below
    assert stage.crop_square((140, 140), [70, 70, 71, 71], 0) == (70, 70, 71, 71)


def test_a_box_longer_than_the_shorter_side_gets_black_bars():
    picture = Image.new("L", (200, 100), 90)
    patch = np.array(stage.zoom_patch(picture, [20, 30, 170, 60], 60, 0.25, 0.05))[3:57, 3:57]  # 150 px in 54
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


@pytest.mark.parametrize("box", [[0, 0, 0, 5], [5, 5, 4, 9], [-1, 0, 5, 5], [0, 0, 141, 5], [0, 0, 5, 141]])
def test_a_box_that_is_not_in_the_picture_is_refused(box):
    with pytest.raises(BadInput, match="does not lie in the picture"):
        stage.augment(noise(), box)


def test_a_patch_too_small_to_see_is_refused():
    with pytest.raises(BadInput, match="raise --patch"):
        stage.augment(noise(), [60, 60, 70, 70], patch=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """01's folder of three small volumes; slices 4 and 5 of each carry two findings."""
    root = tmp_path_factory.mktemp("zoom")
    lesions = [ct.block((3, 6), [25, 6, 33, 12]), ct.block((4, 7), [0, 30, 12, 48])]
    names = [f"train_{n}_a_1.nii.gz" for n in (1, 2, 3)]
    entries = [ct.add_case(root, name, lesions, ("2b", "2e"), ct.chest(i)) for i, name in enumerate(names)]
    importlib.import_module("01_make_dataset").main([*ct.write_index(root, entries), "--out", str(root / "data")])
    return root / "data"


def augmented(data: Path, out: Path, *flags: str) -> Path:
    stage.main(["--data", str(data), "--out", str(out), "--workers", "1", *flags])
    return out


@pytest.mark.parametrize("flags", [(), ("--no-patch",)])
def test_the_twin_folder(data, tmp_path, flags):
    out = augmented(data, tmp_path / "out", *flags)
    for split in ("train", "test"):
        old, new = ct.read_lines(data, split), ct.read_lines(out, split)
        assert len(old) == len(new) == {"train": 12, "test": 6}[split]
        for before, after in zip(old, new, strict=True):
            assert after == {**before, "file_name": f"images/{before['id']}.png", "patch": 0 if flags else 16}
            with Image.open(out / split / after["file_name"]) as picture:
                assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (ct.WIDTH, ct.HEIGHT))
                clean = Image.open(data / split / before["file_name"])
                expected = stage.augment(clean, before["box"], 0 if flags else 0.4)
                np.testing.assert_array_equal(np.array(picture), np.array(expected))
        assert {record["image"].name for record in read_records(out, split)} == {
            path.name for path in (out / split / "images").iterdir()
        }
    info = json.loads((out / "dataset_info.json").read_text())
    before = json.loads((data / "dataset_info.json").read_text())
    assert info == {**before, "stage": "02", "zoom": {"patch": 0 if flags else 0.4, "margin": 0.25, "border": 0.03}}
    with Image.open(out / "overview.png") as overview:
        assert overview.size == (1600, 500)


def test_two_findings_on_one_slice_are_two_pictures(data, tmp_path):
    out = augmented(data, tmp_path / "out", "--no-patch")
    pictures = {}
    for record in (record for split in ("train", "test") for record in read_records(out, split)):
        pictures.setdefault((record["volume"], record["slice"]), []).append(record["image"].read_bytes())
    assert sorted(map(len, pictures.values())) == [1] * 6 + [2] * 6
    assert all(len(set(own)) == len(own) for own in pictures.values())


def test_two_workers_an_interruption_and_a_second_run_change_no_byte(data, tmp_path, monkeypatch):
    whole = ct.tree(augmented(data, tmp_path / "whole"))
    monkeypatch.setattr(stage, "CHUNK", 4)
    assert ct.tree(augmented(data, tmp_path / "two", "--workers", "2")) == whole

    real, out = stage.write_atomic, tmp_path / "out"
    for stop_after in (0, 3, 10, 18, 19, 20):
        count = 0

        def interrupted(path, content, stop_after=stop_after):
            nonlocal count
            count += 1
            if count > stop_after:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(path.name + ".tmp").write_bytes(b"half a")
                raise KeyboardInterrupt
            real(path, content)

        monkeypatch.setattr(stage, "write_atomic", interrupted)
        with pytest.raises(SystemExit) as stop:
            augmented(data, out / str(stop_after))
        assert stop.value.code == 130
        monkeypatch.setattr(stage, "write_atomic", real)
        images = {path: path.stat().st_mtime_ns for path in (out / str(stop_after)).rglob("*.png")}
        assert len(images) == min(stop_after, 18)
        assert ct.tree(augmented(data, out / str(stop_after))) == whole
        assert images == {path: path.stat().st_mtime_ns for path in images}


@pytest.mark.parametrize("workers", ct.STOPS)
def test_stopped_again_and_again_by_signals(data, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(stage, "draw_overview", lambda *_: b"figure")
    whole = ct.tree(augmented(data, tmp_path / "whole"))
    out, done = tmp_path / "out", {}
    flags = ["--data", str(data), "--out", str(out), "--workers", workers]
    for stop in ct.STOPS[workers]:
        ct.stopped("02_zoom_augment", *stop, flags)
        assert not (out / "dataset_info.json").exists()  # it was stopped before its end
        assert done == {path: path.stat().st_mtime_ns for path in done}  # nothing was done twice
        done = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert 0 < len(done) <= 18
    stage.main(flags)
    assert ct.tree(out) == whole
    assert done == {path: path.stat().st_mtime_ns for path in done}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line(data, tmp_path, workers):
    # The system's own refusal: no file may be longer than 1 KiB, pictures have more.
    out = tmp_path / "out"
    command = [sys.executable, "02_zoom_augment.py", "--data", str(data), "--out", str(out), "--workers", workers]
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", *command]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].endswith("cannot be written: File too large")
    assert not list(out.rglob("*.png"))


def test_overwrite_replaces_what_the_scripts_write_and_nothing_else(data, tmp_path):
    whole, out = ct.tree(augmented(data, tmp_path / "whole")), augmented(data, tmp_path / "out", "--no-patch")
    (out / "thesis.txt").write_text("keep")
    assert ct.tree(augmented(data, out, "--overwrite")) == {**whole, "thesis.txt": b"keep"}
    for around in (data, data.parent):
        with pytest.raises(SystemExit, match="not around it"):
            augmented(data, around, "--overwrite")


def test_other_settings_other_data_and_strange_folders_are_refused(data, tmp_path):
    out = augmented(data, tmp_path / "out")
    for flags, words in [(("--margin", "0.5"), "margin"), (("--no-patch",), "patch"), (("--border", "0.1"), "border")]:
        with pytest.raises(SystemExit, match=f"other settings.*{words}"):
            augmented(data, out, *flags)
    with pytest.raises(SystemExit, match="augmented already"):
        augmented(out, tmp_path / "twice")
    with pytest.raises(SystemExit, match="another folder"):
        augmented(data, data)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(SystemExit, match="not made by"):
        augmented(data, tmp_path / "mine")
    with pytest.raises(SystemExit, match="cannot be read"):
        augmented(tmp_path / "nowhere", tmp_path / "out2")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input, beside what tests/test_hostile.py tries


@pytest.mark.parametrize("error", [RuntimeError, KeyError, ValueError, OSError])
def test_an_internal_bug_still_raises(data, tmp_path, monkeypatch, error):
    def bug(*_):
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


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "flags", [["--patch", "0"], ["--patch", "1.5"], ["--margin", "-1"], ["--border", "0.5"], ["--workers", "-1"]]
)
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        stage.main(flags)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


def test_default_folders():
    folders = [stage.parse_arguments(flags).out for flags in ([], ["--no-patch"], ["--no-patch", "--out", "x"])]
    assert folders == [Path("data/ct_rate_vqa_zoom"), Path("data/ct_rate_vqa_nopatch"), Path("x")]


def test_end_to_end_as_a_subprocess(data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "02_zoom_augment.py", "--patch", "0.5", "--data", str(data), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and str(out) in done.stdout, done.stderr
    assert {record["patch"] for record in read_records(out, "train")} == {20}
    done = subprocess.run([*command, "--margin", "1"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.startswith("error: ")
