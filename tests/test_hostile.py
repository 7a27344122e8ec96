"""Nothing let in: every case of the corpus ends in one line that names file and fault, or in a counted skip.

In process, through each script's `main(argv)`, under a limit on time and on memory, with an eye on every file outside
the output folder; a sample again as a user starts it. Then what no corpus can list: hypothesis, the environment, and
what the sources must not contain.
"""

import contextlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import corpus
import ct_fixtures as ct
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import rewards
from support import files, nifti, tiny_vlm, train, vlm
from support.files import BadInput

ROOT = Path(__file__).resolve().parent.parent
STAGES = {name[:2]: importlib.import_module(name) for name in
          ("01_make_dataset", "02_zoom_augment", "03_sft", "04_grpo", "05_eval")}  # fmt: skip
MODEL_FLAGS = {
    "03": ["--max-steps", "1", "--batch-size", "6"],  # as many as there are records: each is read
    "04": ["--steps", "1", "--prompts-per-step", "6", "--group-size", "2", "--max-new-tokens", "2"],
    "05": ["--think", "no", "--max-new-tokens", "2"],
}
LINE = re.compile(r"error: [^\n]+")


def by_name(mutations: list):
    return pytest.mark.parametrize("case", list(enumerate(mutations)), ids=[str(m) for m in mutations])


# ---------------------------------------------------------------------------------------------------------------------
# The harness


@contextlib.contextmanager
def bounded(seconds: int = 60, gigabytes: float = 2):
    """Ends what hangs or asks for this much more memory than the process has by now."""

    def stop(*_):
        raise AssertionError(f"still running after {seconds} s")

    before, old = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + int(gigabytes * 2**30), before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


