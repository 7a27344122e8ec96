"""Shared fixtures: a small phantom dataset through 01 and 02, and the shipped tiny model.

One thread, for exactness.
"""

import copy
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from support import records, vlm
from support.distributed import World

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """02's folder made from 16 phantoms."""
    root = tmp_path_factory.mktemp("data")
    slices, zoom = str(root / "slices"), root / "zoom"
    make, draw = map(importlib.import_module, ("01_make_dataset", "02_zoom_augment"))
    with pytest.MonkeyPatch.context() as patch:
        for stage in (make, draw):  # it takes longer than the rest
            patch.setattr(stage, "draw_overview", lambda *_: None)
        flags = "--phantoms 16 --seed 3 --workers 1 --test-fraction 0.3 --out".split()
        make.main([*flags, slices])
        draw.main(["--data", slices, "--out", str(zoom), "--workers", "1"])
    return zoom


@pytest.fixture(scope="session", name="records")
def training_records(data):
    return records.load_split(data, "train")


@pytest.fixture(scope="session")
def processor():
    return vlm.load_processor(str(vlm.TINY))


@pytest.fixture(scope="session")
def tiny():
    return vlm.load_model(str(vlm.TINY), torch.device("cpu"))


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft", reason="pip install -r benchmarks/requirements.txt")


@pytest.fixture
def model(tiny):
    """The shipped tiny model, for this test alone."""
    return copy.deepcopy(tiny)


@pytest.fixture(scope="session")
def world():
    return World(0, 1, torch.device("cpu"))
