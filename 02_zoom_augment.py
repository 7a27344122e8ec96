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

The patch hides the front of one lung, at times the lesion itself; `--patch-corner auto` puts it
where it hides least of the box, as far from it as can be.

--out is the twin of --data, the same records and ids, but with one RGB picture per record: of 01's
keys only file_name changes, and patch is added, the patch's side in px (0: none). Where --jitter or
--whole draw another box than the record's own, which stays, drawn_box is added. dataset_info.json
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
import random
import re
from contextlib import closing
from pathlib import Path

from PIL import Image, ImageDraw

from rewards import CLASSES
from support.files import (
    BadInput,
    claim,
    inside,
    open_picture,
    png_bytes,
    read_bytes,
    write_atomic,
)
from support.log import save_figure
from support.records import OUTPUTS, SPLITS, area, dataset_info, read_records, write_records
from support.stage import fraction, natural, non_negative, parallel

CHUNK = 64  # records per job: large enough that handing jobs to the workers costs nothing
DRAWS, NEAR = 3000, 0.005  # boxes tried for one of a given IoU, and which is near enough
RED, GREEN = (255, 0, 0), (0, 255, 0)


# ==== 1. The box ====


def check_box(size: tuple[int, int], box: list[int]) -> None:
    """Raises BadInput unless `box` lies in a picture of `size` (width, height)."""
    width, height = size
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise BadInput(f"the box {list(box)} does not lie in the picture of {width} x {height} px")


def shared_area(a: list[int], b: list[int]) -> int:
    """The area that two boxes share, px."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def intersection_over_union(a: list[int], b: list[int]) -> float:
    """The area that two boxes share, of the area that they cover together."""
    shared = shared_area(a, b)
    return shared / (area(a) + area(b) - shared)


def jitter_box(size: tuple[int, int], box: list[int], iou: float, name: str) -> list[int]:
    """A box in the picture of `size` that is wrong by a given amount: its IoU with `box` is `iou`.

    It is `box`, scaled by a factor from `iou` to 1 / `iou` and moved, both at random: the first of
    such boxes that is near enough, or the nearest. For a box as large as 01's (0.5 % of the slice)
    and an `iou` up to 0.9 it is off by at most 0.005 on 512 px, 0.03 on 140 px (0.01 up to 0.7). 1
    is `box` itself, 0 a box beside it. `name`, the record's id, seeds the draws.
    """
    generator = random.Random(f"jitter {name}")
    if iou == 0:
        return box_beside(size, box, generator)
    nearest, least = list(box), 1 - iou
    for _ in range(DRAWS):
        scale = iou ** generator.uniform(-1, 1)
        x0, x1 = _jitter_edges(size[0], box[0], box[2], iou, scale, generator)
        y0, y1 = _jitter_edges(size[1], box[1], box[3], iou, scale, generator)
        drawn = [x0, y0, x1, y1]
        error = abs(intersection_over_union(drawn, box) - iou)
        if error < least:
            nearest, least = drawn, error
        if error <= NEAR:
            break
    return nearest


def _jitter_edges(
    length: int, low: int, high: int, iou: float, scale: float, generator: random.Random
) -> tuple[int, int]:
    """The scaled edges `low` and `high` of a box, somewhere in the picture's 0 to `length`."""
    overlap = math.ceil(iou * (high - low))  # with less in common the IoU is out of reach
    side = round((high - low) * scale + generator.uniform(-1, 1))  # few px have few scales
    side = min(max(side, overlap), length)
    first, last = low + overlap - side, high - overlap
    start = generator.randint(max(first, 0), min(last, length - side))
    return start, start + side


def box_beside(size: tuple[int, int], box: list[int], generator: random.Random) -> list[int]:
    """A box of the size of `box` that does not touch it: at least 1 px lies between them.

    Where no side of `box` has room for it, it is as much smaller as it must be. Raises BadInput
    when `box` leaves no room at all.
    """
    width, height = size
    x0, y0, x1, y1 = box
    strips = [(0, 0, x0 - 1, height), (x1 + 1, 0, width, height)]
    strips += [(0, 0, width, y0 - 1), (0, y1 + 1, width, height)]
    rooms = []
    for strip in strips:
        across, down = (strip[2] - strip[0]) / (x1 - x0), (strip[3] - strip[1]) / (y1 - y0)
        rooms.append((min(across, down, 1), strip))
    scale = max(rooms)[0]
    if scale <= 0:
        raise BadInput(f"the box {list(box)} leaves no room beside it; --jitter above 0 needs none")
    left, top, right, bottom = generator.choice([s for room, s in rooms if room == scale])
    across, down = max(1, int((x1 - x0) * scale)), max(1, int((y1 - y0) * scale))
    x, y = generator.randint(left, right - across), generator.randint(top, bottom - down)
    return [x, y, x + across, y + down]