def snapshot(root: Path, out: Path) -> dict:
    """Every path under `root` but not under `out`, with what tells a change."""
    paths = [path for path in root.rglob("*") if out not in (path, *path.parents)]
    return {path: (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths
            if not path.is_dir()}  # fmt: skip


def outcome(stage: str, out: Path, *flags: object) -> str | None:
    """Runs a stage in the working folder `out.parent`; returns its one-line message, or None when it accepts."""
    before = snapshot(out.parent, out)
    try:
        with bounded():
            STAGES[stage].main([*map(str, flags), "--out", str(out)])
        message = None
    except SystemExit as stop:
        message = stop.code
        assert isinstance(message, str) and LINE.fullmatch(message), message
    assert snapshot(out.parent, out) == before
    return message


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The working folder is an empty one; overview.png takes longer than the rest of a small run and is left out."""
    monkeypatch.chdir(tmp_path)
    for stage in ("01", "02"):
        monkeypatch.setattr(STAGES[stage], "draw_overview", lambda *_: b"")
    monkeypatch.setattr(train, "plot_curves", lambda *_: None)


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """01's folder "slices" and its twin "zoom" by 02, of small slices."""
    root = tmp_path_factory.mktemp("valid")
    large = {axis: ct.chest(axis, (12, 48, 40)) for axis in range(4)}
    cases = [ct.add_case(root, f"train_{i}_a_1.nii.gz", picture=large[i]) for i in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("01", "02"):
            patch.setattr(STAGES[stage], "draw_overview", lambda *_: b"")
        STAGES["01"].main([*ct.write_index(root, cases), "--out", str(root / "slices"), "--test-fraction", "0.5"])
        STAGES["02"].main(["--data", str(root / "slices"), "--out", str(root / "zoom"), "--patch", "1"])
    return root


def damaged(valid: Path, kind: str, target: Path, case) -> Path:
    case.apply(corpus.Records(shutil.copytree(valid / kind, target)))
    return target


# ---------------------------------------------------------------------------------------------------------------------
# The corpus


def test_the_corpus_is_large_enough():
    kinds = Counter(m.kind for m in corpus.VOLUMES + corpus.INDEXES + corpus.RECORDS + corpus.RECORDS_02)
    kinds += Counter(m.kind for m in corpus.CHECKPOINTS)
    assert kinds.total() >= 200 and min(kinds.values()) >= 10, kinds


@by_name(corpus.VOLUMES)
def test_a_bad_volume_is_a_counted_skip(case, tmp_path, capsys):
    flags = corpus.build_volumes(tmp_path, case[1])
    assert outcome("01", tmp_path / "out", *flags) is None
    (skipped,) = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["skipped"]
    names = (corpus.BAD.removesuffix(".nii.gz"), "dataset.json")  # the file, or the entry in dataset.json
    reported = f"{skipped['volume']}: {skipped['reason']}"
    assert case[1].words in reported and any(name in reported for name in names) and len(reported) < 500, reported
    assert {record["volume"] for part in ("train", "test") for record in ct.read_lines(tmp_path / "out", part)} == {
        "train_1_a_1"
    }
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("skipped: ") for line in lines) == 1 and "Traceback" not in "".join(lines)
    message = outcome("01", tmp_path / "strict", *flags, "--strict")
    assert case[1].words in message and any(name in message for name in names)


@by_name(corpus.INDEXES)
def test_a_useless_dataset_json_is_one_line(case, tmp_path):
    flags = corpus.build_volumes(tmp_path, None)
    case[1].apply(tmp_path / "rex" / "dataset.json")
    assert case[1].words in outcome("01", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@by_name(corpus.VOLUME_CONTROLS)
def test_a_strange_but_valid_volume_is_accepted(case, tmp_path):
    assert outcome("01", tmp_path / "out", *corpus.build_volumes(tmp_path, case[1])) is None
    assert json.loads((tmp_path / "out" / "dataset_info.json").read_text())["skipped"] == []


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@by_name(corpus.RECORDS + corpus.RECORDS_02)
def test_a_bad_record_is_one_line(case, valid, tmp_path):
    """In 01's folder, read by 02, and in 02's folder, read by 03, 04 or 05 in turn."""
    number, mutation = case
    message = outcome("02", tmp_path / "out", "--data", damaged(valid, "slices", tmp_path / "a", mutation),
                      "--workers", "1")  # fmt: skip
    assert message is not None and mutation.words in message, message
    assert str(tmp_path / "a") in message or "record train_1_a_1_s0003_f0" in message, message
    if mutation in corpus.RECORDS:
        stage = ("03", "04", "05")[number % 3]
        data = damaged(valid, "zoom", tmp_path / "b", mutation)
        if stage == "05":  # it reads the test split
            (data / "test").rename(data / "other")
            (data / "train").rename(data / "test")
        message = outcome(stage, tmp_path / "run", "--data", data, "--model", tiny_vlm.DEFAULT, *MODEL_FLAGS[stage])
        assert message is not None and mutation.words in message and str(data) in message, message


@by_name(corpus.RECORD_CONTROLS)
def test_a_strange_but_valid_record_is_accepted(case, valid, tmp_path):
    data = damaged(valid, "slices", tmp_path / "a", case[1])
    assert outcome("02", tmp_path / "zoom", "--data", data, "--patch", "1", "--workers", "1") is None
    stage = ("03", "04")[case[0] % 2]
    flags = ["--data", tmp_path / "zoom", "--model", tiny_vlm.DEFAULT, *MODEL_FLAGS[stage]]
    assert outcome(stage, tmp_path / "run", *flags) is None


def test_training_needs_no_more_of_dataset_info_than_the_stage(valid, tmp_path):
    """So that pictures of another origin can be trained on, as the README says."""
    shutil.copytree(valid / "zoom", tmp_path / "zoom")
    (tmp_path / "zoom" / "dataset_info.json").write_text('{"stage": "02"}')
    flags = ["--data", tmp_path / "zoom", "--model", tiny_vlm.DEFAULT, *MODEL_FLAGS["03"]]
    assert outcome("03", tmp_path / "run", *flags) is None


@by_name(corpus.CHECKPOINTS)
def test_a_bad_checkpoint_is_one_line(case, valid, tmp_path):
    """Read by 03, 04 or 05 in turn."""
    folder = shutil.copytree(tiny_vlm.DEFAULT, tmp_path / "model")
    case[1].apply(folder)
    stage = ("03", "04", "05")[case[0] % 3]
    flags = ["--data", valid / "zoom", "--model", folder, *MODEL_FLAGS[stage]]
    message = outcome(stage, tmp_path / "run", *flags)  # Explosive would leave a file: outcome() looks for it
    assert message is not None and str(folder) in message and case[1].words in message, message


@by_name(corpus.CHECKPOINT_CONTROLS)
def test_a_strange_but_valid_checkpoint_is_accepted(case, valid, tmp_path):
    folder = shutil.copytree(tiny_vlm.DEFAULT, tmp_path / "model")
    case[1].apply(folder)
    stage = ("03", "04", "05")[case[0] % 3]
    assert outcome(stage, tmp_path / "run", "--data", valid / "zoom", "--model", folder, *MODEL_FLAGS[stage]) is None


# ---------------------------------------------------------------------------------------------------------------------
# A sample as a user starts it


def start(script: str, *flags: object, ranks: int = 1, env: dict | None = None) -> subprocess.CompletedProcess:
    """At most 16 GiB of address space: what torch reserves at its start, and little more."""
    begin = [sys.executable]
    if ranks > 1:
        begin += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*begin, str(ROOT / script), *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2),
    )


