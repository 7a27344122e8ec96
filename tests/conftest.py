"""Shared fixtures: a small phantom dataset through 01 and 02, and the shipped tiny model. One thread, for exactness."""

import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from support import tiny_vlm, train, vlm

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """02's folder made from 16 phantoms."""
    root = tmp_path_factory.mktemp("data")
    slices = ["--phantoms", "16", "--seed", "3", "--workers", "1", "--test-fraction", "0.3"]
    slices += ["--out", str(root / "slices")]
    importlib.import_module("01_make_dataset").main(slices)
    importlib.import_module("02_zoom_augment").main(
        ["--data", str(root / "slices"), "--out", str(root / "zoom"), "--workers", "1"]
    )
    return root / "zoom"


@pytest.fixture(scope="session")
def records(data):
    return train.load_split(data, "train")


@pytest.fixture(scope="session")
def processor():
    return vlm.load_processor(str(tiny_vlm.DEFAULT))


@pytest.fixture
def model():
    return vlm.load_model(str(tiny_vlm.DEFAULT), torch.device("cpu"))


@pytest.fixture(scope="session")
def world():
    return train.World(0, 1, torch.device("cpu"))
