"""Evaluation: statistics against values worked by hand, judges, model families, and 05 as a user starts it."""

import importlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import rewards
from support import judge, phantom, stats, tiny_vlm, train, vlm, zoom
from support.files import BadInput, read_records
from support.judge import keyword_judge, last_class

evaluation = importlib.import_module("05_eval")
CPU = torch.device("cpu")
QUICK = ["--limit", "12", "--batch-size", "4", "--max-new-tokens", "40"]
FILES = set(evaluation.OUTPUTS)


# ---- intervals ----


def test_bootstrap_means_by_hand():
    #        patient a: 1 of 2 right        b: 1 of 1       c: 0 of 3
    values = np.array([1, 0, 1, 0, 0, 0.0])
    kinds = ["nodule", "fluid", "nodule", "fluid", "fluid", "gas"]
    result = stats.bootstrap(values, ["a", "a", "b", "c", "c", "c"], kinds)
    assert result["mean"] == pytest.approx(2 / 6)
    assert {name: part["mean"] for name, part in result["kinds"].items()} == {"nodule": 1, "fluid": 0, "gas": 0}
    assert result["macro"]["mean"] == pytest.approx(1 / 3)
    assert result["kinds"]["nodule"]["interval_95"] == [1, 1]  # right whoever is drawn


@pytest.mark.parametrize("size", [1, 10])
def test_bootstrap_width_is_that_of_the_patients(size):
    """400 patients of one slice, or 40 of ten like ones: +-1.96 standard errors over patients, not slices."""
    patients = 400 // size
    values = np.repeat(np.arange(patients) % 2, size).astype(float)
    low, high = stats.bootstrap(values, np.repeat(np.arange(patients), size))["interval_95"]
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 / patients), rel=0.15)
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.02)


def row(model, mode, right, patient="p", label="Emphysema", **more):
    predicted = label if right else rewards.CLASSES[0]
    return {"model": model, "mode": mode, "id": "i", "patient": patient, "label": label, "predicted": predicted,
            "format": 1.0, "validity": 1.0, "correctness": float(right), "text": "", **more}  # fmt: skip


def test_paired_differences_are_of_the_same_items():
    """Two models, each right on half of the items: on the same half they differ by exactly 0, whoever is drawn."""
    a = [row("x/a", "direct", i % 2, patient=str(i)) for i in range(100)]
    b = [row("x/b", "direct", i % 2, patient=str(i)) for i in range(100)]
    c = [row("x/c", "direct", i % 4 != 0, patient=str(i)) for i in range(100)]  # right on 25 more of them
    names = {"x/a": "a", "x/b": "b", "x/c": "c"}
    pairs = {(*d["from"], *d["to"]): d for d in evaluation.paired(a + b + c, [], names, ("direct",))}
    assert set(pairs) == {(one, "direct", other, "direct") for one, other in ("ab", "ac", "bc")}
    assert pairs["a", "direct", "b", "direct"] == {"from": ["a", "direct"], "to": ["b", "direct"], "mean": 0,
                                                   "interval_95": [0, 0]}  # fmt: skip
    gain = pairs["a", "direct", "c", "direct"]
    assert gain["mean"] == pytest.approx(0.25)
    low, high = gain["interval_95"]
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 * 0.75 / 100), rel=0.15)


def test_think_is_compared_with_direct():
    rows = [row("a", "direct", i < 8, patient=str(i)) for i in range(10)]
    rows += [row("a", "think", i < 5, patient=str(i)) for i in range(10)]
    (pair,) = evaluation.paired(rows, [], {"a": "a"}, ("direct", "think"))
    assert (pair["from"], pair["to"]) == (["a", "direct"], ["a", "think"])
    assert pair["mean"] == pytest.approx(-0.3)


