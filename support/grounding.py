"""Where a lesion is: boxes between a picture's px and the form in which a model family writes them.

Wrong coordinates are the usual fault of such training, and a silent one: the IoU stays near 0. So
there is one place where a box changes its grid, and every box is [x0, y0, x1, y1], end-exclusive.
"""

import json
import math
import random
from pathlib import Path

import rewards
from rewards import Boxes, iou
from support.files import BadInput, check_fields, read_bytes
from support.records import is_box, pictures

DRAWS, NEAR = 3000, 0.005  # boxes tried for one of a given IoU, and which is near enough


# ==== What is asked, and what is right ====


def ask_where(record: dict, name_finding: bool) -> dict:
    """The record as a question of locating. Every box of the slice is right, or with a named
    finding that finding's alone; the first is taught."""
    boxes, what = boxes_of(record), "the lesion"
    if name_finding:
        text = record.get("text", "").strip().rstrip(".")
        if not text:
            raise BadInput(f"record {record['id']}: no field 'text'; leave out --name-finding")
        what = f"this finding: {text[0].lower()}{text[1:]}"
    else:
        boxes = [*boxes, *(box for box in record.get("slice_boxes", []) if box not in boxes)]
    answer = f"<answer>{rewards.box_text(boxes[0])}</answer>"
    return record | {"question": rewards.LOCATE.format(what), "answer": answer, "boxes": boxes}


def read_boxes(path: Path) -> dict[str, list[int] | None]:
    """The box, or None, of each id in a boxes.jsonl. Raises BadInput, naming the line."""
    boxes = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            row = json.loads(line)
            check_fields(row, {"id": str})
            box = row.get("box")
            if box is not None and not is_box(box):
                raise BadInput("field 'box': [x0, y0, x1, y1] in whole px, or null, is needed")
            if row["id"] in boxes:
                remedy = "give 05 one --model and one prompt form (--think)"
                raise BadInput(f"field 'id': {row['id']!r:.80} has a box already; {remedy}")
        except (ValueError, RecursionError, BadInput) as error:
            raise BadInput(f"{path}, line {number}: {error}") from error
        boxes[row["id"]] = box
    return boxes


# ==== A model's boxes ====


def box_grid(processor, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the grid on which a model writes the boxes of a picture of `size`, px.

    Qwen2.5-VL's is the resized picture itself; that of Qwen2-VL and of the models after 2.5 has
    1000 steps per side. Raises BadInput for another family's processor. Source: QwenLM/Qwen3-VL,
    qwen-vl-finetune/tools/process_bbox.ipynb and its cookbooks.
    """
    thousandths = getattr(processor, "thousandths", None)
    if thousandths is None:
        raise BadInput("--task locate reads boxes as Qwen's models write them, no other family's")
    if thousandths:
        return 1000, 1000
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    cut = processor.image_processor
    limits = cut.size["shortest_edge"], cut.size["longest_edge"]
    height, width = smart_resize(size[1], size[0], cut.patch_size * cut.merge_size, *limits)
    return width, height


def rescale(box: list[int], source: tuple[int, int], grid: tuple[int, int]) -> list[int]:
    """A box on a grid of (width, height) `source` on another: rounded, at least 1 wide and high."""
    edges = []
    for axis in (0, 1):
        factor = grid[axis] / source[axis]
        low = min(round(box[axis] * factor), grid[axis] - 1)
        high = min(round(box[axis + 2] * factor), grid[axis])
        edges.append((low, max(high, low + 1)))
    (x0, x1), (y0, y1) = edges
    return [x0, y0, x1, y1]


def box_in_picture(completion: str, processor, size: tuple[int, int]) -> list[int] | None:
    """The box, px, that a completion answers with about a picture of `size`; None: it has none."""
    grid = box_grid(processor, size)
    box = rewards.predicted_box(completion, *grid)
    return box and rescale(box, grid, size)


def truth(task: str, record: dict, processor, size: tuple[int, int]) -> str | Boxes:
    """What an answer about a record is scored against: its class or, to locate, its boxes.

    `size`: the picture's width and height, px.
    """
    if task == "diagnose":
        return record["label"]
    grid = box_grid(processor, size)
    return Boxes([rescale(box, size, grid) for box in boxes_of(record)], *grid)


def boxes_of(record: dict) -> list[list[int]]:
    """The boxes, px, that are right answers to a question of locating."""
    return record.get("boxes") or [record["box"]]


def questions(records: list[dict], processor, mode: str, task: str) -> tuple[list, list, list]:
    """What the records ask under the prompt form `mode`: pictures, prompts, and what is right."""
    images, prompts, truths = pictures(records), [], []
    for record, image in zip(records, images, strict=True):
        prompts.append(rewards.prompt(record["question"], mode, task))
        truths.append(truth(task, record, processor, image.size))
    return images, prompts, truths


# ==== Wrong boxes ====


def jitter_box(size: tuple[int, int], box: list[int], wanted: float, name: str) -> list[int]:
    """A box in the picture of `size` that is wrong by a given amount: it has that IoU with `box`.

    It is `box`, scaled by a factor from `wanted` to 1 / `wanted` and moved, both at random: the
    first of such boxes that is near enough, or the nearest. For a box as large as 01's (0.5 % of
    the slice) it is off by at most 0.005 on 512 px (0.01 above 0.8), on 140 px by 0.01 up to 0.7
    and by 0.03 up to 0.9. 1 is `box` itself, 0 a box beside it. `name`, the record's id, seeds the
    draws.
    """
    generator = random.Random(f"jitter {name}")
    if wanted == 0:
        return box_beside(size, box, generator)
    nearest, least = list(box), 1 - wanted
    for _ in range(DRAWS):
        scale = wanted ** generator.uniform(-1, 1)
        x0, x1 = _jitter_edges(size[0], box[0], box[2], wanted, scale, generator)
        y0, y1 = _jitter_edges(size[1], box[1], box[3], wanted, scale, generator)
        drawn = [x0, y0, x1, y1]
        error = abs(iou(drawn, box) - wanted)
        if error < least:
            nearest, least = drawn, error
        if error <= NEAR:
            break
    return nearest


def _jitter_edges(
    length: int, low: int, high: int, wanted: float, scale: float, generator: random.Random
) -> tuple[int, int]:
    """The scaled edges `low` and `high` of a box, somewhere in the picture's 0 to `length`."""
    overlap = math.ceil(wanted * (high - low))  # with less in common the IoU is out of reach
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
