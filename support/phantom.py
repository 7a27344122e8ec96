"""Synthetic chest CTs with lesion masks, written exactly as ReXGroundingCT and CT-RATE lie on disk.

They stand in for the two gated sets on a laptop: same folders, same JSON, NIfTI with int16 HU and L,P,S axes, so the
stage scripts cannot tell the difference. They are cartoons, not anatomy: a lesion's visible attributes (texture and
shape) decide its category by the rule in LOOKS, except for the share ATYPICAL, which looks like another category;
no model can therefore score much above 1 - ATYPICAL on them.

    write_phantoms(Path("data/phantoms"), count=50, seed=0)
"""

import json
import os
import re
from contextlib import closing
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from support.pool import parallel

TEXTURES = ("solid", "hazy", "ringed", "holed", "meshed")
SHAPES = ("round", "patchy", "band")
SIDES = ("right", "left")
DEPTHS = ("anterior", "posterior")

# category code of ReXGroundingCT -> the textures and shapes that a typical lesion of it may show
LOOKS = {
    "1b": (("ringed",), ("round", "patchy")),  # bronchiectasis: bright rings around air
    "1c": (("holed",), ("round", "patchy")),  # emphysema: holes darker than lung
    "1d": (("meshed",), ("round", "patchy", "band")),  # septal thickening, reticulation: thin bright mesh
    "2b": (("solid",), ("patchy",)),  # consolidation: solid, with dark air bronchograms
    "2c": (("hazy",), ("round", "patchy")),  # ground glass: a veil
    "2d": (("solid",), ("round",)),  # nodule or mass: a ball
    "2e": (("solid",), ("band",)),  # effusion: a crescent along the wall
}
ATYPICAL = 0.15  # share of lesions that show the looks of another category
LEFT_OUT = 0.04  # share of findings of category 2h, which the paper's seven classes leave out
DEPTH_SLICES = 16  # slices per volume
TEXT = "{Texture} {shape} lesion in the {side} {depth} lung."
_TEXT = re.compile(rf"({'|'.join(TEXTURES)}) ({'|'.join(SHAPES)}) lesion in the (right|left) (anterior|posterior) lung")


def attributes(text: str) -> tuple[str, str, str, str] | None:
    """Reads (texture, shape, side, depth) back from a phantom's report sentence; None for any other text."""
    found = _TEXT.search(text.lower())
    return found.groups() if found else None


def write_phantoms(root: Path, count: int, seed: int, workers: int = 1) -> tuple[Path, Path]:
    """Writes `count` volumes with masks under `root` and returns the two folders (ReXGroundingCT's, CT-RATE's).

    Volume i depends on (seed, i) only. Files appear by rename and existing ones are kept, so an interrupted call is
    completed by the next. About 40 ms a volume. Raises OSError where the folder cannot be written.
    """
    rex, ct_rate = root / "rexgroundingct", root / "ct_rate"
    index, jobs, patient, scan = {"train": [], "val": [], "test": []}, [], 0, 0
    plan = np.random.default_rng([seed, 1])
    for i in range(count):
        repeat = i > 0 and scan == 0 and plan.random() < 0.15  # some people come back for a second scan
        patient, scan = (patient, 1) if repeat else (patient + 1, 0)
        split, prefix = ("val", "valid") if patient % 12 == 0 else ("train", "train")
        name = f"{prefix}_{patient}_{'ab'[scan]}_1.nii.gz"
        folder = ct_rate / "dataset" / f"{prefix}_fixed" / f"{prefix}_{patient}" / name.rsplit("_", 1)[0]
        jobs.append((split, name, folder / name, rex / "segmentations" / name, seed, i))
    with closing(parallel(_write_volume, jobs, workers, "phantoms")) as written:
        entries = {entry["name"]: entry for entry in written}
    for split, name, *_ in jobs:
        index[split].append(entries[name])
    # The real set's test part has findings but no masks.
    index["test"].append({"name": "valid_99999_a_1.nii.gz", "findings": {"0": "Held out."}})
    _replace(rex / "dataset.json", lambda path: path.write_text(json.dumps(index, indent=1)))
    return rex, ct_rate


