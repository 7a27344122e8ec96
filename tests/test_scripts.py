"""03, 04 and 05 as a user starts them: alone, under torchrun, interrupted, on foreign checkpoints and on bad input."""

import importlib
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, GenerationConfig

from support import tiny_vlm, train, vlm

SFT = ["--max-steps", "4", "--batch-size", "6", "--micro-batch", "3", "--save-every", "2"]
GRPO = ["--steps", "4", "--prompts-per-step", "3", "--micro-batch", "2", "--save-every", "2", "--max-new-tokens", "12"]
TIMES = {"seconds", "seconds_rollout", "seconds_update", "peak_memory_gib"}


def call(script, *args, ranks=1, fails=False):
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*start, script, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout if not fails else done.stderr


def weights(folder):
    return load_file(folder / "model.safetensors")


def metrics(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in train.read_log(folder / "metrics.jsonl")]


def close(one, other, atol):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], atol=atol), (name, (one[name] - other[name]).abs().max())


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """03 and 04 run once alone."""
    root = tmp_path_factory.mktemp("runs")
    call("03_sft.py", "--data", data, "--out", root / "sft", *SFT)
    call("04_grpo.py", "--data", data, "--model", root / "sft", "--out", root / "grpo", *GRPO)
    return root


def test_outputs_are_complete(runs):
    for stage in ("sft", "grpo"):
        files = {path.name for path in (runs / stage).iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "curves.png",
                "tokenizer_config.json", "preprocessor_config.json", "metrics.jsonl",
                "chat_template.jinja"} <= files  # fmt: skip
        AutoModelForImageTextToText.from_pretrained(runs / stage)
        assert [row["step"] for row in metrics(runs / stage)] == [1, 2, 3, 4]
    rows = train.read_log(runs / "grpo" / "rollouts.jsonl")
    assert len(rows) == 4 * 3 * 5
    for row in rows:
        assert row["reward"] == row["format"] + row["validity"] + 2 * row["correctness"]
    group = [row["advantage"] for row in rows[:5]]
    assert abs(sum(group)) < 1e-5