def ends_in_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and LINE.fullmatch(lines[-1]), done.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in lines[-1] for word in words), lines[-1]


def named(mutations: list, kind: str, name: str):
    return next(m for m in mutations if (m.kind, m.name) == (kind, name))


@pytest.mark.parametrize(("kind", "name"), [("dimensions", "ct 32,767 to the fourth"), ("gzip", "mask cut by one"),
                                            ("names, links and missing files", "mask is a pipe")])  # fmt: skip
def test_a_volume_as_a_subprocess(kind, name, tmp_path):
    flags = corpus.build_volumes(tmp_path, named(corpus.VOLUMES, kind, name))
    ends_in_one_line(start("01_make_dataset.py", *flags, "--out", tmp_path / "out", "--strict"), "train_2_a_1")


@pytest.mark.parametrize(("kind", "name"), [("picture", "a bomb that inflates"), ("paths, links and ids", "id empty")])
def test_a_record_as_a_subprocess(kind, name, valid, tmp_path):
    data = damaged(valid, "slices", tmp_path / "a", named(corpus.RECORDS, kind, name))
    ends_in_one_line(start("02_zoom_augment.py", "--data", data, "--out", tmp_path / "out"), str(data))


@pytest.mark.parametrize(("script", "kind", "name"), [
    ("03_sft.py", "weights that do not fit", "text_config hidden_size 1000000"),
    ("04_grpo.py", "checkpoint of pickles", "pytorch_model.bin"),
    ("05_eval.py", "tokenizer", "no <|image_pad|>"),
])  # fmt: skip
def test_a_checkpoint_as_a_subprocess(script, kind, name, valid, tmp_path):
    folder = shutil.copytree(tiny_vlm.DEFAULT, tmp_path / "model")
    named(corpus.CHECKPOINTS, kind, name).apply(folder)
    done = start(script, "--data", valid / "zoom", "--model", folder, "--out", tmp_path / "run")
    ends_in_one_line(done, str(folder))
    assert not (tmp_path / "BOOM").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bugs of ours keep their traceback


BUGS = [("01", "support.nifti", "read_header"), ("01", "support.rexgroundingct", "finding_axis"),
        ("02", "support.files", "open_picture"), ("02", "support.zoom", "crop_square"),
        ("03", "support.vlm", "encode"), ("03", "support.vlm", "set_trainable"), ("03", "support.train", "save"),
        ("04", "support.vlm", "positions"), ("04", "rewards", "reward"), ("05", "support.vlm", "decode"),
        ("05", "support.files", "read_records"), ("05", "support.vlm", "load_processor")]  # fmt: skip