def test_summary_by_hand():
    nodule, fluid = "Pulmonary nodules/masses", "Pleural effusion/thickening"
    rows = [row("a", "think", right, "p", nodule, judged=nodule) for right in (1, 1, 1, 0)]
    rows += [row("a", "think", 0, "q", fluid, judged=None), row("a", "think", 1, "r", fluid, judged=nodule)]
    rows[3] |= {"predicted": None, "format": 0.0}
    result = evaluation.summarise(rows)
    assert result["n"] == 6
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["macro_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert result["invalid"] == pytest.approx(1 / 6)
    assert result["format"] == pytest.approx(5 / 6)
    assert result["per_class"] == dict.fromkeys(rewards.CLASSES) | {nodule: 3 / 4, fluid: 1 / 2}
    assert result["confusion"][6] == [0, 0, 0, 0, 0, 0, 3, 1]  # three right, one invalid
    assert result["confusion"][5] == [1, 0, 0, 0, 0, 1, 0, 0]
    assert result["judge"]["coverage"] == pytest.approx(5 / 6)
    assert result["judge"]["consistency"] == pytest.approx(3 / 5)  # an invalid answer follows from no thinking
    assert result["judge"]["right"] == pytest.approx(4 / 5)


def test_weighted_average_is_by_sample_count():
    general = {"skill": {"n": 1000, "mean": 0.0}, "chartqa": {"n": 30, "mean": 0.5}, "textvqa": {"n": 10, "mean": 0.9}}
    assert evaluation.weighted(general) == pytest.approx((30 * 0.5 + 10 * 0.9) / 40)
    assert evaluation.weighted({"skill": {"n": 5, "mean": 1.0}}) is None


# ---- judges ----


@pytest.mark.parametrize(
    ("thinking", "label"),
    [
        ("A faint veil in both lower lobes.", "Ground-glass opacity"),
        ("Septal thickening with honeycombing.", "Fibrosis-related changes"),
        ("Multiple air bronchograms are absent; dense collapse of the lobe.", "Consolidation/atelectasis"),
        ("A band of fluid along the chest wall.", "Pleural effusion/thickening"),
        ("No effusion, not a mass, but bronchiectasis.", "Airway abnormalities"),
        ("No effusion but\na mass; not emphysema", "Pulmonary nodules/masses"),
        ("A round mass without emphysema.", "Pulmonary nodules/masses"),
        ("MASS", "Pulmonary nodules/masses"),
        ("There is no mass.", None),
        ("Massive findings.", None),  # words are whole words
        ("A mass beside emphysema.", None),  # a tie
        ("The left lung.", None),
        ("", None),
    ],
)
def test_keyword_judge(thinking, label):
    assert keyword_judge(thinking) == label


def test_keyword_judge_knows_the_phantoms_rule():
    label = {"1b": "Airway abnormalities", "1c": "Emphysema", "1d": "Fibrosis-related changes",
             "2b": "Consolidation/atelectasis", "2c": "Ground-glass opacity", "2d": "Pulmonary nodules/masses",
             "2e": "Pleural effusion/thickening"}  # fmt: skip
    for code, (textures, shapes) in phantom.LOOKS.items():
        for texture in textures:
            for shape in shapes:
                text = phantom.TEXT.format(Texture=texture.capitalize(), shape=shape, side="left", depth="anterior")
                assert keyword_judge(text) == label[code]


def test_last_class_of_a_reply():
    assert last_class("Not emphysema. Final: ground-glass OPACITY.") == "Ground-glass opacity"
    assert last_class("Ground-glass opacity, or rather Emphysema") == "Emphysema"
    assert last_class("a mass") is None


REPLIES = {
    "holed round": "It has holes: emphysema",
    "solid band": "pleural effusion/thickening",
    "left lung": "unclear",
    "endless": 40 * "emphysema ",
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A causal language model of 0.2 M parameters that was taught REPLIES, the last one without an end."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = tiny_vlm.build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))  # fmt: skip
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, eos_token_id=tokenizer.eos_token_id)
    lines = []
    for text, reply in REPLIES.items():
        turn = [{"role": "user", "content": judge.PROMPT.format(text)}]
        start = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        lines.append(
            (tokenizer(start)["input_ids"], tokenizer(reply + (text != "endless") * "<|im_end|>")["input_ids"])
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = 0
        for start, reply in lines:
            ids = torch.tensor([start + reply])
            labels = torch.tensor([[-100] * len(start) + reply])
            loss = loss + model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def test_language_judge(language_model, monkeypatch):
    monkeypatch.setattr(judge, "REPLY_TOKENS", 24)
    ask = judge.language_judge(str(language_model), CPU)
    texts = ["holed round", "endless", "left lung", "solid band"]  # of unequal lengths: padded on the left
    expected = ["Emphysema", None, None, "Pleural effusion/thickening"]
    assert ask(texts) == expected  # cut off, and naming no class, give None
    assert [ask([text])[0] for text in texts] == expected
    with pytest.raises(BadInput, match="no such checkpoint folder"):
        judge.language_judge("runs/none", CPU)


def test_judgements_are_cached_by_text(language_model, tmp_path, world, monkeypatch):
    monkeypatch.setattr(judge, "REPLY_TOKENS", 24)
    flags = ["--model", "x", "--judge", str(language_model), "--out", str(tmp_path)]
    args = evaluation.parser().parse_args(flags)
    texts = ["<think>holed round</think><answer>Emphysema</answer>", "<answer>Emphysema</answer>"]
    rows = [row("a", "think", 1, text=text) for text in 2 * texts] + [row("a", "direct", 1, text=texts[0])]
    evaluation.judged(rows, args, world)
    assert [r.get("judged") for r in rows] == ["Emphysema", None, "Emphysema", None, None]
    assert "judged" not in rows[-1]

    def never(*_):
        raise AssertionError("asked twice")

    monkeypatch.setattr(judge, "language_judge", never)
    evaluation.judged(rows, args, world)
    assert rows[0]["judged"] == "Emphysema"


# ---- families ----


def tiny_qwen2_vl(folder):
    """A tiny Qwen2-VL of random weights in the layout of a real checkpoint."""
    processor = tiny_vlm.build_processor()
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={"vocab_size": len(processor.tokenizer), "hidden_size": 64, "intermediate_size": 96,
                     "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0},
                     "bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>")},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=True, top_k=5, eos_token_id=token("<|im_end|>"))
    model.save_pretrained(folder)
    processor.save(folder)
    return folder


