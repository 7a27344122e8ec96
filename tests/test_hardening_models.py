"""Checkpoints, resumed runs and evaluations met with damage: one line, or what is left is used."""

import importlib
import json
import os
import shutil
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from support import checkpoint, log, tables, vlm
from support.distributed import World
from support.files import BadInput
from support.log import read_log
from support.records import load_split
from tests import launch

launch.server()
CPU = torch.device("cpu")
TRAIN = {
    "03_sft": "--max-steps 2 --batch-size 2 --save-every 1",
    "04_grpo": "--steps 2 --prompts-per-step 1 --group-size 2 --max-new-tokens 2 --save-every 1 "
    "--schedule constant --warmup-ratio 0",  # so that --steps may change
}
BOTH = pytest.mark.parametrize("script", TRAIN)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Leaves out a figure that takes half a second."""
    for script in TRAIN:
        monkeypatch.setattr(importlib.import_module(script), "plot_curves", lambda *_: None)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(vlm.TINY, tmp_path / "model")


def change(path, *keys, value) -> None:
    """Sets one value of a JSON file."""
    whole = part = json.loads(path.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(whole))


def open_model(folder, records) -> dict:
    """What 03 and 04 do with a checkpoint before they train."""
    model, processor = vlm.load_model(str(folder), CPU), vlm.load_processor(str(folder))
    return vlm.try_out(model, processor, records[:3], "think", "diagnose", CPU)


def main(script, data, out, *flags) -> str | None:
    """Runs a stage here; its one line, or None at a good end."""
    flags = ["--data", data, "--out", out, *flags]
    if "--model" not in flags:
        flags += ["--model", vlm.TINY]
    try:
        importlib.import_module(script).main(list(map(str, flags)))
    except SystemExit as stop:
        assert isinstance(stop.code, str) and "\n" not in stop.code
        return stop.code
    return None


# ==== A checkpoint is tried when it is opened ====


SETTINGS = [
    ("config.json", ("vision_config", "num_heads"), 3),
    ("config.json", ("vision_config", "window_size"), 0),
    ("config.json", ("text_config", "rope_parameters"), None),
    ("config.json", ("text_config", "pad_token_id"), 10**6),
    ("config.json", ("vision_config", "depth"), 10**6),
    ("config.json", ("text_config", "num_hidden_layers"), 10**6),
    ("config.json", ("num_labels",), 10**9),
    ("config.json", ("return_dict",), False),
    ("preprocessor_config.json", ("do_resize",), False),
    ("preprocessor_config.json", ("size",), {"shortest_edge": 10**9, "longest_edge": 10**9}),
    ("preprocessor_config.json", ("temporal_patch_size",), 10**9),
    ("tokenizer_config.json", ("split_special_tokens",), True),
    ("generation_config.json", ("pad_token_id",), 10**6),
]


@pytest.mark.parametrize(("file", "keys", "value"), SETTINGS, ids=lambda part: str(part)[-30:])
def test_settings_that_do_not_work_are_one_line(folder, records, file, keys, value):
    change(folder / file, *keys, value=value)
    with pytest.raises(BadInput, match=str(folder)):
        open_model(folder, records)


@pytest.mark.parametrize("key", ["dtype", "attn_implementation"])
def test_parameters_are_counted_or_it_is_one_line(folder, key):
    change(folder / "config.json", key, value=3)
    with pytest.raises(BadInput, match=str(folder)):
        vlm.count_parameters(str(folder))


def test_a_dtype_of_another_type_is_not_used(folder, data, tmp_path):
    change(folder / "config.json", "dtype", value=3)
    flags = [*TRAIN["03_sft"].split(), "--model", folder]
    assert main("03_sft", data, tmp_path / "out", *flags) is None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "loops": LOOP,
    "one long call": "{{ 'x' | center(9999999999) | length }}",
    "fails on text": "{{ messages[0].content[1].text.no.such }}",
    "no picture": "{{ messages[0].content[1].text }}",
    "raises": "{{ raise_exception('no') }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "break": "{% break %}",
    "too long": "<|image_pad|>{{ 'x ' * 10000000 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_that_do_not_work_are_one_line(folder, records, monkeypatch, name):
    monkeypatch.setattr(vlm, "TEMPLATE_SECONDS", 0.5)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    with pytest.raises(BadInput) as error:
        open_model(folder, records)
    assert name == "too long" or f"{folder}: the chat template" in str(error.value)


STRANGE = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "stop_strings": ["a"],
    "forced_eos_token_id": 3,
    "guidance_scale": 2.0,
    "bad_words_ids": [[5]],
    "num_return_sequences": 3,
    "num_beams": 4,
    "temperature": 0.1,
    "max_length": 1,
    "min_new_tokens": 9,
    "suppress_tokens": [1, 2],
}


def test_of_generation_config_only_ends_and_padding_count(folder, records, processor, tiny):
    images, prompts = [Image.new("RGB", (112, 112))], ["Which abnormality?"]
    batch = vlm.encode(processor, images, prompts)
    wanted = vlm.generate(tiny, batch, 3)
    for key, value in STRANGE.items():
        change(folder / "generation_config.json", key, value=value)
    model = vlm.load_model(str(folder), CPU)
    assert vlm.generate(model, batch, 3) == wanted
    assert model.generation_config.eos_token_id == tiny.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == tiny.generation_config.pad_token_id


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_pipes_in_a_checkpoint_are_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BadInput, match=name):
        vlm.load_model(str(folder), CPU)


@pytest.mark.parametrize("shard", ["sub/pipe.safetensors", "../pipe.safetensors", "/dev/zero", 3])
def test_an_index_names_files_of_its_folder(folder, shard):
    (folder / "model.safetensors").unlink()
    (folder / "sub").mkdir()
    for place in (folder / "sub", folder.parent):
        os.mkfifo(place / "pipe.safetensors")
    index = {"metadata": {}, "weight_map": {"a": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="index.json: does not work"):
        vlm.load_model(str(folder), CPU)


# ==== What is asked for is compared with what there is ====


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("03_sft", "--batch-size 2147483647"),
        ("04_grpo", "--prompts-per-step 2147483647"),
        ("04_grpo", "--group-size 1000000000"),
        ("04_grpo", "--max-new-tokens 1000000000"),
        ("05_eval", "--max-new-tokens 1000000000"),
    ],
)
def test_more_than_a_machine_holds_is_one_line(data, tmp_path, script, flags):
    message = main(script, data, tmp_path / "out", *flags.split())
    assert "GiB" in message or "max_position_embeddings" in message


@pytest.mark.parametrize(
    ("script", "flags"),
    [("03_sft", "--lr 1e30 --max-steps 1 --batch-size 2")]
    + [
        ("04_grpo", f"{flag} --steps 1 --prompts-per-step 1 --group-size 2 --max-new-tokens 2")
        for flag in ("--lr 1e30", "--temperature 1e-30", "--temperature 1e30")
    ],
)
def test_extreme_rates_end_well_or_in_one_line(data, tmp_path, script, flags):
    assert (main(script, data, tmp_path / "out", *flags.split()) or "").count("\n") == 0


def with_question(data, target, number: int, question: str):
    """A copy of the data with another question in one record of each split."""
    shutil.copytree(data, target)
    for split in ("train", "test"):
        path = target / split / "metadata.jsonl"
        rows = list(map(json.loads, path.read_text().splitlines()))
        rows[number]["question"] = question
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


@pytest.mark.parametrize("script", [*TRAIN, "05_eval"])
def test_a_question_longer_than_the_model_takes_is_one_line(data, tmp_path, script):
    data = with_question(data, tmp_path / "data", 5, "why? " * 6000)
    message = main(script, data, tmp_path / "out", *TRAIN.get(script, "").split())
    assert "tokens; the model takes at most 2,048" in message


# ==== Runs that are resumed ====


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Runs of two steps with both checkpoints."""
    root = tmp_path_factory.mktemp("finished")
    for script, flags in TRAIN.items():
        assert main(script, data, root / script, *flags.split()) is None
    return root


