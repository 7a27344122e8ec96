"""Stage 01 on hand-made NIfTI files: geometry, boxes, slices, split, folder, restart, bad input."""

import errno
import gzip
import importlib
import json
import multiprocessing
import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from rewards import CLASSES, QUESTION, predicted_class
from support import files, records
from support.files import BadInput, write_atomic
from support.records import read_records
from support.rexgroundingct import Case, check_entry, finding_axis
from support.stage import parallel
from tests import ct_fixtures as ct
from tests import launch

launch.server()
stage = importlib.import_module("01_make_dataset")
BOX = [25, 6, 33, 12]  # the fixtures' lesion, on slices 3, 4, 5
DRAW = stage.draw_overview


@pytest.fixture(scope="module", autouse=True)
def no_overview():
    """Leaves out the figure, which takes most of a small run's time; test_overview makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "draw_overview", lambda out, records: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def phantoms_by_python(tmp_path_factory):
    """Starts a small demo; meanwhile tests in this process run."""
    out = tmp_path_factory.mktemp("python") / "data" / "ct_rate_vqa"
    flags = "--phantoms 6 --seed 5 --workers 2 --out".split()
    return out, launch.start_python("01_make_dataset", *flags, out)


def build(flags: list[str], out: Path, *more: str) -> tuple[dict, list[dict]]:
    """Runs 01 in this process; returns dataset_info.json and the records of both splits."""
    stage.main([*flags, "--out", str(out), *more])
    records = ct.read_lines(out, "train") + ct.read_lines(out, "test")
    return json.loads((out / "dataset_info.json").read_text()), records


def picture_of(out: Path, record: dict) -> np.ndarray:
    (path,) = out.glob(f"*/{record['file_name']}")
    return np.array(Image.open(path))


def built_from(root: Path, *entries: dict, flags: tuple = ()) -> list[dict]:
    """The records of 01's folder root / "out", made from these cases."""
    return build(ct.write_index(root, entries), root / "out", *flags)[1]


def files_of(out: Path) -> list[Path]:
    """The files that mark finished volumes."""
    return sorted((out / ".work").glob("[tv]*_*.json"))


# ==== Geometry ====


@pytest.mark.parametrize("layout", ["first", "last", "3d"])
@pytest.mark.parametrize("axes", ["LPS", "RAS", "LAS", "SLP", "PIR", "ARI"])
def test_a_lesion_lands_in_its_box_whatever_the_files_axes(tmp_path, axes, layout):
    picture = ct.chest(3)
    entry = ct.add_case(tmp_path, picture=picture, axes=axes, layout=layout)
    records = built_from(tmp_path, entry, flags=ct.IDENTITY_WINDOW)
    assert [record["slice"] for record in records] == [3, 4, 5]
    for record in records:
        assert record["box"] == BOX and record["boxes"] == [BOX]
        written = picture_of(tmp_path / "out", record)
        np.testing.assert_array_equal(written, picture[record["slice"]])


def test_world_coordinates_decide_left_right_front_and_top(tmp_path):
    # One bright voxel, placed by its position in mm: to the patient's right (+x), to the back
    # (-y), high (+z).
    affine = np.array([[0, -1.0, 0, 20], [-1.0, 0, 0, 30], [0, 0, 2.0, -100], [0, 0, 0, 1]])
    shape = (48, 40, 12)
    i, j, k = np.round(np.linalg.inv(affine) @ [15, -10, -84, 1])[:3].astype(int)
    voxels, mask = np.zeros(shape, np.int16), np.zeros((1, *shape), np.uint8)
    voxels[i, j, k], mask[0, i - 2 : i + 3, j - 2 : j + 3, k] = 255, 1
    name = "train_5_a_1.nii.gz"
    ct.write_gz(ct.ct_path(tmp_path, name), ct.nifti(voxels, affine))
    ct.write_gz(ct.mask_path(tmp_path, name), ct.nifti(mask))
    entry = {"name": name, "findings": {"0": "x"}, "shape": list(shape), "categories": {"0": "2d"}}
    (record,) = built_from(tmp_path, entry, flags=ct.IDENTITY_WINDOW)
    # x from 20 down to -19: column 20 - 15; y from 30 down to -17: row 30 + 10; z from -100 in
    # steps of 2: slice 8
    assert record["slice"] == 8 and record["box"] == [3, 38, 8, 43]
    assert np.argwhere(picture_of(tmp_path / "out", record) == 255).tolist() == [[40, 5]]