def tiny_llava(folder):
    """A tiny LLaVA of random weights: a family that is asked through its own processor."""
    tokenizer = tiny_vlm.build_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    template = tiny_vlm.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    size = {"height": 56, "width": 56}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=size)
    LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1, chat_template=template).save_pretrained(folder)  # fmt: skip
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **shape, "image_size": 56, "patch_size": 14},
        text_config={"model_type": "qwen2", **shape, "num_key_value_heads": 2, "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    return folder


def test_another_family_goes_through_its_own_processor(tmp_path, records):
    name = str(tiny_llava(tmp_path))
    model, processor = vlm.load_model(name, CPU), vlm.any_processor(name)
    assert isinstance(processor, LlavaProcessor)
    images, prompts = train.pictures(records[:3]), ["What?", tiny_vlm.DESCRIBE, tiny_vlm.ASK.format("shape")]
    together = evaluation.answer(model, processor, images, prompts, 12, CPU)
    assert len(set(together)) > 1 and not any("<image>" in text or "assistant" in text for text in together)
    alone = [evaluation.answer(model, processor, [i], [p], 12, CPU)[0] for i, p in zip(images, prompts, strict=True)]
    assert together == alone


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Qwen2-VL"])
def test_families_answer_in_batches_as_alone(family, tmp_path, records):
    """Greedy though generation_config says otherwise; pictures of unequal sizes and prompts of unequal lengths."""
    name = str(tiny_vlm.DEFAULT if family == "Qwen2.5-VL" else tiny_qwen2_vl(tmp_path))
    model, processor = vlm.load_model(name, CPU), vlm.any_processor(name)
    assert evaluation.vlm.count_parameters(name) == sum(p.numel() for p in model.parameters())
    images = train.pictures(records[:3])
    images[1] = images[1].resize((112, 140))
    prompts = [rewards.prompt(rewards.QUESTION, "think"), tiny_vlm.DESCRIBE, tiny_vlm.ASK.format("shape")]
    together = evaluation.answer(model, processor, images, prompts, 16, CPU)
    assert len(set(together)) > 1
    for image, prompt, text in zip(images, prompts, together, strict=True):
        assert evaluation.answer(model, processor, [image], [prompt], 16, CPU) == [text]
        # The reference: one forward pass a token, without a cache.
        batch, stops, ids = vlm.encode(processor, [image], [prompt]), vlm.stop_ids(model, processor), []
        while len(ids) < 16 and not (ids and ids[-1] in stops):
            more = torch.tensor([ids], dtype=torch.long)
            whole = {**batch, "input_ids": torch.cat([batch["input_ids"], more], 1)}
            for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
                whole[key] = torch.cat([batch[key], torch.full_like(more, fill)], 1)
            with torch.no_grad():
                ids.append(model(**whole).logits[0, -1].argmax().item())
        assert vlm.decode(processor, ids, stops) == text


# ---- the script ----


def command(*args, ranks=1):
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, "05_eval.py", *map(str, args)]


