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

The output folder is the twin of the input: the same records and ids, one RGB picture a record. A run that was
interrupted goes on where it stopped when the same command is given again.
"""

import argparse
import hashlib
import io
import json
import math
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw

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
from support.pool import parallel

SPLITS = ("train", "test")
CHUNK = 64  # records a job: large enough that handing jobs to the workers costs nothing


def crop_square(size: tuple[int, int], box: list[int], margin: float) -> tuple[int, int, int, int]:
    """The square (x0, y0, x1, y1), px, that the patch shows of a picture of `size` (width, height).

    Its side is the longer side of `box` times 1 + 2 * margin: a square, so that the anatomy is not distorted, however
    long and thin the box. It lies around the box's centre; at the picture's edge it is shifted inside; a large one
    gives up margin to fit. Only a box longer than the picture's shorter side makes it reach over that side's both edges
    alike (the crop is black there). The box is always whole inside it.
    """
    longest = max(box[2] - box[0], box[3] - box[1])
    side = math.ceil(longest * (1 + 2 * margin))
    side = min(side, max(longest, min(size)))
    corner = []
    for low, high, length in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        start = (low + high - side) // 2
        corner.append((length - side) // 2 if side > length else min(max(start, 0), length - side))
    return corner[0], corner[1], corner[0] + side, corner[1] + side


def patch_side(size: tuple[int, int], patch: float) -> int:
    """The patch's side in px, its green border included: `patch` times the shorter side of the picture."""
    return round(patch * min(size))


def zoom_patch(picture: Image.Image, box: list[int], side: int, margin: float, border: float) -> Image.Image:
    """The framed patch, RGB, side x side px: a green border of `border` * side (at least 1 px) around the bicubic crop.

    The crop is resized to the space within the border, which hides nothing of it.
    """
    width = max(1, round(border * side))
    inner = side - 2 * width
    crop = picture.convert("RGB").crop(crop_square(picture.size, box, margin))
    framed = Image.new("RGB", (side, side), (0, 255, 0))
    framed.paste(crop.resize((inner, inner), Image.Resampling.BICUBIC), (width, width))
    return framed


def augment(
    picture: Image.Image, box: list[int], patch: float = 0.4, margin: float = 0.25, border: float = 0.03
) -> Image.Image:
    """A copy of `picture` (any mode, clean) as RGB, with the zoomed patch and the red location box.

    `box` is [x0, y0, x1, y1] in px, end-exclusive; `patch` a fraction of the shorter side, 0 for no patch; `margin` a
    fraction of the box's longer side, added on each side; `border` a fraction of the patch's side. The red line lies
    outside the box, on it only where the picture ends; it is drawn last, so the patch never hides it (though the patch
    may hide the lesion itself, which is then seen in the patch only). Raises BadInput for a box that is not in the
    picture and for a patch too small to see. Source: paper, Section 3.2.
    """
    width, height = picture.size
    if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise BadInput(f"the box {list(box)} does not lie in the picture of {width} x {height} px")
    result = picture.convert("RGB")
    if patch:
        side = patch_side(picture.size, patch)
        if side - 2 * max(1, round(border * side)) < 8:
            raise BadInput(f"a patch of {side} px leaves fewer than 8 px within its border; raise --patch")
        result.paste(zoom_patch(picture, box, side, margin, border), (0, 0))
    line = max(1, round(min(picture.size) / 256))  # 1 px on the demo's slices, 2 px on a 512 px one
    outline = (
        max(box[0] - line, 0),
        max(box[1] - line, 0),
        min(box[2] - 1 + line, width - 1),  # PIL's rectangle includes its last pixel
        min(box[3] - 1 + line, height - 1),
    )
    ImageDraw.Draw(result).rectangle(outline, outline=(255, 0, 0), width=line)
    return result


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
    data: Path, out: Path, patch: float = 0.4, margin: float = 0.25, border: float = 0.03, workers: int = 0
) -> dict:
    """Makes (or completes) `out`, the augmented twin of 01's folder `data`, and returns its dataset_info.

    The output is the same bytes for any number of `workers` (0: one a core), interrupted or not. Raises BadInput.
    """
    info = dataset_info(data)
    if info["stage"] != "01":
        raise BadInput(f"{data}: has been augmented already; --data needs the folder that 01_make_dataset.py wrote")
    if out.resolve() == data.resolve():
        raise BadInput(f"{out}: --out must be another folder than --data")
    records = {split: read_records(data, split) for split in SPLITS}
    for record in (record for split in SPLITS for record in records[split]):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", record["id"]):
            raise BadInput(f"{data}: the id {record['id']!r:.80} cannot be a file name; use letters, digits, . _ -")
    files = [data / "dataset_info.json", *(data / split / "metadata.jsonl" for split in SPLITS)]
    source = hashlib.sha256(b"".join(map(read_bytes, files))).hexdigest()
    zoom = {"patch": patch, "margin": margin, "border": border}
    open_work(out, {**zoom, "source_sha256": source}, "02_zoom_augment.py")

    jobs = [
        (records[split][i : i + CHUNK], out / split, patch, margin, border)
        for split in SPLITS
        for i in range(0, len(records[split]), CHUNK)
    ]
    new = {record["id"]: record for done in parallel(augment_records, jobs, workers, "records") for record in done}
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
    add("--workers", type=int, default=0, metavar="K", help="processes; 0 is one a core (default)")
    args = parser.parse_args(argv)
    if not (0 < args.patch <= 1 and 0 <= args.margin <= 10 and 0 < args.border < 0.5 and args.workers >= 0):
        parser.error("--patch must be in (0, 1], --margin in [0, 10], --border in (0, 0.5), --workers 0 or more")
    if args.no_patch:
        args.patch = 0.0
    if args.out is None:
        args.out = Path("data/ct_rate_vqa_nopatch" if args.no_patch else "data/ct_rate_vqa_zoom")
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1, Ctrl-C in exit code 130."""
    args = parse_arguments(argv)
    try:
        info = augment_dataset(args.data, args.out, args.patch, args.margin, args.border, args.workers)
    except BadInput as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(f"{args.out}: {info['records']} records; see overview.png; next: 03_sft.py --data {args.out}")


if __name__ == "__main__":
    main()