def test_an_oblique_affine_counts_as_its_nearest_axes(tmp_path):
    angle = np.deg2rad(12)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    affine = ct.affine_for("RAS")
    affine[:3, :3] = turn @ affine[:3, :3]
    entry = ct.add_case(tmp_path, axes="RAS", affine=affine)
    records = built_from(tmp_path, entry, flags=ct.IDENTITY_WINDOW)
    assert {tuple(r["box"]) for r in records} == {tuple(BOX)}
    np.testing.assert_array_equal(picture_of(tmp_path / "out", records[0]), ct.chest()[3])


def case_of(shape: tuple, findings: int) -> Case:
    keys = tuple(map(str, range(findings)))
    return Case("train_1_a_1.nii.gz", shape, keys, ("x",) * findings, ("2b",) * findings)


def test_the_finding_axis_is_found_by_the_jsons_shape_only():
    as_many_as_slices = case_of((40, 48, 12), 12)
    assert finding_axis((12, 40, 48, 12), as_many_as_slices) == 0
    assert finding_axis((40, 48, 12, 12), as_many_as_slices) == 3
    assert finding_axis((5, 5, 5, 5), case_of((5, 5, 5), 5)) == 0  # both fit: the documented place
    assert finding_axis((40, 48, 12), case_of((40, 48, 12), 1)) is None
    wrong_shapes = [(40, 48, 12), (12, 48, 40, 2), (3, 40, 48, 12), (2, 40, 48, 12, 1)]
    for wrong in [*wrong_shapes, (48, 40, 12, 2)]:
        with pytest.raises(BadInput, match="shape"):
            finding_axis(wrong, case_of((40, 48, 12), 2))


@pytest.mark.parametrize("layout", ["first", "last"])
def test_each_finding_keeps_its_own_channel_text_and_class(tmp_path, layout):
    places = {1: [2, 2, 8, 8], 7: [20, 20, 30, 30], 9: [0, 40, 9, 48]}
    lesions = [ct.block((k, k + 1), box) * k for k, box in places.items()]
    entry = ct.add_case(tmp_path, lesions=lesions, categories=("2e", "1c", "2d"), layout=layout)
    # The order in the JSON is no matter.
    entry["findings"] = {key: entry["findings"][key] for key in ("2", "0", "1")}
    records = built_from(tmp_path, entry)
    expected = [
        {"finding": 0, "slice": 1, "category": "2e", "label": "Pleural effusion/thickening"},
        {"finding": 1, "slice": 7, "category": "1c", "label": "Emphysema"},
        {"finding": 2, "slice": 9, "category": "2d", "label": "Pulmonary nodules/masses"},
    ]
    for record, wanted in zip(records, expected, strict=True):
        assert wanted.items() <= record.items() and record["box"] == places[record["slice"]]
        assert record["text"] == f"Finding {record['finding']} of train_1_a_1.nii.gz."


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "u4", "i8", "f4", "f8"])
def test_any_number_type_of_mask_and_ct(tmp_path, dtype):
    lesion, picture = (ct.block((3, 6), BOX) * 7).astype(dtype), ct.chest().astype(dtype)
    entry = ct.add_case(tmp_path, lesions=[lesion], picture=picture)
    if dtype == ">i2":  # the voxels are big-endian: let the header be so too
        for path in (ct.ct_path(tmp_path, entry["name"]), ct.mask_path(tmp_path, entry["name"])):
            data = gzip.decompress(path.read_bytes())
            header = ct.Nifti1Header(data[:348]).as_byteswapped(">")
            ct.write_gz(path, header.binaryblock + data[348:])
    records = built_from(tmp_path, entry, flags=ct.IDENTITY_WINDOW)
    assert [r["box"] for r in records] == [BOX] * 3
    np.testing.assert_array_equal(picture_of(tmp_path / "out", records[0]), ct.chest()[3])


# ==== Gray values ====


