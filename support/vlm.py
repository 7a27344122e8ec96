"""Qwen2.5-VL: load and save checkpoints, choose what is trained, turn prompts and pictures into batches.

The Hugging Face model is used unmodified. Its `AutoProcessor` needs torchvision (for video); we need only its two
halves, the tokenizer and the image processor, and expand the image placeholder ourselves (`encode`).
"""

import copy
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError, StrictDataclassError
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from support.files import BadInput, read_json

transformers_logging.disable_progress_bar()

IMAGE_PAD = "<|image_pad|>"
FAMILIES = ("qwen2_5_vl", "qwen2_vl")  # whose model_type is read by `load_processor`; the first alone is trained
# Flags that make `generate` greedy whatever a checkpoint's own generation_config says.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
GREEDY |= dict.fromkeys(("temperature", "top_k", "top_p"))
DEMO_MARKER = "medreason_demo"  # key in config.json that support/tiny_vlm.py writes; see `is_demo`

# A checkpoint folder holds one file of each line; these and the other JSON files that are read must hold objects.
PARTS = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json"),
    ("tokenizer.json", "vocab.json", "tokenizer.model"),
    ("preprocessor_config.json", "processor_config.json"),
)
OTHERS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json")
# What the libraries raise over a damaged folder. Caught around their calls only, so that no bug of ours hides in them.
BROKEN = (ImportError, OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError,
          MemoryError, SafetensorError, StrictDataclassError, TemplateError)  # fmt: skip

# What `--train` can name: patterns that must match a parameter's whole name. An unanchored "mlp" would be wrong: it
# also occurs in the vision blocks and the merger. A tied lm_head is listed under embed_tokens, so "llm" covers it.
MERGER = r"model\.visual\.merger\..+"
LLM_MLP = r"model\.language_model\.layers\.\d+\.mlp\..+"
GROUPS = {
    "merger": MERGER,
    "llm_mlp": LLM_MLP,
    "mlp": f"{MERGER}|{LLM_MLP}",
    "llm": r"model\.language_model\..+|lm_head\..+",
    "full": r".+",
}


@dataclass
class Processor:
    """The two halves of a checkpoint's processor."""

    tokenizer: object
    image_processor: object

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def load_config(name: str):
    """The configuration of a checkpoint folder or hub id. Raises BadInput with a remedy when it cannot be had, or the
    folder is not complete."""
    if Path(name).is_dir():
        _check_folder(Path(name))
    return pretrained(AutoConfig, name)


def is_demo(name: str) -> bool:
    """Whether a checkpoint descends from the tiny demo model: only then do a script's DEMO values apply."""
    return bool(getattr(load_config(name), DEMO_MARKER, False))


def load_processor(name: str) -> Processor:
    """Tokenizer and image processor of a folder or hub id, tried on a blank picture. Raises BadInput when they cannot
    be had, lack a needed token, or belong to another model."""
    config, tokenizer = load_config(name), pretrained(AutoTokenizer, name)
    images = pretrained(AutoImageProcessor, name)
    tokens = tokenizer.get_vocab()
    for token in (IMAGE_PAD, "<|vision_start|>", "<|im_start|>", "<|im_end|>"):
        if token not in tokens:
            raise BadInput(f"{name}: the tokenizer has no {token} token; a Qwen2.5-VL checkpoint is needed")
    if tokens[IMAGE_PAD] != config.image_token_id or max(tokens.values()) >= config.get_text_config().vocab_size:
        raise BadInput(f"{name}: the tokenizer's ids are not those of config.json; fetch the tokenizer files again")
    eye, own = config.vision_config, (images.patch_size, images.merge_size, images.temporal_patch_size)
    if own != (eye.patch_size, eye.spatial_merge_size, eye.temporal_patch_size):
        raise BadInput(f"{name}: preprocessor_config.json cuts other patches than config.json says; fetch both again")
    if tokenizer.chat_template is None:
        raise BadInput(f"{name}: no chat template; copy the base model's chat_template.jinja into the folder")
    try:
        images(images=[Image.new("RGB", (56, 56))], return_tensors="pt")
        chat = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
        tokenizer(chat)
    except BROKEN as error:
        reason = _one_line(error)
        raise BadInput(f"{name}: chat template, tokenizer or preprocessor_config.json is broken: {reason}") from error
    if chat.count(IMAGE_PAD) != 1:
        raise BadInput(f"{name}: the chat template does not place a picture; copy the base model's into the folder")
    return Processor(tokenizer, images)


def any_processor(name: str):
    """For evaluation: the `Processor` of the families that it fits, the checkpoint's own AutoProcessor for any other
    (tested with LLaVA alone; some need torchvision)."""
    if load_config(name).model_type in FAMILIES:
        return load_processor(name)
    return pretrained(AutoProcessor, name)


