"""Where data comes in: files that are no files, strange names, damage byte by byte; how stages end.

Killed workers, a full standard output, Ctrl-C while a script imports. The corpus of test_hostile.py
has what is wrong with one record or one volume.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from multiprocessing import resource_tracker, util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from support import files, nifti, records, rexgroundingct
from support.files import BadInput
from support.stage import parallel
from tests import corpus, launch
from tests import ct_fixtures as ct

stage = importlib.import_module("01_make_dataset")


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """Nothing here takes a minute; overviews are left out."""
    monkeypatch.setattr(stage, "draw_overview", lambda *_: None)

    def stop(*_):
        raise AssertionError("it hangs")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


# ==== What is read ====


def missing(path: Path) -> None:
    pass


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


PLACES = [missing, loop, device, os.mkfifo, Path.mkdir]
NAMES = ["x.png", "x" * 300, "a\nb", b"\xff\xfe".decode("utf-8", "surrogateescape")]
READERS = [files.read_bytes, files.read_json, files.open_picture, nifti.read_header]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_what_is_no_file_is_one_line(place, read, tmp_path):
    for name in NAMES:
        with contextlib.suppress(OSError):  # too long a name
            place(tmp_path / name)
        with pytest.raises(BadInput) as error:
            read(tmp_path / name)
        assert str(error.value).isprintable() and str(tmp_path) in str(error.value)
        assert "cannot be read: " in str(error.value)


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_has_no_proper_name_is_not_written(name, tmp_path):
    if "\n" in name:
        files.write_atomic(tmp_path / name, "x")  # odd, but a name
        return
    with pytest.raises(BadInput, match="cannot be written: "):
        files.claim(tmp_path / name, {"script": "x"}, ())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    def refused(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refused)
    for read in READERS:
        with pytest.raises(BadInput, match="x: cannot be read: Permission denied$"):
            read(tmp_path / "x")
    with pytest.raises(BadInput, match="x: cannot be written: Permission denied$"):
        files.claim(tmp_path / "x", {"script": "x"}, ())


KINDS = ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "DDS", "PCX", "SGI"]
KINDS += [kind for kind in ("WEBP", "AVIF") if features.check(kind.lower())]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_png_or_jpeg(kind, tmp_path):
    Image.new("RGB", (40, 48)).save(tmp_path / "x.png", format=kind)
    with pytest.raises(BadInput, match="cannot be read: "):
        files.open_picture(tmp_path / "x.png")


@pytest.mark.parametrize(("scans", "good"), [(0, True), (5, True), (90_000, False)])
def test_a_jpeg_has_a_bounded_number_of_scans(scans, good, tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("L", (40, 48), 77).save(path, progressive=True)
    data = path.read_bytes()
    last = data[data.rindex(b"\xff\xda") : -2]
    path.write_bytes(data[:-2] + last * scans + data[-2:])
    if good:
        assert files.open_picture(path).getpixel((0, 0)) == 77
    else:
        with pytest.raises(BadInput, match="scans"):
            files.open_picture(path)


def test_a_picture_of_16_bits_is_refused(tmp_path):
    Image.new("I;16", (40, 48), 30_000).save(tmp_path / "x.png")
    with pytest.raises(BadInput, match="16 bits per px"):
        files.open_picture(tmp_path / "x.png")


@pytest.mark.filterwarnings("error")
def test_a_strange_transparency_does_not_stop_a_conversion(tmp_path):
    chunk = b"tRNS" + bytes(2)  # of a gray picture; found by damage byte by byte
    for mode, extra in (("L", chunk), ("P", b"tRNS" + bytes(9)), ("RGB", b"tRNS" + bytes(6))):
        Image.new(mode, (40, 48)).save(tmp_path / "x.png")
        data = (tmp_path / "x.png").read_bytes()
        at = data.index(b"IDAT") - 4
        framed = (len(extra) - 4).to_bytes(4, "big") + extra + zlib.crc32(extra).to_bytes(4, "big")
        (tmp_path / "x.png").write_bytes(data[:at] + framed + data[at:])
        files.png_bytes(files.open_picture(tmp_path / "x.png").convert("RGB"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("slope", [3e38, -3e38])
def test_a_scale_beyond_fp32_does_not_warn(slope, tmp_path):
    voxels = ct.to_file_axes(ct.chest(), "LPS").astype(np.float32)
    path = ct.write_gz(tmp_path / "x.nii.gz", ct.nifti(voxels, scl_slope=slope))
    header = nifti.read_header(path)
    for slab in nifti.read_slabs(header):
        assert set(np.unique(stage.apply_window(header.scale(slab), (0, 1)))) <= {0, 128, 255}


# ==== Ids, kept work, what is deleted ====


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[str], dict]:
    """Three volumes, the flags for them, and the bytes of 01's folder."""
    root = tmp_path_factory.mktemp("made")
    entries = [ct.add_case(root, f"train_{i}_a_1.nii.gz", picture=ct.chest(i)) for i in range(3)]
    flags = [*ct.write_index(root, entries), "--test-fraction", "0.4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "draw_overview", lambda *_: None)
        stage.main([*flags, "--out", str(root / "out")])
    return root, flags, ct.tree(root / "out")


@pytest.fixture
def out(made, tmp_path) -> Path:
    return shutil.copytree(made[0] / "out", tmp_path / "out")


@pytest.mark.parametrize("split", records.SPLITS)
def test_an_id_of_the_other_split_is_refused_by_every_reader(split, out):
    lines = [json.loads((out / s / "metadata.jsonl").read_text().splitlines()[0]) for s in SPLITS]
    lines[0]["id"] = lines[1]["id"]
    (out / "train" / "metadata.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(BadInput, match="'id': .* was used before"):
        records.read_records(out, split)


SPLITS = records.SPLITS
DAMAGE = {"cut": lambda data: data[:-9], "empty": lambda data: b"", "not JSON": lambda data: b"{"}
DAMAGE |= {"one digit": lambda data: data.replace(b"25", b"26"), "null": lambda data: b"null"}
DAMAGE |= {"one byte more": lambda data: data + b"!", "last byte": lambda data: data[:-1] + b"!"}
DAMAGE |= {"flipped": lambda data: data[:99] + bytes([data[99] ^ 4]) + data[100:]}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_work_is_made_again(damage, made, out):
    for path in (out / ".work").glob("train_*.json"):
        corpus.edit(path, DAMAGE[damage])
    stage.main([*made[1], "--out", str(out)])
    assert ct.tree(out) == made[2]


def test_damaged_settings_make_the_outputs_again(made, out):
    (out / "train" / "metadata.jsonl").write_text("of other settings")
    (out / ".work" / "settings.json").write_text("{")
    stage.main([*made[1], "--out", str(out)])
    assert ct.tree(out) == made[2]


def test_only_what_was_written_is_deleted(made, out):
    """Temporary files go; what a user or a notebook put among the pictures stays."""
    images = out / "train" / "images"
    (images / ".ipynb_checkpoints").mkdir()
    (images / "mine.png").write_bytes(b"mine")
    (images / ".tmp.train_1_a_1_s0003.png").write_bytes(b"half a")
    stage.main([*made[1], "--out", str(out)])
    assert ct.tree(out) == {**made[2], "train/images/mine.png": b"mine"}
    assert (images / ".ipynb_checkpoints").is_dir()


@pytest.mark.parametrize("way", ["--overwrite", "damaged settings"])
def test_what_was_not_written_stays_when_all_is_made_anew(made, out, way):
    (out / "train" / "images" / "notes.txt").write_bytes(b"mine")
    flags = ["--seed", "7"] if way == "--overwrite" else []
    if not flags:
        (out / ".work" / "settings.json").write_text("{")
    stage.main([*made[1], *flags, "--out", str(out), "--overwrite"])
    assert ct.tree(out)["train/images/notes.txt"] == b"mine"


def test_with_damaged_settings_no_kept_work_is_used(made, tmp_path):
    """Volumes without records would otherwise keep what other settings gave."""
    flags = [*made[1], "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="no usable record"):
        stage.main([*flags, "--min-box-fraction", "1"])
    (tmp_path / "out" / ".work" / "settings.json").write_text("{")
    stage.main(flags)
    assert ct.tree(tmp_path / "out") == made[2]


def test_the_pictures_of_a_volume_that_became_unusable_go(made, tmp_path):
    root = shutil.copytree(made[0], tmp_path / "made")
    (root / "out" / ".work" / "train_1_a_1.json").unlink()
    ct.ct_path(root, "train_1_a_1.nii.gz").write_bytes(b"no volume")
    flags = ["--rexgroundingct", root / "rex", "--ct-rate", root / "ct_rate", "--workers", 1]
    stage.main([*map(str, flags), "--test-fraction", "0.4", "--out", str(root / "out")])
    left = {path.name[:11] for path in (root / "out").glob("*/images/*")}
    assert left == {"train_0_a_1", "train_2_a_1"}


@pytest.mark.parametrize("script", launch.STAGES[:2])
def test_an_output_folder_removed_meanwhile_is_one_line(script, made, tmp_path, monkeypatch):
    module, target = importlib.import_module(script), tmp_path / "out"

    def interfering(*arguments):
        results = list(parallel(*arguments))
        shutil.rmtree(target)
        return iter(results)

    monkeypatch.setattr(module, "parallel", lambda *arguments: Closing(interfering(*arguments)))
    flags = made[1] if script == "01_make_dataset" else ["--data", str(made[0] / "out")]
    flags = [*flags, "--workers", "1", "--out", str(target)]
    with pytest.raises(SystemExit, match=r"^error: [^\n]* was removed meanwhile; [^\n]*$"):
        module.main(flags)


class Closing:
    """An iterator that can be closed."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return self.items

    def close(self):
        pass


# ==== Workers that are killed ====


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.5])
def test_a_killed_worker_ends_the_others_at_once(seconds):
    """While they start and while they work: SIGTERM, which they do not hear, would not do."""

    def kill() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.01)
        time.sleep(seconds)
        multiprocessing.active_children()[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(BadInput, match="a worker was killed"):
        list(parallel(time.sleep, [(60,)] * 3, 3, "test"))
    thread.join()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("error", [OSError("handle is closed"), ValueError("fds_to_keep")])
def test_a_worker_killed_while_the_next_one_begins_is_told_as_such(error, monkeypatch):
    """The pool then closes the pipes that the next one is to inherit."""
    resource_tracker.ensure_running()  # a process that would be begun before the first worker
    begin, begun = util.spawnv_passfds, []

    def spawn(*arguments):
        if begun:
            raise error
        begun.append(begin(*arguments))
        return begun[0]

    monkeypatch.setattr(util, "spawnv_passfds", spawn)
    with pytest.raises(BadInput, match="a worker was killed"):
        list(parallel(time.sleep, [(60,)] * 3, 3, "test"))
    assert begun and not multiprocessing.active_children()


def test_an_exception_of_a_worker_tells_where_it_was_raised():
    with pytest.raises(ValueError, match="invalid literal") as error:
        list(parallel(int, [("1",), ("x",)], 2, "test"))
    assert "_process_worker" in str(error.value.__cause__)


# ==== Streams and signals ====


def python(*command: object, shell: str = "", **environment) -> subprocess.CompletedProcess:
    """Runs Python, its streams redirected as `shell` says."""
    environment = {**os.environ, "PYTHONPATH": str(launch.ROOT), **environment}
    line = ["bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=20)


LIST = "from support.stage import *\nrun_stage(lambda: print(list(parallel(abs, [(-7,)], 1, ''))))"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_one_line(unbuffered):
    done = python("-c", LIST, shell=">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "error: the standard output cannot be written: No space left on device"


def test_streams_may_be_closed():
    done = python("-c", LIST, shell="2>&-")
    assert (done.returncode, done.stdout) == (0, "[7]\n")
    assert python("-c", LIST, shell=">&- 2>&-").returncode == 0


THRICE = """
import os, signal, time
for _ in range(3):
    os.kill(os.getpid(), signal.SIGINT)
time.sleep(20)
"""


HEAVY = {"01_make_dataset": "nibabel", "02_zoom_augment": "PIL"}  # the others import torch


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("script", launch.STAGES)
def test_ctrl_c_while_a_script_imports_is_one_line(script, first, tmp_path):
    module = "tqdm" if first else HEAVY.get(script, "torch")
    (tmp_path / f"{module}.py").write_text(THRICE)
    done = python(launch.ROOT / f"{script}.py", PYTHONPATH=str(tmp_path))
    assert (done.returncode, len(done.stderr.splitlines())) == (130, 1), done.stderr
    assert done.stderr.startswith("interrupted; ")


STAGE = """
import atexit, os, signal, time
from support.stage import run_stage

def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)

def work():
    try:
        ctrl_c()
        time.sleep(20)
    finally:
        ctrl_c()

atexit.register(ctrl_c)
run_stage(work)
"""


def test_three_ctrl_c_are_one_line(tmp_path):
    (tmp_path / "01_stage.py").write_text(STAGE)
    done = python(tmp_path / "01_stage.py")
    assert (done.returncode, len(done.stderr.splitlines())) == (130, 1), done.stderr


# ==== Damage byte by byte ====


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three bytes changed, a part copied elsewhere, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)])
    kind, at, start = rng.randrange(4), rng.randrange(len(data)), rng.randrange(len(data))
    if kind == 0:
        data[at : at + 9] = data[start : start + 9]
    elif kind == 1:
        del data[at:]
    return bytes(data)


def survives(read, path: Path, data: bytes):
    """What `read` makes of the file; None when it is refused in one line."""
    path.write_bytes(data)
    try:
        return read(path)
    except BadInput as error:
        assert str(error).isprintable()
        return None


def test_any_damage_is_one_line_or_harmless(made, tmp_path):
    rng, root = random.Random(0), shutil.copytree(made[0], tmp_path / "made")
    folder = root / "out"
    picture = next(iter(folder.glob("train/images/*.png")))
    volume = ct.ct_path(root, "train_0_a_1.nii.gz")
    (case,) = rexgroundingct.read_cases(root / "rex" / "dataset.json")[0][:1]
    result = stage.read_result(folder / "train", case) or stage.read_result(folder / "test", case)
    assert result

    def build(path: Path) -> int:
        settings = {
            "min_box_fraction": 0,
            "cap": "finding",
            "max_slices": 2,
            "window": (-600, 1500),
        }
        build_volume = stage.build_volume
        made = build_volume(
            case, root / "rex", root / "ct_rate", tmp_path / "new" / "train", settings
        )
        return len(made.records)

    def again(path: Path):
        kept = [stage.read_result(folder / split, case) for split in SPLITS]
        assert kept in ([None, None], [None, result], [result, None])

    readers = {
        volume: build,
        picture: files.open_picture,
        root / "rex" / "dataset.json": rexgroundingct.read_cases,
        folder / "train" / "metadata.jsonl": lambda _: records.read_records(folder, "train"),
        folder / "dataset_info.json": lambda _: records.dataset_info(folder),
        folder / ".work" / "train_0_a_1.json": again,
    }
    for path, read in readers.items():
        good = path.read_bytes()
        for _ in range(40):
            survives(read, path, damaged(good, rng))
        path.write_bytes(good)