def test_window_against_numbers_worked_by_hand():
    # -600 / 1500: 0 at -1350, 255 at 150; -1000 is 350/1500*255 = 59.5, 40 is 1390/1500*255 =
    # 236.3
    hu = np.array([-3000, -1350, -1000, -600, 40, 150, 3000])
    assert stage.apply_window(hu, (-600, 1500)).tolist() == [0, 0, 60, 128, 236, 255, 255]
    assert stage.apply_window(np.array([-110, 40, 190]), (40, 300)).tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("slope", "inter", "stored"), [(1, -1024, 1064), (2, -1000, 520), (0, 0, 40), (np.nan, 0, 40)]
)
def test_slope_and_intercept_give_hu(tmp_path, slope, inter, stored):
    picture = np.full((ct.DEPTH, ct.HEIGHT, ct.WIDTH), stored, np.int16)
    entry = ct.add_case(tmp_path, picture=picture, scl_slope=slope, scl_inter=inter)
    records = built_from(tmp_path, entry)
    assert set(picture_of(tmp_path / "out", records[0]).flat) == {236}  # 40 HU in every case


# ==== Boxes, slices, cap ====


def test_boxes_are_8_connected_components_larger_than_the_limit_and_sorted():
    lesion = np.zeros((40, 60), bool)
    lesion[2:6, 3:9] = True  # 6 x 4 = 24: not larger than 24
    lesion[10:15, 20:25] = True  # 25
    diagonal = range(20, 26), range(30, 36)  # six pixels, one component, its box has 36
    lesion[diagonal] = True
    lesion[30:35, 2:7] = True  # 25, but further to the left
    assert stage.find_boxes(lesion, 24) == [[30, 20, 36, 26], [2, 30, 7, 35], [20, 10, 25, 15]]
    assert stage.find_boxes(lesion, 25) == [[30, 20, 36, 26]]
    assert stage.find_boxes(np.zeros((4, 4), bool), 0) == []


@pytest.mark.parametrize(
    ("side", "at_limit", "above"), [(512, (26, 50), (3, 434)), (768, (45, 65), (46, 65))]
)
def test_the_papers_1300_pixels_are_exact_and_scale_with_the_image(side, at_limit, above):
    lesions = np.zeros((2, side, side, 1), bool)  # 1300 * (768 / 512)**2 = 2925 = 45 * 65
    lesions[0, : at_limit[0], : at_limit[1]] = True
    lesions[1, : above[0], : above[1]] = True
    (boxes,), _ = stage.boxes_by_slice(enumerate(lesions), 1, 1300 / 512**2)
    assert boxes == {1: [[0, 0, above[1], above[0]]]}


def test_several_components_make_one_record_with_the_largest_as_its_box(tmp_path):
    small, large = [2, 2, 8, 8], [20, 10, 32, 30]
    lesion = ct.block((4, 5), small) + 2 * ct.block((4, 5), large)
    lesion += ct.block((4, 5), [0, 40, 2, 42])
    entry = ct.add_case(tmp_path, lesions=[lesion])
    (record,) = built_from(tmp_path, entry)
    assert record["box"] == large and record["boxes"] == [large, small]


def test_evenly_spaced():
    assert stage.evenly_spaced(list(range(9)), 3) == [1, 4, 7]
    assert stage.evenly_spaced(list(range(10)), 1) == [5]
    assert stage.evenly_spaced([3, 5], 2) == [3, 5] and stage.evenly_spaced([3], 20) == [3]
    for count in range(1, 60):
        gaps = np.diff(stage.evenly_spaced(list(range(60)), count))
        assert len(gaps) == count - 1
        if count > 1:
            assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("cap", ["finding", "volume"])
def test_cap(tmp_path, cap):
    shape = (70, 40, 40)  # finding 0 on 60 slices, finding 1 on 10 of them and on 10 others
    lesions = [ct.block((0, 60), [1, 1, 9, 9], shape), ct.block((50, 70), [20, 20, 30, 30], shape)]
    both = {"lesions": lesions, "categories": ("2b", "2c")}
    entry = ct.add_case(tmp_path, **both, picture=ct.chest(0, shape))
    info, records = build(ct.write_index(tmp_path, [entry]), tmp_path / "out", "--cap", cap)
    first = [record["slice"] for record in records if record["finding"] == 0]
    second = [record["slice"] for record in records if record["finding"] == 1]
    chosen = sorted({*first, *second})
    if cap == "finding":
        assert first == list(range(1, 60, 3)) and second == list(range(50, 70))
    else:  # 20 of the 70 slices, each with every finding that is on it
        assert len(chosen) == 20 and set(np.diff(chosen)) == {3, 4}
        assert first == [k for k in chosen if k < 60]
        assert second == [k for k in chosen if k >= 50]
    pngs = list((tmp_path / "out").rglob("images/*.png"))
    assert len(pngs) == len(chosen) == sum(info["slices"].values())


