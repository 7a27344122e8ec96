"""Synthetic chest CTs with lesion masks, written exactly as ReXGroundingCT and CT-RATE lie on disk.

They stand in for the two gated sets on a laptop: same folders, same JSON, NIfTI with int16 HU and
L,P,S axes, so the scripts cannot tell the difference. They are cartoons, not anatomy: a lesion's
visible attributes (texture and shape) decide its category by the rule in LOOKS, except for the
share ATYPICAL, which looks like another category; no model can therefore score much above
1 - ATYPICAL on them.

    write_phantoms(Path("data/phantoms"), count=50, seed=0)
"""

import json
import re
from contextlib import closing
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import scipy  # scipy.ndimage is loaded at its first use

from support.files import keep, kept, write_atomic
from support.stage import parallel

TEXTURES = ("solid", "hazy", "ringed", "holed", "meshed")
SHAPES = ("round", "patchy", "band")
SIDES = ("right", "left")
DEPTHS = ("anterior", "posterior")
ATTRIBUTES = {"texture": TEXTURES, "shape": SHAPES, "side": SIDES, "depth": DEPTHS}

# category code of ReXGroundingCT -> the textures and shapes that a typical lesion of it may show
LOOKS = {
    "1b": (("ringed",), ("round", "patchy")),  # bronchiectasis: bright rings around air
    "1c": (("holed",), ("round", "patchy")),  # emphysema: holes darker than lung
    "1d": (("meshed",), ("round", "patchy", "band")),  # septal thickening: thin bright mesh
    "2b": (("solid",), ("patchy",)),  # consolidation: solid, with dark air bronchograms
    "2c": (("hazy",), ("round", "patchy")),  # ground glass: a veil
    "2d": (("solid",), ("round",)),  # nodule or mass: a ball
    "2e": (("solid",), ("band",)),  # effusion: a crescent along the wall
}
ATYPICAL = 0.15  # share of lesions that show the looks of another category
LEFT_OUT = 0.04  # share of findings of category 2h, which the paper's seven classes leave out
DEPTH_SLICES = 16  # slices per volume
ZONES = {"1c": (9, 13), "2b": (3, 7), "2e": (3, 7)}  # slices of a lesion's middle: apical, basal
TEXT = "{Texture} {shape} lesion in the {side} {depth} lung."
ASK = "What is the {} of the lesion in the red box?"


# ==== What is said of a phantom ====


def attributes(text: str) -> tuple[str, str, str, str] | None:
    """Reads (texture, shape, side, depth) from a phantom's report sentence; None for other text."""
    texture, shape, side, depth = map("|".join, ATTRIBUTES.values())
    found = re.search(f"({texture}) ({shape}) lesion in the ({side}) ({depth}) lung", text.lower())
    return found.groups() if found else None


def questions(records: list[dict]) -> list[dict]:
    """One attribute question per phantom record, the four attributes in turn.

    This is the general skill that the tiny base was taught. In the form of
    vqa_metrics.read_questions, "part" being the attribute. Other records have none.
    """
    rows = []
    for record in records:
        values = attributes(record.get("text", ""))
        if values is None:
            continue
        i = len(rows) % len(ATTRIBUTES)
        part = list(ATTRIBUTES)[i]
        rows.append({**record, "question": ASK.format(part), "answers": [values[i]], "part": part})
    return rows


# ==== The folders ====


def write_phantoms(root: Path, count: int, seed: int, workers: int = 1) -> tuple[Path, Path]:
    """Writes volumes and masks under `root`; returns ReXGroundingCT's and CT-RATE's folders there.

    Volume i depends on (seed, i) only. Existing files are kept, so an interrupted call is completed
    by the next. About 40 ms per volume. Raises BadInput where the folder cannot be written.
    """
    rex, ct_rate = root / "rexgroundingct", root / "ct_rate"
    plan = np.random.default_rng([seed, 1])
    jobs, splits = [], {}
    patient = scan = 0
    for i in range(count):
        if i > 0 and scan == 0 and plan.random() < 0.15:  # some people come back for a second scan
            scan = 1
        else:
            patient, scan = patient + 1, 0
        prefix = "valid" if patient % 12 == 0 else "train"
        person = f"{prefix}_{patient}"
        series = f"{person}_{'ab'[scan]}"
        name = f"{series}_1.nii.gz"
        ct_path = ct_rate / "dataset" / f"{prefix}_fixed" / person / series / name
        jobs.append((ct_path, rex / "segmentations" / name, seed, i))
        splits[name] = "val" if prefix == "valid" else "train"
    with closing(parallel(_write_volume, jobs, workers, "phantoms")) as written:
        entries = {entry["name"]: entry for entry in written}
    index = {"train": [], "val": [], "test": []}
    for name, split in splits.items():
        index[split].append(entries[name])
    # The real set's test part has findings but no masks.
    index["test"].append({"name": "valid_99999_a_1.nii.gz", "findings": {"0": "Held out."}})
    write_atomic(rex / "dataset.json", json.dumps(index, indent=1))
    return rex, ct_rate


