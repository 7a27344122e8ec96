"""03, 04 and 05 as a user starts them: alone, over two ranks, sharded, on foreign checkpoints."""

import importlib
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from assets import build_tiny_vlm
from benchmarks.kill_resume import TIMES
from support import vlm
from support.log import read_log
from tests import launch

launch.server()
SFT = "--max-steps 4 --batch-size 6 --micro-batch 3 --save-every 2".split()
GRPO = "--steps 4 --prompts-per-step 3 --micro-batch 2 --save-every 2 --max-new-tokens 12".split()


def finish(*processes: launch.Process) -> None:
    """Waits for stages that run at the same time."""
    for process in processes:
        assert process.wait() == 0, process.stderr


def weights(folder):
    return load_file(folder / "model.safetensors")


def metrics(folder) -> list[dict]:
    """The rows of metrics.jsonl without what no two runs share."""
    rows = read_log(folder / "metrics.jsonl")
    for row in rows:
        for key in TIMES & row.keys():
            del row[key]
    return rows


def rollouts(folder, *keys: str) -> list[tuple]:
    """These keys of every row of rollouts.jsonl."""
    rows = []
    for row in read_log(folder / "rollouts.jsonl"):
        rows.append(tuple(row[key] for key in keys))
    return rows


def assert_close_weights(one, other, atol: float) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        difference = (one[name] - other[name]).abs().max().item()
        assert difference <= atol, (name, difference)


def assert_close_metrics(one, other) -> None:
    for first, second in zip(metrics(one), metrics(other), strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module", autouse=True)
def started_runs(data, tmp_path_factory):
    """Starts 03 and 04 by `python`, 03 by `torchrun`; meanwhile tests in this process run."""
    root = tmp_path_factory.mktemp("runs")
    flags = ["--data", data, "--model", vlm.TINY, "--out"]
    processes = [
        launch.start_python("03_sft", *flags, root / "sft", *SFT),
        launch.start_python("04_grpo", *flags, root / "grpo", *GRPO),
        launch.start_python("03_sft", *flags, root / "torchrun", *SFT, ranks=2),
    ]
    return root, processes


@pytest.fixture(scope="module")
def runs(started_runs):
    """The folder of these runs: sft, grpo, torchrun."""
    root, processes = started_runs
    for process in processes:
        done = launch.ended(process)
        assert not done.returncode, done.stderr
    return root


# ==== In this process ====


def test_bad_input_is_one_line(data, tmp_path, monkeypatch):
    """What a single value of a flag cannot tell; test_command_line.py tries those."""
    monkeypatch.chdir(tmp_path)
    zoom, tiny = ["--data", data], ["--model", vlm.TINY]
    cases = [
        ("03_sft", "--data", tmp_path / "no"),
        ("03_sft", "--data", data.parent / "slices"),  # 01's folder: no red box
        ("03_sft", *zoom, "--model", tmp_path / "no"),
        ("04_grpo", *zoom, "--model", "runs/none"),  # no hub id: nothing asks the network
        ("04_grpo", *zoom, *tiny, "--shard"),  # one process
    ]
    for script, *flags in cases:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script).main(list(map(str, flags)))
        message = stop.value.code
        assert message.startswith("error: ") and "\n" not in message


@pytest.mark.parametrize(
    ("script", "function"),
    [("03_sft", "add_gradients"), ("04_grpo", "rollout"), ("05_eval", "ask")],
)
def test_an_internal_bug_still_raises(data, tmp_path, monkeypatch, script, function):
    stage = importlib.import_module(script)

    def bug(*args, **kwargs):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(stage, function, bug)
    with pytest.raises(ValueError, match="a bug of ours"):
        stage.main(["--data", str(data), "--model", str(vlm.TINY), "--out", str(tmp_path)])


SHORT = {
    "03_sft": "--batch-size 6 --micro-batch 6 --warmup-ratio 0 --max-steps 4",
    "04_grpo": "--save-every 99 --inner-epochs 1 --micro-batch 6 --prompts-per-step 4 "
    "--max-new-tokens 12 --steps 4",
}