@pytest.mark.parametrize(("stage", "module", "function"), BUGS)
def test_an_internal_bug_still_raises(stage, module, function, valid, tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        raise TypeError("a bug of ours")

    original = getattr(importlib.import_module(module), function)
    for place in list(sys.modules.values()):  # wherever it was imported to
        if getattr(place, "__file__", None) and getattr(place, function, None) is original:
            monkeypatch.setattr(place, function, bug)
    flags = {"01": corpus.build_volumes(tmp_path, None), "02": ["--data", valid / "slices", "--workers", "1"]}
    model = ["--data", valid / "zoom", "--model", tiny_vlm.DEFAULT, *MODEL_FLAGS.get(stage, ())]
    with pytest.raises(TypeError, match="a bug of ours"):
        outcome(stage, tmp_path / "out", *flags.get(stage, model))


# ---------------------------------------------------------------------------------------------------------------------
# What no table lists: hypothesis

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
RECORD = {"file_name": "a.png", "id": "a", "label": "Emphysema", "question": "?", "answer": "!", "box": [0, 0, 1, 1]}
EDGE = st.integers() | st.integers(-2, 60) | st.floats() | st.booleans() | st.none()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One record's dataset folder, of which hypothesis rewrites the metadata."""
    root = tmp_path_factory.mktemp("records")
    (root / "train").mkdir()
    (root / "train" / "a.png").write_bytes(corpus.png(40, 48, bytes(41 * 48)))
    return root


def read(folder: Path, text: str | bytes) -> list[dict] | None:
    """The records of a metadata.jsonl with this text, or None when it is refused in one line."""
    path = folder / "train" / "metadata.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        return files.read_records(folder, "train")
    except BadInput as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return None


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.lists(EDGE, max_size=6) | JSON)
@example([0, 0, 40, 48])
def test_any_box(folder, box):
    records = read(folder, json.dumps({**RECORD, "box": box}))
    good = isinstance(box, list) and len(box) == 4 and all(type(edge) is int for edge in box)
    assert (records is not None) == (good and 0 <= box[0] < box[2] <= 4096 and 0 <= box[1] < box[3] <= 4096)


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.sampled_from([*RECORD, "boxes", "slice", "text", "patch", None]), JSON)
def test_any_json_as_a_record(folder, field, value):
    records = read(folder, json.dumps(value if field is None else {**RECORD, field: value}))
    if records is not None:
        assert records[0]["label"] in rewards.CLASSES and records[0]["image"].is_file()


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_metadata_and_as_json(folder, data):
    assert not read(folder, data)
    path = folder / "x.json"
    path.write_bytes(data)
    for reader in (files.read_json, lambda path: files.dataset_info(path.parent)):
        (folder / "dataset_info.json").write_bytes(data)
        try:
            reader(path)
        except BadInput as error:
            assert "\n" not in str(error) and str(folder) in str(error)


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["stage", "phantoms", "settings", "records", "skipped", "classes"]), JSON))
def test_any_json_as_dataset_info(folder, info):
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with contextlib.suppress(BadInput):
        assert files.dataset_info(folder)["stage"] in ("01", "02")


PIECES = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<Answer>", "</ answer>", "\n", " ", ".",
                          "<", ">", "\0", "İ", "ß", *rewards.CLASSES])  # fmt: skip