def count_parameters(name: str) -> int:
    """The parameters of a folder or hub id, counted from its configuration alone; a tied head counts once."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForImageTextToText.from_config(load_config(name)).parameters())


def load_model(name: str, device: torch.device, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model of a folder or hub id on `device`, in evaluation mode: bf16 on a GPU, fp32 on a CPU unless told.

    Only safetensors are read, never pickles. Raises BadInput with a remedy when it cannot be loaded.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model, report = pretrained(
        AutoModelForImageTextToText,
        name,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        output_loading_info=True,
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        broken = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise BadInput(f"{name}: weights missing or of another shape ({', '.join(broken[:3])}); fetch the folder again")
    stops, words = _eos(model), model.get_input_embeddings().num_embeddings
    if not all(type(i) is int and 0 <= i < words for i in stops):
        raise BadInput(f"{name}/generation_config.json: eos_token_id {stops!r:.80} must name tokens below {words:,}")
    return model.to(device).eval()


def pretrained(kind, name: str, **kwargs):
    """`kind.from_pretrained(name)`, with the failures that a user can mend turned into one line."""
    local = Path(name).is_dir()
    # A hub id is "owner/name"; our own default folders look like one, too, but are never meant as such.
    looks_local = str(name).count("/") != 1 or str(name).startswith((".", "/", "runs/", "assets/", "data/"))
    if not local and (Path(name).exists() or looks_local):
        raise BadInput(f"{name}: no such checkpoint folder; run the stage before, or give a folder or hub id (--model)")
    if local:
        remedy = "is the folder complete?"
    elif _hub_answers():
        remedy = "not a folder; as a hub id: check its spelling, and log in with `hf auth login` if it is gated"
    else:
        remedy = (f"not a folder, and the hub does not answer: check the network, or `hf download {name}` where there "
                  "is one and give that folder to --model; HF_HUB_OFFLINE=1 uses the cache at once")  # fmt: skip
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **kwargs)
    except BROKEN as error:
        place = f"{name}/*.safetensors" if isinstance(error, SafetensorError) else name
        raise BadInput(f"{place}: cannot be loaded as a checkpoint ({remedy}): {_one_line(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers' Rust half raises the bare class
            raise
        raise BadInput(f"{name}: its tokenizer.json is broken: {_one_line(error)}") from error


def _check_folder(folder: Path) -> None:
    """Raises BadInput for a checkpoint folder that lacks a file, or whose JSON files do not hold objects."""
    for names in PARTS:
        if not any((folder / name).is_file() for name in names):
            pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
            hint = f"; {pickled[0]} may be a pickle and is not read: convert it to safetensors" if pickled else ""
            raise BadInput(f"{folder}: is no complete checkpoint folder: {names[0]} is missing{hint}")
    for name in [*(name for names in PARTS for name in names), *OTHERS]:
        path = folder / name
        if name.endswith(".json") and path.exists() and not isinstance(read_json(path), dict):
            raise BadInput(f"{path}: must hold a JSON object")


@lru_cache
def _hub_answers() -> bool:
    """Asks the hub once, for 5 s. Unanswered, only its cache is used from here on: the library would otherwise try six
    times for each file."""
    if not constants.is_offline_mode():
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except HTTPError:
            constants.HF_HUB_OFFLINE = True
    return not constants.is_offline_mode()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def stored_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype that the model was loaded with: of its frozen weights, its reference and its checkpoints."""
    dtype = model.config.dtype or model.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained turns it into its name


def save_checkpoint(folder: Path, model: torch.nn.Module, processor: Processor, state: dict | None = None) -> None:
    """Writes a complete Hugging Face folder: config, generation config, safetensors, tokenizer, image processor.

    Weights are stored in the dtype that the model was loaded with, so that on a GPU fp32 masters come out as bf16.
    `state` stands for `model.state_dict()` where the model's own tensors are shards.
    """
    dtype = stored_dtype(model)
    state = {name: tensor.to(dtype) for name, tensor in (state or model.state_dict()).items()}
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        del state["lm_head.weight"]  # tied: stored once, under its embedding's name
    model.save_pretrained(folder, state_dict=state)
    processor.save(folder)


def set_trainable(model: torch.nn.Module, group: str) -> dict[str, torch.nn.Parameter]:
    """Freezes everything but the parameters of `group` (a key of GROUPS) and returns those by name.

    Trained parameters become fp32 masters; frozen ones keep their dtype. Raises BadInput when nothing matches, as for
    a family of other names.
    """
    chosen = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.fullmatch(GROUPS[group], name) is not None)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            chosen[name] = parameter
    if not chosen:
        raise BadInput(f"--train {group}: no parameter of {type(model).__name__} is named like that")
    return chosen