def weights(folder) -> dict:
    return {
        name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()
    }


def same(one, other) -> bool:
    one, other = weights(one), weights(other)
    return all(np.array_equal(one[name], other[name]) for name in one)


@BOTH
def test_an_unreadable_later_checkpoint_is_not_taken_for_the_last(
    finished, data, tmp_path, capsys, script
):
    out = shutil.copytree(finished / script, tmp_path / "out")
    bad = shutil.copytree(out / "checkpoint-000002", out / "checkpoint-000009")
    (bad / "state.pt").write_bytes(b"no zip")
    tensors = load_file(bad / "model.safetensors")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    steps = ["--steps", "3"] if script == "04_grpo" else ()  # 03's schedule depends on its steps
    assert main(script, data, out, *TRAIN[script].split(), *steps, "--resume") is None
    assert "checkpoint-000009/state.pt: cannot be read" in capsys.readouterr().err
    last = checkpoint.checkpoints(out)
    if script == "04_grpo":
        assert [folder.name[-1] for folder in last] == ["2", "3"]
        assert same(out, last[-1])
    assert not same(out, bad) if bad.exists() else True


def cut(folder) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def with_folder(folder) -> None:
    (folder / ".ipynb_checkpoints").mkdir()


@BOTH
@pytest.mark.parametrize("damage", [cut, with_folder], ids=lambda damage: damage.__name__)
def test_a_finished_run_is_finished_again_from_its_state(finished, data, tmp_path, script, damage):
    out = shutil.copytree(finished / script, tmp_path / "out")
    damage(out / "checkpoint-000002")
    assert main(script, data, out, *TRAIN[script].split(), "--resume") is None
    assert same(out, finished / script)


