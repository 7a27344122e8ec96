"""How close 01_make_dataset.py comes to its floor: the time to inflate the same gzip files once.

It writes CTs of 512 x 512 x 300 int16 voxels, with noise such that they shrink about as real ones
do, and masks of five findings, and builds a dataset from them. The sides take turns, each run is a
process of its own, and times are medians:

    inflate     reads every file to its end with Python's gzip, and does nothing with the bytes
    01          01_make_dataset.py with one worker, then with two

    python benchmarks/dataset.py
    python benchmarks/dataset.py --volumes 1 --repeats 9 --mask-type int16

Seconds are wall clock, without starting Python and importing (but for the two workers, which do so
while 01 runs). Peak memory is that of the largest process. The last line is 01 with one worker
divided by inflate.
"""

import argparse
import gzip
import importlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib.figure  # noqa: F401 (with scipy.ndimage what 01 imports while the clock runs)
import numpy as np
import PIL
import scipy.ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SIDE = 512
CODES = ("2b", "2c", "2d", "2e", "1d")  # of the five findings


# ==== 1. The volumes ====


def write_gz(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """A NIfTI-1 file with sform `affine`; nibabel's own saving would hold the volume twice."""
    from nibabel.nifti1 import Nifti1Header

    header = Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_sform(affine, 1)
    header["magic"], header["vox_offset"], header["scl_slope"] = b"n+1", 352, 1
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", compresslevel=6) as stream:
        stream.write(header.binaryblock + bytes(4))
        for k in range(voxels.shape[-1]):  # slab by slab along the last axis, Fortran order
            stream.write(voxels[..., k].tobytes(order="F"))


def draw_ct(rng, depth: int) -> np.ndarray:
    """HU, int16 [SIDE, SIDE, depth], axes L,P,S.

    Tissue at its usual HU under noise of 45 HU, blurred as a reconstruction kernel does, half of it
    in the air; -1024 outside the round field of view.
    """
    line = np.linspace(-1, 1, SIDE)
    x, y = np.meshgrid(line, line, indexing="ij")
    body = (x / 0.9) ** 2 + (y / 0.68) ** 2 < 1
    wall = (x / 0.8) ** 2 + (y / 0.56) ** 2 < 1
    lung = ((abs(x) - 0.42) / 0.33) ** 2 + (y / 0.5) ** 2 < 1
    tissue = np.where(lung, -850, np.where(wall, 40, np.where(body, -90, -1000)))
    strength = np.where(body, 1, 0.5)
    hu = np.empty((SIDE, SIDE, depth), np.int16, order="F")
    for k in range(depth):
        noise = rng.standard_normal((SIDE, SIDE), dtype=np.float32)
        noise = scipy.ndimage.gaussian_filter(noise, 0.6)
        slab = tissue + noise * (45 / noise.std()) * strength
        hu[..., k] = np.where(x**2 + y**2 < 1, slab, -1024)
    return hu


def draw_mask(rng, depth: int, mask_type: str) -> np.ndarray:
    """[5, SIDE, SIDE, depth]: each finding an ellipsoid with a wavy border, depth / 5 high."""
    mask = np.zeros((len(CODES), SIDE, SIDE, depth), mask_type, order="F")
    size = (SIDE // 3, SIDE // 3, depth // 5)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij", sparse=True)
    radius = axes[0] ** 2 + axes[1] ** 2 + axes[2] ** 2
    for f in range(len(CODES)):
        wave = rng.standard_normal(size, dtype=np.float32)
        wave = scipy.ndimage.gaussian_filter(wave, (SIDE / 40, SIDE / 40, 3))
        x, y, z = SIDE // 9 + f * SIDE // 12, SIDE // 3, f * depth // 5
        part = mask[f, x : x + size[0], y : y + size[1], z : z + size[2]]
        part[...] = radius + 0.2 * wave / wave.std() < 0.8
    return mask


def write_volume(root: Path, number: int, depth: int, mask_type: str) -> dict:
    """Writes a CT and its mask; returns the entry of dataset.json."""
    rng = np.random.default_rng(number)
    name = f"train_{number}_a_1.nii.gz"
    write_gz(root / "ct" / name, draw_ct(rng, depth), np.diag([-0.7, -0.7, 1, 1]))
    mask = draw_mask(rng, depth, mask_type)
    write_gz(root / "rex" / "segmentations" / name, mask, np.eye(4))
    keys = [str(f) for f in range(len(CODES))]
    return {
        "name": name,
        "shape": [SIDE, SIDE, depth],
        "findings": dict.fromkeys(keys, "Generated."),
        "categories": dict(zip(keys, CODES, strict=True)),
    }


# ==== 2. One run ====


def inflate(files: list[Path]) -> None:
    for path in files:
        with gzip.open(path) as stream:
            while stream.read(1 << 20):
                pass


def run_once(root: Path, side: str) -> None:
    """In a process of its own: does one side's work, prints [seconds, peak memory in bytes]."""
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--rexgroundingct", str(root / "rex"), "--ct-rate", str(root / "ct")]
    stage = importlib.import_module("01_make_dataset")
    start = time.perf_counter()
    if side == "inflate":
        inflate(sorted(root.rglob("*.nii.gz")))
    else:
        stage.main([*flags, "--out", str(out), "--workers", side])
    seconds = time.perf_counter() - start
    peaks = []
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        peaks.append(resource.getrusage(who).ru_maxrss)
    unit = 1024 if sys.platform == "linux" else 1  # KiB on Linux, bytes on macOS
    print(json.dumps([seconds, max(peaks) * unit]))


# ==== 3. Flags ====


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--volumes", type=int, default=4, help="how many (4)")
    add("--depth", type=int, default=300, help="slices per volume (300)")
    add("--mask-type", choices=("uint8", "int16"), default="uint8", help="of the masks (uint8)")
    add("--repeats", type=int, default=5, help="runs of each side (5)")
    add("--one-run", nargs=2, metavar=("FOLDER", "SIDE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ==== 4. The benchmark ====


def write_volumes(root: Path, args: argparse.Namespace) -> None:
    """In a process of its own: on Linux a child begins with its parent's peak memory."""
    entries = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for n in range(args.volumes):
            job = pool.submit(write_volume, root, n + 1, args.depth, args.mask_type)
            entries.append(job.result())
    (root / "rex" / "dataset.json").write_text(json.dumps({"train": entries}))


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*.gz")) / 1e6


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.one_run:
        run_once(Path(args.one_run[0]), args.one_run[1])
        return
    sides = {"inflate": "inflate", "1": "01, 1 worker", "2": "01, 2 workers"}
    runs = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_volumes(root, args)
        libraries = f"numpy {np.__version__}, scipy {scipy.__version__}, Pillow {PIL.__version__}"
        python = f"Python {platform.python_version()}, zlib {zlib.ZLIB_RUNTIME_VERSION}"
        print(f"{python}, {libraries}, {os.cpu_count()} cores")
        ct, mask = megabytes(root / "ct"), megabytes(root / "rex")
        sizes = f"CTs {ct:.0f} MB gzipped, {args.mask_type} masks {mask:.1f} MB"
        volumes = f"{args.volumes} x {SIDE} x {SIDE} x {args.depth}"
        print(f"{volumes}: {sizes}, {args.repeats} runs per side")
        for _ in range(args.repeats):
            for side in sides:
                command = [sys.executable, __file__, "--one-run", str(root), side]
                quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                done = subprocess.run(command, check=True, **quiet)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    print("| side | seconds | peak memory, MB | times inflate |\n| --- | --- | --- | --- |")
    medians = {}
    for side, name in sides.items():
        seconds, peak = np.median(runs[side], axis=0)
        medians[side] = seconds
        times = seconds / medians["inflate"]
        print(f"| {name} | {seconds:.2f} | {peak / 1e6:.0f} | {times:.2f} |")
    print(f"gain of 2 workers: {medians['1'] / medians['2']:.2f} times")
    print(f"01 with 1 worker / inflate: {medians['1'] / medians['inflate']:.2f}")


if __name__ == "__main__":
    main()