def test_small_and_left_out_findings_are_counted_and_are_not_errors(tmp_path):
    lesions = [ct.block((3, 6), BOX), ct.block((3, 6), [1, 1, 4, 4]), ct.block((8, 9), BOX)]
    entry = ct.add_case(tmp_path, lesions=lesions, categories=("2b", "2c", "2g"))
    info, records = build(ct.write_index(tmp_path, [entry]), tmp_path / "out", "--strict")
    assert [record["slice"] for record in records] == [3, 4, 5]
    assert {record["finding"] for record in records} == {0}
    assert (info["too_small"], info["left_out"], info["skipped"]) == (1, {"2g": 1}, [])


def test_a_slice_lists_the_boxes_of_all_its_findings_also_without_a_class(tmp_path):
    other, small = [2, 2, 10, 9], [1, 12, 4, 15]
    lesions = [ct.block((3, 6), BOX), ct.block((4, 9), other), ct.block((3, 6), small)]
    entry = ct.add_case(tmp_path, lesions=lesions, categories=("2b", "2g", "2c"))
    _, records = build(ct.write_index(tmp_path, [entry]), tmp_path / "out")
    found = {record["slice"]: record["slice_boxes"] for record in records}
    assert found == {3: [BOX], 4: [BOX, other], 5: [BOX, other]}


def test_another_index_is_for_testing_alone(tmp_path, capsys):
    """Of its val every patient, however many, that dataset.json lacks; its train not at all."""
    entries = [ct.add_case(tmp_path, f"valid_{i}_a_1.nii.gz") for i in (1, 2, 3)]
    known = ct.add_case(tmp_path, "valid_4_a_1.nii.gz")
    again = ct.add_case(tmp_path, "valid_4_b_2.nii.gz")  # the same patient, another scan
    partly = ct.add_case(tmp_path, "train_5_a_1.nii.gz")
    ct.write_index(tmp_path, [partly], [*entries, known, again])
    rex = tmp_path / "rex"
    (rex / "dataset.json").rename(rex / "challenge.json")
    flags = ct.write_index(tmp_path, [known])
    info, records = build(flags, tmp_path / "out", "--index", str(rex / "challenge.json"))
    assert info["records"] == {"train": 0, "test": len(records)} and len(records) >= 3
    assert info["settings"]["index"] == "challenge.json"
    assert {record["patient"] for record in records} == {"valid_1", "valid_2", "valid_3"}
    assert "2 of 5 volumes left out, whose patients are in dataset.json" in capsys.readouterr().err
    stage.main([*flags, "--list-ct", "--index", str(rex / "challenge.json")])
    assert len(capsys.readouterr().out.split("dataset/valid_fixed")) == 4
    with pytest.raises(SystemExit):
        stage.main(["--index", "challenge.json"])
    assert "need --rexgroundingct" in capsys.readouterr().err


def test_the_fourteen_categories():
    assert len(stage.CLASS_OF) == 14
    assert set(stage.CLASS_OF.values()) - {None} == set(CLASSES)
    assert [code for code, label in stage.CLASS_OF.items() if label is None] == ["1f", "2g", "2h"]


# ==== The split and the folder ====


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, list[str]]:
    """Ten people, four of them scanned twice, one number in both of CT-RATE's halves."""
    root = tmp_path_factory.mktemp("many")
    names = [f"train_{n}_a_1.nii.gz" for n in range(1, 9)]
    names += [f"train_{n}_b_2.nii.gz" for n in (1, 3, 5)]
    names += ["train_1841_a_1.nii.gz", "train_1841_a_2.nii.gz"]
    entries = [ct.add_case(root, name, picture=ct.chest(i)) for i, name in enumerate(names)]
    two = ("2c", "1c")
    val = ct.add_case(root, "valid_1841_a_1.nii.gz", categories=two, flat=True)  # a flat folder
    test = {"name": "valid_77_a_1.nii.gz", "findings": {"0": "Has no mask."}}
    return root, ct.write_index(root, entries, [val], [test])