@hypothesis_settings(max_examples=500, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
def test_any_text_as_a_completion(text):
    """The parser never raises, and names a class only for a single pair that holds nothing else."""
    scored = rewards.reward(text, "Emphysema")
    assert {scored.format, scored.validity, scored.correctness} <= {0.0, 1.0} and 0 <= scored.total <= 4
    rewards.thinking(text)
    if scored.predicted is not None:
        assert text.count("<answer>") == text.count("</answer>") == 1
        inside = text.split("<answer>")[1].split("</answer>")[0]
        assert " ".join(inside.split()).rstrip(". ").casefold() == scored.predicted.casefold()


def test_an_endless_completion_is_parsed_in_linear_time():
    for piece in ("<think>", "</think>", "<answer>", "<think><answer>", " ", "<"):
        text = piece * (400_000 // len(piece))
        with bounded():
            assert rewards.reward(text, "Emphysema").total == 0 and rewards.reward(f"<answer>{text}", "Emphysema")


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_to_a_nifti(tmp_path_factory, data):
    """A few bytes changed, before or after compression, and an end cut off: the voxels, or one line."""
    path = tmp_path_factory.getbasetemp() / "damaged.nii.gz"
    raw = bytearray(ct.nifti(ct.to_file_axes(ct.chest(), "LPS")[:8, :8, :4].copy(), ct.affine_for("LPS")))

    def damage(content: bytearray, limit: int) -> bytearray:
        for at, value in data.draw(st.lists(st.tuples(st.integers(0, limit - 1), st.integers(0, 255)), max_size=3)):
            content[at] = value
        return content

    ct.write_gz(path, bytes(damage(raw, 352)))
    packed = damage(bytearray(path.read_bytes()), path.stat().st_size)
    path.write_bytes(packed[: data.draw(st.integers(0, len(packed)) | st.just(len(packed)))])
    try:
        header = nifti.read_header(path)
        with bounded(gigabytes=0.5):
            for slab in nifti.read_slabs(header):
                assert slab.shape == header.shape[:-1]
    except BadInput as error:
        assert "\n" not in str(error) and str(path) in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# The environment


def test_no_network_with_a_hub_id(valid, tmp_path):
    """Nobody listens at this address; the library alone would try for 20 s a file."""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    done = start("05_eval.py", "--data", valid / "zoom", "--model", "Qwen/Qwen2.5-VL-7B-Instruct", env=env)
    ends_in_one_line(done, "Qwen/Qwen2.5-VL-7B-Instruct", "network", "hf download", "HF_HUB_OFFLINE")
    assert "Retrying" not in done.stderr


@pytest.mark.parametrize("stage", ["04", "05"])
def test_fewer_samples_than_ranks(stage, valid, tmp_path):
    """One record and two ranks: both finish; training takes it twice, as 03 does, evaluation scores it once."""
    data = shutil.copytree(valid / "zoom", tmp_path / "data")
    for split in ("train", "test"):
        path = data / split / "metadata.jsonl"
        path.write_text(path.read_text().splitlines()[0] + "\n")
    flags = {**MODEL_FLAGS, "04": [*MODEL_FLAGS["04"], "--prompts-per-step", "2"]}[stage]
    done = start(f"{STAGES[stage].__name__}.py", "--data", data, "--model", tiny_vlm.DEFAULT, "--out", tmp_path / "run",
                 *flags, ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = train.read_log(tmp_path / "run" / {"04": "rollouts.jsonl", "05": "predictions.jsonl"}[stage])
    assert len(rows) == {"04": 2 * 2, "05": 1}[stage] and len({row["id"] for row in rows}) == 1


@pytest.mark.parametrize("stage", ["03", "04"])
def test_fewer_samples_a_step_than_ranks_is_one_line(stage, valid, monkeypatch):
    monkeypatch.setattr(train, "start", lambda seed: train.World(0, 2, torch.device("cpu")))
    flag = {"03": "--batch-size", "04": "--prompts-per-step"}[stage]
    message = outcome(stage, Path.cwd() / "run", "--data", valid / "zoom", "--model", tiny_vlm.DEFAULT, flag, "1")
    assert flag in message


def test_a_class_absent_from_training_is_said(valid, tmp_path, capsys):
    """The valid folder shows consolidation only; training goes on, evaluation gives the other classes no accuracy."""
    flags = ["--data", valid / "zoom", "--model", tiny_vlm.DEFAULT]
    assert outcome("03", tmp_path / "sft", *flags, *MODEL_FLAGS["03"]) is None
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "Consolidation" not in note and all(name in note for name in rewards.CLASSES if "Consolidation" not in name)
    assert outcome("05", tmp_path / "eval", *flags, *MODEL_FLAGS["05"]) is None


@pytest.mark.parametrize("stage", ["03", "04", "05"])
def test_an_output_folder_that_cannot_be_made_is_one_line_at_once(stage, valid, tmp_path, monkeypatch):
    """Nothing is computed first."""
    (tmp_path / "file").write_text("no folder")
    for module, name in ((STAGES["03"], "sft_step"), (STAGES["04"], "rollout"), (STAGES["05"], "answer")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("computed before it looked"))
    flags = ["--data", valid / "zoom", "--model", tiny_vlm.DEFAULT, *MODEL_FLAGS[stage]]
    message = outcome(stage, tmp_path / "file" / "out", *flags)
    assert str(tmp_path / "file") in message and "cannot be written" in message


@pytest.mark.parametrize("size", [200_000, 3_000_000])
@pytest.mark.parametrize("stage", ["03", "04"])
def test_a_full_disk_is_one_line(stage, size, valid, tmp_path):
    """No file may grow beyond `size` bytes: the checkpoint's weights have 3.6 million, its state more."""
    flags = ["--data", valid / "zoom", "--model", tiny_vlm.DEFAULT, *MODEL_FLAGS[stage]]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        message = outcome(stage, tmp_path / "run", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert message and "cannot be written" in message and str(tmp_path / "run") in message
    assert train.checkpoints(tmp_path / "run") == [] and not (tmp_path / "run" / "config.json").exists()


def test_torchs_own_writer_on_a_full_disk(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        with pytest.raises(BadInput, match="cannot be written"), files.writing(tmp_path / "x"):
            torch.save(torch.ones(3000), tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    with pytest.raises(RuntimeError, match="a bug of ours"), files.writing(tmp_path / "x"):
        raise RuntimeError("a bug of ours")


# ---------------------------------------------------------------------------------------------------------------------
# Security: what no source may contain

FORBIDDEN = {
    "a pickle": r"\bpickle\.(load|Unpickler)|\bnp\.load\(|allow_pickle|\bjoblib\b|\bshelve\b|\bmarshal\b|\bdill\b",
    "code of a checkpoint": r"trust_remote_code(?!=False)",
    "eval or exec": r"(?<![\w.])(eval|exec|compile|__import__)\(",
    "a shell": r"shell=True|os\.system|os\.popen|\bcommands\b",
    "a download": r"\b(urllib|requests|httpx2?|aiohttp|ftplib|socket|wget|snapshot_download|hf_hub_download)\b",
    "YAML or XML of strangers": r"\byaml\b|xml\.etree",
}
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "support").rglob("*.py")])


def test_sources_hold_nothing_dangerous():
    assert len(SOURCES) > 10
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for what, pattern in FORBIDDEN.items():
                assert not re.search(pattern, line), f"{path.name}, line {number}: {what}: {line.strip()}"
            if "torch.load(" in line:
                assert "weights_only=True" in line, f"{path.name}, line {number}: {line.strip()}"
            if "from_pretrained(" in line and "AutoConfig" not in line and path.name == "vlm.py":
                assert "trust_remote_code=False" in line or '"""' in line or "`" in line, line


@pytest.mark.parametrize(
    "line", ["torch.load(p)", "pickle.load(f)", "trust_remote_code=True", "eval(x)", "shell=True", "import requests"]
)
def test_the_search_finds_what_it_looks_for(line, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(line + "\n")
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", [tmp_path / "bad.py"] * 11)
    with pytest.raises(AssertionError, match="bad.py, line 1"):
        test_sources_hold_nothing_dangerous()


def test_a_pickle_in_a_state_file_is_not_run(model, world, tmp_path):
    """--resume reads state.pt with weights_only=True."""
    state = tmp_path / "checkpoint-000001" / "state.pt"
    state.parent.mkdir()
    torch.save({"step": 1, "trained": corpus.Explosive()}, state)
    trained = vlm.set_trainable(model, "merger")
    with pytest.raises(BadInput, match="no checkpoint can be read"):
        train.resume(tmp_path, trained, torch.optim.AdamW(trained.values()), world)
    assert not (tmp_path / "BOOM").exists()
