"""Stage 01: CT volumes and lesion masks -> slices, lesion boxes and questions (CT-RATE-VQA; paper, Section 3.1).

ReXGroundingCT gives a mask for each finding of a radiology report; CT-RATE gives the CT. From each volume this script
takes the slices that show a finding, and asks of each: what does this lesion's box show? In the order of this file:

    1. patients        14 categories become seven classes; patients are divided 8:2
    2. boxes           connected components in each slice of the mask; boxes of more than 1300 px are kept
    3. slices          at most 20 of a finding's eligible slices, evenly spaced
    4. pictures        anterior at the top, the patient's right on the left, lung window, 8-bit PNG
    5. the folder      one JSON line a question, as `datasets.load_dataset("imagefolder", data_dir=...)` reads it

Without real data it makes synthetic chests ("phantoms") in the same file formats and builds from those:

    python 01_make_dataset.py                                                            the demo, half a minute
    python 01_make_dataset.py --rexgroundingct /data/rexgroundingct --list-ct > ct.txt   which CTs to download
    python 01_make_dataset.py --rexgroundingct /data/rexgroundingct --ct-rate /data/ct-rate --out data/ct_rate_vqa

The paper: 3,042 volumes, 68,581 training and 15,507 test slices. One record here is one finding on one slice.
A run that was interrupted goes on where it stopped when the same command is given again.
"""

import argparse
import hashlib
import io
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from rewards import CLASSES, QUESTION, target
from support.files import MIN_SIDE, BadInput, open_work, png_bytes, read_bytes, read_json, write_atomic
from support.nifti import Nifti, picture_planes, read_header, read_slabs
from support.phantom import write_phantoms
from support.pool import parallel, run_stage
from support.rexgroundingct import Case, ct_rate_path, fault, find_ct, finding_axis, read_cases

DEMO = {"phantoms": 360}

# The paper names the seven classes but not which category goes where: this is our reading. None = left out.
CLASS_OF = {
    "1a": "Airway abnormalities",  # bronchial wall thickening
    "1b": "Airway abnormalities",  # bronchiectasis
    "1c": "Emphysema",
    "1d": "Fibrosis-related changes",  # septal thickening, reticulation
    "1e": "Pulmonary nodules/masses",  # micronodules
    "1f": None,  # other non-focal
    "2a": "Fibrosis-related changes",  # linear: subsegmental atelectasis, scarring, fibrosis
    "2b": "Consolidation/atelectasis",
    "2c": "Ground-glass opacity",
    "2d": "Pulmonary nodules/masses",
    "2e": "Pleural effusion/thickening",
    "2f": "Fibrosis-related changes",  # honeycombing
    "2g": None,  # pneumothorax
    "2h": None,  # other focal
}
EIGHT_CONNECTED = np.ones((3, 3))


@dataclass(frozen=True)
class Settings:
    """What decides the output; kept with it, so that a folder is never continued under other settings."""

    max_slices: int
    cap: str
    min_box_fraction: float
    test_fraction: float
    window: tuple[float, float]
    seed: int
    phantoms: int  # 0: real data
    dataset_sha256: str  # of dataset.json


# ---------------------------------------------------------------------------------------------------------------------
# 1. Patients


def split_patients(patients: set[str], test_fraction: float, seed: int) -> dict[str, str]:
    """patient -> "train" or "test": a seeded shuffle of the sorted names, of which the first `test_fraction` are test.

    All patients named in dataset.json take part, also those whose volumes turn out unusable: so the split does not
    change when a broken download is mended. With two patients or more, neither side is empty (unless 0 is asked for).
    """
    order = sorted(patients)
    random.Random(seed).shuffle(order)
    count = round(test_fraction * len(order))
    if 0 < test_fraction < 1 and len(order) > 1:
        count = min(max(count, 1), len(order) - 1)
    return {patient: "test" if i < count else "train" for i, patient in enumerate(order)}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Geometry and boxes


def to_picture_axes(affine: np.ndarray) -> np.ndarray:
    """nibabel's orientation transform from a CT file's axes to [slice, row, column] = inferior -> superior,
    anterior -> posterior, patient's right -> left (so the right lung is on the left, as radiologists look at it).

    `affine` is the CT's, [4, 4], to RAS+ mm; for an oblique one each axis counts as its nearest. Raises BadInput.
    """
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise BadInput("the affine is not finite or is singular: the orientation is unknown")
    wanted = nib.orientations.axcodes2ornt(("S", "P", "L"))
    return nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), wanted)


