"""Stage 02: slices and boxes -> the same slices with a zoomed patch (Section 2.1, second half).

A lesion is small beside the slice it lies in. The paper therefore crops it, enlarges it to a fixed
size, frames it in green and puts it in the upper-left corner: the model sees the lesion's detail
and the whole chest in one picture.

    +-------+-----------+    patch: a square around the lesion's box, a margin wider than the box;
    | patch |           |           its side is `--patch` of the slice's shorter side
    +-------+  slice    |    red:   the lesion's box, in every picture, with the patch or without:
    |         +---+     |           a slice with two findings would otherwise be one picture with
    |         |red|     |           two right answers
    +---------+---+-----+    The paper gives no sizes: --patch, --margin and --border are ours.

    python 02_zoom_augment.py                                              with the patch
    python 02_zoom_augment.py --no-patch --out data/ct_rate_vqa_nopatch    Table 3's "None" arm
    python 02_zoom_augment.py --data data/real --out data/real_zoom --workers 32
    python 02_zoom_augment.py --image slice.png --box 60 70 90 95 --out zoomed.png    one picture

The boxes are the annotators'. What does a wrong one cost? Evaluate a model on these, too:

    python 02_zoom_augment.py --jitter 0.5    red and patch: a box that has an IoU of 0.5 with it
    python 02_zoom_augment.py --whole         no box: red and patch take the whole slice

Without annotators a model must find the lesion first: it learns that on clean slices (03 and 04
with --task locate), and the boxes that it predicts are drawn in place of theirs:

    python 02_zoom_augment.py --clean                         neither red box nor patch
    python 02_zoom_augment.py --boxes runs/where/boxes.jsonl  what 05 --task locate wrote

The patch hides the front of one lung, at times the lesion itself; `--patch-corner auto` puts it
where it hides least of the box, as far from it as can be.

--out is the twin of --data, the same records and ids, but with one RGB picture per record: of 01's
keys only file_name changes, and patch is added, the patch's side in px (0: none). Where another box
is drawn than the record's own, which stays, drawn_box is added. With --clean, question and answer
are those of locating (the box in px of the slice; 03 writes it on the model's own grid), and boxes
all of the slice, the record's own first; with --name-finding the question has the report's words,
and boxes are those of this finding. Of --boxes only the records
that the file names are drawn; where it has no box, the whole slice is taken. dataset_info.json
gets the flags as "zoom" and, of a folder with patches, "patch_statistics":

    magnification    min, quartiles and max over the records: the patch's inner side / the crop's
    shrunk           share of records magnified less than once: the patch shows less, not more
    box_touched      share of records whose box, as drawn, lies at least in part under the patch
    box_half_hidden  share of records whose box, as drawn, lies by more than half under the patch

overview.png shows a slice of each class before and after. The same command goes on where an
interrupted one stopped.
"""

from support.stage import run_stage  # isort: skip  (first, see support/__init__.py)
import argparse
import hashlib
import json
import math
import os
import re
from contextlib import closing
from pathlib import Path

from PIL import Image, ImageDraw

from rewards import CLASSES, area, shared_area
from support.files import (
    BadInput,
    claim,
    inside,
    open_picture,
    png_bytes,
    read_bytes,
    write_atomic,
)
from support.grounding import ask_where, jitter_box, read_boxes
from support.log import save_figure
from support.records import OUTPUTS, SPLITS, dataset_info, read_records, write_records
from support.stage import fraction, natural, non_negative, parallel

CHUNK = 64  # records per job: large enough that handing jobs to the workers costs nothing
RED, GREEN = (255, 0, 0), (0, 255, 0)


# ==== 1. The box ====


def check_box(size: tuple[int, int], box: list[int]) -> None:
    """Raises BadInput unless `box` lies in a picture of `size` (width, height)."""
    width, height = size
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise BadInput(f"the box {list(box)} does not lie in the picture of {width} x {height} px")


