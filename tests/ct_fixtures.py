"""Small hand-made CTs and masks in ReXGroundingCT's and CT-RATE's layout, for stages 01 and 02.

Everything is written from plain arrays in picture axes, [slice, row, column] = toward the head, the
back, the patient's left. The NIfTI bytes and the orientations are put together here by hand,
independently of the code under test. At the end: how a stage is stopped in the middle of its work.
"""

import gzip
import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Header

from support import files, records
from tests import launch

DEPTH, HEIGHT, WIDTH = 12, 48, 40
# letter -> (picture axis, is it reversed?, world axis in RAS+ mm, direction along it)
AXES = {
    "L": (2, False, 0, -1),
    "R": (2, True, 0, 1),
    "P": (1, False, 1, -1),
    "A": (1, True, 1, 1),
    "S": (0, False, 2, 1),
    "I": (0, True, 2, -1),
}
# With this window a stored HU of 0 to 255 is the picture's gray value itself, so that pictures can
# be compared exactly.
IDENTITY_WINDOW = ("--window", "127.5", "255")


# Any JSON value, for hypothesis.
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)


def lists_and_objects(inner: st.SearchStrategy) -> st.SearchStrategy:
    objects = st.dictionaries(st.text(max_size=4), inner, max_size=4)
    return st.lists(inner, max_size=4) | objects


JSON = st.recursive(SCALAR, lists_and_objects, max_leaves=8)


def to_file_axes(picture: np.ndarray, axes: str) -> np.ndarray:
    """[slice, row, column] -> the array a file with `axes` (such as "LPS") stores."""
    for letter in axes:
        axis, reverse, _, _ = AXES[letter]
        picture = np.flip(picture, axis) if reverse else picture
    return picture.transpose([AXES[letter][0] for letter in axes])


def affine_for(axes: str, spacing: tuple[float, float, float] = (0.7, 0.7, 2.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for i, letter in enumerate(axes):
        _, _, world, sign = AXES[letter]
        affine[world, i] = sign * spacing[world]
    affine[:3, 3] = (-11.0, 20.0, -300.0)
    return affine


def nifti(voxels: np.ndarray, affine: np.ndarray | None = None, **fields) -> bytes:
    """The uncompressed bytes of a NIfTI-1 file; `fields` overwrite header fields, unchecked."""
    header = Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    if affine is not None:
        header.set_sform(affine, 1)
    usual = {"magic": b"n+1", "vox_offset": 352, "scl_slope": 1, "scl_inter": 0}
    for key, value in {**usual, **fields}.items():
        header[key] = value
    return header.binaryblock + bytes(4) + voxels.tobytes(order="F")


def write_gz(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, 1, mtime=0))
    return path


def chest(seed: int = 0, shape: tuple[int, int, int] = (DEPTH, HEIGHT, WIDTH)) -> np.ndarray:
    """Random HU of 0 to 255: no two slices, rows, columns or mirror images are alike."""
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.int16)


def block(
    slices: tuple[int, int], box: list[int], shape: tuple[int, int, int] = (DEPTH, HEIGHT, WIDTH)
) -> np.ndarray:
    """A lesion mask: `box` [x0, y0, x1, y1] on the slices from slices[0] to slices[1] - 1."""
    mask = np.zeros(shape, np.uint8)
    mask[slices[0] : slices[1], box[1] : box[3], box[0] : box[2]] = 1
    return mask


def ct_path(root: Path, name: str, flat: bool = False) -> Path:
    stem = name.removesuffix(".nii.gz")
    series = stem.rsplit("_", 1)[0]
    tree = f"dataset/{stem.split('_')[0]}_fixed/{series.rsplit('_', 1)[0]}/{series}/{name}"
    return root / "ct_rate" / (name if flat else tree)


def mask_path(root: Path, name: str) -> Path:
    return root / "rex" / "segmentations" / name