PLACES = {
    "a file": lambda path: path.write_bytes(b""),
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to another": lambda path: path.symlink_to("checkpoint-000001"),
}


@pytest.mark.parametrize("name", ["checkpoint-000002", "checkpoint-000009", ".checkpoint.tmp"])
@pytest.mark.parametrize("place", PLACES)
def test_only_folders_are_checkpoints(finished, model, processor, world, tmp_path, place, name):
    out = shutil.copytree(finished / "03_sft", tmp_path / "out")
    shutil.rmtree(out / "checkpoint-000002")
    PLACES[place](out / name)
    trained = vlm.set_trainable(model, "mlp")
    optimizer = torch.optim.AdamW(trained.values())
    assert checkpoint.resume(out, trained, optimizer, world) == 1
    checkpoint.save(out, 2, model, processor, trained, optimizer, world)
    assert [folder.name[-1] for folder in checkpoint.checkpoints(out)] == ["1", "2"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("checkpoint-1000000", "checkpoint-999999", "checkpoint-٠٠٠٠٠٩"):
        (tmp_path / name).mkdir()
    names = [folder.name for folder in checkpoint.checkpoints(tmp_path)]
    assert names == ["checkpoint-999999", "checkpoint-1000000"]


STATES = {
    "a list": lambda state: [state],
    "keys are missing": lambda state: {"step": state["step"]},
    "another step": lambda state: state | {"step": 7},
    "a text as step": lambda state: state | {"step": "2"},
    "nothing trained": lambda state: state | {"trained": {}},
    "other shapes": lambda state: (
        state | {"trained": {name: torch.zeros(3) for name in state["trained"]}}
    ),
    "no moments": lambda state: state | {"optimizer": {"state": {0: {}}, "param_groups": []}},
    "moments of nobody": lambda state: state | {"optimizer": {"state": {10**6: {}}}},
    "moments as text": lambda state: state | {"optimizer": {"state": {0: {"step": "x"}}}},
    "no state at all": lambda state: 7,
    "a number that is no step": lambda state: state | {"step": 2.0},
    "moments are missing": lambda state: state | {"optimizer": {"state": {}}},
    "moments of the one before": lambda state: (
        state | {"optimizer": {"state": {-1: state["optimizer"]["state"][0]}}}
    ),
    "sparse": lambda state: (
        state | {"trained": {name: t.to_sparse() for name, t in state["trained"].items()}}
    ),
    "whole numbers": lambda state: (
        state | {"trained": {name: t.int() for name, t in state["trained"].items()}}
    ),
    "shapes alone": lambda state: (
        state | {"trained": {name: t.to("meta") for name, t in state["trained"].items()}}
    ),
    "no tensors": lambda state: state | {"trained": dict.fromkeys(state["trained"], 1.0)},
}


@pytest.mark.parametrize("name", STATES)
def test_a_whole_state_with_other_content_is_unreadable(
    finished, model, world, tmp_path, capsys, name
):
    out = shutil.copytree(finished / "03_sft", tmp_path / "out")
    trained = vlm.set_trainable(model, "mlp")
    path = out / "checkpoint-000002" / "state.pt"
    torch.save(STATES[name](torch.load(path, weights_only=True)), path)
    optimizer = torch.optim.AdamW(trained.values())
    assert checkpoint.resume(out, trained, optimizer, world) == 1
    assert f"{path}: cannot be read" in capsys.readouterr().err


def test_a_whole_zip_whose_pickle_is_cut_is_unreadable(finished, model, world, tmp_path):
    """Its checksums are right; torch's reader raises what no list of ours held."""
    out = shutil.copytree(finished / "03_sft", tmp_path / "out")
    path = out / "checkpoint-000002" / "state.pt"
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, b"\x80\x02G\0" if name.endswith("data.pkl") else content)
    trained = vlm.set_trainable(model, "mlp")
    assert checkpoint.resume(out, trained, torch.optim.AdamW(trained.values()), world) == 1