def box_to_draw(size: tuple[int, int], record: dict, instead: dict) -> list[int]:
    """The box that red line and patch are drawn from.

    `instead` is {"jitter": IoU}, {"whole": True}, {"boxes": a digest} for the record's drawn_box,
    or empty for its own box. Raises BadInput when a box does not lie in the picture of `size`.
    """
    check_box(size, record["box"])
    if "boxes" in instead and record["drawn_box"]:
        check_box(size, record["drawn_box"])
        return record["drawn_box"]
    if "whole" in instead or "boxes" in instead:
        return [0, 0, *size]
    if "jitter" in instead:
        return jitter_box(size, record["box"], instead["jitter"], record["id"])
    return record["box"]


# ==== 2. The patch ====


def crop_square(size: tuple[int, int], box: list[int], margin: float) -> tuple[int, int, int, int]:
    """The square (x0, y0, x1, y1), px, that the patch shows of a picture of `size` (width, height).

    Its side is the longer side of `box` times 1 + 2 * margin: a square, so that the anatomy is not
    distorted, however long and thin the box. It lies around the box's centre; at the picture's edge
    it is shifted inside; a large one gives up margin to fit. The square of a box longer than the
    picture's shorter side reaches as far beyond its one edge as beyond the other, and the crop is
    black there. The box is always whole inside it.
    """
    width, height = size
    longest = max(box[2] - box[0], box[3] - box[1])
    side = math.ceil(longest * (1 + 2 * margin))
    side = min(side, max(longest, min(size)))

    def start(low: int, high: int, length: int) -> int:
        if side > length:
            return (length - side) // 2
        return min(max((low + high - side) // 2, 0), length - side)

    x, y = start(box[0], box[2], width), start(box[1], box[3], height)
    return x, y, x + side, y + side


def patch_side(size: tuple[int, int], patch: float) -> int:
    """The patch's side in px, its border included: `patch` times the picture's shorter side."""
    return round(patch * min(size))


def inner_side(side: int, border: float) -> int:
    """The side of what a patch of `side` px shows within its border, px. Raises BadInput."""
    inner = side - 2 * max(1, round(border * side))
    if inner < 8:
        raise BadInput(f"a patch of {side} px leaves fewer than 8 px in its border; raise --patch")
    return inner


def patch_square(
    size: tuple[int, int], box: list[int], side: int, patch_corner: str | None
) -> tuple[int, int, int, int]:
    """Where the patch lies in a picture of `size`: x0, y0, x1, y1, px.

    "auto" takes the corner where it hides the least area of `box`; of several the one farthest from
    the centre of `box`; of several still the first of upper left, upper right, lower left and lower
    right. Everything else is the paper's upper left.
    """
    if patch_corner != "auto":
        return 0, 0, side, side
    width, height = size
    ranks = []
    for bottom in (0, 1):
        for right in (0, 1):
            x, y = right * (width - side), bottom * (height - side)
            square = (x, y, x + side, y + side)
            # Twice the distance, so that a centre between two px is a whole number, too.
            across = box[0] + box[2] - 2 * right * width
            down = box[1] + box[3] - 2 * bottom * height
            ranks.append((shared_area(square, box), -(across**2 + down**2), bottom, right, square))
    return min(ranks)[-1]


def zoom_patch(
    picture: Image.Image, box: list[int], side: int, margin: float, border: float
) -> Image.Image:
    """The framed patch, RGB, side x side px: the bicubic crop within a green border.

    The border is `border` * side px wide, at least 1, and hides nothing of the crop.
    """
    inner = inner_side(side, border)
    width = (side - inner) // 2
    crop = picture.convert("RGB").crop(crop_square(picture.size, box, margin))
    framed = Image.new("RGB", (side, side), GREEN)
    framed.paste(crop.resize((inner, inner), Image.Resampling.BICUBIC), (width, width))
    return framed


def patch_figures(size: tuple[int, int], box: list[int], zoom: dict) -> tuple[float, float]:
    """The patch's magnification, and the share of `box` that it hides; `zoom` as for `augment`."""
    side = patch_side(size, zoom["patch"])
    left, _, right, _ = crop_square(size, box, zoom["margin"])
    hidden = shared_area(patch_square(size, box, side, zoom.get("patch_corner")), box)
    return inner_side(side, zoom["border"]) / (right - left), hidden / area(box)


def patch_statistics(figures: list[tuple[float, float]]) -> dict:
    """dataset_info.json's "patch_statistics", of the `patch_figures` of all records."""
    magnifications = sorted(magnification for magnification, _ in figures)
    count, quartiles = len(figures), {}
    for i, name in enumerate(("min", "lower_quartile", "median", "upper_quartile", "max")):
        quartiles[name] = round(magnifications[round(i * (count - 1) / 4)], 4)  # a record's own
    return {
        "magnification": quartiles,
        "shrunk": sum(magnification < 1 for magnification in magnifications) / count,
        "box_touched": sum(hidden > 0 for _, hidden in figures) / count,
        "box_half_hidden": sum(hidden > 0.5 for _, hidden in figures) / count,
    }


# ==== 3. The picture ====


def augment(
    picture: Image.Image,
    box: list[int],
    patch: float = 0.4,
    margin: float = 0.25,
    border: float = 0.03,
    patch_corner: str = "upper-left",
) -> Image.Image:
    """A copy of `picture` (any mode, clean) as RGB, with the zoomed patch and the red box.

    `box` is [x0, y0, x1, y1] in px, end-exclusive; `patch` a fraction of the shorter side, 0 for no
    patch; `margin` a fraction of the box's longer side, added on each side; `border` a fraction of
    the patch's side; `patch_corner` its place, see `patch_square`. The red line lies outside the
    box, on it only where the picture ends. It is drawn last, so the patch never hides it, though it
    may hide the lesion itself, which is then seen in the patch only. Raises BadInput for a box that
    is not in the picture and for a patch too small to see. Source: paper, Section 2.1.
    """
    check_box(picture.size, box)
    (width, height), (x0, y0, x1, y1) = picture.size, box
    result = picture.convert("RGB")
    if patch:
        side = patch_side(picture.size, patch)
        square = patch_square(picture.size, box, side, patch_corner)
        result.paste(zoom_patch(picture, box, side, margin, border), square[:2])
    line = max(1, round(min(picture.size) / 256))  # 1 px on the demo's slices, 2 px on 512 px
    left, top = max(x0 - line, 0), max(y0 - line, 0)
    # PIL's rectangle includes its last pixel.
    right, bottom = min(x1 - 1 + line, width - 1), min(y1 - 1 + line, height - 1)
    ImageDraw.Draw(result).rectangle((left, top, right, bottom), outline=RED, width=line)
    return result


def draw_records(records: list[dict], folder: Path, zoom: dict, instead: dict) -> list[tuple]:
    """Draws the pictures of some records in `folder`, their split's.

    `zoom` are the arguments of `augment`, `instead` that of `box_to_draw`; with "clean" in it
    nothing is drawn. Returns pairs: the new record and its `patch_figures`, None without a patch.
    Pictures that are there are kept: they appear by rename, so they are whole.
    """
    results = []
    for record in records:
        try:
            picture = open_picture(record["image"])
            box = box_to_draw(picture.size, record, instead)
            path = inside(folder, f"images/{record['id']}.png")
            if not os.path.isfile(path):
                clean = "clean" in instead
                drawn = picture.convert("RGB") if clean else augment(picture, box, **zoom)
                write_atomic(path, png_bytes(drawn))
            figures = patch_figures(picture.size, box, zoom) if zoom["patch"] else None
        except BadInput as error:
            raise BadInput(f"record {record['id']}: {error}") from error
        new = {key: value for key, value in record.items() if key not in ("image", "drawn_box")}
        new["file_name"] = f"images/{path.name}"
        new["patch"] = patch_side(picture.size, zoom["patch"])
        if box != record["box"]:
            new["drawn_box"] = box
        results.append((new, figures))
    return results


# ==== 4. The folder ====


def read_source(data: Path) -> tuple[dict[str, list[dict]], dict, str]:
    """The records per split, the dataset_info and the SHA-256 of 01's folder. Raises BadInput."""
    info = dataset_info(data)
    if info["stage"] != "01":
        raise BadInput(f"{data}: has been augmented already; --data needs 01_make_dataset.py's")
    digest = hashlib.sha256(read_bytes(data / "dataset_info.json"))
    records = {}
    for split in SPLITS:
        records[split] = read_records(data, split)
        digest.update(read_bytes(data / split / "metadata.jsonl"))
        for record in records[split]:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", record["id"]):
                fault = f"the id {record['id']!r:.80} cannot be a file name"
                raise BadInput(f"{data}: {fault}; use letters, digits, . _ -")
    return records, info, digest.hexdigest()


def draw_overview(records: dict[str, list[dict]], new: dict[str, dict], out: Path) -> None:
    """overview.png: for each class one record, its slice before and after."""
    from matplotlib.figure import Figure  # here: it takes most of a second to import

    figure = Figure(figsize=(16, 5), layout="constrained")
    axes = figure.subplots(2, len(CLASSES))
    for (above, below), label in zip(axes.T, CLASSES, strict=True):
        rows = []
        for split in SPLITS:
            rows += [(split, record) for record in records[split] if record["label"] == label]
        if rows:
            split, record = rows[len(rows) // 2]
            before = open_picture(record["image"]).convert("RGB")
            after = open_picture(out / split / new[record["id"]]["file_name"])
            above.imshow(before, interpolation="nearest")
            below.imshow(after, interpolation="nearest")
            below.set_title(record["id"], fontsize=7, pad=2)
        above.set_title(label, fontsize=9)
        above.axis("off")
        below.axis("off")
    save_figure(out / "overview.png", figure)


# ==== 5. Flags ====


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("input and output").add_argument
    add("--data", type=Path, help="01's folder (default data/ct_rate_vqa)")
    add("--image", type=Path, metavar="FILE", help="instead of --data: one clean slice, and")
    add("--box", type=natural, nargs=4, metavar=("X0", "Y0", "X1", "Y1"), help="its lesion, in px")
    text = "new folder (default data/ct_rate_vqa_zoom, _nopatch ...); with --image: a PNG file"
    add("--out", type=Path, help=text)
    add("--overwrite", action="store_true", help="replace what other settings left in --out")
    add("--workers", type=natural, default=0, metavar="K", help="processes (0, default: per core)")
    add = parser.add_argument_group("drawing, as fractions (not in the paper)").add_argument
    add("--patch", type=fraction, default=0.4, help="its side, of the slice's shorter one (0.4)")
    add("--no-patch", action="store_true", help='the red box only: the "None" arm of Table 3')
    add("--margin", type=non_negative, default=0.25, help="around the box, of its long side (0.25)")
    add("--border", type=fraction, default=0.03, help="green, of the patch's side (0.03)")
    text = "upper-left (default, the paper's), or auto: where it hides least of the box"
    add("--patch-corner", choices=("upper-left", "auto"), default="upper-left", help=text)
    group = parser.add_argument_group("which box is drawn (not in the paper)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--jitter", type=fraction, metavar="IOU", help="drawn from a box of this IoU with the true")
    add("--whole", action="store_true", help="drawn from none: the whole slice is taken as the box")
    add(
        "--boxes", type=Path, metavar="FILE", help="drawn from those that 05 --task locate predicts"
    )
    add(
        "--clean", action="store_true", help="nothing is drawn; the question is where the lesion is"
    )
    text = "with --clean: ask for the finding in the report's words, not for the lesion"
    group.add_argument("--name-finding", action="store_true", help=text)
    args = parser.parse_args(argv)
    if args.patch == 0 or args.margin > 10 or not 0 < args.border < 0.5:
        parser.error("--patch and --border begin above 0; --border ends below 0.5, --margin at 10")
    if (args.image is None) != (args.box is None):
        parser.error("--image and --box go together")
    other = args.whole or args.jitter is not None or args.boxes or args.clean
    if args.image and (args.data or other or not args.out):
        parser.error("--image needs --out, a file, and takes neither --data nor another box")
    if args.name_finding and not args.clean:
        parser.error("--name-finding goes with --clean")
    if args.no_patch or args.clean:
        args.patch = 0.0
    args.data = args.data or Path("data/ct_rate_vqa")
    default = "data/ct_rate_vqa_nopatch" if args.no_patch else "data/ct_rate_vqa_zoom"
    if args.clean:
        default = "data/ct_rate_vqa_clean"
    if args.whole:
        default += "_whole"
    if args.jitter is not None:
        default += f"_jitter_{args.jitter:g}"
    if args.boxes:
        default += "_predicted"
    args.out = args.out or Path(default)
    return args


# ==== 6. The stage ====


def draw(args: argparse.Namespace) -> None:
    """Draws one picture, or builds or completes the twin of 01's folder.

    It is the same bytes for any number of workers, interrupted or not. Raises BadInput.
    """
    zoom = {"patch": args.patch, "margin": args.margin, "border": args.border}
    if args.patch_corner != "upper-left":
        zoom["patch_corner"] = args.patch_corner
    out = args.out
    if args.image:
        content = png_bytes(augment(open_picture(args.image), args.box, **zoom))
        if os.path.lexists(out) and not args.overwrite and read_bytes(out) != content:
            raise BadInput(f"{out}: exists; choose another --out, or --overwrite it")
        write_atomic(out, content)
        print(f"{out}: the slice as the model is shown it")
        return

    instead = {}
    for key in ("whole", "clean", "name_finding"):
        if getattr(args, key):
            instead[key] = True
    if args.jitter is not None:
        instead["jitter"] = args.jitter
    records, info, source = read_source(args.data)
    if args.boxes:
        boxes = read_boxes(args.boxes)
        instead["boxes"] = hashlib.sha256(read_bytes(args.boxes)).hexdigest()
        for split, rows in records.items():
            named = [row for row in rows if row["id"] in boxes]
            records[split] = [row | {"drawn_box": boxes[row["id"]]} for row in named]
        if not any(records.values()):
            raise BadInput(f"{args.boxes}: names no record of {args.data}")
    if args.clean:
        for split, rows in records.items():
            records[split] = [ask_where(row, args.name_finding) for row in rows]
    settings = {"script": "02_zoom_augment.py", **zoom, **instead, "source_sha256": source}
    claim(out, settings, OUTPUTS, overwrite=args.overwrite, inputs=(args.data,))
    jobs = []
    for split in SPLITS:
        for first in range(0, len(records[split]), CHUNK):
            jobs.append((records[split][first : first + CHUNK], out / split, zoom, instead))
    new, figures = {}, []
    with closing(parallel(draw_records, jobs, args.workers, "records")) as finished:
        for drawn in finished:
            for record, figure in drawn:
                new[record["id"]] = record
                figures.append(figure)
    for split in SPLITS:
        write_records(out / split, [new[record["id"]] for record in records[split]])
    draw_overview(records, new, out)
    info |= {"stage": "02", "zoom": zoom | instead}
    if args.boxes:
        info["records"] = {split: len(rows) for split, rows in records.items()}
        for key in ("volumes", "patients", "slices", "classes"):  # 01's, of all records
            info.pop(key, None)
    size = ""
    if zoom["patch"] and figures:
        info["patch_statistics"] = patch_statistics(figures)
        size = f", median magnification {info['patch_statistics']['magnification']['median']:.1f}"
    write_atomic(out / "dataset_info.json", json.dumps(info, indent=1))
    following = "05_eval.py" if args.boxes else "03_sft.py"
    following += " --task locate" if args.clean else ""
    print(
        f"{out}: {info['records']} records{size}; see overview.png; next: {following} --data {out}"
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    run_stage(lambda: draw(parse_args(argv)))


if __name__ == "__main__":
    main()
