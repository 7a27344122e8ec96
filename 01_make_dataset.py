"""Stage 01: CT volumes and lesion masks -> slices, lesion boxes and questions (paper, Section 2.1).

ReXGroundingCT gives a mask for each finding of a radiology report; CT-RATE gives the CT. From each
volume this script takes the slices that show a finding, and asks of each: what does this lesion's
box show? In the order of this file:

    1. patients   14 categories become seven classes; patients are divided 8:2
    2. boxes      connected components in each slice of the mask; boxes above 1300 px are kept
    3. slices     at most 20 of a finding's eligible slices, evenly spaced
    4. pictures   anterior at the top, the patient's right on the left, lung window, 8-bit PNG

Without real data it makes synthetic chests ("phantoms") in the same formats and uses those:

    python 01_make_dataset.py                       the demo, half a minute
    python 01_make_dataset.py --rexgroundingct /data/rex --list-ct > ct.txt   which CTs to download
    python 01_make_dataset.py --rexgroundingct /data/rex --ct-rate /data/ct --out data/ct_rate_vqa
    ... --index /data/rex/MICCAI_challenge_dataset.json --out data/challenge    to test on alone

The paper: 3,042 volumes, 68,581 training and 15,507 test slices. The same command goes on where an
interrupted one stopped. --out is for datasets.load_dataset("imagefolder", data_dir=...): train/ and
test/ hold images and metadata.jsonl, one line per record, which is one finding on one slice:

    file_name, id, volume, patient   the picture, and whose it is
    slice, finding                   counted from the feet, and its number in the report
    box, boxes                       [x0, y0, x1, y1] in px, end-exclusive: the largest, and all
    slice_boxes                      those of every finding on the slice, also without a class
    category, label, text            ReXGroundingCT's code, its class, the report's sentence
    question, answer                 see rewards.py

overview.png shows examples. dataset_info.json holds the settings, the counts per split, left_out
(findings without a class), too_small (without a box above the limit) and skipped, with reasons.
"""

from support.stage import run_stage  # isort: skip  (first, see support/__init__.py)
import argparse
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import scipy  # scipy.ndimage is loaded at its first use
from PIL import Image

from assets.phantom import write_phantoms
from rewards import CLASSES, QUESTION, area, target
from support.files import (
    MIN_SIDE,
    BadInput,
    claim,
    keep,
    kept,
    open_picture,
    png_bytes,
    read_bytes,
    write_atomic,
)
from support.log import draw_box, save_figure
from support.nifti import Nifti, picture_planes, read_header, read_slabs
from support.records import OUTPUTS, write_records
from support.rexgroundingct import (
    Case,
    choose_cases,
    ct_rate_path,
    fault,
    find_ct,
    finding_axis,
    report_skipped,
)
from support.stage import bounded, finite, fraction, natural, parallel, positive_int

DEMO = {"phantoms": 360}
# The flags that decide the output; kept with it, so that a folder never mixes two settings.
DECIDING = ("max_slices", "cap", "min_box_fraction", "test_fraction", "window", "seed")