def test_patients_are_never_in_both_splits(many, tmp_path):
    info, records = build(many[1], tmp_path / "out")
    train = {record["patient"] for record in ct.read_lines(tmp_path / "out", "train")}
    test = {record["patient"] for record in ct.read_lines(tmp_path / "out", "test")}
    assert not train & test and (len(train), len(test)) == (8, 2)  # 10 people, a fifth
    people = {f"train_{n}" for n in range(1, 9)}
    assert train | test == people | {"train_1841", "valid_1841"}
    volumes = {record["volume"] for record in records if record["patient"] == "train_1841"}
    assert volumes == {"train_1841_a_1", "train_1841_a_2"}
    assert info["patients"] == {"train": 8, "test": 2} and sum(info["volumes"].values()) == 14
    assert info["stage"] == "01" and info["phantoms"] is False


def test_split_patients():
    people = {f"train_{n}" for n in range(100)}
    split = stage.split_patients(people, 0.2, seed=0)
    assert sorted(split.values()).count("test") == 20 and set(split) == people
    ten = stage.split_patients({f"train_{n}" for n in range(10)}, 0.3, seed=0)
    test = [patient for patient in sorted(ten) if ten[patient] == "test"]
    assert test == ["train_1", "train_7", "train_8"]  # in every process and version
    assert split == stage.split_patients(people, 0.2, seed=0)
    assert split != stage.split_patients(people, 0.2, seed=1)
    two = stage.split_patients({"train_1841", "valid_1841"}, 0.2, 0)
    assert sorted(two.values()) == ["test", "train"]
    assert set(stage.split_patients(people, 0, 0).values()) == {"train"}


def test_what_an_imagefolder_reader_sees(many, tmp_path):
    info, _ = build(many[1], tmp_path / "out")
    keys = "file_name id volume patient slice finding box boxes slice_boxes category label text"
    keys += " question answer"
    seen = set()
    for split in ("train", "test"):
        records = ct.read_lines(tmp_path / "out", split)
        for record in records:
            assert list(record) == keys.split()
            with Image.open(tmp_path / "out" / split / record["file_name"]) as picture:
                assert (picture.format, picture.mode) == ("PNG", "L")
                assert picture.size == (ct.WIDTH, ct.HEIGHT)
            assert record["question"] == QUESTION
            assert predicted_class(record["answer"]) == record["label"]
            assert record["box"] == record["boxes"][0]
        named = {Path(record["file_name"]).name for record in records}
        assert named == {path.name for path in (tmp_path / "out" / split / "images").iterdir()}
        assert info["records"][split] == len(records) == sum(info["classes"][split].values())
        assert len(read_records(tmp_path / "out", split)) == len(records)  # what 02 to 05 read
        seen |= {record["id"] for record in records}
    assert len(seen) == sum(info["records"].values()) == 13 * 3 + 2 * 3


def test_overview(many, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "draw_overview", DRAW)
    build(many[1], tmp_path / "out")
    path = tmp_path / "out" / "overview.png"
    with Image.open(path) as overview:
        assert overview.size == (1400, 860)
        pixels = np.array(overview.convert("RGB"), int)
    red, green, blue = pixels[:600].transpose(2, 0, 1)
    boxes = (red - green > 60) & (red - blue > 60)  # blended at their edges
    assert boxes.sum() > 100
    first = path.read_bytes()
    build(many[1], tmp_path / "out")
    assert path.read_bytes() == first


# ==== Restart ====


