"""Stage 02: slices and boxes -> the same slices with a zoomed patch of the lesion (paper, Section 3.2).

A lesion is small beside the slice it lies in. The paper therefore crops it, enlarges it to a fixed size, frames it in
green and puts it in the upper-left corner: the model sees the lesion's detail and the whole chest in one picture.

    +-------+-----------+      patch: a square around the lesion's box, a margin wider than the box, with `--patch` of
    | patch |           |             the slice's shorter side as its side
    +-------+  slice    |      red:   the lesion's box. It is in every picture, with the patch or without, because a
    |         +---+     |             slice with two findings would otherwise be one picture with two right answers
    |         |red|     |
    +---------+---+-----+      The paper gives no sizes: --patch, --margin and --border are our assumptions.

    python 02_zoom_augment.py                                                   with the patch
    python 02_zoom_augment.py --no-patch --out data/ct_rate_vqa_nopatch         Table 3's "None" arm
    python 02_zoom_augment.py --data data/real --out data/real_zoom --workers 32

The drawing is in support/zoom.py, which 05_eval.py --image shares; this script draws a whole dataset. The output folder
is the twin of the input: the same records and ids, one RGB picture a record. A run that was
interrupted goes on where it stopped when the same command is given again.
"""

import argparse
import hashlib
import io
import json
import re
from contextlib import closing
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from rewards import CLASSES
from support.files import (
    BadInput,
    dataset_info,
    inside,
    open_picture,
    open_work,
    png_bytes,
    read_bytes,
    read_records,
    write_atomic,
)
from support.pool import parallel, run_stage
from support.zoom import augment, crop_square, patch_side, zoom_patch  # noqa: F401 (drawing, this stage's heart)

SPLITS = ("train", "test")
CHUNK = 64  # records a job: large enough that handing jobs to the workers costs nothing


def augment_records(records: list[dict], folder: Path, patch: float, margin: float, border: float) -> list[dict]:
    """Writes the pictures of some records under `folder`/images, unless they are there; returns their new records."""
    done = []
    for record in records:
        try:
            picture = open_picture(record["image"])
            target = inside(folder, f"images/{record['id']}.png")
            if not target.exists():  # it appeared by rename: what is there is whole
                write_atomic(target, png_bytes(augment(picture, record["box"], patch, margin, border)))
        except BadInput as error:
            raise BadInput(f"record {record['id']}: {error}") from error
        new = {key: value for key, value in record.items() if key != "image"}
        done.append({**new, "file_name": f"images/{target.name}", "patch": patch_side(picture.size, patch)})
    return done


def augment_dataset(
    data: Path,
    out: Path,
    patch: float = 0.4,
    margin: float = 0.25,
    border: float = 0.03,
    workers: int = 0,
    overwrite: bool = False,
) -> dict:
    """Makes (or completes) `out`, the augmented twin of 01's folder `data`, and returns its dataset_info.

    The output is the same bytes for any number of `workers` (0: one a core), interrupted or not. Raises BadInput.
    """
    info = dataset_info(data)
    if info["stage"] != "01":
        raise BadInput(f"{data}: has been augmented already; --data needs the folder that 01_make_dataset.py wrote")
    if data.resolve().is_relative_to(out.resolve()):
        raise BadInput(f"{out}: --out must be another folder than --data, and not around it")
    records = {split: read_records(data, split) for split in SPLITS}
    for record in (record for split in SPLITS for record in records[split]):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", record["id"]):
            raise BadInput(f"{data}: the id {record['id']!r:.80} cannot be a file name; use letters, digits, . _ -")
    files = [data / "dataset_info.json", *(data / split / "metadata.jsonl" for split in SPLITS)]
    source = hashlib.sha256(b"".join(map(read_bytes, files))).hexdigest()
    zoom = {"patch": patch, "margin": margin, "border": border}
    open_work(out, {**zoom, "source_sha256": source}, "02_zoom_augment.py", overwrite)

    jobs = [
        (records[split][i : i + CHUNK], out / split, patch, margin, border)
        for split in SPLITS
        for i in range(0, len(records[split]), CHUNK)
    ]
    with closing(parallel(augment_records, jobs, workers, "records")) as finished:
        new = {record["id"]: record for done in finished for record in done}
    for split in SPLITS:
        lines = [json.dumps(new[record["id"]]) + "\n" for record in records[split]]
        write_atomic(out / split / "metadata.jsonl", "".join(lines))
        for stray in (out / split).glob("images/*.tmp"):  # left by an interrupted run
            stray.unlink()
    write_atomic(out / "overview.png", draw_overview(records, new, out))
    info = {**info, "stage": "02", "zoom": zoom}
    write_atomic(out / "dataset_info.json", json.dumps(info, indent=1))
    return info


def draw_overview(records: dict[str, list[dict]], new: dict[str, dict], out: Path) -> bytes:
    """overview.png: for each class one record, its slice before and after."""
    figure = Figure(figsize=(16, 5), layout="constrained")
    axes = figure.subplots(2, len(CLASSES))
    for column, label in zip(axes.T, CLASSES, strict=True):
        own = [(split, record) for split in SPLITS for record in records[split] if record["label"] == label]
        if own:
            split, record = own[len(own) // 2]
            after = new[record["id"]]
            column[0].imshow(Image.open(record["image"]).convert("RGB"), interpolation="nearest")
            column[1].imshow(Image.open(out / split / after["file_name"]), interpolation="nearest")
            column[1].set_title(record["id"], fontsize=7, pad=2)
        column[0].set_title(label, fontsize=9)
        for axis in column:
            axis.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/ct_rate_vqa"), help="01's folder (default data/ct_rate_vqa)")
    add("--out", type=Path, help="new folder (default data/ct_rate_vqa_zoom; with --no-patch data/ct_rate_vqa_nopatch)")
    add("--patch", type=float, default=0.4, help="patch side as a fraction of the slice's shorter side (default 0.4)")
    add("--no-patch", action="store_true", help='draw the red box only: the "None" arm of Table 3')
    add("--margin", type=float, default=0.25, help="added around the box, a fraction of its longer side (default 0.25)")
    add("--border", type=float, default=0.03, help="green border as a fraction of the patch's side (default 0.03)")
    add("--overwrite", action="store_true", help="replace what another run, or other settings, left in --out")
    add("--workers", type=int, default=0, metavar="K", help="processes; 0 is one a core (default)")
    args = parser.parse_args(argv)
    if not (0 < args.patch <= 1 and 0 <= args.margin <= 10 and 0 < args.border < 0.5 and args.workers >= 0):
        parser.error("--patch must be in (0, 1], --margin in [0, 10], --border in (0, 0.5), --workers 0 or more")
    if args.no_patch:
        args.patch = 0.0
    if args.out is None:
        args.out = Path("data/ct_rate_vqa_nopatch" if args.no_patch else "data/ct_rate_vqa_zoom")
    return args


def run(args: argparse.Namespace) -> None:
    zoom = (args.patch, args.margin, args.border)
    info = augment_dataset(args.data, args.out, *zoom, args.workers, args.overwrite)
    print(f"{args.out}: {info['records']} records; see overview.png; next: 03_sft.py --data {args.out}")


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    run_stage(run, parse_arguments(argv))


if __name__ == "__main__":
    main()