def _replace(path: Path, write) -> None:
    """Lets `write(temporary)` make the file, then renames it to `path`: a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".new.{path.name}")  # ends in the real suffix, which nibabel reads
    write(temporary)
    os.replace(temporary, path)


def _write_volume(_: str, name: str, ct_path: Path, mask_path: Path, seed: int, i: int) -> dict:
    entry_path = mask_path.with_name(name.replace(".nii.gz", ".json"))
    if entry_path.exists() and ct_path.exists() and mask_path.exists():
        return json.loads(entry_path.read_text())
    hu, masks, findings = make_volume(seed, i)
    spacing = 330.0 / hu.shape[0]
    affine = np.diag([-spacing, -spacing, 8.0, 1.0])  # axes run to the patient's Left, Posterior and Superior
    stored = masks.astype(np.uint8)  # [F, H, W, D]
    if i % 7 == 3:  # some real files carry the finding axis last, or none when there is a single finding
        stored = stored[0] if len(stored) == 1 else np.moveaxis(stored, 0, -1)
    _replace(ct_path, lambda path: nib.save(nib.Nifti1Image(hu, affine), path))
    _replace(mask_path, lambda path: nib.save(nib.Nifti1Image(stored, np.eye(4)), path))
    entry = {
        "name": name,
        "findings": {str(k): text for k, (_, text) in enumerate(findings)},
        "entity_counts": {str(k): 1 for k in range(len(findings))},
        "shape": list(hu.shape),
        "pixels": {str(k): int(mask.sum()) for k, mask in enumerate(masks)},
        "categories": {str(k): code for k, (code, _) in enumerate(findings)},
        "protocol": "phantom",
    }
    _replace(entry_path, lambda path: path.write_text(json.dumps(entry)))
    return entry


def make_volume(seed: int, i: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """One phantom: HU as int16 [H, W, D] with axes L,P,S, bool masks [F, H, W, D], (category, text) a finding."""
    rng = np.random.default_rng([seed, 2, i])
    side = int(rng.integers(140, 193))  # pixels; the in-plane field of view is always 330 mm
    hu, lungs = _chest(rng, side)
    right_first = rng.random() < 0.5
    masks, findings = [], []
    for k in range(int(rng.integers(1, 3))):
        lung = lungs[int(right_first) ^ k]  # two findings of one volume lie in different lungs
        category = "2h" if rng.random() < LEFT_OUT else str(rng.choice(list(LOOKS)))
        shown = str(rng.choice(list(LOOKS))) if category == "2h" or rng.random() < ATYPICAL else category
        texture, shape = (str(rng.choice(words)) for words in LOOKS[shown])
        region = _region(rng, lung, shape, shown, side)
        _paint(rng, hu, region, texture)
        x, y = (ndimage.center_of_mass(region)[axis] / side for axis in (0, 1))
        words = {"shape": shape, "side": SIDES[int(x > 0.5)], "depth": DEPTHS[int(y > 0.5)]}
        masks.append(region)
        findings.append((category, TEXT.format(Texture=texture.capitalize(), **words)))
    noise = ndimage.gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (0.6, 0.6, 0))
    hu += noise * (rng.uniform(40, 110) / noise.std())
    return np.clip(hu, -1024, 1500).astype(np.int16), np.stack(masks), findings


def _chest(rng, side: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """An empty chest: HU float32 [side, side, D] and the masks of the right and the left lung."""
    grid = np.linspace(-1, 1, side, dtype=np.float32)
    x, y, z = grid[:, None, None], grid[None, :, None], np.linspace(0, 1, DEPTH_SLICES, dtype=np.float32)
    wide, deep = rng.uniform(0.86, 0.95), rng.uniform(0.70, 0.80)

    def ellipse(cx, cy, rx, ry):
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1

    hu = np.full((side, side, DEPTH_SLICES), -1000, np.float32)
    body = ellipse(0, 0, wide, deep)
    hu[np.broadcast_to(body, hu.shape)] = -90  # fat
    hu[np.broadcast_to(ellipse(0, 0, wide - 0.06, deep - 0.06), hu.shape)] = 40  # muscle and mediastinum
    size = 1 - 0.30 * z**2  # lungs narrow towards the apex (z = 1)
    lungs = []
    for sign in (-1, 1):  # the patient's right is at small x
        cx = sign * (0.43 + rng.uniform(-0.02, 0.02))
        lung = ellipse(cx, rng.uniform(-0.04, 0.04), 0.36 * size, (deep - 0.14) * size)
        if sign == 1:  # the heart takes a bite out of the basal left lung
            lung &= ~ellipse(0.14, -0.16, 0.30 * (1 - 0.6 * z), 0.30 * (1 - 0.6 * z))
        lungs.append(lung)
        hu[lung] = rng.uniform(-870, -830)
        for angle in np.linspace(0.2, np.pi - 0.2, 7):  # ribs
            rib = ellipse(sign * np.sin(angle) * (wide - 0.10), -np.cos(angle) * (deep - 0.09), 0.035, 0.03)
            hu[np.broadcast_to(rib, hu.shape)] = rng.uniform(400, 700)
    hu[np.broadcast_to(ellipse(0, 0.44, 0.12, 0.12), hu.shape)] = rng.uniform(400, 600)  # spine
    vessels = ndimage.gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (1.4, 1.4, 1.0))
    hu[(lungs[0] | lungs[1]) & (vessels > 2.6 * vessels.std())] = -250
    return hu, lungs


def _region(rng, lung: np.ndarray, shape: str, category: str, side: int) -> np.ndarray:
    """The voxels of a lesion, bool [H, W, D]: 22 to 44 pixels across on a 140-pixel slice, 5 to 8 slices high."""
    unit = side / 140
    radius = rng.uniform(11, 22) * unit
    zone = {"1c": (9, 13), "2b": (3, 7), "2e": (3, 7)}.get(category, (4, 12))  # apical, basal, anywhere
    middle, half = int(rng.integers(*zone)), rng.uniform(2.6, 4.2)
    z = (np.arange(DEPTH_SLICES) - middle) / half
    taper = np.sqrt(np.clip(1 - z**2, 0, None)) * 0.35 + 0.65 * (np.abs(z) < 1)  # blunt ends keep most slices large
    inward = ndimage.distance_transform_edt(lung[:, :, middle])  # [H, W] pixels to the lung's wall
    gx, gy = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    if shape == "band":  # a crescent along the wall: the lung's rim, cut to an arc
        rim = (inward > 0) & (inward < 2)
        posterior = rim & (gy > side * 0.58) if category == "2e" else rim
        outer = np.abs(gx - side / 2) > side * 0.16  # along the chest wall, not along the mediastinum
        cx, cy = rng.choice(np.argwhere(posterior & outer))
        thick, reach = rng.uniform(8, 13) * unit, radius * 1.25
        flat = (inward > 0) & (inward < thick) & ((gx - cx) ** 2 + (gy - cy) ** 2 < reach**2)
        return flat[:, :, None] & (taper > 0) & lung
    cx, cy = rng.choice(np.argwhere(inward > min(radius * 0.8, inward.max() * 0.8)))
    reach = np.hypot(gx - cx, gy - cy)
    if shape == "patchy":  # a blob whose radius wobbles strongly with the angle, and with bites taken out
        angle = np.arctan2(gy - cy, gx - cx)
        waves = [(k, rng.uniform(0, 2 * np.pi), rng.uniform(0.10, 0.26)) for k in (2, 3, 5)]
        wobble = 1 + sum(a * np.sin(k * angle + phase) for k, phase, a in waves)
        reach = reach / (1.15 * wobble / wobble.max())
        bites = ndimage.gaussian_filter(rng.standard_normal((side, side)), 2.2 * unit)
        reach = np.where(bites > 0.9 * bites.std(), np.inf, reach)
    return (reach[:, :, None] < radius * taper) & lung


def _paint(rng, hu: np.ndarray, region: np.ndarray, texture: str) -> None:
    """Writes a lesion's texture into `hu` [H, W, D] in place, inside `region`."""
    unit = hu.shape[0] / 140
    lung = float(np.median(hu[region]))
    gx, gy = np.meshgrid(np.arange(hu.shape[0]), np.arange(hu.shape[1]), indexing="ij")
    spacing = rng.uniform(7.5, 9.5) * unit
    # Distance to the nearest centre of a staggered lattice: shared by rings, holes and (as cell walls) the mesh.
    row = np.round(gy / spacing)
    near_x = gx - (np.round(gx / spacing - 0.5 * (row % 2)) + 0.5 * (row % 2)) * spacing
    distance = np.hypot(near_x, gy - row * spacing) / unit
    if texture == "solid":
        value = np.full_like(distance, rng.uniform(0, 60))
    elif texture == "hazy":
        veil = ndimage.gaussian_filter(rng.standard_normal(distance.shape), 3 * unit)
        value = rng.uniform(-620, -500) + 40 * veil / veil.std()
    elif texture == "ringed":
        value = np.where(distance < 1.4, -960, np.where(distance < 2.9, rng.uniform(-100, 50), lung))
    elif texture == "holed":
        value = np.where(distance < 3.2, -990, rng.uniform(-760, -700))
    else:  # meshed: two families of thin bright lines
        lines = np.minimum((gx + gy) / unit % 7.0, (gx - gy) / unit % 7.0)
        value = np.where(lines < 1.7, rng.uniform(-350, -200), lung + 60)
    hu[region] = np.broadcast_to(value[:, :, None], hu.shape)[region]
