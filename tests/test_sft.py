"""03's labels, loss and trainable groups, and the training support that 03 and 04 share."""

import importlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from support import checkpoint, vlm
from support.log import read_log
from support.records import batch_indices
from support.stage import lr_factor

sft = importlib.import_module("03_sft")
ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
SIZES = {
    "7B": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "3B": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
}


@pytest.mark.parametrize(
    ("size", "merger", "llm_mlp"), [("7B", 44_574_464, 5_703_204_864), ("3B", 36_708_608, None)]
)
def test_trainable_counts_of_the_real_models(size, merger, llm_mlp):
    tied = size == "3B"
    text = {**SIZES[size], "rope_parameters": ROPE, "tie_word_embeddings": tied}
    vision = {"hidden_size": 1280, "out_hidden_size": text["hidden_size"]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    count = {}
    for group in vlm.GROUPS:
        trained = vlm.set_trainable(model, group)
        count[group] = sum(parameter.numel() for parameter in trained.values())
    assert count["merger"] == merger
    assert count["llm_mlp"] == (llm_mlp or 36 * 3 * 2048 * 11008)
    assert count["mlp"] == count["merger"] + count["llm_mlp"]
    assert count["full"] == sum(p.numel() for p in model.parameters())
    vision_total = sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert count["llm"] == count["full"] - vision_total  # an untied lm_head is in it
    assert not any("visual" in name for name in vlm.set_trainable(model, "llm_mlp"))


@pytest.mark.parametrize("group", vlm.GROUPS)
def test_what_changes_in_a_step_is_the_group(model, processor, records, world, group):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = vlm.set_trainable(model, group)
    sft.add_gradients(model, [sft.encode(records[:2], processor)], world)
    torch.optim.SGD(trained.values(), lr=1.0).step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trained)


def test_labels_are_the_answer_and_its_eos_alone(processor, records):
    batch = sft.encode(records[:5], processor)
    for row, labels, record in zip(batch["input_ids"], batch["labels"], records, strict=False):
        kept = labels >= 0
        expected = f"<answer>{record['label']}</answer><|im_end|>"
        assert processor.tokenizer.decode(row[kept]) == expected
        assert (row[kept] == labels[kept]).all()


def test_labels_survive_pad_equal_to_eos(processor, records):
    other = vlm.load_processor("assets/tiny-qwen2.5-vl")
    other.tokenizer.pad_token = "<|im_end|>"
    labels = sft.encode(records[:5], other)["labels"]
    assert (labels == sft.encode(records[:5], processor)["labels"]).all()


def test_loss_is_the_models_own_and_padding_is_harmless(model, processor, records):
    batch = sft.encode(records[:5], processor)
    with torch.no_grad():
        total = sft.sum_loss(model, batch)
        targets = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        alone = sum(sft.sum_loss(model, sft.encode([record], processor)) for record in records[:5])
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert total.item() == pytest.approx(alone.item(), rel=1e-5)


def test_gradient_does_not_depend_on_micro_batches(model, processor, records, world):
    trained, gradients = vlm.set_trainable(model, "mlp"), []
    for size in (6, 4, 1):
        parts = [sft.encode(records[i : min(i + size, 6)], processor) for i in range(0, 6, size)]
        loss, _ = sft.add_gradients(model, parts, world)
        gradients.append([loss, *(p.grad.clone() for p in trained.values())])
        model.zero_grad()
    for other in gradients[1:]:
        assert other[0] == pytest.approx(gradients[0][0], rel=1e-5)
        for a, b in zip(gradients[0][1:], other[1:], strict=True):
            assert (a - b).norm() <= 1e-4 * a.norm() + 1e-7


def test_order_covers_every_epoch_and_is_reshuffled():
    seen = [i for step in range(6) for i in batch_indices(10, 5, step, seed=1)]
    epochs = [seen[i : i + 10] for i in (0, 10, 20)]
    assert (
        all(sorted(epoch) == list(range(10)) for epoch in epochs)
        and epochs[0] != epochs[1] != epochs[2]
    )
    assert batch_indices(10, 5, 3, 1) == seen[15:20] != batch_indices(10, 5, 3, 2)
    assert len(batch_indices(3, 8, 0, 0)) == 8  # a batch larger than the data


def test_schedule_by_hand():
    factors = [lr_factor(step, 20, 0.1, "cosine") for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[11] == pytest.approx(0.5)
    assert factors[19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 17 / 18)))
    assert factors[2:] == sorted(factors[2:], reverse=True) and factors[19] > 0
    assert [lr_factor(step, 20, 0.1, "constant") for step in range(20)] == [0.5] + [1.0] * 19
    assert [lr_factor(step, 3, 0, "constant") for step in range(3)] == [1.0] * 3
    assert lr_factor(20, 20, 0.1, "cosine") == pytest.approx(0)  # what the last step stops short of
    warm = [0.25, 0.5, 0.75, 1.0]
    for schedule in ("constant", "cosine"):
        assert [lr_factor(step, 4, 1, schedule) for step in range(4)] == warm  # nothing but warm-up
        assert lr_factor(0, 1, 0, schedule) == 1.0


def test_learning_rates_of_a_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "plot_curves", lambda *_: None)
    flags = "--max-steps 4 --batch-size 2 --warmup-ratio 0.5 --lr 1e-3 --train merger"
    sft.main(["--data", str(data), "--out", str(tmp_path), *flags.split()])
    rates = [row["lr"] for row in read_log(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


def test_checkpoint_round_trip_and_pickles_are_refused(model, processor, world, tmp_path):
    trained = vlm.set_trainable(model, "llm_mlp")
    optimizer = torch.optim.AdamW(trained.values())
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, model, processor, trained, optimizer, world)
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["checkpoint-000002", "checkpoint-000003"]
    checkpoint.finish(tmp_path, 3, world)
    again = vlm.load_model(str(tmp_path), torch.device("cpu"))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert vlm.is_demo(str(tmp_path)) and not (tmp_path / "state.pt").exists()
    state = tmp_path / "checkpoint-000003" / "state.pt"
    torch.save({"step": 3, "trained": {}, "rng": Evil()}, state)
    assert checkpoint.resume(tmp_path, trained, optimizer, world) == 2  # the one before
    assert not Evil.ran


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


def test_demo_values_apply_to_the_demo_checkpoint_only(model, processor, tmp_path):
    demo = ["--model", "assets/tiny-qwen2.5-vl"]
    assert sft.parse_args(demo).lr == sft.DEMO["lr"]
    assert sft.parse_args([*demo, "--lr", "0.1"]).lr == 0.1
    vlm.save_checkpoint(tmp_path, model, processor)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[vlm.DEMO_MARKER]
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = sft.parse_args(["--model", str(tmp_path)])
    paper = (1e-5, "merger", 2, 0.1)
    assert (args.lr, args.train, args.epochs, args.warmup_ratio) == paper
