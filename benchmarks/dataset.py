"""How close 01_make_dataset.py comes to its floor: the time that inflating the same gzip files once takes.

It writes CTs of 512 x 512 x 300 int16 voxels, with noise such that they shrink about as real ones do, and masks of five
findings, and builds a dataset from them. The sides take turns, each run is a process of its own, and times are medians:

    inflate     reads every file to its end with Python's gzip, and does nothing with the bytes
    01          01_make_dataset.py with one worker, then with two

    python benchmarks/dataset.py
    python benchmarks/dataset.py --volumes 1 --repeats 9 --mask-type int16

Seconds are wall clock, without starting Python and importing (but for the two workers, which do so while 01 runs).
Peak memory is that of the largest process. The last line is 01 with one worker divided by inflate.
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

import numpy as np
import PIL
import scipy
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SIDE, PARTS, CODES = 512, ("ct", "segmentations"), ("2b", "2c", "2d", "2e", "1d")


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


def write_volume(root: Path, number: int, depth: int, mask_type: str) -> dict:
    """A CT (axes L,P,S) and its mask [5, SIDE, SIDE, depth]; returns the entry of dataset.json.

    Tissue at its usual HU under noise of 45 HU, blurred as a reconstruction kernel does, half of it in the air; -1024
    outside the round field of view. A finding is an ellipsoid with a wavy border, a fifth of the volume high.
    """
    side, rng, name = SIDE, np.random.default_rng(number), f"train_{number}_a_1.nii.gz"
    x, y = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side), indexing="ij")
    body, wall = (x / 0.9) ** 2 + (y / 0.68) ** 2 < 1, (x / 0.8) ** 2 + (y / 0.56) ** 2 < 1
    lung, view = ((abs(x) - 0.42) / 0.33) ** 2 + (y / 0.5) ** 2 < 1, x**2 + y**2 < 1
    tissue = np.where(lung, -850, np.where(wall, 40, np.where(body, -90, -1000)))
    hu = np.empty((side, side, depth), np.int16, order="F")
    for k in range(depth):
        noise = ndimage.gaussian_filter(rng.standard_normal((side, side), dtype=np.float32), 0.6)
        hu[..., k] = np.where(view, tissue + noise * (45 / noise.std()) * np.where(body, 1, 0.5), -1024)
    mask = np.zeros((len(CODES), side, side, depth), mask_type, order="F")
    for f in range(len(CODES)):
        size, low = (side // 3, side // 3, depth // 5), (side // 9 + f * side // 12, side // 3, f * depth // 5)
        wave = ndimage.gaussian_filter(rng.standard_normal(size, dtype=np.float32), (side / 40, side / 40, 3))
        radius = sum(np.linspace(-1, 1, n).reshape([-1 if a == b else 1 for b in range(3)]) ** 2
                     for a, n in enumerate(size))  # fmt: skip
        mask[f][tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))] = radius + 0.2 * wave / wave.std() < 0.8
    write_gz(root / "ct" / name, hu, np.diag([-0.7, -0.7, 1, 1]))
    write_gz(root / "rex" / "segmentations" / name, mask, np.eye(4))
    keys = [str(f) for f in range(len(CODES))]
    entry = {"name": name, "shape": [side, side, depth], "findings": dict.fromkeys(keys, "Generated.")}
    return {**entry, "categories": dict(zip(keys, CODES, strict=True))}


def inflate(files: list[Path]) -> None:
    for path in files:
        with gzip.open(path) as stream:
            while stream.read(1 << 20):
                pass


def one_run(root: Path, side: str) -> None:
    """The child process: does one side's work once and prints its seconds and peak memory in bytes as JSON."""
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--rexgroundingct", str(root / "rex"), "--ct-rate", str(root / "ct"), "--out", str(out)]
    stage, start = importlib.import_module("01_make_dataset"), time.perf_counter()
    if side == "inflate":
        inflate(sorted(root.rglob("*.nii.gz")))
    else:
        stage.main([*flags, "--workers", side])
    seconds = time.perf_counter() - start
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps([seconds, peak * (1024 if sys.platform == "linux" else 1)]))  # KiB on Linux, bytes on macOS


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--volumes", type=int, default=4, help="how many (default 4)")
    add("--depth", type=int, default=300, help="slices of a volume (default 300)")
    add("--mask-type", choices=("uint8", "int16"), default="uint8", help="number type of the masks (default uint8)")
    add("--repeats", type=int, default=5, help="runs of each side (default 5)")
    add("--one-run", nargs=2, metavar=("FOLDER", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one_run:
        return one_run(Path(args.one_run[0]), args.one_run[1])

    with tempfile.TemporaryDirectory() as folder:
        root, runs = Path(folder), {"inflate": [], "1": [], "2": []}
        # In a process of its own: on Linux a child begins with its parent's peak memory.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(write_volume, root, n + 1, args.depth, args.mask_type) for n in range(args.volumes)]
            entries = [job.result() for job in jobs]
        (root / "rex" / "dataset.json").write_text(json.dumps({"train": entries}))
        size = [sum(path.stat().st_size for path in root.rglob(f"{part}/*.gz")) / 1e6 for part in PARTS]
        print(f"Python {platform.python_version()}, zlib {zlib.ZLIB_RUNTIME_VERSION}, numpy {np.__version__}, "
              f"scipy {scipy.__version__}, Pillow {PIL.__version__}, {os.cpu_count()} cores")  # fmt: skip
        print(f"{args.volumes} x {SIDE} x {SIDE} x {args.depth}: CTs {size[0]:.0f} MB gzipped, "
              f"{args.mask_type} masks {size[1]:.1f} MB, {args.repeats} runs a side")  # fmt: skip
        for _ in range(args.repeats):
            for side, own in runs.items():
                command = [sys.executable, __file__, "--one-run", str(root), side]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                own.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {side: np.median(own, axis=0) for side, own in runs.items()}  # (seconds, bytes)
    floor, one, two = (seconds for seconds, _ in middle.values())
    print("| side | seconds | peak memory, MB | times inflate |\n| --- | --- | --- | --- |")
    for name, (seconds, peak) in zip(("inflate", "01, 1 worker", "01, 2 workers"), middle.values(), strict=True):
        print(f"| {name} | {seconds:.2f} | {peak / 1e6:.0f} | {seconds / floor:.2f} |")
    print(f"gain of 2 workers: {one / two:.2f} times")
    print(f"01 with 1 worker / inflate: {one / floor:.2f}")


if __name__ == "__main__":
    main()