@pytest.fixture(scope="module")
def finished(many, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("finished") / "out"
    build(many[1], out)
    return ct.tree(out)


def test_two_workers_write_the_same_bytes(many, finished, tmp_path):
    handles = []
    for name in ("one", "two"):
        stage.main([*many[1], "--out", str(tmp_path / name), "--workers", "2"])
        assert ct.tree(tmp_path / name) == finished
        handles.append(len(os.listdir("/dev/fd")))
    assert handles[0] == handles[1] and not multiprocessing.active_children()  # nothing leaks


@pytest.mark.parametrize("writes", [0, 1, 2, 7, 30, 56, 57, 59])
def test_interrupted_anywhere_and_started_again(
    many, finished, tmp_path, monkeypatch, capsys, writes
):
    out = tmp_path / "out"

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        torn = ct.torn_write(writes, interrupt)
        for module in (stage, files, records):
            patch.setattr(module, "write_atomic", torn)
        with pytest.raises(SystemExit) as stop:
            build(many[1], out)
    assert stop.value.code == 130 and "goes on from here" in capsys.readouterr().err
    before = ct.times(files_of(out))
    build(many[1], out)
    assert ct.tree(out) == finished
    # The settings come first, then three pictures and a record file per volume.
    assert len(before) == min(max(writes - 1, 0) // 4, 14)
    assert before == ct.times(before)  # nothing was done twice


@pytest.mark.parametrize("workers", ct.STOPS)
def test_stopped_again_and_again_by_signals(many, finished, tmp_path, workers):
    out, done = tmp_path / "out", {}
    flags = [*many[1], "--out", str(out), "--workers", workers]
    for stop in ct.STOPS[workers]:
        ct.run_stopped("01_make_dataset", stop, flags)
        assert not (out / "dataset_info.json").exists()  # it was stopped before its end
        assert done == ct.times(done)  # nothing was done twice
        done = ct.times(files_of(out))
    assert 0 < len(done) < 14
    stage.main(flags)
    assert ct.tree(out) == finished
    assert done == ct.times(done)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO]
)
def test_a_disk_that_takes_no_more_is_one_line_and_can_be_mended(
    many, finished, tmp_path, monkeypatch, number
):
    real, left = Path.write_bytes, 9

    def write_bytes(path, data):
        nonlocal left
        left -= 1
        if left < 0:
            real(path, data[:5])
            raise OSError(number, os.strerror(number))
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(SystemExit) as stop:
            build(many[1], tmp_path / "out")
    message = str(stop.value.code)
    assert message.startswith(f"error: {tmp_path / 'out'}")
    assert message.endswith(os.strerror(number))
    build(many[1], tmp_path / "out")
    assert ct.tree(tmp_path / "out") == finished


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_file_that_may_not_grow_is_one_line(many, tmp_path, workers):
    # The system's own refusal, in a worker process, too: no file may be longer than 1000 bytes,
    # pictures have 2000.
    flags = [*many[1], "--out", tmp_path / "out", "--workers", workers]
    done = launch.run("01_make_dataset", *flags, limits={"RLIMIT_FSIZE": 1000})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].endswith("cannot be written: File too large")
    assert not list((tmp_path / "out").rglob("[!.]*.png"))


