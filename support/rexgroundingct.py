"""How ReXGroundingCT and CT-RATE lie on disk: dataset.json's entries, the paths of the CTs, the masks' finding axis."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from support.files import MAX_SIDE, BadInput, read_json

NAME = re.compile(r"(train|valid)_[0-9]{1,9}_[a-z]{1,9}_[0-9]{1,9}\.nii\.gz")  # no name leaves its folder
MAX_VOXELS = 2**30  # 1024 x 1024 x 1024; CT-RATE's largest volumes have a third of that


@dataclass(frozen=True)
class Case:
    """One checked entry of dataset.json."""

    name: str  # "train_1741_b_2.nii.gz"
    shape: tuple[int, int, int]  # voxels, in the CT file's own axis order
    keys: tuple[str, ...]  # findings, in the order of the mask's channels
    texts: tuple[str, ...]  # the radiologist's sentence on each finding
    categories: tuple[str, ...]  # its category code, such as "2b"

    @property
    def volume(self) -> str:
        return self.name.removesuffix(".nii.gz")

    @property
    def patient(self) -> str:
        # The prefix stays: train_1841 and valid_1841 are two people.
        return self.volume.rsplit("_", 2)[0]


def check_entry(entry: object) -> Case:
    """One entry of dataset.json as a Case. Raises BadInput naming the field that cannot be used."""
    if not isinstance(entry, dict):
        raise BadInput(f"an entry is not a JSON object but {type(entry).__name__}")
    name = entry.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadInput(f"field 'name': {name!r:.80} is not of the form train_1741_b_2.nii.gz")
    for field in ("findings", "categories"):
        if not isinstance(entry.get(field), dict):
            raise BadInput(f"field {field!r} must be an object")
    for field, kind in (("pixels", dict), ("entity_counts", dict), ("protocol", str)):  # not needed, but telling
        if not isinstance(entry.get(field, kind()), kind):
            raise BadInput(f"field {field!r} must be of type {kind.__name__}")
    shape, findings, categories = entry.get("shape"), entry["findings"], entry["categories"]
    sizes = shape if isinstance(shape, list) else []
    if len(sizes) != 3 or any(type(size) is not int or not 1 <= size <= MAX_SIDE for size in sizes):
        raise BadInput(f"field 'shape': three whole numbers from 1 to {MAX_SIDE} are needed, not {shape!r:.80}")
    if math.prod(shape) > MAX_VOXELS:
        raise BadInput(f"field 'shape': {shape} is more than {MAX_VOXELS:,} voxels")
    if not findings or not all(re.fullmatch("[0-9]{1,4}", key) for key in findings):
        raise BadInput("field 'findings': the keys must be whole numbers, and there must be one")
    keys = tuple(sorted(findings, key=int))
    if not all(isinstance(findings[key], str) and isinstance(categories.get(key), str) for key in keys):
        raise BadInput("fields 'findings' and 'categories': each finding needs a text and a category code")
    return Case(name, tuple(shape), keys, tuple(findings[k] for k in keys), tuple(categories[k] for k in keys))


def read_cases(path: Path) -> tuple[list[Case], list[dict]]:
    """The usable entries under `train` and `val` (only these have masks), by name, and what was skipped and why.

    Raises BadInput when `path` is no such file at all.
    """
    data = read_json(path)
    parts = [data[part] for part in ("train", "val") if part in data] if isinstance(data, dict) else []
    if not parts or not all(isinstance(part, list) for part in parts):
        raise BadInput(f"{path}: an object with lists under 'train' and 'val' is needed")
    cases, skipped = {}, []
    for entry in (entry for part in parts for entry in part):
        try:
            case = check_entry(entry)
            if case.name in cases:
                raise BadInput("duplicate name; its first entry is used")
            cases[case.name] = case
        except BadInput as error:
            name = entry.get("name") if isinstance(entry, dict) else None
            skipped.append(fault(f"{name!r:.80}", None, f"{path}: {error}"))
    return [cases[name] for name in sorted(cases)], skipped


def fault(volume: str, finding: str | None, reason: str) -> dict:
    """One line of the report on what was skipped; `finding` None means the whole volume."""
    return {"volume": volume, "finding": finding, "reason": reason}


def finding_axis(shape: tuple[int, ...], case: Case) -> int | None:
    """Which axis of a mask of `shape` counts the findings: 0 (documented), 3 (some files), None (one 3-D finding).

    Only the JSON's shape decides. Where both 0 and 3 fit (as many findings as slices, and so on), 0 is taken.
    Raises BadInput when none fits.
    """
    count = len(case.keys)
    if shape == (count, *case.shape):
        return 0
    if shape == (*case.shape, count):
        return 3
    if shape == case.shape and count == 1:
        return None
    raise BadInput(f"mask of shape {shape}, but dataset.json says {count} finding(s) of shape {case.shape}")


def find_ct(ct_rate: Path, case: Case) -> Path:
    """The CT of `case`, in CT-RATE's own folders or in a flat folder. Raises BadInput when it is in neither."""
    places = [ct_rate / ct_rate_path(case), ct_rate.parent / ct_rate_path(case), ct_rate / case.name]
    for path in places:
        if os.path.isfile(path):  # unlike Path.is_file, False also for a folder that must not be read
            return path
    raise BadInput(f"no CT: neither {places[0]} nor {places[2]} exists")


def ct_rate_path(case: Case) -> str:
    """Where CT-RATE keeps a volume: dataset/train_fixed/train_1741/train_1741_b/train_1741_b_2.nii.gz."""
    series = case.volume.rsplit("_", 1)[0]
    return f"dataset/{case.name.split('_')[0]}_fixed/{case.patient}/{series}/{case.name}"