LOSSES = [("03_sft", "sum_loss"), pytest.param("04_grpo", "grpo_loss", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("script", "loss"), LOSSES)
def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch, script, loss):
    """The third step's loss is NaN: one line, and the state after the second is saved.

    An undisturbed run has the same state.
    """
    stage = importlib.import_module(script)
    true, calls = getattr(stage, loss), []

    def poisoned(*args, **kwargs):
        value = true(*args, **kwargs)
        calls.append(0)
        bad = float("nan") if len(calls) == 3 else 1.0
        return value * bad if torch.is_tensor(value) else (value[0] * bad, value[1])

    monkeypatch.setattr(stage, "plot_curves", lambda *_: None)
    flags = ["--data", str(data), "--model", str(vlm.TINY), *SHORT[script].split(), "--out"]
    bad, good = tmp_path / "bad", tmp_path / "good"
    with monkeypatch.context() as patch:
        patch.setattr(stage, loss, poisoned)
        with pytest.raises(SystemExit, match="step 3: loss or gradient is not finite"):
            stage.main([*flags, str(bad)])
    saved = torch.load(bad / "checkpoint-000002" / "state.pt", weights_only=True)
    assert saved["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in saved["trained"].values())
    stage.main([*flags, str(bad), "--resume"])
    stage.main([*flags, str(good)])
    one, other = weights(bad), weights(good)
    assert all(torch.equal(one[name], other[name]) for name in one)


# ==== As a user starts them ====


FILES = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
FILES += " preprocessor_config.json chat_template.jinja metrics.jsonl curves.png run.json"


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_outputs_are_complete(runs, stage):
    assert set(FILES.split()) <= {path.name for path in (runs / stage).iterdir()}
    AutoModelForImageTextToText.from_pretrained(runs / stage)
    assert [row["step"] for row in metrics(runs / stage)] == [1, 2, 3, 4]


def test_rollouts_are_complete(runs):
    rows = read_log(runs / "grpo" / "rollouts.jsonl")
    assert len(rows) == 4 * 3 * 5
    for row in rows:
        assert row["reward"] == row["format"] + row["validity"] + 2 * row["correctness"]
    assert abs(sum(row["advantage"] for row in rows[:5])) < 1e-5


@pytest.mark.parametrize(("script", "stage"), [("03_sft", "sft"), ("04_grpo", "grpo")])
def test_resumed_equals_uninterrupted_bit_for_bit(runs, data, tmp_path, script, stage):
    out = shutil.copytree(runs / stage, tmp_path / "out")
    shutil.rmtree(out / "checkpoint-000004")
    flags = ["--data", data, "--model", vlm.TINY, "--out", out, "--resume"]
    finish(launch.start(script, *flags, *(SFT if stage == "sft" else GRPO)))
    one, other = weights(runs / stage), weights(out)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(runs / stage) == metrics(out)


def test_torchrun_equals_one_process(runs):
    assert_close_weights(runs / "sft", runs / "torchrun", 1e-4)


@pytest.mark.slow
def test_two_ranks_sample_what_one_samples(runs, data, tmp_path):
    flags = ["--data", data, "--model", vlm.TINY, "--out", tmp_path / "grpo", *GRPO]
    finish(launch.start("04_grpo", *flags, ranks=2))
    one, two = runs / "grpo", tmp_path / "grpo"
    keys = ("step", "id", "sample", "text")
    first = [row for row in rollouts(one, *keys) if row[0] == 1]
    second = [row for row in rollouts(two, *keys) if row[0] == 1]
    assert sorted(first) == sorted(second)
    assert metrics(one)[0]["loss"] == pytest.approx(metrics(two)[0]["loss"], abs=1e-4)


@pytest.mark.slow
def test_a_rank_without_variance_neither_hangs_nor_differs(data, tmp_path):
    """One prompt per rank, and correctness alone is rewarded.

    In some steps all of one rank's completions are wrong. Samples, metrics and weights are those of
    one process.
    """
    flags = ["--data", data, "--model", vlm.TINY, "--max-new-tokens", "24"]
    flags += "--steps 5 --prompts-per-step 2 --micro-batch 1 --lr 3e-4".split()
    flags += "--reward-weights 0 0 2 --out".split()
    one, two = tmp_path / "one", tmp_path / "two"
    finish(launch.start("04_grpo", *flags, one), launch.start("04_grpo", *flags, two, ranks=2))
    assert 1 in {row["zero_variance_groups"] for row in metrics(two)}
    assert rollouts(one, "text") == rollouts(two, "text")  # the same lines in the same order
    assert_close_metrics(one, two)
    assert_close_weights(one, two, 2e-5)


THREE_UPDATES = "--steps 3 --prompts-per-step 4 --micro-batch 1 --inner-epochs 2".split()
THREE_UPDATES += "--max-new-tokens 24 --lr 3e-4 --save-every 1".split()


def assert_shards_equal_one_process(folder, flags: list, **spread) -> None:
    """Trains both ways, then resumes each with the other's state."""
    flags = [*flags, "--out"]
    one, many = folder / "one", folder / "many"
    whole = launch.start("04_grpo", *flags, one)
    finish(whole, launch.start("04_grpo", *flags, many, "--shard", **spread))
    keys = ("step", "id", "sample", "text")
    assert sorted(rollouts(one, *keys)) == sorted(rollouts(many, *keys))
    assert_close_metrics(one, many)
    assert_close_weights(one, many, 2e-5)
    shutil.rmtree(one / "checkpoint-000003")
    shutil.rmtree(many / "checkpoint-000003")
    whole = launch.start("04_grpo", *flags, many, "--resume")
    finish(whole, launch.start("04_grpo", *flags, one, "--resume", "--shard", **spread))
    assert_close_weights(one, many, 2e-5)


# With the tower frozen, and with its merger trained.
@pytest.mark.slow
@pytest.mark.parametrize("group", ["llm", "mlp"])
def test_sharded_over_two_ranks_equals_one_process(runs, data, tmp_path, group):
    """Three updates with a rollout before each, and a resume with another world size."""
    flags = ["--data", data, "--model", runs / "sft", "--train", group]
    assert_shards_equal_one_process(tmp_path, [*flags, *THREE_UPDATES], ranks=2)


def test_sharded_sft_equals_one_process(runs, data, tmp_path):
    flags = ["--data", data, "--out", tmp_path, "--shard", *SFT]
    finish(launch.start("03_sft", *flags, ranks=2))
    assert_close_weights(runs / "sft", tmp_path, 1e-4)
    assert_close_metrics(runs / "sft", tmp_path)


@pytest.mark.slow
def test_memory_is_flat_over_200_steps(data, tmp_path):
    flags = ["--data", data, "--model", vlm.TINY, "--out", tmp_path, "--save-every", "1000"]
    flags += "--steps 220 --group-size 2 --prompts-per-step 1 --micro-batch 1".split()
    finish(launch.start("04_grpo", *flags, "--max-new-tokens", "3"))
    peaks = [row["peak_memory_gib"] for row in read_log(tmp_path / "metrics.jsonl")]
    assert peaks[0] > 0.1 and peaks[-1] - peaks[19] < 0.03, (peaks[0], peaks[19], peaks[-1])


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_foreign_checkpoint(data, tmp_path, tied):
    """Another size and vocabulary, no demo marker, a generation_config that makes samples equal."""
    processor = build_tiny_vlm.build_processor()
    processor.tokenizer.add_tokens([f"extra{i}" for i in range(40)])
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 200 * 200}  # pictures of unequal size
    processor.image_processor.size = sizes
    config = build_tiny_vlm.build_config(processor.tokenizer)
    delattr(config, vlm.DEMO_MARKER)
    config.text_config.hidden_size, config.vision_config.out_hidden_size = 64, 64
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    eos = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    greedy = {"do_sample": True, "top_k": 1, "top_p": 0.001}
    model.generation_config = GenerationConfig(**greedy, eos_token_id=[eos])
    base, sft, grpo = tmp_path / "base", tmp_path / "sft", tmp_path / "grpo"
    vlm.save_checkpoint(base, model, processor)

    def run(script: str, *flags: object) -> None:
        finish(launch.start(script, "--data", data, *flags))

    run("03_sft", "--model", base, "--out", sft, "--lr", "1e-3", *SFT)
    run("04_grpo", "--model", sft, "--out", grpo, *GRPO)
    flags = "--limit 4 --max-new-tokens 8".split()
    run("05_eval", "--model", grpo, "--out", tmp_path / "eval", *flags)
    texts = rollouts(grpo, "text")
    assert len(set(texts[:5])) > 1  # top_k = 1 was not obeyed while sampling
    assert ("lm_head.weight" in weights(grpo)) == (not tied)
