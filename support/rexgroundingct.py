"""How ReXGroundingCT and CT-RATE lie on disk: dataset.json, the CTs' paths, the finding axis."""

import math
import os
import re
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from support.files import MAX_SIDE, BadInput, check_fields, read_json

NAME = re.compile(r"(train|valid)_[0-9]{1,9}_[a-z]{1,9}_[0-9]{1,9}\.nii\.gz")  # leaves no folder
MAX_VOXELS = 2**30  # 1024 x 1024 x 1024; CT-RATE's largest volumes have a third of that
REQUIRED = {"name": str, "shape": list, "findings": dict, "categories": dict}
OPTIONAL = {"pixels": dict, "entity_counts": dict, "protocol": str}  # not needed, but telling


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
    """One entry of dataset.json as a Case. Raises BadInput naming the field that is unusable."""
    check_fields(entry, REQUIRED, OPTIONAL)
    name, shape = entry["name"], entry["shape"]
    findings, categories = entry["findings"], entry["categories"]
    if not NAME.fullmatch(name):
        raise BadInput(f"field 'name': {name!r:.80} is not of the form train_1741_b_2.nii.gz")
    if len(shape) != 3 or any(type(n) is not int or not 1 <= n <= MAX_SIDE for n in shape):
        needed = f"three whole numbers from 1 to {MAX_SIDE} are needed"
        raise BadInput(f"field 'shape': {needed}, not {shape!r:.80}")
    if math.prod(shape) > MAX_VOXELS:
        raise BadInput(f"field 'shape': {shape} is more than {MAX_VOXELS:,} voxels")
    if not findings or not all(re.fullmatch("[0-9]{1,4}", key) for key in findings):
        raise BadInput("field 'findings': one or more are needed, their keys whole numbers")
    keys, texts, codes = sorted(findings, key=int), [], []
    for key in keys:
        if type(findings[key]) is not str or type(categories.get(key)) is not str:
            needed = "each finding needs a text and a category code"
            raise BadInput(f"fields 'findings' and 'categories': {needed}")
        texts.append(findings[key])
        codes.append(categories[key])
    return Case(name, tuple(shape), tuple(keys), tuple(texts), tuple(codes))


def read_cases(path: Path, names: tuple = ("train", "val")) -> tuple[list[Case], list[dict]]:
    """The usable entries of dataset.json, sorted by name, and what was skipped and why.

    Read are the parts `names`; the real `test` has no masks. Raises BadInput when `path` is no
    such file at all.
    """
    data = read_json(path)
    parts = []
    if isinstance(data, dict):
        parts = [data[name] for name in names if name in data]
    if not parts or not all(isinstance(part, list) for part in parts):
        needed = " and ".join(f"'{name}'" for name in names)
        raise BadInput(f"{path}: an object with lists under {needed} is needed")
    cases, skipped = {}, []
    for entry in chain(*parts):
        try:
            case = check_entry(entry)
            if case.name in cases:
                raise BadInput("duplicate name; its first entry is used")
            cases[case.name] = case
        except BadInput as error:
            name = entry.get("name") if isinstance(entry, dict) else None
            skipped.append(fault(f"{name!r:.80}", None, f"{path}: {error}"))
    return [cases[name] for name in sorted(cases)], skipped


def choose_cases(rex: Path, index: Path | None) -> tuple[list[Case], list[dict]]:
    """`read_cases` of dataset.json or, to test on, of the `val` of another index.

    Of the latter, whose masks are exhaustive, the patients that dataset.json lists are left out:
    they may have been trained on.
    """
    dataset = rex / "dataset.json"
    cases, skipped = read_cases(dataset)
    if index:
        known = {case.patient for case in cases}
        listed, skipped = read_cases(index, ("val",))
        cases = [case for case in listed if case.patient not in known]
        left_out = f"{len(listed) - len(cases)} of {len(listed)} volumes left out"
        print(f"{index}: {left_out}, whose patients are in {dataset.name}", file=sys.stderr)
    return cases, skipped


def fault(volume: str, finding: str | None, reason: str) -> dict:
    """One row of the report on what was skipped; `finding` None means the whole volume."""
    return {"volume": volume, "finding": finding, "reason": reason}


def report_skipped(faults: list[dict], strict: bool) -> None:
    """Prints one line per fault; with `strict` the first raises BadInput."""
    for row in faults:
        finding = f", finding {row['finding']}" if row["finding"] else ""
        line = f"{row['volume']}{finding}: {row['reason']}"
        if strict:
            raise BadInput(f"{line} (--strict)")
        tqdm.write(f"skipped: {line}", file=sys.stderr)


def finding_axis(shape: tuple[int, ...], case: Case) -> int | None:
    """The axis of a mask of `shape` that counts findings: 0 (documented), 3 (some files), None.

    None is one 3-D finding. Only dataset.json's shape decides; where both 0 and 3 fit (as many
    findings as slices, and so on), 0 is taken. Raises BadInput when none fits.
    """
    count = len(case.keys)
    if shape == (count, *case.shape):
        return 0
    if shape == (*case.shape, count):
        return 3
    if shape == case.shape and count == 1:
        return None
    expected = f"{count} finding(s) of shape {case.shape}"
    raise BadInput(f"mask of shape {shape}, but the index says {expected}")


def find_ct(ct_rate: Path, case: Case) -> Path:
    """The CT of `case`, in CT-RATE's own folders or in a flat one. Raises BadInput."""
    path = ct_rate_path(case)
    for place in (ct_rate / path, ct_rate.parent / path, ct_rate / case.name):
        if os.path.isfile(place):  # unlike Path.is_file, False for a folder that is not readable
            return place
    raise BadInput(f"no CT: neither {ct_rate / path} nor {ct_rate / case.name} exists")


def ct_rate_path(case: Case) -> str:
    """CT-RATE's place: dataset/train_fixed/train_1741/train_1741_b/train_1741_b_2.nii.gz."""
    part = case.name.split("_")[0]
    series = case.volume.rsplit("_", 1)[0]
    return f"dataset/{part}_fixed/{case.patient}/{series}/{case.name}"