def add_case(
    root: Path,
    name: str = "train_1_a_1.nii.gz",
    lesions: dict[int, np.ndarray] | list[np.ndarray] = (),
    categories: tuple[str, ...] = ("2b",),
    picture: np.ndarray | None = None,
    axes: str = "LPS",
    layout: str = "first",
    affine: np.ndarray | None = None,
    flat: bool = False,
    **fields,
) -> dict:
    """Writes one CT and its mask under `root`; returns its entry of dataset.json.

    `fields` go into the CT's header.
    """
    picture = chest() if picture is None else picture
    lesions = lesions or [block((3, 6), [25, 6, 33, 12], picture.shape)] * len(categories)
    voxels = to_file_axes(picture, axes)
    channels = [to_file_axes(lesion, axes) for lesion in lesions]
    mask = channels[0] if layout == "3d" else np.stack(channels, 0 if layout == "first" else -1)
    affine = affine_for(axes) if affine is None else affine
    write_gz(ct_path(root, name, flat), nifti(voxels, affine, **fields))
    # As in the real set, the mask's own affine is of no use.
    write_gz(mask_path(root, name), nifti(mask, np.eye(4)))
    keys = [str(i) for i in range(len(channels))]
    counts = [int((channel > 0).sum()) for channel in channels]
    return {
        "name": name,
        "findings": {key: f"Finding {key} of {name}." for key in keys},
        "entity_counts": dict.fromkeys(keys, 1),
        "shape": list(voxels.shape),
        "pixels": dict(zip(keys, counts, strict=True)),
        "categories": dict(zip(keys, categories, strict=True)),
        "protocol": "protocol1",
    }


def write_index(root: Path, train: list, val: list = (), test: list = ()) -> list[str]:
    """Writes dataset.json and returns 01's flags for the two folders."""
    path = root / "rex" / "dataset.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"train": list(train), "val": list(val), "test": list(test)}))
    (root / "ct_rate").mkdir(exist_ok=True)
    flags = ["--rexgroundingct", str(root / "rex"), "--ct-rate", str(root / "ct_rate")]
    return [*flags, "--workers", "1"]


def read_lines(folder: Path, split: str) -> list[dict]:
    text = (folder / split / "metadata.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` with its bytes."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def times(paths: Iterable[Path]) -> dict[Path, int]:
    """When each file was written, ns: the same again where nothing was done twice."""
    return {path: path.stat().st_mtime_ns for path in paths}


# ==== Stages that are stopped ====


@dataclass
class Stop:
    """A moment at which a stage is stopped, and the signal that stops it."""

    what: str  # "write": after `count` writes, the next is torn; "result": of as many jobs; "start"
    count: int
    number: int  # of the signal


def torn_write(count: int, stop: Callable[[], None]) -> Callable:
    """A `write_atomic` that calls `stop` in the middle of every write but the first `count`."""
    write, writes = files.write_atomic, 0

    def torn(path: Path, content: bytes | str) -> None:
        nonlocal writes
        writes += 1
        if writes > count:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".tmp.{path.name}").write_bytes(b"half a")
            stop()
        write(path, content)

    return torn


def stop_at(script: str, what: str, count: int, number: int) -> None:
    """Prepares the process of a stage: it gets signal `number` at that moment."""
    stage = importlib.import_module(script)
    parallel = stage.parallel
    stage.CHUNK, stage.draw_overview = 2, lambda *_: None

    def stop() -> None:
        # SIGKILL hits this process alone, the others its workers, too, as from a terminal.
        os.kill(os.getpid() if number == signal.SIGKILL else 0, number)

    def broken_off(function, jobs, *more):
        if what == "start":  # a moment later, while the workers are importing
            threading.Timer(0.2, stop).start()
        some = jobs[: count + 2]  # the rest stays undone
        for i, result in enumerate(parallel(function, some, *more)):
            if i == count and what == "result":
                stop()
            yield result
        if what == "start":
            time.sleep(30)  # the jobs were faster than the timer

    if what == "write":
        torn = torn_write(count, stop)
        stage.write_atomic = files.write_atomic = records.write_atomic = torn
    else:
        stage.parallel = broken_off


def run_stopped(script: str, stop: Stop, argv: list[str]) -> None:
    """Runs a stage that is stopped, and checks how it ends.

    Its exit code, one line, no traceback, and that no process is left: `launch.run` waits for all.
    """
    before = ["tests.ct_fixtures", "stop_at", script, stop.what, stop.count, int(stop.number)]
    done = launch.run(script, *argv, before=before)
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert done.returncode == expected[stop.number], done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    if stop.number != signal.SIGKILL:
        last = done.stderr.splitlines()[-1]
        assert last.startswith("interrupted; the same command goes on from here")


STOPS = {  # workers -> the moments at which a folder's making is stopped, one after the other
    "1": [
        Stop("write", 0, signal.SIGKILL),  # the settings
        Stop("write", 2, signal.SIGTERM),
        Stop("write", 9, signal.SIGINT),
        Stop("write", 8, signal.SIGKILL),
        Stop("result", 1, signal.SIGTERM),
    ],
    "2": [
        Stop("start", 0, signal.SIGINT),
        Stop("result", 0, signal.SIGKILL),
        Stop("result", 1, signal.SIGTERM),
        Stop("result", 1, signal.SIGINT),
    ],
}