def frozen_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` that never changes; it shares every frozen tensor and copies only the trained ones, in the
    dtype of the checkpoint: nothing is lost, the fp32 masters still hold its very values."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    reference = copy.deepcopy(model, shared).requires_grad_(False).eval()
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(stored_dtype(model))
    return reference


def stop_ids(model: torch.nn.Module, processor: Processor) -> list[int]:
    """Every token id that ends a completion: those of generation_config and the chat's own end of turn."""
    return sorted({processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), *_eos(model)})


def _eos(model: torch.nn.Module) -> list[int]:
    """What generation_config names as the end of a text: nothing, one id or several."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    return [i for i in configured if i is not None]


def encode(processor: Processor, images: list[Image.Image], prompts: list[str], answers: list[str] | None = None):
    """One batch of chats, each a picture and a prompt, ready for `model(**batch)`.

    Without `answers` rows are padded on the left, so that completions start in one column; with them the answer and
    the end-of-turn token follow the prompt, rows are padded on the right, and `labels` holds the answer's tokens, EOS
    included, and -100 elsewhere: built from lengths, never from pad ids, since pad and EOS may be one token.

    Returns a dict of input_ids, attention_mask, mm_token_type_ids (1 at image tokens; without it the model silently
    loses its 3-D positions), [B, T] each; pixel_values [patches, channels * 2 * 14 * 14]; image_grid_thw [B, 3].
    Raises BadInput for a prompt that holds an image placeholder of its own.
    """
    tokenizer, pixels = processor.tokenizer, processor.image_processor(images=images, return_tensors="pt")
    merge = processor.image_processor.merge_size**2
    rows, starts = [], []
    for i, (prompt, grid) in enumerate(zip(prompts, pixels["image_grid_thw"], strict=True)):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if text.count(IMAGE_PAD) != 1:
            raise BadInput(f"prompt {prompt[:60]!r}: it must not hold {IMAGE_PAD}, which stands for the picture")
        ids = tokenizer(text.replace(IMAGE_PAD, IMAGE_PAD * int(grid.prod() // merge)))["input_ids"]
        starts.append(len(ids))
        if answers is not None:
            ids = ids + tokenizer(answers[i] + "<|im_end|>")["input_ids"]
        rows.append(ids)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # its value never matters: it is masked
    input_ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for i, ids in enumerate(rows):
        columns = slice(0, len(ids)) if answers is not None else slice(width - len(ids), width)
        input_ids[i, columns], mask[i, columns] = torch.tensor(ids), 1
        labels[i, starts[i] : len(ids)] = input_ids[i, starts[i] : len(ids)]
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    batch = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "mm_token_type_ids": ((input_ids == image_token) & mask.bool()).int(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }
    if answers is not None:
        batch["labels"] = labels
    return batch


def positions(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """The 3-D rotary positions (time, height, width) of a batch of prompts, [3, B, T]; text after a picture goes on
    from the picture's longer side, and padding is 0."""
    return model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )[0]


def to_device(batch: dict, device: torch.device) -> dict:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def picture_inputs(batch: dict) -> dict:
    """What the model's forward needs of the pictures: patches, or the tower's output where `features` has it."""
    if "features" in batch:
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=batch["features"])}}
    return {key: batch[key] for key in ("pixel_values", "image_grid_thw")}


def select(batch: dict, rows: slice) -> dict:
    """The given rows of a batch of prompts, with just their pictures' patches."""
    ends = batch["image_grid_thw"].prod(1).cumsum(0).tolist()
    start, stop, _ = rows.indices(len(ends))
    patches = slice(ends[start - 1] if start else 0, ends[stop - 1])
    return {key: value[patches if key == "pixel_values" else rows] for key, value in batch.items()}


def repeat(batch: dict, times: int) -> dict:
    """Every row of a batch `times` times in a row (AABB), its picture with it."""
    repeated = {}
    for key, value in batch.items():
        if key == "pixel_values":
            pictures = value.split(batch["image_grid_thw"].prod(1).tolist())
            repeated[key] = torch.cat([picture for picture in pictures for _ in range(times)])
        elif key == "features":
            repeated[key] = [picture for picture in value for _ in range(times)]
        else:
            repeated[key] = value.repeat_interleave(times, 0)
    return repeated


def decode(processor: Processor, ids: list[int], stops: list[int]) -> str:
    """The text of a completion without its end-of-turn token."""
    return processor.tokenizer.decode([i for i in ids if i not in stops], skip_special_tokens=True)