def test_a_state_that_is_a_pipe_is_not_waited_for(finished, model, world, tmp_path):
    out = shutil.copytree(finished / "03_sft", tmp_path / "out")
    path = out / "checkpoint-000002" / "state.pt"
    path.unlink()
    os.mkfifo(path)
    trained = vlm.set_trainable(model, "mlp")
    assert checkpoint.resume(out, trained, torch.optim.AdamW(trained.values()), world) == 1


DAMAGED_LOGS = [b"[" * 100_000, b'{"step": "1"}\n', b'{"step": 1, "loss": "x"}\n', b"7\n", b"\xff"]
DAMAGED_LOGS += [b'{"step": -1' + b"0" * 400 + b', "loss": 1}\n']
DAMAGED_LOGS += [b'{"step": 1, "reward": 1' + b"0" * 400 + b"}\n", b'{"step": null}\n']


@pytest.mark.parametrize("content", DAMAGED_LOGS, ids=range(len(DAMAGED_LOGS)))
def test_a_damaged_log_does_not_end_a_run(world, tmp_path, capsys, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    log.Log(path, 1, world).write({"step": 2, "loss": 0.5, "reward": 2.0})
    log.plot_curves(tmp_path, ["loss", "reward"])
    importlib.import_module("04_grpo").print_progress(read_log(path))
    assert " 2.000\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["a folder", "a pipe"])
def test_a_log_that_is_no_file_is_one_line(finished, data, tmp_path, kind):
    out = shutil.copytree(finished / "03_sft", tmp_path / "out")
    (out / "metrics.jsonl").unlink()
    (os.mkdir if kind == "a folder" else os.mkfifo)(out / "metrics.jsonl")
    message = main("03_sft", data, out, *TRAIN["03_sft"].split(), "--resume")
    assert f"{out}/metrics.jsonl: cannot be read" in message


def test_only_rank_0_checks_the_checksums(finished, model, monkeypatch):
    """A checksum of a large checkpoint takes minutes; the others read what rank 0 has chosen."""
    folder = finished / "03_sft" / "checkpoint-000002"
    trained = vlm.set_trainable(model, "mlp")
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda file: "a damaged part")
    assert checkpoint.read_state(folder, trained, World(1, 2, CPU))["step"] == 2
    with pytest.raises(BadInput, match="a checksum is wrong"):
        checkpoint.read_state(folder, trained, World(0, 2, CPU))


def test_two_ranks_resume_from_what_rank_0_can_read(finished, data, tmp_path):
    out = shutil.copytree(finished / "03_sft", tmp_path / "out")
    state = out / "checkpoint-000002" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 16
    state.write_bytes(content)
    flags = ["--data", data, "--model", vlm.TINY, "--out", out, *TRAIN["03_sft"].split()]
    done = launch.run("03_sft", *flags, "--resume", ranks=2)
    assert done.returncode == 0 and done.stderr.count("trying the checkpoint before it") == 1
    assert [row["step"] for row in read_log(out / "metrics.jsonl")] == [1, 2]


# ==== Within a run ====


@BOTH
def test_an_error_within_the_loop_begins_a_line_and_names_the_record(
    data, tmp_path, capsys, script
):
    """All pictures but the one on which the checkpoint was tried are damaged."""
    data = shutil.copytree(data, tmp_path / "data")
    for path in (data / "train" / "images").iterdir():
        if path != tried(data):
            path.write_bytes(b"no picture")
    message = main(script, data, tmp_path / "out", *TRAIN[script].split())
    assert message.startswith(f"error: {data}/train/images/")
    assert capsys.readouterr().err.endswith("\n")  # the bar's line has ended