def _write_volume(ct_path: Path, mask_path: Path, seed: int, i: int) -> dict:
    """Writes one volume, unless it is there; returns its entry of dataset.json."""
    entry_path = mask_path.with_name(mask_path.name.replace(".nii.gz", ".json"))
    entry = kept(entry_path)
    if entry and ct_path.exists() and mask_path.exists():
        return entry
    hu, masks, findings = make_volume(seed, i)
    stored = masks.astype(np.uint8)  # [F, H, W, D]
    if i % 7 == 3:  # some real files have the finding axis last, or none for a single finding
        stored = stored[0] if len(stored) == 1 else np.moveaxis(stored, 0, -1)
    spacing = 330.0 / hu.shape[0]  # mm
    affine = np.diag([-spacing, -spacing, 8.0, 1.0])  # axes to Left, Posterior and Superior
    write_atomic(ct_path, partial(nib.save, nib.Nifti1Image(hu, affine)))
    write_atomic(mask_path, partial(nib.save, nib.Nifti1Image(stored, np.eye(4))))
    keys = [str(k) for k in range(len(findings))]
    codes, texts = zip(*findings, strict=True)
    pixels = [int(mask.sum()) for mask in masks]
    entry = {
        "name": ct_path.name,
        "findings": dict(zip(keys, texts, strict=True)),
        "entity_counts": dict.fromkeys(keys, 1),
        "shape": list(hu.shape),
        "pixels": dict(zip(keys, pixels, strict=True)),
        "categories": dict(zip(keys, codes, strict=True)),
        "protocol": "phantom",
    }
    keep(entry_path, entry)
    return entry


# ==== One volume ====


