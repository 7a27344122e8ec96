"""Nothing let in: each case of the corpus ends in one line with file and fault, or a counted skip.

In process, through each script's `main(argv)`, under a limit on time and on memory, with an eye on
every file outside the output folder; a sample again as a user starts it. Then what no corpus can
list: hypothesis, the environment, and what the sources must not contain.
"""

import contextlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import rewards
from support import checkpoint, distributed, files, nifti, records, vlm
from support.files import BadInput
from support.log import read_log
from tests import corpus, launch
from tests import ct_fixtures as ct
from tests.ct_fixtures import JSON

launch.server()
STAGES = {name[:2]: importlib.import_module(name) for name in launch.STAGES}
TRAINING = ("03", "04")
MODELS = (*TRAINING, "05")  # the stages that read a checkpoint
MODEL_FLAGS = {
    "03": "--max-steps 1 --batch-size 6".split(),  # as many as there are records: each is read
    "04": "--steps 1 --prompts-per-step 6 --group-size 2 --max-new-tokens 2".split(),
    "05": "--think no --max-new-tokens 2".split(),
}
LINE = re.compile(r"error: [^\n]+")


def by_name(mutations: list):
    return pytest.mark.parametrize("case", list(enumerate(mutations)), ids=map(str, mutations))


# ==== The harness ====


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
    state = {}
    for path in root.rglob("*"):
        if out not in (path, *path.parents) and not path.is_dir():
            status = path.lstat()
            state[path] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return state


def outcome(stage: str, out: Path, *flags: object) -> str | None:
    """Runs a stage in the working folder `out.parent`: its one-line message, None if it accepts."""
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
    """The working folder is an empty one; figures take longer than the rest and are left out."""
    monkeypatch.chdir(tmp_path)
    for stage in STAGES.values():
        for function in ("draw_overview", "plot_curves"):
            monkeypatch.setattr(stage, function, lambda *_: None, raising=False)


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """01's folder "slices" and its twin "zoom" by 02, of small slices."""
    root = tmp_path_factory.mktemp("valid")
    cases = []
    for i in range(4):
        cases.append(ct.add_case(root, f"train_{i}_a_1.nii.gz", picture=ct.chest(i)))
    slices, zoom = str(root / "slices"), str(root / "zoom")
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("01", "02"):
            patch.setattr(STAGES[stage], "draw_overview", lambda *_: None)
        flags = [*ct.write_index(root, cases), "--out", slices, "--test-fraction", "0.5"]
        STAGES["01"].main(flags)
        flags = ["--data", slices, "--out", zoom, "--patch", "1", "--workers", "1"]
        STAGES["02"].main(flags)
    return root


def damaged(valid: Path, kind: str, target: Path, case) -> Path:
    case.apply(corpus.Records(shutil.copytree(valid / kind, target)))
    return target


# ==== The corpus ====


def test_the_corpus_is_large_enough():
    mutations = corpus.VOLUMES + corpus.INDEXES + corpus.RECORDS + corpus.RECORDS_02
    mutations += corpus.CHECKPOINTS
    kinds = Counter(mutation.kind for mutation in mutations)
    assert kinds.total() >= 200 and min(kinds.values()) >= 10, kinds


@by_name(corpus.VOLUMES)
def test_a_bad_volume_is_a_counted_skip(case, tmp_path, capsys):
    flags = corpus.build_volumes(tmp_path, case[1])
    assert outcome("01", tmp_path / "out", *flags) is None
    (skipped,) = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["skipped"]
    reported = f"{skipped['volume']}: {skipped['reason']}"
    file = re.compile(r"train_2_a_1|dataset\.json")  # the file, or its entry in dataset.json
    assert case[1].words in reported and file.search(reported) and len(reported) < 500, reported
    lines = ct.read_lines(tmp_path / "out", "train") + ct.read_lines(tmp_path / "out", "test")
    assert {record["volume"] for record in lines} == {"train_1_a_1"}
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert sum(line.startswith("skipped: ") for line in printed.splitlines()) == 1
    message = outcome("01", tmp_path / "strict", *flags, "--strict")
    assert case[1].words in message and file.search(message)


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
    data = damaged(valid, "slices", tmp_path / "a", mutation)
    message = outcome("02", tmp_path / "out", "--data", data, "--workers", "1")
    assert message is not None and mutation.words in message, message
    assert str(tmp_path / "a") in message or "record train_1_a_1_s0003_f0" in message, message
    if mutation in corpus.RECORDS:
        stage = MODELS[number % 3]
        data = damaged(valid, "zoom", tmp_path / "b", mutation)
        if stage == "05":  # it reads the test split
            (data / "test").rename(data / "other")
            (data / "train").rename(data / "test")
        flags = ["--data", data, "--model", vlm.TINY, *MODEL_FLAGS[stage]]
        message = outcome(stage, tmp_path / "run", *flags)
        assert message is not None and mutation.words in message and str(data) in message, message