@pytest.mark.parametrize(("script", "stage", "flags"), [("03_sft", "sft", SFT), ("04_grpo", "grpo", GRPO)])
def test_resumed_equals_uninterrupted_bit_for_bit(runs, data, tmp_path, script, stage, flags):
    shutil.copytree(runs / stage, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-000004")
    model = ["--model", runs / "sft"] if stage == "grpo" else []
    call(f"{script}.py", "--data", data, *model, "--out", tmp_path / "out", "--resume", *flags)
    one, other = weights(runs / stage), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(runs / stage) == metrics(tmp_path / "out")


def test_two_ranks_equal_one(runs, data, tmp_path):
    call("03_sft.py", "--data", data, "--out", tmp_path / "sft", *SFT, ranks=2)
    close(weights(runs / "sft"), weights(tmp_path / "sft"), 1e-4)
    call("04_grpo.py", "--data", data, "--model", runs / "sft", "--out", tmp_path / "grpo", *GRPO, ranks=2)
    one, two = (train.read_log(folder / "grpo" / "rollouts.jsonl") for folder in (runs, tmp_path))
    first = [[(r["id"], r["sample"], r["text"]) for r in rows if r["step"] == 1] for rows in (one, two)]
    assert sorted(first[0]) == sorted(first[1])  # the same samples whatever the world size
    loss = [metrics(folder / "grpo")[0]["loss"] for folder in (runs, tmp_path)]
    assert loss[0] == pytest.approx(loss[1], abs=1e-4)
    out = ["--data", data, "--model", runs / "sft", "--limit", "10", "--max-new-tokens", "12"]
    call("05_eval.py", *out, "--out", tmp_path / "e1")
    call("05_eval.py", *out, "--out", tmp_path / "e2", ranks=2)
    assert (tmp_path / "e1" / "predictions.jsonl").read_text() == (tmp_path / "e2" / "predictions.jsonl").read_text()


@pytest.mark.parametrize("group", ["llm", "mlp"])  # with the tower frozen, and with its merger trained
def test_sharded_over_two_ranks_equals_one_process(runs, data, tmp_path, group):
    """Three updates with a rollout before each: tokens, losses, weights; and a resume with another world size."""
    flags = ["--data", data, "--model", runs / "sft", "--train", group, "--steps", "3", "--prompts-per-step", "4",
             "--micro-batch", "1", "--inner-epochs", "2", "--max-new-tokens", "24", "--lr", "3e-4",
             "--save-every", "1"]  # fmt: skip
    call("04_grpo.py", *flags, "--out", tmp_path / "one")
    call("04_grpo.py", *flags, "--out", tmp_path / "two", "--shard", ranks=2)
    one, two = (
        sorted((r["step"], r["id"], r["sample"], r["text"]) for r in train.read_log(tmp_path / name / "rollouts.jsonl"))
        for name in ("one", "two")
    )
    assert one == two
    for first, second in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
    close(weights(tmp_path / "one"), weights(tmp_path / "two"), 2e-5)
    for name, resume in (("one", ["--shard"]), ("two", [])):  # one process's state over two shards, and back
        shutil.rmtree(tmp_path / name / "checkpoint-000003")
        call("04_grpo.py", *flags, "--out", tmp_path / name, "--resume", *resume, ranks=1 + len(resume))
    close(weights(tmp_path / "one"), weights(tmp_path / "two"), 2e-5)


def test_sharded_sft_equals_one_process(runs, data, tmp_path):
    call("03_sft.py", "--data", data, "--out", tmp_path / "sft", "--shard", *SFT, ranks=2)
    close(weights(runs / "sft"), weights(tmp_path / "sft"), 1e-4)
    for one, two in zip(metrics(runs / "sft"), metrics(tmp_path / "sft"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_memory_is_flat_over_200_steps(runs, data, tmp_path):
    flags = ["--steps", "220", "--group-size", "2", "--prompts-per-step", "1", "--micro-batch", "1",
             "--max-new-tokens", "3", "--save-every", "1000"]  # fmt: skip
    call("04_grpo.py", "--data", data, "--model", runs / "sft", "--out", tmp_path, *flags)
    peaks = [row["peak_memory_gib"] for row in train.read_log(tmp_path / "metrics.jsonl")]
    assert peaks[0] > 0.1 and peaks[-1] - peaks[19] < 0.03, (peaks[0], peaks[19], peaks[-1])


@pytest.mark.parametrize(("script", "loss"), [("03_sft", "sum_loss"), ("04_grpo", "grpo_loss")])
def test_a_loss_that_is_not_finite_stops_the_run(runs, data, tmp_path, monkeypatch, script, loss):
    """The third step's loss is NaN: one line, and the state after the second is saved as an undisturbed run has it."""
    stage = importlib.import_module(script)
    true, calls = getattr(stage, loss), []

    def poisoned(*args, **kwargs):
        value = true(*args, **kwargs)
        calls.append(0)
        bad = float("nan") if len(calls) == 3 else 1.0
        return value * bad if torch.is_tensor(value) else (value[0] * bad, value[1])

    flags = ["--data", data, "--model", runs / "sft", "--save-every", "99", "--inner-epochs", "1", "--micro-batch", "6",
             "--prompts-per-step", "4", "--max-new-tokens", "12", "--steps"]  # fmt: skip
    if script == "03_sft":
        flags = ["--data", data, "--model", runs / "sft", "--batch-size", "6", "--micro-batch", "6", "--warmup-ratio",
                 "1e-9", "--max-steps"]  # fmt: skip
    monkeypatch.setattr(stage, loss, poisoned)
    with pytest.raises(SystemExit, match="step 3: loss or gradient is not finite"):
        stage.main([*map(str, flags), "4", "--out", str(tmp_path / "nan")])
    saved = torch.load(tmp_path / "nan" / "checkpoint-000002" / "state.pt", weights_only=True)
    assert saved["step"] == 2 and all(torch.isfinite(tensor).all() for tensor in saved["trained"].values())
    monkeypatch.setattr(stage, loss, true)
    stage.main([*map(str, flags), "4", "--out", str(tmp_path / "nan"), "--resume"])
    stage.main([*map(str, flags), "4", "--out", str(tmp_path / "good")])
    one, other = weights(tmp_path / "nan"), weights(tmp_path / "good")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tied", [True, False])
def test_foreign_checkpoint(data, tmp_path, tied):
    """Another size and vocabulary, a generation_config that would make all samples equal, no demo marker."""
    processor = tiny_vlm.build_processor()
    processor.tokenizer.add_tokens([f"extra{i}" for i in range(40)])
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 200 * 200}  # unequal picture sizes
    config = tiny_vlm.build_config(processor.tokenizer)
    delattr(config, vlm.DEMO_MARKER)
    config.text_config.hidden_size, config.vision_config.out_hidden_size = 64, 64
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = tiny_vlm.Qwen2_5_VLForConditionalGeneration(config)
    eos = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, top_p=0.001, eos_token_id=[eos])
    base = tmp_path / "base"
    vlm.save_checkpoint(base, model, processor)
    call("03_sft.py", "--data", data, "--model", base, "--out", tmp_path / "sft", "--lr", "1e-3", *SFT)
    call("04_grpo.py", "--data", data, "--model", tmp_path / "sft", "--out", tmp_path / "grpo", *GRPO)
    call("05_eval.py", "--data", data, "--model", tmp_path / "grpo", "--out", tmp_path / "e", "--limit", "4",
         "--max-new-tokens", "8")  # fmt: skip
    rows = train.read_log(tmp_path / "grpo" / "rollouts.jsonl")
    assert len({row["text"] for row in rows[:5]}) > 1  # top_k = 1 was not obeyed while sampling
    assert ("lm_head.weight" in weights(tmp_path / "grpo")) == (not tied)


def test_bad_input_is_one_line(data, tmp_path):
    cases = [
        ("03_sft.py", "--data", tmp_path / "no"),
        ("03_sft.py", "--data", data.parent / "slices"),  # 01's folder: no red box
        ("03_sft.py", "--data", data, "--model", tmp_path / "no"),
        ("04_grpo.py", "--data", data, "--model", "runs/none"),  # looks like a hub id, must not go to the network
        ("04_grpo.py", "--data", data, "--model", tiny_vlm.DEFAULT, "--group-size", "1"),
        ("05_eval.py", "--data", data, "--model", tiny_vlm.DEFAULT, "--limit", "0"),
        ("04_grpo.py", "--data", data, "--model", tiny_vlm.DEFAULT, "--shard"),  # one process
    ]
    for case in cases:
        message = call(*case, fails=True)
        last = message.strip().splitlines()[-1]
        assert last.startswith("error: ") and "Traceback" not in message, message


@pytest.mark.parametrize(
    ("script", "function"), [("03_sft", "sft_step"), ("04_grpo", "rollout"), ("05_eval", "answer")]
)
def test_an_internal_bug_still_raises(data, tmp_path, monkeypatch, script, function):
    stage = importlib.import_module(script)

    def bug(*args, **kwargs):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(stage, function, bug)
    with pytest.raises(ValueError, match="a bug of ours"):
        stage.main(["--data", str(data), "--model", str(tiny_vlm.DEFAULT), "--out", str(tmp_path)])