def call(*args, ranks=1):
    done = subprocess.run(command(*args, ranks=ranks), capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def main(*args):
    """In this process: quicker."""
    evaluation.main([*map(str, args)])


def complaint(*args):
    with pytest.raises(SystemExit) as stop:
        main(*args)
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A checkpoint unlike the base in weights, with a training log beside it."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    model = vlm.load_model(str(tiny_vlm.DEFAULT), CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    vlm.save_checkpoint(folder, model, vlm.load_processor(str(tiny_vlm.DEFAULT)))
    (folder / "run.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    return folder


@pytest.fixture(scope="module")
def flags(data, sft, tmp_path_factory):
    """A small evaluation of everything: two models, both prompts, three general-skill sets."""
    folder = tmp_path_factory.mktemp("general")
    Image.new("RGB", (100, 80), "red").save(folder / "a.png")
    line = {"image": "a.png", "question": "What colour?", "answer": "red"}
    lines = [{**line, "type": kind} for kind in ("human", "augmented")]
    (folder / "charts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = {"image": "a.png", "question": "What does it say?", "answers": 10 * ["stop"]}
    (folder / "texts.jsonl").write_text(json.dumps(line) + "\n")
    return ["--data", data, "--model", tiny_vlm.DEFAULT, sft, "--chartqa", folder / "charts.jsonl",
            "--textvqa", folder / "texts.jsonl", *QUICK]  # fmt: skip


@pytest.fixture(scope="module")
def results(flags, tmp_path_factory):
    """That evaluation's folder, and what was printed."""
    out = tmp_path_factory.mktemp("results") / "eval"
    return out, call(*flags, "--out", out)


def test_results_are_complete_and_right(results, flags):
    out, printed = results
    assert set(read(out)) == FILES
    assert (out / "table.md").read_text() in printed
    metrics = json.loads((out / "metrics.json").read_text())
    rows, general = (train.read_log(out / name) for name in ("predictions.jsonl", "general.jsonl"))
    assert list(metrics["models"]) == ["tiny-qwen2.5-vl", "sft"]
    assert [len(rows), len(general)] == [2 * 2 * 12, 2 * (12 + 2 + 1)]
    for name, model in metrics["models"].items():
        assert model["parameters"] == 1_835_008
        for mode, m in model["modes"].items():
            mine = [r for r in rows if r["model"].endswith(name) and r["mode"] == mode]
            right = [rewards.predicted_class(r["text"]) == r["label"] for r in mine]
            assert m["n"] == len(mine) == 12 == sum(map(sum, m["confusion"]))
            assert m["accuracy"] == pytest.approx(sum(right) / 12)
            assert m["interval_95"][0] <= m["accuracy"] <= m["interval_95"][1]
            for r in mine:
                parts = rewards.reward(r["text"], r["label"])
                assert all(r[key] == getattr(parts, key) for key in ("format", "validity", "correctness", "predicted"))
                assert ("judged" in r) == (mode == "think")
        for key, part in model["general"].items():
            mine = [r["score"] for r in general if r["model"].endswith(name) and r["set"] == key]
            assert part["n"] == len(mine)
            assert part["mean"] == pytest.approx(np.mean(mine))
    base = metrics["models"]["tiny-qwen2.5-vl"]
    assert base["general"]["skill"]["mean"] > 0.4  # it was taught to answer attribute questions
    assert base["modes"]["think"]["judge"]["coverage"] > 0.9
    table = (out / "table.md").read_text()
    for caption in ("Table 1", "Fig. 1d", "Fig. 3", "Table 2", "Differences"):
        assert caption in table
    think = base["modes"]["think"]
    cells = [think["accuracy"], *think["interval_95"], think["macro_accuracy"], *think["macro_interval_95"]]
    shown = "{:.1f} ({:.1f} to {:.1f}) | {:.1f} ({:.1f} to {:.1f})".format(*(100 * cell for cell in cells))
    assert f"| tiny-qwen2.5-vl | 1.8 M | think | {shown} |" in table
    header = "| model | attribute questions % (n = 12) | depth % | shape % | side % | texture % | "
    assert header + "ChartQA % (n = 2) | augmented % | human % | TextVQA % (n = 1) | weighted average % |" in table
    assert '"steps": [1, 2]' in (out / "report.html").read_text()  # the training curves of the run given as --model
    labels = [r["label"] for r in train.load_split(flags[1], "test")[:12]]
    assert metrics["commonest_class"]["share"] == max(map(labels.count, labels)) / 12


def test_two_ranks_give_the_same_bytes(results, flags, tmp_path):
    call(*flags, "--out", tmp_path / "e", ranks=2)
    assert read(tmp_path / "e") == read(results[0])


def test_killed_and_started_again_gives_the_same_bytes(results, flags, tmp_path):
    out, kept = tmp_path / "e", {}
    for batches in (1, 5, 9):  # of 2 x (3 + 3 + 3 + 1 + 1)
        process = subprocess.Popen(command(*flags, "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob(".work/*/*/*.json"))) < batches:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was not done yet
        assert not set(read(out)) & FILES
        done = {path: path.stat().st_mtime_ns for path in out.glob(".work/*/*/*.json")}
        assert kept.items() <= done.items()  # nothing is asked twice
        kept = done
    call(*flags, "--out", out)
    assert read(out) == read(results[0])
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in out.glob(".work/*/*/*.json")}.items()


def test_other_settings_are_refused(results, flags, sft, tmp_path):
    out = tmp_path / "e"
    shutil.copytree(results[0], out)
    before = read(out)
    message = complaint(*flags, "--think", "no", "--out", out)
    assert message.startswith(f"error: {out}: made with other settings (think);") and "--overwrite" in message
    other = tmp_path / "other"
    shutil.copytree(sft, other)
    one = [*flags[:2], "--model", other, "--think", "no", "--no-skill", *QUICK]
    main(*one, "--out", tmp_path / "one")
    shutil.copy(tiny_vlm.DEFAULT / "model.safetensors", other)  # another checkpoint by the same name
    assert "made with other settings (model)" in complaint(*one, "--out", tmp_path / "one")
    models = flags[flags.index("--model") + 1 :][:2]  # in the other order each would get the other's answers
    swapped = [*flags[: flags.index("--model") + 1], *models[::-1], *flags[flags.index("--model") + 3 :]]
    assert "made with other settings (model)" in complaint(*swapped, "--out", out)
    (tmp_path / "data").mkdir()
    shutil.copytree(flags[1], tmp_path / "data", dirs_exist_ok=True)
    info = tmp_path / "data" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"border": 0.5}))  # other pictures of the same records
    assert "made with other settings (data)" in complaint(flags[0], tmp_path / "data", *flags[2:], "--out", out)
    assert read(out) == before
    main(*flags, "--think", "no", "--out", out, "--overwrite")
    rows = train.read_log(out / "predictions.jsonl")
    assert {r["mode"] for r in rows} == {"direct"}


def test_foreign_files_are_left_alone(data, tmp_path):
    (tmp_path / "metrics.json").write_text("mine")
    for extra in ([], ["--overwrite"]):
        message = complaint("--data", data, "--model", tiny_vlm.DEFAULT, "--out", tmp_path, *extra)
        assert "was not made by 05_eval.py" in message
    assert read(tmp_path) == {"metrics.json": b"mine"}


def test_one_own_slice(data, records, tmp_path, capsys):
    record = records[0]
    slices = {r["id"]: r["image"] for r in read_records(data.parent / "slices", "train")}
    plain = slices[record["id"]]
    main("--image", plain, "--box", *record["box"], "--model", tiny_vlm.DEFAULT, "--out", tmp_path / "e")
    assert not (tmp_path / "e").exists()
    model, processor = vlm.load_model(str(tiny_vlm.DEFAULT), CPU), vlm.load_processor(str(tiny_vlm.DEFAULT))
    picture = zoom.augment(Image.open(plain), record["box"])
    assert np.array_equal(picture, Image.open(record["image"]))  # as 02 drew it
    prompt = rewards.prompt(rewards.QUESTION, "think")
    text = evaluation.answer(model, processor, [picture], [prompt], 40, CPU)[0]
    assert (
        f"  thinks:  {rewards.thinking(text)}\n  answers: {rewards.predicted_class(text)}\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--image", "no.png", "--box", 1, 2, 30, 40], "no.png: cannot be read"),
        (["--image", "assets/example.png"], "go together"),
        (["--image", "assets/example.png", "--box", 1, 2, 9000, 40], "does not lie in the picture"),
        (["--batch-size", 0], "must be above 0"),
        (["--model", tiny_vlm.DEFAULT, tiny_vlm.DEFAULT], "twice"),
        (["--chartqa", "no.json"], "no.json: cannot be read"),
        (["--judge", "runs/none", "--limit", 1], "runs/none: no such checkpoint folder"),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, extra, words):
    assert words in complaint("--data", data, "--model", tiny_vlm.DEFAULT, "--out", tmp_path / "e", *extra)