def tried(data):
    """The picture that a checkpoint is tried on."""
    records = load_split(data, "train")
    return max(records, key=lambda record: len(record["question"]))["image"]


def test_a_prompt_that_does_not_fit_names_its_record(processor, records):
    images, prompts = [Image.new("RGB", (112, 112))] * 2, ["?", "why? " * 6000]
    with pytest.raises(BadInput, match="^b: 18,0.. tokens"):
        vlm.encode(processor, images, prompts, names=["a", "b"])
    with pytest.raises(BadInput, match="b: .*must stand once"):
        vlm.encode(processor, images, ["?", vlm.IMAGE_PAD], names=["a", "b"])


def test_a_disk_that_is_full_when_the_tokenizer_is_written(model, processor, world, tmp_path):
    """The tokenizers' Rust half then raises the bare class Exception."""
    trained = vlm.set_trainable(model, "merger")
    full = Mock()
    full.save_pretrained.side_effect = Exception("No space left on device (os error 28)")
    parts = vlm.Processor(full, processor.image_processor)
    optimizer = torch.optim.AdamW(trained.values())
    with pytest.raises(BadInput, match="cannot be written: No space left"):
        checkpoint.save(tmp_path, 1, model, parts, trained, optimizer, world)
    assert checkpoint.checkpoints(tmp_path) == []


@pytest.mark.parametrize("script", [*TRAIN, "05_eval"])
def test_a_full_standard_output_is_one_line(data, tmp_path, script):
    flags = ["--data", data, "--model", vlm.TINY, "--out", tmp_path / "out"]
    flags += TRAIN.get(script, "--limit 2 --max-new-tokens 2 --no-skill").split()
    done = launch.run(script, *flags, before=["tests.launch", "fill_stdout"])
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last == "error: the standard output cannot be written: No space left on device"


@pytest.mark.parametrize("flag", ["--out", "--model"])
@pytest.mark.parametrize("script", [*TRAIN, "05_eval"])
def test_names_that_are_not_utf8_are_refused_at_once(data, tmp_path, script, flag):
    name = tmp_path / os.fsdecode(b"caf\xe9")
    if flag == "--model":
        shutil.copytree(vlm.TINY, name)
    assert "the name is not UTF-8" in main(script, data, tmp_path / "out", flag, name)


# ==== Evaluation ====


def test_damaged_answers_are_made_again(data, tmp_path):
    flags = "--limit 4 --batch-size 2 --max-new-tokens 8 --no-skill".split()
    out = tmp_path / "out"
    assert main("05_eval", data, out, *flags) is None
    wanted = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    damage = [b"", b"[]", b"[" * 100_000, b"\xff"]
    files = [path for path in sorted(out.glob(".work/*/*/*")) if path.suffix == ".json"]
    assert len(files) == 4
    for path, content in zip(files, damage, strict=True):
        path.write_bytes(content)
    assert main("05_eval", data, out, *flags) is None
    assert wanted == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_answers_of_unknown_settings_are_not_used(data, tmp_path):
    flags = "--limit 2 --no-skill --think no".split()
    out = tmp_path / "out"
    assert main("05_eval", data, out, *flags, "--max-new-tokens", "2") is None
    short = (out / "predictions.jsonl").read_bytes()
    (out / ".work" / "settings.json").write_text("{")
    assert main("05_eval", data, out, *flags, "--max-new-tokens", "8") is None
    assert (out / "predictions.jsonl").read_bytes() != short


def test_answers_removed_meanwhile_are_one_line(tmp_path, world):
    def work(batch):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        return batch

    with pytest.raises(BadInput, match="removed or damaged meanwhile"):
        importlib.import_module("05_eval").work_once(tmp_path / "x", [1, 2], 1, work, world, "")


def test_a_name_within_a_checkpoint_need_not_be_utf8(folder):
    before = checkpoint.digest_of(str(folder))
    (folder / os.fsdecode(b"caf\xe9.json")).write_text("{}")
    assert checkpoint.digest_of(str(folder)) != before


def test_a_name_like_mathematics_is_drawn_as_text(tmp_path):
    confusion = np.zeros((7, 8), int).tolist()
    modes = {"direct": {"confusion": confusion, "accuracy": 0.5}}
    tables.plot_confusion(tmp_path / "confusion.png", {r"a$\frac$": {"modes": modes}})
    assert Image.open(tmp_path / "confusion.png").size == (460, 440)