@by_name(corpus.RECORD_CONTROLS)
def test_a_strange_but_valid_record_is_accepted(case, valid, tmp_path):
    data = damaged(valid, "slices", tmp_path / "a", case[1])
    flags = ["--data", data, "--patch", "1", "--workers", "1"]
    assert outcome("02", tmp_path / "zoom", *flags) is None
    stage = TRAINING[case[0] % 2]
    flags = ["--data", tmp_path / "zoom", "--model", vlm.TINY, *MODEL_FLAGS[stage]]
    assert outcome(stage, tmp_path / "run", *flags) is None


def test_training_needs_no_more_of_dataset_info_than_the_stage(valid, tmp_path):
    """So that pictures of another origin can be trained on, as the README says."""
    shutil.copytree(valid / "zoom", tmp_path / "zoom")
    (tmp_path / "zoom" / "dataset_info.json").write_text('{"stage": "02"}')
    flags = ["--data", tmp_path / "zoom", "--model", vlm.TINY, *MODEL_FLAGS["03"]]
    assert outcome("03", tmp_path / "run", *flags) is None


@by_name(corpus.CHECKPOINTS)
def test_a_bad_checkpoint_is_one_line(case, valid, tmp_path):
    """Read by 03, 04 or 05 in turn."""
    folder = shutil.copytree(vlm.TINY, tmp_path / "model")
    case[1].apply(folder)
    stage = MODELS[case[0] % 3]
    flags = ["--data", valid / "zoom", "--model", folder, *MODEL_FLAGS[stage]]
    # Explosive would leave a file: outcome() looks for it.
    message = outcome(stage, tmp_path / "run", *flags)
    assert message is not None and str(folder) in message and case[1].words in message, message


@by_name(corpus.CHECKPOINT_CONTROLS)
def test_a_strange_but_valid_checkpoint_is_accepted(case, valid, tmp_path):
    folder = shutil.copytree(vlm.TINY, tmp_path / "model")
    case[1].apply(folder)
    stage = MODELS[case[0] % 3]
    flags = ["--data", valid / "zoom", "--model", folder, *MODEL_FLAGS[stage]]
    assert outcome(stage, tmp_path / "run", *flags) is None


# ==== A sample as a user starts it ====


def start(script: str, *flags: object, **options):
    """At most 16 GiB of address space: what torch reserves at its start, and little more."""
    limits = {"RLIMIT_AS": 16 * 2**30}
    return launch.run(script, *flags, cwd=Path.cwd(), limits=limits, **options)


def ends_in_one_line(done, *words: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and LINE.fullmatch(lines[-1]), done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert all(word in lines[-1] for word in words), lines[-1]


def named(mutations: list, kind: str, name: str):
    return next(m for m in mutations if (m.kind, m.name) == (kind, name))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dimensions", "ct 32,767 to the fourth"),
        ("gzip", "mask cut by one"),
        ("names, links and missing files", "mask is a pipe"),
    ],
)
def test_a_volume_as_a_subprocess(kind, name, tmp_path):
    flags = corpus.build_volumes(tmp_path, named(corpus.VOLUMES, kind, name))
    done = start("01_make_dataset", *flags, "--out", tmp_path / "out", "--strict")
    ends_in_one_line(done, "train_2_a_1")


@pytest.mark.parametrize(
    ("kind", "name"), [("picture", "a bomb that inflates"), ("paths, links and ids", "id empty")]
)
def test_a_record_as_a_subprocess(kind, name, valid, tmp_path):
    data = damaged(valid, "slices", tmp_path / "a", named(corpus.RECORDS, kind, name))
    done = start("02_zoom_augment", "--data", data, "--out", tmp_path / "out")
    ends_in_one_line(done, str(data))