def box_to_draw(size: tuple[int, int], record: dict, wrong: dict) -> list[int]:
    """The box that red line and patch are drawn from.

    `wrong` is {"jitter": IoU}, {"whole": True}, or empty for the record's own box. Raises BadInput
    when that does not lie in the picture of `size`.
    """
    check_box(size, record["box"])
    if "whole" in wrong:
        return [0, 0, *size]
    if "jitter" in wrong:
        return jitter_box(size, record["box"], wrong["jitter"], record["id"])
    return record["box"]


# ==== 2. The patch ====


def crop_square(size: tuple[int, int], box: list[int], margin: float) -> tuple[int, int, int, int]:
    """The square (x0, y0, x1, y1), px, that the patch shows of a picture of `size` (width, height).

    Its side is the longer side of `box` times 1 + 2 * margin: a square, so that the anatomy is not
    distorted, however long and thin the box. It lies around the box's centre; at the picture's edge
    it is shifted inside; a large one gives up margin to fit. Only a box longer than the picture's
    shorter side makes it reach over that side's both edges alike (the crop is black there). The box
    is always whole inside it.
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


def draw_records(records: list[dict], folder: Path, zoom: dict, wrong: dict) -> list[tuple]:
    """Draws the pictures of some records in `folder`, their split's.

    `zoom` are the arguments of `augment`, `wrong` is that of `box_to_draw`. Returns pairs, the new
    record and its `patch_figures`, None without a patch. Pictures that are there are kept: they
    appear by rename, so they are whole.
    """
    drawn = []
    for record in records:
        try:
            picture = open_picture(record["image"])
            box = box_to_draw(picture.size, record, wrong)
            path = inside(folder, f"images/{record['id']}.png")
            if not os.path.isfile(path):
                write_atomic(path, png_bytes(augment(picture, box, **zoom)))
            figures = patch_figures(picture.size, box, zoom) if zoom["patch"] else None
        except BadInput as error:
            raise BadInput(f"record {record['id']}: {error}") from error
        new = {key: value for key, value in record.items() if key != "image"}
        new["file_name"] = f"images/{path.name}"
        new["patch"] = patch_side(picture.size, zoom["patch"])
        if box != record["box"]:
            new["drawn_box"] = box
        drawn.append((new, figures))
    return drawn


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
    text = "upper-left (default, the paper's), or auto: the one far from the box"
    add("--patch-corner", choices=("upper-left", "auto"), default="upper-left", help=text)
    group = parser.add_argument_group("a wrong box (not in the paper): what does it cost?")
    add = group.add_mutually_exclusive_group().add_argument
    add("--jitter", type=fraction, metavar="IOU", help="drawn from a box of this IoU with the true")
    add("--whole", action="store_true", help="drawn from none: the whole slice is taken as the box")
    args = parser.parse_args(argv)
    if args.patch == 0 or args.margin > 10 or not 0 < args.border < 0.5:
        parser.error("--patch and --border begin above 0; --border ends below 0.5, --margin at 10")
    if (args.image is None) != (args.box is None):
        parser.error("--image and --box go together")
    if args.image and (args.data or args.whole or args.jitter is not None or not args.out):
        parser.error("--image needs --out, a file, and takes no --data, --jitter or --whole")
    if args.no_patch:
        args.patch = 0.0
    args.data = args.data or Path("data/ct_rate_vqa")
    default = "data/ct_rate_vqa_nopatch" if args.no_patch else "data/ct_rate_vqa_zoom"
    if args.whole:
        default += "_whole"
    if args.jitter is not None:
        default += f"_jitter_{args.jitter:g}"
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

    wrong = {"whole": True} if args.whole else {}
    if args.jitter is not None:
        wrong["jitter"] = args.jitter
    records, info, source = read_source(args.data)
    settings = {"script": "02_zoom_augment.py", **zoom, **wrong, "source_sha256": source}
    claim(out, settings, OUTPUTS, overwrite=args.overwrite, inputs=(args.data,))
    jobs = []
    for split in SPLITS:
        for first in range(0, len(records[split]), CHUNK):
            jobs.append((records[split][first : first + CHUNK], out / split, zoom, wrong))
    new, figures = {}, []
    with closing(parallel(draw_records, jobs, args.workers, "records")) as finished:
        for drawn in finished:
            for record, figure in drawn:
                new[record["id"]] = record
                figures.append(figure)
    for split in SPLITS:
        write_records(out / split, [new[record["id"]] for record in records[split]])
    draw_overview(records, new, out)
    info |= {"stage": "02", "zoom": zoom | wrong}
    size = ""
    if zoom["patch"] and figures:
        info["patch_statistics"] = patch_statistics(figures)
        size = f", median magnification {info['patch_statistics']['magnification']['median']:.1f}"
    write_atomic(out / "dataset_info.json", json.dumps(info, indent=1))
    print(f"{out}: {info['records']} records{size}; see overview.png; next: 03_sft.py --data {out}")


def main(argv: list[str] | None = None) -> None:
    """Runs the stage; bad input ends in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    run_stage(lambda: draw(parse_args(argv)))


if __name__ == "__main__":
    main()