def test_a_folder_that_cannot_be_written_is_one_line(many, tmp_path, monkeypatch):
    def mkdir(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(SystemExit, match="cannot be written: Read-only file system"):
        build(many[1], tmp_path / "out")


def test_a_finished_folder_is_not_redone(many, finished, tmp_path, monkeypatch):
    build(many[1], tmp_path / "out")
    monkeypatch.setattr(stage, "build_volume", None)  # calling it would raise
    build(many[1], tmp_path / "out")
    assert ct.tree(tmp_path / "out") == finished


def test_a_lost_part_is_made_again_and_strays_go(many, finished, tmp_path):
    out = tmp_path / "out"
    build(many[1], out)
    shutil.rmtree(out / "test")
    shutil.rmtree(out / "train" / "images")
    build(many[1], out)
    assert ct.tree(out) == finished
    for path in (out / ".work").glob("*_a_1.json"):
        path.unlink()
    (out / "train" / "images" / ".tmp.train_1_a_1_s0003.png").write_bytes(b"")
    build(many[1], out)
    assert ct.tree(out) == finished


def test_other_settings_or_a_strange_folder_are_refused(many, tmp_path):
    build(many[1], tmp_path / "out")
    with pytest.raises(SystemExit, match="other settings.*--max-slices was 20 and is 3"):
        build(many[1], tmp_path / "out", "--max-slices", "3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    for flags in ((), ("--overwrite",)):
        with pytest.raises(SystemExit, match="mine: holds thesis.txt of another run"):
            build(many[1], tmp_path / "mine", *flags)
    assert ct.tree(tmp_path / "mine") == {"thesis.txt": b"keep"}
    (tmp_path / "file").write_text("no folder")
    for flags in ((), ("--overwrite",)):
        with pytest.raises(SystemExit, match="error: .*file"):
            build(many[1], tmp_path / "file", *flags)
        with pytest.raises(SystemExit, match="lies in --out"):
            build(many[1], many[0], *flags)


def test_overwrite_replaces_what_the_scripts_write_and_nothing_else(many, finished, tmp_path):
    out = tmp_path / "out"
    build(many[1], out, "--max-slices", "1", "--window", "0", "100")
    (out / "thesis.txt").write_text("keep")
    (out / "train" / "notes.txt").write_text("keep")
    build(many[1], out, "--overwrite")
    assert ct.tree(out) == {**finished, "thesis.txt": b"keep", "train/notes.txt": b"keep"}
    before = ct.times(out.rglob("*.png"))
    build(many[1], out, "--overwrite")  # the same settings: it goes on
    assert before == ct.times(before)


# ==== Bad input, beside what tests/test_hostile.py tries ====


def check_skip(root: Path, entries: list, words: str, capsys) -> None:
    """The bad entry is one counted line, the good one goes on; --strict ends in one line."""
    flags = ct.write_index(root, entries)
    info, records = build(flags, root / "out")
    assert len(info["skipped"]) == 1 and words in info["skipped"][0]["reason"], info["skipped"]
    assert {r["volume"] for r in records} == {"train_1_a_1"} and len(records) == 3
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith("skipped: ")]
    assert len(lines) == 1 and words in lines[0]
    with pytest.raises(SystemExit) as stop:
        build(flags, root / "strict", "--strict")
    message = str(stop.value.code)
    assert message.startswith("error: ") and words in message and "\n" not in message
    names = {path.name for path in root.iterdir()}
    assert names == {"rex", "ct_rate", "out", "strict"}  # nothing lands elsewhere


def test_duplicates_and_entries_of_another_type(tmp_path, capsys):
    good = ct.add_case(tmp_path)
    check_skip(tmp_path, [good, {**good, "findings": {"0": "another text"}}], "duplicate", capsys)
    for n, strange in enumerate([None, 5, "text", [good]]):
        root = tmp_path / str(n)
        root.mkdir()
        check_skip(root, [ct.add_case(root), strange], "not a JSON object", capsys)


def test_one_bad_finding_leaves_the_volumes_others(tmp_path):
    slices = [(3, 6), (0, 0), (8, 9), (8, 9)]
    lesions = [ct.block(part, BOX) for part in slices]
    entry = ct.add_case(tmp_path, lesions=lesions, categories=("2b", "2c", "9z", "2d"))
    info, records = build(ct.write_index(tmp_path, [entry]), tmp_path / "out")
    assert [fault["finding"] for fault in info["skipped"]] == ["1", "2"]
    assert {fault["volume"] for fault in info["skipped"]} == {"train_1_a_1"}
    assert [(r["slice"], r["finding"]) for r in records] == [(3, 0), (4, 0), (5, 0), (8, 3)]


def test_a_mended_volume_is_taken_up_by_the_next_run(tmp_path):
    good, late = ct.add_case(tmp_path), ct.add_case(tmp_path, "train_2_a_1.nii.gz")
    path, away = ct.ct_path(tmp_path, late["name"]), tmp_path / "away"
    path.rename(away)
    flags = ct.write_index(tmp_path, [good, late])
    info, records = build(flags, tmp_path / "out")
    assert len(info["skipped"]) == 1 and len(records) == 3
    away.rename(path)
    build(flags, tmp_path / "out")
    build(flags, tmp_path / "whole")
    assert ct.tree(tmp_path / "out") == ct.tree(tmp_path / "whole")


def test_no_folder_no_json_no_record(tmp_path):
    flags = ct.write_index(tmp_path, [])
    with pytest.raises(SystemExit, match="no usable record"):
        build(flags, tmp_path / "out")
    (tmp_path / "rex" / "dataset.json").unlink()
    with pytest.raises(SystemExit, match="cannot be read"):
        build(flags, tmp_path / "out2")
    nowhere = ["--rexgroundingct", str(tmp_path / "nowhere"), "--ct-rate", str(tmp_path)]
    with pytest.raises(SystemExit, match="nowhere/dataset.json: cannot be read"):
        stage.main([*nowhere, "--out", "never_made"])
    flags = [*ct.write_index(tmp_path, []), "--ct-rate", str(tmp_path / "none")]
    with pytest.raises(SystemExit, match="none: no such folder"):
        build(flags, tmp_path / "out3")


ENTRY = {"name": "train_1_a_1.nii.gz", "shape": [40, 48, 12]}
ENTRY |= {"findings": {"0": "x"}, "categories": {"0": "2b"}}


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.sampled_from([*ENTRY, "pixels", "entity_counts", "protocol", None]), ct.JSON)
def test_any_json_is_a_case_or_bad_input(field, value):
    try:
        case = check_entry(value if field is None else {**ENTRY, field: value})
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert case.patient == "train_1" and len(case.shape) == 3
        assert len(case.keys) == len(case.texts) >= 1