@pytest.mark.parametrize(
    ("script", "kind", "name"),
    [
        ("03_sft", "weights that do not fit", "text_config hidden_size 1000000"),
        ("04_grpo", "checkpoint of pickles", "pytorch_model.bin"),
        ("05_eval", "tokenizer", "no <|image_pad|>"),
    ],
)
def test_a_checkpoint_as_a_subprocess(script, kind, name, valid, tmp_path):
    folder = shutil.copytree(vlm.TINY, tmp_path / "model")
    named(corpus.CHECKPOINTS, kind, name).apply(folder)
    done = start(script, "--data", valid / "zoom", "--model", folder, "--out", tmp_path / "run")
    ends_in_one_line(done, str(folder))
    assert not (tmp_path / "BOOM").exists()


# ==== Bugs of ours keep their traceback ====


BUGS = [
    ("01", "support.nifti", "read_header"),
    ("01", "support.rexgroundingct", "finding_axis"),
    ("02", "support.files", "open_picture"),
    ("02", "02_zoom_augment", "crop_square"),
    ("03", "support.vlm", "encode"),
    ("03", "support.vlm", "set_trainable"),
    ("03", "support.checkpoint", "save"),
    ("04", "support.vlm", "positions"),
    ("04", "rewards", "reward"),
    ("05", "support.vlm", "decode"),
    ("05", "support.records", "read_records"),
    ("05", "support.vlm", "load_processor"),
]


@pytest.mark.parametrize(("stage", "module", "function"), BUGS)
def test_an_internal_bug_still_raises(stage, module, function, valid, tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        raise TypeError("a bug of ours")

    original = getattr(importlib.import_module(module), function)
    for place in list(sys.modules.values()):  # wherever it was imported to
        if getattr(place, "__file__", None) and getattr(place, function, None) is original:
            monkeypatch.setattr(place, function, bug)
    if stage == "01":
        flags = corpus.build_volumes(tmp_path, None)
    elif stage == "02":
        flags = ["--data", valid / "slices", "--workers", "1"]
    else:
        flags = ["--data", valid / "zoom", "--model", vlm.TINY, *MODEL_FLAGS[stage]]
    with pytest.raises(TypeError, match="a bug of ours"):
        outcome(stage, tmp_path / "out", *flags)


# ==== What no table lists: hypothesis ====

RECORD = {"file_name": "a.png", "id": "a", "label": "Emphysema", "question": "?", "answer": "!"}
RECORD["box"] = [0, 0, 1, 1]
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
        return records.read_records(folder, "train")
    except BadInput as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return None


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.lists(EDGE, max_size=6) | JSON)
@example([0, 0, 40, 48])
def test_any_box(folder, box):
    accepted = read(folder, json.dumps({**RECORD, "box": box})) is not None
    good = isinstance(box, list) and [type(edge) for edge in box] == [int] * 4
    if good:
        good = 0 <= box[0] < box[2] <= 4096 and 0 <= box[1] < box[3] <= 4096
    assert accepted == good


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.sampled_from([*RECORD, "boxes", "slice", "text", "patch", None]), JSON)
def test_any_json_as_a_record(folder, field, value):
    rows = read(folder, json.dumps(value if field is None else {**RECORD, field: value}))
    if rows is not None:
        assert rows[0]["label"] in rewards.CLASSES and rows[0]["image"].is_file()


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_metadata_and_as_json(folder, data):
    assert not read(folder, data)
    path = folder / "dataset_info.json"
    path.write_bytes(data)
    for reader, where in ((files.read_json, path), (records.dataset_info, folder)):
        try:
            reader(where)
        except BadInput as error:
            assert "\n" not in str(error) and str(path) in str(error)


KEYS = ["stage", "phantoms", "settings", "records", "skipped", "classes"]


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_json_as_dataset_info(folder, info):
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with contextlib.suppress(BadInput):
        assert records.dataset_info(folder)["stage"] in ("01", "02")


TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<Answer>", "</ answer>"]
MARKS = ["\n", " ", ".", "<", ">", "\0", "İ", "ß"]
PIECES = st.sampled_from([*TAGS, *MARKS, *rewards.CLASSES])


@hypothesis_settings(max_examples=500, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
def test_any_text_as_a_completion(text):
    """The parser never raises, and names a class only for a single pair that holds nothing else."""
    scored = rewards.reward(text, "Emphysema")
    assert {scored.format, scored.validity, scored.correctness} <= {0.0, 1.0}
    assert 0 <= scored.total <= 4
    rewards.reasoning(text)
    if scored.predicted is not None:
        assert text.count("<answer>") == text.count("</answer>") == 1
        inside = text.split("<answer>")[1].split("</answer>")[0]
        assert " ".join(inside.split()).rstrip(". ").casefold() == scored.predicted.casefold()


def test_an_endless_completion_is_parsed_in_linear_time():
    for piece in ("<think>", "</think>", "<answer>", "<think><answer>", " ", "<"):
        text = piece * (400_000 // len(piece))
        with bounded():
            assert rewards.reward(text, "Emphysema").total == 0
            rewards.reward(f"<answer>{text}", "Emphysema")


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_to_a_nifti(tmp_path_factory, data):
    """A few bytes changed, before or after compression, and an end cut off.

    It gives the voxels, or one line.
    """
    path = tmp_path_factory.getbasetemp() / "damaged.nii.gz"
    voxels = ct.to_file_axes(ct.chest(), "LPS")[:8, :8, :4].copy()
    raw = bytearray(ct.nifti(voxels, ct.affine_for("LPS")))

    def damage(content: bytearray, limit: int) -> bytearray:
        change = st.tuples(st.integers(0, limit - 1), st.integers(0, 255))
        for at, value in data.draw(st.lists(change, max_size=3)):
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


# ==== The environment ====


HUB_ID = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.fixture(scope="module", autouse=True)
def hub_id_by_python(valid, tmp_path_factory):
    """Starts 05 without a network; meanwhile tests in this process run."""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}  # where nobody listens
    env = {**os.environ, **env, "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
    return launch.start_python("05_eval", "--data", valid / "zoom", "--model", HUB_ID, env=env)


def test_no_network_with_a_hub_id(hub_id_by_python):
    """The library alone would try for 20 s per file."""
    done = launch.ended(hub_id_by_python)
    ends_in_one_line(done, HUB_ID, "network", "hf download", "HF_HUB_OFFLINE")
    assert "Retrying" not in done.stderr


ROWS = [("04", "rollouts.jsonl", 2 * 2), ("05", "predictions.jsonl", 1)]


@pytest.mark.parametrize(("stage", "file", "count"), ROWS)
def test_fewer_samples_than_ranks(stage, file, count, valid, tmp_path):
    """One record and two ranks: training takes it twice, as 03 does, evaluation scores it once."""
    data = shutil.copytree(valid / "zoom", tmp_path / "data")
    for split in ("train", "test"):
        path = data / split / "metadata.jsonl"
        path.write_text(path.read_text().splitlines()[0] + "\n")
    flags = ["--data", data, "--model", vlm.TINY, "--out", tmp_path / "run", *MODEL_FLAGS[stage]]
    if stage == "04":
        flags += ["--prompts-per-step", "2"]
    done = start(STAGES[stage].__name__, *flags, ranks=2)
    assert done.returncode == 0, done.stderr
    rows = read_log(tmp_path / "run" / file)
    assert len(rows) == count and len({row["id"] for row in rows}) == 1


@pytest.mark.parametrize(("stage", "flag"), [("03", "--batch-size"), ("04", "--prompts-per-step")])
def test_fewer_samples_a_step_than_ranks_is_one_line(stage, flag, valid, tmp_path, monkeypatch):
    world = distributed.World(0, 2, torch.device("cpu"))
    monkeypatch.setattr(distributed, "start", lambda: world)
    flags = ["--data", valid / "zoom", "--model", vlm.TINY, flag, "1"]
    assert flag in outcome(stage, tmp_path / "run", *flags)


def test_a_class_absent_from_training_is_said(valid, tmp_path, capsys):
    """The valid folder shows consolidation only: training and evaluation go on."""
    flags = ["--data", valid / "zoom", "--model", vlm.TINY]
    assert outcome("03", tmp_path / "sft", *flags, *MODEL_FLAGS["03"]) is None
    lines = capsys.readouterr().out.splitlines()
    (note,) = [line for line in lines if line.startswith("note: ")]
    for name in rewards.CLASSES:
        assert (name in note) == ("Consolidation" not in name)
    assert outcome("05", tmp_path / "eval", *flags, *MODEL_FLAGS["05"]) is None


@pytest.mark.parametrize(
    ("stage", "function"), [("03", "add_gradients"), ("04", "rollout"), ("05", "answer")]
)
def test_an_output_folder_that_cannot_be_made_is_one_line_at_once(
    stage, function, valid, tmp_path, monkeypatch
):
    """Nothing is computed first."""
    (tmp_path / "file").write_text("no folder")
    early = pytest.fail.Exception("computed before it looked")
    monkeypatch.setattr(STAGES[stage], function, Mock(side_effect=early))
    flags = ["--data", valid / "zoom", "--model", vlm.TINY, *MODEL_FLAGS[stage]]
    message = outcome(stage, tmp_path / "file" / "out", *flags)
    assert str(tmp_path / "file") in message and "cannot be written" in message


@contextlib.contextmanager
def no_file_beyond(size: int):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("size", [200_000, 3_000_000])
@pytest.mark.parametrize("stage", TRAINING)
def test_a_full_disk_is_one_line(stage, size, valid, tmp_path):
    """No file may grow beyond `size` bytes: the weights have 3.6 million, the state more."""
    flags = ["--data", valid / "zoom", "--model", vlm.TINY, *MODEL_FLAGS[stage]]
    with no_file_beyond(size):
        message = outcome(stage, tmp_path / "run", *flags)
    assert message and "cannot be written" in message and str(tmp_path / "run") in message
    assert checkpoint.checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run" / "config.json").exists()


def test_torchs_own_writer_on_a_full_disk(tmp_path):
    with no_file_beyond(2000):
        with pytest.raises(BadInput, match="cannot be written"), files.writing(tmp_path / "x"):
            torch.save(torch.ones(3000), tmp_path / "x")
    with pytest.raises(RuntimeError, match="a bug of ours"), files.writing(tmp_path / "x"):
        raise RuntimeError("a bug of ours")


# ==== Security: what no source may contain ====

FORBIDDEN = {
    "a pickle": r"\bpickle\.(load|Unpickler)|\bnp\.load\(|allow_pickle",
    "another pickle": r"\b(joblib|shelve|marshal|dill)\b",
    "code of a checkpoint": r"trust_remote_code(?!=False)",
    "eval or exec": r"(?<![\w.])(eval|exec|compile|__import__)\(",
    "a shell": r"shell=True|os\.system|os\.popen|\bcommands\b",
    "the network": r"\b(urllib|requests|httpx2?|aiohttp|ftplib|socket|wget)\b",
    "a download": r"\b(snapshot_download|hf_hub_download)\b",
    "YAML or XML of strangers": r"\byaml\b|xml\.etree",
}
PATTERNS = ("*.py", "support/**/*.py", "assets/*.py")
SOURCES = sorted(path for pattern in PATTERNS for path in launch.ROOT.glob(pattern))


def test_sources_hold_nothing_dangerous():
    assert len(SOURCES) > 10
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            place = f"{path.name}, line {number}: {line.strip()}"
            for what, pattern in FORBIDDEN.items():
                assert not re.search(pattern, line), f"{place}: {what}"
            if "torch.load(" in line:
                assert "weights_only=True" in line, place
            if "from_pretrained(" in line and "AutoConfig" not in line and path.name == "vlm.py":
                assert "trust_remote_code=False" in line or '"""' in line or "`" in line, place


DANGEROUS = ["torch.load(p)", "pickle.load(f)", "trust_remote_code=True", "eval(x)", "shell=True"]
DANGEROUS += ["import requests", "import shelve", "hf_hub_download(name)", "import yaml"]


@pytest.mark.parametrize("line", DANGEROUS)
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
        checkpoint.resume(tmp_path, trained, torch.optim.AdamW(trained.values()), world)
    assert not (tmp_path / "BOOM").exists()
