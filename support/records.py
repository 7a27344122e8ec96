"""What the scripts hand each other: folders of records, checked when read, dealt into batches."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from PIL import Image

from rewards import CLASSES
from support.files import (
    MAX_SIDE,
    BadInput,
    check_fields,
    inside,
    open_picture,
    read_bytes,
    read_json,
    write_atomic,
    writing,
)

SPLITS = ("train", "test")
# What 01 and 02 write, and --overwrite deletes: other files in images/ are the user's.
OUTPUTS = (".work/*", "overview.png", "dataset_info.json", "train/metadata.jsonl")
OUTPUTS += ("test/metadata.jsonl", "train/images/*.png", "test/images/*.png")

REQUIRED = {"file_name": str, "id": str, "label": str, "question": str, "answer": str, "box": list}
OPTIONAL = {"volume": str, "patient": str, "category": str, "text": str, "slice": int}
OPTIONAL |= {"finding": int, "boxes": list, "slice_boxes": list, "patch": int}
# Of dataset_info.json; a folder for 03 to 05 that 02 did not make needs none of them.
INFO = {"phantoms": bool, "settings": dict, "records": dict, "classes": dict, "skipped": list}


def dataset_info(folder: Path) -> dict:
    """The dataset_info.json that 01 or 02 wrote; its "stage" is "01" or "02". Raises BadInput."""
    path = Path(folder) / "dataset_info.json"
    info = read_json(path)
    stage = info.get("stage") if isinstance(info, dict) else None
    if stage not in ("01", "02"):
        raise BadInput(f"{path}: no stage 01 or 02 in it; make the folder with 01_make_dataset.py")
    required = INFO if stage == "01" else {}
    try:
        check_fields(info, required, INFO)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    return info


def read_records(folder: Path, split: str) -> list[dict]:
    """The records of <folder>/<split>/metadata.jsonl, each with its picture's path as "image".

    Raises BadInput, naming file, line and field, for the first line that is not a usable record. An
    id of the other split is not: one patient would be trained and tested on.
    """
    path = Path(folder) / split / "metadata.jsonl"
    records, ids = [], set()
    for other in set(SPLITS) - {split}:
        ids |= _ids(Path(folder) / other / "metadata.jsonl")
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            record = json.loads(line)
            _check(record, ids)
            picture = inside(path.parent, record["file_name"])
            if not os.path.isfile(picture):
                raise BadInput(f"field 'file_name': there is no picture {picture}")
        except (ValueError, RecursionError, BadInput) as error:
            remedy = "mend the line or make the folder again"
            raise BadInput(f"{path}, line {number}: {error}; {remedy}") from error
        ids.add(record["id"])
        records.append({**record, "image": picture})
    return records


def _ids(path: Path) -> set[str]:
    """The ids in a metadata.jsonl, which may be missing; lines that are no records have none."""
    ids = set()
    for line in read_bytes(path).splitlines() if os.path.lexists(path) else ():
        with suppress(ValueError, RecursionError, TypeError, KeyError):
            ids.add(json.loads(line)["id"])
    return ids


def write_records(folder: Path, records: list[dict]) -> None:
    """Writes <folder>/metadata.jsonl. Raises BadInput when a picture has gone meanwhile."""
    for record in records:
        if not os.path.isfile(picture := folder / record["file_name"]):
            raise BadInput(f"{picture}: was removed meanwhile; remove the folder and start again")
    write_atomic(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in records))
    with writing(folder):
        for stray in folder.glob("images/.tmp.*.png"):  # of an interrupted run
            stray.unlink()


def _check(record: object, ids: set[str]) -> None:
    """Raises BadInput, naming the field, when a metadata line is no record or repeats an id."""
    check_fields(record, REQUIRED, OPTIONAL)
    for box in [record["box"], *record.get("boxes", []), *record.get("slice_boxes", [])]:
        if not is_box(box):
            form = "[x0, y0, x1, y1] in whole px, 0 <= x0 < x1, 0 <= y0 < y1"
            raise BadInput(f"field 'box': {form}, is needed")
    if record["label"] not in CLASSES:
        raise BadInput(f"field 'label': {record['label']!r:.80} is not one of the seven classes")
    if not record["id"] or record["id"] in ids:
        raise BadInput(f"field 'id': {record['id']!r:.80} is empty or was used before")


def is_box(box: object) -> bool:
    """Whether it is a list of four whole numbers, px, of positive area."""
    if not isinstance(box, list) or [type(edge) for edge in box] != [int] * 4:
        return False
    x0, y0, x1, y1 = box
    return 0 <= x0 < x1 <= MAX_SIDE and 0 <= y0 < y1 <= MAX_SIDE


def load_split(folder: Path, split: str, task: str = "diagnose") -> list[dict]:
    """The records of 02's folder for a task. Raises BadInput for 01's folder and the other task's.

    A diagnosis needs the red box: without it a slice with two findings would be one picture with
    two right answers. To locate the lesion, no box may be drawn.
    """
    info = dataset_info(folder)
    if info["stage"] != "02":
        clean = " --clean" if task == "locate" else ""
        remedy = f"make its twin with 02_zoom_augment.py{clean} --data {folder}"
        raise BadInput(f"{folder}: is 01's, with no red boxes; {remedy}")
    clean = isinstance(info.get("zoom"), dict) and "clean" in info["zoom"]
    if clean != (task == "locate"):
        drawn, other = ("without", "locate") if clean else ("with", "diagnose")
        remedy = f"needs a folder drawn {drawn} --clean, or give --task {other}"
        raise BadInput(f"{folder}: --task {task} {remedy}")
    records = read_records(folder, split)
    if not records:
        raise BadInput(f"{folder}/{split}/metadata.jsonl: holds no records")
    absent = sorted(set(CLASSES) - {record["label"] for record in records})
    if absent and os.environ.get("RANK", "0") == "0":
        print(f"note: {folder}/{split} has no record of: {', '.join(absent)}", flush=True)
    return records


def pictures(records: list[dict]) -> list[Image.Image]:
    """The records' pictures, RGB."""
    return [open_picture(record["image"]).convert("RGB") for record in records]


# ==== Batches ====


def batch_indices(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The `batch` dataset indices of one step (from 0): each epoch is shuffled anew, and an epoch
    begins right after the one before, in the middle of a batch if need be."""
    places = range(step * batch, (step + 1) * batch)
    return [_permutation(count, seed, place // count)[place % count] for place in places]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    import torch  # here: 01 and 02 read records without it

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def ahead(function: Callable, items: Iterable) -> Iterator:
    """Yields function(item) for each item, and prepares the next one in a thread meanwhile:
    pictures load while the model computes."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