@pytest.mark.parametrize(
    "error", [RuntimeError, KeyError, TypeError, ValueError, IndexError, OSError, MemoryError]
)
def test_an_internal_bug_still_raises(tmp_path, monkeypatch, error):
    def bug(*_):
        raise error("a bug of ours")

    monkeypatch.setattr(stage, "find_boxes", bug)
    with pytest.raises(error, match="a bug of ours"):
        build(ct.write_index(tmp_path, [ct.add_case(tmp_path)]), tmp_path / "out")


def test_an_error_of_the_caller_cancels_the_jobs_that_have_not_begun(tmp_path):
    jobs = [(tmp_path / f"{i}", "x") for i in range(2000)]
    with pytest.raises(KeyError), closing(parallel(write_atomic, jobs, 2, "test")) as results:
        for _ in results:
            raise KeyError
    assert 0 < len(list(tmp_path.iterdir())) < 2000 and not multiprocessing.active_children()


def test_a_killed_worker_is_one_line():
    with pytest.raises(BadInput, match="fewer --workers"):
        list(parallel(os._exit, [(1,), (1,)], 2, "test"))


# ==== The command line ====


def test_list_ct_prints_only_paths(many, tmp_path, capsys):
    stage.main(["--rexgroundingct", str(many[0] / "rex"), "--list-ct"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14 and "dataset/train_fixed/train_3/train_3_b/train_3_b_2.nii.gz" in lines
    assert lines[-1] == "dataset/valid_fixed/valid_1841/valid_1841_a/valid_1841_a_1.nii.gz"


@pytest.mark.parametrize(
    "flags",
    [
        ["--rexgroundingct", "x"],
        ["--ct-rate", "x"],
        ["--list-ct"],
        ["--rexgroundingct", "x", "--ct-rate", "x", "--phantoms", "3"],
        ["--phantoms", "0"],
        ["--max-slices", "0"],
        ["--window", "0", "0"],
        ["--window", "nan", "5"],
        ["--test-fraction", "1.5"],
        ["--min-box-fraction", "-1"],
    ],
)
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        stage.main(flags)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


def test_phantoms_end_to_end_by_python(phantoms_by_python):
    out, process = phantoms_by_python
    done = launch.ended(process)
    assert done.returncode == 0, done.stderr
    assert "6 phantoms, seed 5" in done.stdout
    info = json.loads((out / "dataset_info.json").read_text())
    assert info["phantoms"] is True and info["settings"]["phantoms"] == 6 and info["skipped"] == []
    assert min(info["records"].values()) > 0
    assert {path.name for path in out.parent.iterdir()} == {"ct_rate_vqa", "phantoms"}
    for split in ("train", "test"):
        assert len(read_records(out, split)) == info["records"][split]


def test_strict_as_a_subprocess(tmp_path):
    bad = ct.add_case(tmp_path)
    ct.mask_path(tmp_path, bad["name"]).unlink()
    flags = [*ct.write_index(tmp_path, [bad]), "--out", tmp_path / "out", "--strict"]
    done = launch.run("01_make_dataset", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and bad["name"] in last