def find_boxes(lesion: np.ndarray, min_area: float, left: int = 0, top: int = 0) -> list[list[int]]:
    """Boxes [x0, y0, x1, y1] (px, end-exclusive) of the 8-connected components of `lesion`, bool [rows, columns], which
    is the part of a picture that begins at column `left` and row `top`.

    Kept are boxes with an area strictly above `min_area` px; largest first, ties from the left, then from the top.
    """
    labels, _ = ndimage.label(lesion, EIGHT_CONNECTED)
    found = ndimage.find_objects(labels)
    boxes = [[left + x.start, top + y.start, left + x.stop, top + y.stop] for y, x in found]
    return sorted((box for box in boxes if area(box) > min_area), key=lambda box: (-area(box), box))


def area(box: list[int]) -> int:
    """Of the box [x0, y0, x1, y1], in px."""
    return (box[2] - box[0]) * (box[3] - box[1])


def read_lesions(mask: Nifti, case: Case, transform: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (slice, bool [row, column, finding]) of the mask, in picture axes. Raises BadInput.

    Every entity of a finding has a number of its own, so lesion is "> 0". The mask lies on the CT's voxel grid, and its
    own affine is not to be trusted: it is turned by the CT's `transform`.
    """
    axis, plain = finding_axis(mask.shape, case), (mask.slope, mask.inter) == (1, 0)
    lesion = (slab > 0 if plain else slab * mask.slope + mask.inter > 0 for slab in read_slabs(mask))
    return picture_planes(lesion, mask.shape, bool, axis, transform)


def boxes_by_slice(planes: Iterable, findings: int, min_fraction: float) -> tuple[list[dict[int, list]], np.ndarray]:
    """For each finding {slice: kept boxes}, and whether its mask has any voxel; `planes` is read_lesions' iterator."""
    boxes: list[dict[int, list]] = [{} for _ in range(findings)]
    present = np.zeros(findings, bool)
    for k, plane in planes:
        columns, rows = plane.any(axis=0), plane.any(axis=(1, 2)).nonzero()[0]  # [column, finding], [rows with lesion]
        here = columns.any(axis=0)
        present |= here
        for f in np.flatnonzero(here):  # searching only the rows and columns that hold lesions saves a tenth of the run
            x = np.flatnonzero(columns[:, f])
            part = plane[rows[0] : rows[-1] + 1, x[0] : x[-1] + 1, f]
            if kept := find_boxes(part, min_fraction * plane[..., f].size, int(x[0]), int(rows[0])):
                boxes[f][k] = kept
    return boxes, present


# ---------------------------------------------------------------------------------------------------------------------
# 3. Which slices


def evenly_spaced(items: list, count: int) -> list:
    """At most `count` of `items`, the middles of `count` equal parts: evenly_spaced(range(9), 3) is [1, 4, 7]."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def choose_slices(boxes: list[dict[int, list]], settings: Settings) -> list[tuple[int, int]]:
    """The (slice, finding) pairs that become records, sorted.

    "Each case is capped at 20 slices": a case is a finding of a volume (`--cap finding`; its 10.8 slices a finding fit
    the paper's counts), or a volume (`--cap volume`; then every finding on a chosen slice is kept).
    """
    if settings.cap == "finding":
        chosen = [(k, f) for f, own in enumerate(boxes) for k in evenly_spaced(sorted(own), settings.max_slices)]
    else:
        slices = evenly_spaced(sorted(set().union(*boxes)), settings.max_slices)
        chosen = [(k, f) for f, own in enumerate(boxes) for k in slices if k in own]
    return sorted(chosen)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Pictures


def apply_window(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """HU -> uint8: 0 at centre - width/2 and below, 255 at centre + width/2 and above, linear between, rounded."""
    centre, width = window
    return np.rint(np.clip((hu - (centre - width / 2)) / width, 0, 1) * 255).astype(np.uint8)


def read_pictures(ct: Nifti, transform: np.ndarray, slices: list[int], window: tuple[float, float]) -> dict:
    """{slice: uint8 [row, column]} of a CT; only `slices` become HU, but the whole file is checked. Raises BadInput."""
    planes = picture_planes(read_slabs(ct), ct.shape, ct.dtype, None, transform)
    wanted = set(slices)
    return {k: apply_window(plane[..., 0] * ct.slope + ct.inter, window) for k, plane in planes if k in wanted}


# ---------------------------------------------------------------------------------------------------------------------
# 5. One volume, then the folder


def build_volume(case: Case, rex: Path, ct_rate: Path, out: Path, split: str, settings: Settings) -> dict:
    """Makes one volume's pictures and records; the record file comes last, and marks the volume as finished.

    A volume that cannot be used comes back as skipped and leaves no file, so that the next run tries it again.
    """
    result = {"volume": case.volume, "records": [], "skipped": [], "left_out": [], "too_small": 0}
    try:
        ct, mask = read_header(find_ct(ct_rate, case)), read_header(rex / "segmentations" / case.name)
        if ct.shape != case.shape:
            raise BadInput(f"{ct.path}: shape {ct.shape}, but dataset.json says {case.shape}")
        if ct.affine is None:
            raise BadInput(f"{ct.path}: neither sform nor qform: the orientation is unknown")
        transform = to_picture_axes(ct.affine)
        lesions = read_lesions(mask, case, transform)
        boxes, present = boxes_by_slice(lesions, len(case.keys), settings.min_box_fraction)
        for f, (key, category) in enumerate(zip(case.keys, case.categories, strict=True)):
            if category not in CLASS_OF:
                result["skipped"].append(fault(case.volume, key, f"unknown category {category!r:.40}"))
            elif CLASS_OF[category] is None:
                result["left_out"].append(category)
            elif not present[f]:
                result["skipped"].append(fault(case.volume, key, f"{mask.path}: empty mask"))
            else:
                result["too_small"] += not boxes[f]
                continue
            boxes[f] = {}
        chosen = choose_slices(boxes, settings)
        slices = sorted({k for k, _ in chosen})
        pictures = read_pictures(ct, transform, slices, settings.window) if slices else {}
        if slices and min(pictures[slices[0]].shape) < MIN_SIDE:
            raise BadInput(f"{ct.path}: the slices are smaller than {MIN_SIDE} px")
    except BadInput as error:
        return {**result, "left_out": [], "too_small": 0, "skipped": [fault(case.volume, None, str(error))]}

    for k, picture in pictures.items():
        write_atomic(out / split / "images" / f"{case.volume}_s{k:04d}.png", png_bytes(Image.fromarray(picture)))
    for k, f in chosen:
        label = CLASS_OF[case.categories[f]]
        result["records"].append(
            {
                "file_name": f"images/{case.volume}_s{k:04d}.png",
                "id": f"{case.volume}_s{k:04d}_f{case.keys[f]}",
                "volume": case.volume,
                "patient": case.patient,
                "slice": k,  # counted from the feet
                "finding": int(case.keys[f]),
                "box": boxes[f][k][0],  # the largest
                "boxes": boxes[f][k],
                "category": case.categories[f],
                "label": label,
                "text": case.texts[f],
                "question": QUESTION,
                "answer": target(label),
            }
        )
    write_atomic(out / ".work" / f"{case.volume}.json", json.dumps(result))
    return result


def make_dataset(rex: Path, ct_rate: Path, out: Path, settings: Settings, workers=0, strict=False, overwrite=False):
    """Builds (or completes) the dataset folder `out` and returns its dataset_info, a dict.

    The output is the same bytes for any number of `workers` (0: one a core), interrupted or not. Raises BadInput; with
    `strict` at the first skipped volume or finding.
    """
    cases, skipped = read_cases(rex / "dataset.json")
    open_work(out, asdict(settings), "01_make_dataset.py", overwrite)
    split = split_patients({case.patient for case in cases}, settings.test_fraction, settings.seed)

    def report(faults: list[dict]) -> None:
        for one in faults:
            line = f"{one['volume']}{', finding ' + one['finding'] if one['finding'] else ''}: {one['reason']}"
            if strict:
                raise BadInput(f"{line} (--strict)")
            tqdm.write(f"skipped: {line}", file=sys.stderr)

    report(skipped)
    results, jobs = [], []
    for case in cases:
        path = out / ".work" / f"{case.volume}.json"
        done = read_json(path) if path.exists() else None
        if done and all((out / split[case.patient] / record["file_name"]).exists() for record in done["records"]):
            results.append(done)
            report(done["skipped"])
        else:
            jobs.append((case, rex, ct_rate, out, split[case.patient], settings))
    with closing(parallel(build_volume, jobs, workers, "volumes")) as finished:
        for result in finished:
            report(result["skipped"])
            results.append(result)
    results.sort(key=lambda result: result["volume"])

    records = {"train": [], "test": []}
    for record in (record for result in results for record in result["records"]):
        records[split[record["patient"]]].append(record)
    skipped += [one for result in results for one in result["skipped"]]
    if not records["train"] and not records["test"]:
        raise BadInput(f"{rex}: no usable record in {len(cases)} volumes ({len(skipped)} skipped)")
    info = {
        "stage": "01",
        "phantoms": bool(settings.phantoms),
        "settings": asdict(settings),
        "volumes": {part: len({r["volume"] for r in own}) for part, own in records.items()},
        "patients": {part: len({r["patient"] for r in own}) for part, own in records.items()},
        "slices": {part: len({r["file_name"] for r in own}) for part, own in records.items()},
        "records": {part: len(own) for part, own in records.items()},
        "classes": {part: {c: sum(r["label"] == c for r in own) for c in CLASSES} for part, own in records.items()},
        "left_out": dict(sorted(Counter(code for result in results for code in result["left_out"]).items())),
        "too_small": sum(result["too_small"] for result in results),  # findings without one box above the threshold
        "skipped": skipped,
    }
    for part, own in records.items():
        write_atomic(out / part / "metadata.jsonl", "".join(json.dumps(record) + "\n" for record in own))
        named = {out / part / record["file_name"] for record in own}
        for stray in set((out / part).glob("images/*")) - named:  # left by an interrupted run
            stray.unlink()
    write_atomic(out / "overview.png", draw_overview(out, records))
    write_atomic(out / "dataset_info.json", json.dumps(info, indent=1))
    return info


def draw_overview(out: Path, records: dict[str, list[dict]]) -> bytes:
    """overview.png: up to three volumes a class with their boxes, and the number of records by class and split."""
    figure = Figure(figsize=(14, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[3, 1.1])
    axes = upper.subplots(3, len(CLASSES))
    for column, label in zip(axes.T, CLASSES, strict=True):
        own = [(part, r) for part in records for r in records[part] if r["label"] == label]
        own = {r["volume"]: (part, r) for part, r in sorted(own, key=lambda one: area(one[1]["box"]))}  # its largest
        for axis, volume in zip(column, evenly_spaced(sorted(own), 3) + [None] * 3, strict=False):
            axis.axis("off")
            if volume is None:
                continue
            part, record = own[volume]
            axis.imshow(Image.open(out / part / record["file_name"]), cmap="gray", vmin=0, vmax=255)
            axis.set_title(f"{volume}, slice {record['slice']}", fontsize=7, pad=2)
            for x0, y0, x1, y1 in record["boxes"]:  # pixel i covers i - 0.5 to i + 0.5
                box = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="red", linewidth=1.2)
                axis.add_patch(box)
        column[0].set_title(f"{label}\n{column[0].get_title()}", fontsize=8, pad=2)
    axis = lower.subplots()
    for i, (part, own) in enumerate(records.items()):
        counts = [sum(r["label"] == label for r in own) for label in CLASSES]
        bars = axis.bar([c + 0.4 * i - 0.2 for c in range(len(CLASSES))], counts, 0.38, label=f"{part}: {len(own):,}")
        axis.bar_label(bars, fontsize=8)
    axis.set_xticks(range(len(CLASSES)), CLASSES, fontsize=8)
    axis.set_ylabel("records")
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("input").add_argument
    add("--rexgroundingct", type=Path, metavar="DIR", help="folder with dataset.json and segmentations/")
    add("--ct-rate", type=Path, metavar="DIR", help="folder with the CTs: CT-RATE's own tree, or all in one folder")
    add("--phantoms", type=int, metavar="N", help=f"without real data: synthetic volumes (default {DEMO['phantoms']})")
    add("--list-ct", action="store_true", help="print the CT-RATE paths that dataset.json needs, and stop")
    add = parser.add_argument_group("what is kept").add_argument
    add("--max-slices", type=int, default=20, help="most slices a case (default and the paper: 20)")
    add("--cap", choices=("finding", "volume"), default="finding", help="what a case is; the paper does not say")
    add("--min-box-fraction", type=float, default=1300 / 512**2, metavar="F",
        help="boxes must be larger than this fraction of the slice (default and the paper: 1300/512**2)")  # fmt: skip
    add("--test-fraction", type=float, default=0.2, metavar="F", help="share of patients (default and the paper: 0.2)")
    add("--window", type=float, nargs=2, default=(-600, 1500), metavar=("CENTRE", "WIDTH"),
        help="gray window in HU (default: lung, -600 1500; the paper does not say)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the patient split and of the phantoms")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("data/ct_rate_vqa"), help="dataset folder (default data/ct_rate_vqa)")
    add("--overwrite", action="store_true", help="replace what another run, or other settings, left in --out")
    add("--workers", type=int, default=0, metavar="K", help="processes; 0 (default) is one a core")
    add("--strict", action="store_true", help="stop at the first bad volume or finding instead of skipping it")
    args = parser.parse_args(argv)
    real = (args.rexgroundingct is not None) + (args.ct_rate is not None)
    if args.list_ct and args.rexgroundingct is None:
        parser.error("--list-ct needs --rexgroundingct")
    if real == 1 and not args.list_ct:
        parser.error("--rexgroundingct and --ct-rate go together: masks are useless without their CTs")
    if real and args.phantoms is not None:
        parser.error("--phantoms is for running without real data")
    if (args.phantoms is not None and args.phantoms < 1) or args.max_slices < 1 or args.workers < 0 or args.seed < 0:
        parser.error("--phantoms and --max-slices begin at 1, --workers and --seed at 0")
    if not (0 <= args.min_box_fraction < 1 and 0 <= args.test_fraction <= 1):
        parser.error("--min-box-fraction and --test-fraction are fractions of 1")
    if not (np.isfinite(args.window).all() and args.window[1] > 0):
        parser.error("--window: two finite numbers, and the width above 0")
    return args


def run(args: argparse.Namespace) -> None:
    if args.list_ct:
        cases, skipped = read_cases(args.rexgroundingct / "dataset.json")
        for one in skipped:
            print(f"skipped: {one['volume']}: {one['reason']}", file=sys.stderr)
        if skipped and args.strict:
            raise BadInput("dataset.json has unusable entries (--strict)")
        print(*map(ct_rate_path, cases), sep="\n")
        return
    rex, ct_rate, phantoms = args.rexgroundingct, args.ct_rate, 0
    if rex is None:
        phantoms = args.phantoms or DEMO["phantoms"]
        print(f"no real data given: {phantoms} phantom volumes, seed {args.seed} (DEMO = {DEMO})", flush=True)
        root = args.out.parent / "phantoms" / f"{phantoms}_seed{args.seed}"
        try:
            rex, ct_rate = write_phantoms(root, phantoms, args.seed, args.workers or os.cpu_count() or 1)
        except OSError as error:
            raise BadInput(f"{root}: cannot be written: {error.strerror}") from error
    for folder in (rex, ct_rate):
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        if folder.resolve().is_relative_to(args.out.resolve()):
            raise BadInput(f"{folder}: lies in --out, where files are replaced; choose another --out")
    settings = Settings(
        max_slices=args.max_slices,
        cap=args.cap,
        min_box_fraction=args.min_box_fraction,
        test_fraction=args.test_fraction,
        window=tuple(args.window),
        seed=args.seed,
        phantoms=phantoms,
        dataset_sha256=hashlib.sha256(read_bytes(rex / "dataset.json")).hexdigest(),
    )
    info = make_dataset(rex, ct_rate, args.out, settings, args.workers, args.strict, args.overwrite)
    for part in info["records"]:
        counts = [f"{info[what][part]:,} {what}" for what in ("records", "slices", "volumes", "patients")]
        print(f"{part}: {', '.join(counts)}")
    print(f"{len(info['skipped'])} skipped; see overview.png and dataset_info.json in {args.out}")


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    run_stage(run, parse_arguments(argv))


if __name__ == "__main__":
    main()