def make_volume(seed: int, i: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """One phantom, axes L,P,S: int16 HU [H, W, D], bool masks [F, H, W, D], (category, text)s."""
    rng = np.random.default_rng([seed, 2, i])
    side = int(rng.integers(140, 193))  # pixels; the in-plane field of view is always 330 mm
    hu, lungs = _chest(rng, side)
    left_first = int(rng.random() < 0.5)
    masks, findings = [], []
    for k in range(int(rng.integers(1, 3))):
        category = "2h" if rng.random() < LEFT_OUT else str(rng.choice(list(LOOKS)))
        shown = category
        if category == "2h" or rng.random() < ATYPICAL:
            shown = str(rng.choice(list(LOOKS)))
        textures, shapes = LOOKS[shown]
        texture = str(rng.choice(textures))
        shape = str(rng.choice(shapes))
        lung = lungs[(left_first + k) % 2]  # two findings of one volume lie in different lungs
        region = _region(rng, lung, shape, shown)
        _paint(rng, hu, region, texture)
        x, y, _ = scipy.ndimage.center_of_mass(region)
        where = {"side": SIDES[int(x / side > 0.5)], "depth": DEPTHS[int(y / side > 0.5)]}
        masks.append(region)
        text = TEXT.format(Texture=texture.capitalize(), shape=shape, **where)
        findings.append((category, text))
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    noise = scipy.ndimage.gaussian_filter(noise, (0.6, 0.6, 0))
    hu += noise * (rng.uniform(40, 110) / noise.std())
    return np.clip(hu, -1024, 1500).astype(np.int16), np.stack(masks), findings


def _chest(rng, side: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """An empty chest: HU, float32 [side, side, D], and the masks of the right and the left lung."""
    grid = np.linspace(-1, 1, side, dtype=np.float32)
    x, y = grid[:, None, None], grid[None, :, None]
    z = np.linspace(0, 1, DEPTH_SLICES, dtype=np.float32)
    wide, deep = rng.uniform(0.86, 0.95), rng.uniform(0.70, 0.80)
    hu = np.full((side, side, DEPTH_SLICES), -1000, np.float32)

    def ellipse(cx, cy, rx, ry):
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        return np.broadcast_to(inside, hu.shape)

    hu[ellipse(0, 0, wide, deep)] = -90  # fat
    hu[ellipse(0, 0, wide - 0.06, deep - 0.06)] = 40  # muscle and mediastinum
    size = 1 - 0.30 * z**2  # lungs narrow towards the apex (z = 1)
    lungs = []
    for sign in (-1, 1):  # the patient's right is at small x
        cx = sign * (0.43 + rng.uniform(-0.02, 0.02))
        cy = rng.uniform(-0.04, 0.04)
        lung = ellipse(cx, cy, 0.36 * size, (deep - 0.14) * size)
        if sign == 1:  # the heart takes a bite out of the basal left lung
            heart = 0.30 * (1 - 0.6 * z)
            lung = lung & ~ellipse(0.14, -0.16, heart, heart)
        lungs.append(lung)
        hu[lung] = rng.uniform(-870, -830)
        for angle in np.linspace(0.2, np.pi - 0.2, 7):  # ribs
            cx, cy = sign * np.sin(angle) * (wide - 0.10), -np.cos(angle) * (deep - 0.09)
            hu[ellipse(cx, cy, 0.035, 0.03)] = rng.uniform(400, 700)
    hu[ellipse(0, 0.44, 0.12, 0.12)] = rng.uniform(400, 600)  # spine
    vessels = rng.standard_normal(hu.shape, dtype=np.float32)
    vessels = scipy.ndimage.gaussian_filter(vessels, (1.4, 1.4, 1.0))
    hu[(lungs[0] | lungs[1]) & (vessels > 2.6 * vessels.std())] = -250
    return hu, lungs


# ==== One lesion ====


def _region(rng, lung: np.ndarray, shape: str, category: str) -> np.ndarray:
    """The voxels of a lesion in `lung`, both bool [H, W, D].

    On a slice of 140 px it is 16 to 38 px across; it is 5 to 9 slices high.
    """
    side = len(lung)
    unit = side / 140
    radius = rng.uniform(9, 16) * unit
    middle = int(rng.integers(*ZONES.get(category, (4, 12))))
    half = rng.uniform(2.6, 4.2)
    z = (np.arange(DEPTH_SLICES) - middle) / half
    # Blunt ends keep most slices large.
    taper = np.sqrt(np.clip(1 - z**2, 0, None)) * 0.35 + 0.65 * (np.abs(z) < 1)
    inward = scipy.ndimage.distance_transform_edt(lung[:, :, middle])  # [H, W] px to the wall
    gx, gy = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    if shape == "band":  # a crescent along the wall: the lung's rim, cut to an arc
        rim = (inward > 0) & (inward < 2)
        rim &= np.abs(gx - side / 2) > side * 0.16  # at the chest wall, not at the mediastinum
        if category == "2e":
            rim &= gy > side * 0.58  # posterior
        cx, cy = rng.choice(np.argwhere(rim))
        thick = rng.uniform(7, 11) * unit
        reach = radius * 1.25
        arc = (gx - cx) ** 2 + (gy - cy) ** 2 < reach**2
        flat = (inward > 0) & (inward < thick) & arc
        return flat[:, :, None] & (taper > 0) & lung
    cx, cy = rng.choice(np.argwhere(inward > min(radius * 0.8, inward.max() * 0.8)))
    reach = np.hypot(gx - cx, gy - cy)
    if shape == "patchy":  # its radius wobbles with the angle, and bites are taken out
        angle = np.arctan2(gy - cy, gx - cx)
        waves = 0
        for k in (2, 3, 5):
            phase, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.18, 0.32)
            waves = waves + height * np.sin(k * angle + phase)
        wobble = 1 + waves
        reach = reach / (1.3 * wobble / wobble.max())
        bites = scipy.ndimage.gaussian_filter(rng.standard_normal((side, side)), 2.2 * unit)
        reach = np.where(bites > 0.8 * bites.std(), np.inf, reach)
    return (reach[:, :, None] < radius * taper) & lung


def _paint(rng, hu: np.ndarray, region: np.ndarray, texture: str) -> None:
    """Writes a lesion's texture into `hu` [H, W, D] in place, inside `region`."""
    unit = len(hu) / 140
    lung = float(np.median(hu[region]))
    gx, gy = np.meshgrid(np.arange(hu.shape[0]), np.arange(hu.shape[1]), indexing="ij")
    spacing = rng.uniform(6.0, 7.5) * unit
    # The distance to the nearest centre of a staggered lattice, of rings and of holes; one of them
    # lies where the lesion is deepest, so that even a small one shows it whole.
    inward = scipy.ndimage.distance_transform_edt(region.any(2))
    cx, cy = np.unravel_index(inward.argmax(), inward.shape)
    gx, gy = gx - cx, gy - cy
    row = np.round(gy / spacing)
    stagger = 0.5 * (row % 2)
    near_x = gx - (np.round(gx / spacing - stagger) + stagger) * spacing
    distance = np.hypot(near_x, gy - row * spacing) / unit
    if texture == "solid":
        value = np.full_like(distance, rng.uniform(0, 60))
    elif texture == "hazy":
        veil = scipy.ndimage.gaussian_filter(rng.standard_normal(distance.shape), 3 * unit)
        value = rng.uniform(-620, -500) + 25 * veil / veil.std()
    elif texture == "ringed":
        value = np.where(distance < 2.5, rng.uniform(-100, 50), lung + 60)
        value[distance < 1.2] = -960
    elif texture == "holed":
        value = np.where(distance < 2.6, -990, rng.uniform(-650, -560))
    else:  # meshed: two families of thin bright lines
        lines = np.minimum((gx + gy) / unit % 5.5, (gx - gy) / unit % 5.5)
        value = np.where(lines < 1.5, rng.uniform(-300, -150), lung + 170)
    hu[region] = np.broadcast_to(value[:, :, None], hu.shape)[region]