# The paper names the seven classes but not which category goes where: this is our reading.
CLASS_OF = {  # None = left out
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


@dataclass
class Result:
    """What one volume gave; its file in .work marks the volume as finished."""

    volume: str
    records: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # category codes
    too_small: int = 0


# ==== 1. Patients ====


def split_patients(patients: set[str], test_fraction: float, seed: int) -> dict[str, str]:
    """patient -> "train" or "test": a seeded shuffle, the first are test (paper, Section 3.1).

    Patients whose volumes turn out unusable take part, so that the split stays when a broken
    download is mended. With two patients or more neither side is empty, unless it is asked for.
    """
    order = sorted(patients)
    random.Random(seed).shuffle(order)
    count = round(test_fraction * len(order))
    if 0 < test_fraction < 1 and len(order) > 1:
        count = min(max(count, 1), len(order) - 1)
    return {patient: "test" if i < count else "train" for i, patient in enumerate(order)}


# ==== 2. Boxes ====


def to_picture_axes(affine: np.ndarray) -> np.ndarray:
    """nibabel's orientation transform from a CT file's axes to [slice, row, column].

    These run to the head, to the back and to the patient's left, as radiologists look at it.
    `affine`, [4, 4] to RAS+ mm, may be oblique: each axis counts as its nearest. Raises BadInput.
    """
    if affine is None:
        raise BadInput("neither sform nor qform: the orientation is unknown")
    known = np.isfinite(affine).all()
    axes = nib.orientations.io_orientation(affine) if known else np.array(np.nan)
    if np.isnan(axes).any():  # nibabel cannot place an axis
        raise BadInput("the affine is not finite or is singular: the orientation is unknown")
    return nib.orientations.ornt_transform(axes, nib.orientations.axcodes2ornt(("S", "P", "L")))


def find_boxes(lesion: np.ndarray, min_area: float, left: int = 0, top: int = 0) -> list[list[int]]:
    """Boxes [x0, y0, x1, y1] (px, end-exclusive) of the 8-connected components of `lesion`.

    `lesion`, bool [rows, columns], is the part of a picture from column `left` and row `top` on.
    Kept are areas strictly above `min_area` px, the largest first, ties from the left.
    """
    labels, _ = scipy.ndimage.label(lesion, EIGHT_CONNECTED)
    boxes = []
    for y, x in scipy.ndimage.find_objects(labels):
        box = [left + x.start, top + y.start, left + x.stop, top + y.stop]
        if area(box) > min_area:
            boxes.append(box)
    return sorted(boxes, key=lambda box: (-area(box), box))


def boxes_by_slice(planes: Iterable, findings: int, min_fraction: float) -> tuple[list, np.ndarray]:
    """{slice: boxes} per finding, and whether it has any voxel, bool [finding].

    `planes` yields (slice, bool [row, column, finding]); kept are boxes above `min_fraction` of it.
    """
    boxes = [{} for _ in range(findings)]
    present = np.zeros(findings, bool)
    for k, plane in planes:
        columns = plane.any(axis=0)  # [column, finding]
        rows = np.flatnonzero(plane.any(axis=(1, 2)))
        here = columns.any(axis=0)  # [finding]
        present |= here
        for f in np.flatnonzero(here):
            # Searching only the rows and columns that hold lesions saves a tenth of the run.
            x = np.flatnonzero(columns[:, f])
            part = plane[rows[0] : rows[-1] + 1, x[0] : x[-1] + 1, f]
            min_area = min_fraction * plane[..., f].size
            found = find_boxes(part, min_area, int(x[0]), int(rows[0]))
            if found:
                boxes[f][k] = found
    return boxes, present


# ==== 3. Slices ====


def evenly_spaced(items: list, count: int) -> list:
    """The middles of `count` equal parts of `items`: (range(9), 3) gives [1, 4, 7]."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def choose_slices(boxes: list[dict], cap: str, count: int) -> list[tuple[int, int]]:
    """The (slice, finding) pairs that become records, sorted.

    "Each case is capped at 20 slices": a case is a finding (its 10.8 slices fit the paper's counts)
    or, with `cap` "volume", a volume, of which every finding on a chosen slice is kept.
    """
    shared = evenly_spaced(sorted(set().union(*boxes)), count)
    chosen = []
    for f, found in enumerate(boxes):
        slices = shared if cap == "volume" else evenly_spaced(sorted(found), count)
        chosen += [(k, f) for k in slices if k in found]
    return sorted(chosen)


# ==== 4. Pictures ====


def apply_window(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """HU -> uint8: 0 up to centre - width/2, 255 from centre + width/2, linear between, rounded."""
    centre, width = window
    gray = np.clip((hu - (centre - width / 2)) / width, 0, 1)
    return np.rint(gray * 255).astype(np.uint8)


def read_pictures(ct: Nifti, transform: np.ndarray, slices: set[int], window) -> dict:
    """{slice: uint8 [row, column]} of a CT; the file is checked to its end. Raises BadInput."""
    pictures = {}
    for k, plane in picture_planes(read_slabs(ct), ct.shape, None, transform):
        if k in slices:
            pictures[k] = apply_window(ct.scale(plane[..., 0]), window)
    if any(min(picture.shape) < MIN_SIDE for picture in pictures.values()):
        raise BadInput(f"{ct.path}: the slices are smaller than {MIN_SIDE} px")
    return pictures


# ==== 5. One volume ====


def build_volume(case: Case, rex: Path, ct_rate: Path, folder: Path, settings: dict) -> Result:
    """Makes one volume's pictures and records; an unusable one is skipped, to be tried again."""
    result = Result(case.volume)
    try:
        ct = read_header(find_ct(ct_rate, case))
        mask = read_header(rex / "segmentations" / case.name)
        if ct.shape != case.shape:
            raise BadInput(f"{ct.path}: shape {ct.shape}, but the index says {case.shape}")
        transform = to_picture_axes(ct.affine)
        # Each entity of a finding has its own number: lesion is "> 0". The mask lies on the CT's
        # voxel grid; its own affine is not to be trusted.
        lesions = (mask.scale(slab) > 0 for slab in read_slabs(mask))
        axis = finding_axis(mask.shape, case)
        planes = picture_planes(lesions, mask.shape, axis, transform)
        boxes, present = boxes_by_slice(planes, len(case.keys), settings["min_box_fraction"])
        every = [dict(found) for found in boxes]
        drop_findings(case, mask.path, boxes, present, result)
        chosen = choose_slices(boxes, settings["cap"], settings["max_slices"])
        slices = {k for k, _ in chosen}
        pictures = read_pictures(ct, transform, slices, settings["window"]) if slices else {}
    except BadInput as error:
        for stray in folder.glob(f"images/{case.volume}_s????.png"):  # of an interrupted run
            stray.unlink()
        return Result(case.volume, skipped=[fault(case.volume, None, str(error))])
    for k, picture in pictures.items():
        path = folder / "images" / f"{case.volume}_s{k:04d}.png"
        write_atomic(path, png_bytes(Image.fromarray(picture)))
    for k, f in chosen:
        around = [box for found in every for box in found.get(k, [])]
        result.records.append(make_record(case, k, f, boxes[f][k], around))
    keep(folder.parent / f".work/{case.volume}.json", asdict(result))  # last: it means finished
    return result


def drop_findings(case: Case, mask: Path, boxes: list, present: np.ndarray, result: Result) -> None:
    """Empties `boxes` of each finding that belongs to no class; `result` says what is not used."""
    for f, (key, category) in enumerate(zip(case.keys, case.categories, strict=True)):
        if CLASS_OF.get(category) is None:
            boxes[f] = {}
        if category not in CLASS_OF:
            reason = f"unknown category {category!r:.40}"
            result.skipped.append(fault(case.volume, key, reason))
        elif CLASS_OF[category] is None:
            result.left_out.append(category)
        elif not present[f]:
            result.skipped.append(fault(case.volume, key, f"{mask}: empty mask"))
        elif not boxes[f]:
            result.too_small += 1


def make_record(case: Case, k: int, f: int, boxes: list[list[int]], around: list) -> dict:
    """One line of metadata.jsonl: finding `f` on slice `k`. Its keys are explained above."""
    label = CLASS_OF[case.categories[f]]
    return {
        "file_name": f"images/{case.volume}_s{k:04d}.png",
        "id": f"{case.volume}_s{k:04d}_f{case.keys[f]}",
        "volume": case.volume,
        "patient": case.patient,
        "slice": k,
        "finding": int(case.keys[f]),
        "box": boxes[0],
        "boxes": boxes,
        "slice_boxes": around,
        "category": case.categories[f],
        "label": label,
        "text": case.texts[f],
        "question": QUESTION,
        "answer": target(label),
    }


def read_result(folder: Path, case: Case) -> Result | None:
    """What an earlier run kept of a volume; None unless all its pictures are there."""
    fields = kept(folder.parent / f".work/{case.volume}.json")
    if fields and all((folder / row["file_name"]).is_file() for row in fields["records"]):
        return Result(**fields)
    return None


# ==== 6. The folder ====


def count_records(records: dict[str, list[dict]]) -> dict[str, dict]:
    """How many volumes, patients, slices, records, and records of each class are in each split."""
    counts = {"volumes": {}, "patients": {}, "slices": {}, "records": {}, "classes": {}}
    for split, rows in records.items():
        counts["volumes"][split] = len({row["volume"] for row in rows})
        counts["patients"][split] = len({row["patient"] for row in rows})
        counts["slices"][split] = len({row["file_name"] for row in rows})
        counts["records"][split] = len(rows)
        labels = Counter(row["label"] for row in rows)
        counts["classes"][split] = {label: labels[label] for label in CLASSES}
    return counts


def draw_overview(out: Path, records: dict[str, list[dict]]) -> None:
    """overview.png: up to three volumes per class with their boxes, and the records per class."""
    from matplotlib.figure import Figure  # here: it takes most of a second to import

    figure = Figure(figsize=(14, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[3, 1.1])
    axes = upper.subplots(3, len(CLASSES))
    for column, label in zip(axes.T, CLASSES, strict=True):
        draw_examples(column, label, out, records)
    axis = lower.subplots()
    for i, (split, rows) in enumerate(records.items()):
        counts = count_records(records)["classes"][split].values()
        places = [c + 0.4 * i - 0.2 for c in range(len(CLASSES))]
        bars = axis.bar(places, list(counts), 0.38, label=f"{split}: {len(rows):,}")
        axis.bar_label(bars, fontsize=8)
    axis.set_xticks(range(len(CLASSES)), CLASSES, fontsize=8)
    axis.set_ylabel("records")
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save_figure(out / "overview.png", figure)


def draw_examples(axes, label: str, out: Path, records: dict[str, list[dict]]) -> None:
    """Up to three volumes of one class, each by its record with the largest box."""

    largest = {}  # volume -> (split, record)
    for split, rows in records.items():
        for row in sorted(rows, key=lambda row: area(row["box"])):
            if row["label"] == label:
                largest[row["volume"]] = split, row
    for axis in axes:
        axis.axis("off")
    for axis, volume in zip(axes, evenly_spaced(sorted(largest), 3), strict=False):
        split, record = largest[volume]
        axis.imshow(open_picture(out / split / record["file_name"]), cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"{volume}, slice {record['slice']}", fontsize=7, pad=2)
        for box in record["boxes"]:
            draw_box(axis, box, "red")
    axes[0].set_title(f"{label}\n{axes[0].get_title()}", fontsize=8, pad=2)


# ==== 7. Flags ====


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("input").add_argument
    add("--rexgroundingct", type=Path, metavar="DIR", help="with dataset.json and segmentations/")
    add("--ct-rate", type=Path, metavar="DIR", help="CTs: CT-RATE's own tree, or one flat folder")
    volumes = bounded(int, 1, 100_000, "a whole number from 1 to 100,000")
    add("--index", type=Path, metavar="FILE", help="test on its val patients new to dataset.json")
    add("--phantoms", type=volumes, metavar="N", help="synthetic volumes (default 360)")
    add("--list-ct", action="store_true", help="print the index's CT-RATE paths, and stop")
    add = parser.add_argument_group("what is kept").add_argument
    add("--max-slices", type=positive_int, default=20, metavar="N", help="per case (paper: 20)")
    add("--cap", choices=("finding", "volume"), default="finding", help="what is a case (finding)")
    text = "boxes larger than this share of the slice (the paper and default: 1300/512**2)"
    add("--min-box-fraction", type=fraction, default=1300 / 512**2, metavar="F", help=text)
    add("--test-fraction", type=fraction, default=0.2, metavar="F", help="of patients (paper: 0.2)")
    add("--window", type=finite, nargs=2, default=(-600, 1500), metavar="HU", help="centre, width")
    add("--seed", type=natural, default=0, help="of the patient split and of the phantoms (0)")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("data/ct_rate_vqa"), help="dataset folder (%(default)s)")
    add("--overwrite", action="store_true", help="replace what other settings left in --out")
    add("--workers", type=natural, default=0, metavar="K", help="processes (0, default: per core)")
    add("--strict", action="store_true", help="stop at the first bad volume or finding")
    args = parser.parse_args(argv)
    real = [args.rexgroundingct, args.ct_rate]
    if (args.list_ct or args.index) and args.rexgroundingct is None:
        parser.error("--list-ct and --index need --rexgroundingct")
    if real.count(None) == 1 and not args.list_ct:
        parser.error("--rexgroundingct and --ct-rate go together: masks are useless without CTs")
    if real.count(None) < 2 and args.phantoms:
        parser.error("--phantoms is for running without real data")
    if args.window[1] <= 0:
        parser.error("--window: the width must be above 0")
    return args


# ==== 8. The stage ====


def build(args: argparse.Namespace) -> None:
    """Builds or completes --out: the same bytes for any number of workers, interrupted or not."""
    rex, ct_rate, count = args.rexgroundingct, args.ct_rate, 0
    if args.list_ct:
        cases, skipped = choose_cases(rex, args.index)
        report_skipped(skipped, args.strict)
        print(*map(ct_rate_path, cases), sep="\n")
        return
    if rex is None:
        count = args.phantoms or DEMO["phantoms"]
        print(f"no real data given: {count} phantoms, seed {args.seed} (DEMO = {DEMO})", flush=True)
        root = args.out.parent / "phantoms" / f"{count}_seed{args.seed}"
        rex, ct_rate = write_phantoms(root, count, args.seed, args.workers)
    index = args.index or rex / "dataset.json"
    settings = {name: getattr(args, name) for name in DECIDING} | {"phantoms": count}
    settings["dataset_sha256"] = hashlib.sha256(read_bytes(index)).hexdigest()
    cases, skipped = choose_cases(rex, args.index)
    split_of = split_patients({case.patient for case in cases}, args.test_fraction, args.seed)
    if args.index:  # for testing, and not mixed into training
        split_of = dict.fromkeys(split_of, "test")
        settings["index"] = index.name
    record = {"script": "01_make_dataset.py", **settings}
    claim(args.out, record, OUTPUTS, overwrite=args.overwrite, inputs=(rex, ct_rate))
    report_skipped(skipped, args.strict)
    results, jobs = [], []
    for case in cases:
        folder = args.out / split_of[case.patient]
        result = read_result(folder, case)
        if result is None:
            jobs.append((case, rex, ct_rate, folder, settings))
        else:
            report_skipped(result.skipped, args.strict)
            results.append(result)
    with closing(parallel(build_volume, jobs, args.workers, "volumes")) as finished:
        for result in finished:
            report_skipped(result.skipped, args.strict)
            results.append(result)

    records, left_out, too_small = {"train": [], "test": []}, Counter(), 0
    for result in sorted(results, key=lambda result: result.volume):
        for row in result.records:
            records[split_of[row["patient"]]].append(row)
        skipped += result.skipped
        left_out.update(result.left_out)
        too_small += result.too_small
    if not any(records.values()):
        raise BadInput(f"{rex}: no usable record in {len(cases)} volumes ({len(skipped)} skipped)")
    for split, rows in records.items():
        write_records(args.out / split, rows)
    draw_overview(args.out, records)
    counts = count_records(records)
    info = {"stage": "01", "phantoms": bool(count), "settings": settings, **counts}
    info |= {"left_out": dict(sorted(left_out.items())), "too_small": too_small, "skipped": skipped}
    write_atomic(args.out / "dataset_info.json", json.dumps(info, indent=1))
    for split in records:
        kinds = ("records", "slices", "volumes", "patients")
        print(f"{split}: {', '.join(f'{counts[kind][split]:,} {kind}' for kind in kinds)}")
    print(f"{len(skipped)} skipped; see overview.png and dataset_info.json in {args.out}")


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    run_stage(lambda: build(parse_args(argv)))


if __name__ == "__main__":
    main()
