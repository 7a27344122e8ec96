"""The model families: load and save checkpoints, choose what is trained, encode what is asked.

The Hugging Face model is used unmodified. Its `AutoProcessor` needs torchvision (for video); we
need only its two halves, the tokenizer and the image processor, and expand the image placeholder
ourselves (`encode`). transformers is imported where it is used: it takes seconds.
"""

import copy
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError

from support.files import BadInput, read_json

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen2.5-vl"
DEMO_MARKER = "medreason_demo"  # a key in config.json of checkpoints that descend from TINY
IMAGE_PAD = "<|image_pad|>"
FAMILIES = ("qwen2_5_vl", "qwen2_vl")  # read by `load_processor`; only the first is trained
# These make `generate` greedy whatever a checkpoint's own generation_config says.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
GREEDY |= {"temperature": None, "top_k": None, "top_p": None}

# A checkpoint folder holds one file of each line; the other JSON files may be there.
PARTS = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json"),
    ("tokenizer.json", "vocab.json", "tokenizer.model"),
    ("preprocessor_config.json", "processor_config.json"),
)
OTHERS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
OTHERS += ("chat_template.json",)
# What the libraries raise over a damaged folder. Caught around their calls only, so that no bug of
# ours hides in them.
BROKEN = (ImportError, OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError)
BROKEN += (ArithmeticError, MemoryError, SafetensorError, StrictDataclassError, TemplateError)

# What `--train` can name: patterns that match a parameter's whole name. An unanchored "mlp" would
# also match in the vision blocks. A tied lm_head is listed under embed_tokens.
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


# ==== Loading and saving ====


def load_config(name: str):
    """The configuration of a checkpoint folder or hub id. Raises BadInput when it is incomplete."""
    if Path(name).is_dir():
        _check_folder(Path(name))
    return pretrained("AutoConfig", name)


def is_demo(name: str) -> bool:
    """Whether a checkpoint descends from the tiny demo model: only then are DEMO values used."""
    return bool(getattr(load_config(str(name)), DEMO_MARKER, False))


def load_processor(name: str) -> Processor:
    """Tokenizer and image processor of a folder or hub id, tried on a blank picture.

    Raises BadInput when they cannot be had, lack a needed token, or belong to another model.
    """
    config = load_config(name)
    tokenizer, images = pretrained("AutoTokenizer", name), pretrained("AutoImageProcessor", name)
    tokens = tokenizer.get_vocab()
    for token in (IMAGE_PAD, "<|vision_start|>", "<|im_start|>", "<|im_end|>"):
        if token not in tokens:
            need = "a Qwen2.5-VL checkpoint is needed"
            raise BadInput(f"{name}: the tokenizer has no {token} token; {need}")
    words = config.get_text_config().vocab_size
    if tokens[IMAGE_PAD] != config.image_token_id or max(tokens.values()) >= words:
        remedy = "fetch the tokenizer files again"
        raise BadInput(f"{name}: the tokenizer's ids are not those of config.json; {remedy}")
    vision = config.vision_config
    expected = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    if (images.patch_size, images.merge_size, images.temporal_patch_size) != expected:
        fault = "preprocessor_config.json cuts other patches than config.json says"
        raise BadInput(f"{name}: {fault}; fetch both again")
    remedy = "copy the base model's chat_template.jinja into the folder"
    if tokenizer.chat_template is None:
        raise BadInput(f"{name}: no chat template; {remedy}")
    try:
        images(images=[Image.new("RGB", (56, 56))], return_tensors="pt")
        turn = {"role": "user", "content": [{"type": "image"}]}
        chat = tokenizer.apply_chat_template([turn], tokenize=False)
        tokenizer(chat)
    except BROKEN as error:
        parts = "chat template, tokenizer or preprocessor_config.json"
        raise BadInput(f"{name}: {parts} is broken: {_one_line(error)}") from error
    if chat.count(IMAGE_PAD) != 1:
        raise BadInput(f"{name}: the chat template does not place a picture; {remedy}")
    return Processor(tokenizer, images)


def any_processor(name: str):
    """For evaluation: our `Processor` where it fits, else the checkpoint's own AutoProcessor
    (tested with LLaVA alone; some need torchvision)."""
    if load_config(name).model_type in FAMILIES:
        return load_processor(name)
    return pretrained("AutoProcessor", name)


def count_parameters(name: str) -> int:
    """The parameters of a folder or hub id by its configuration alone; a tied head counts once."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(load_config(name))
    return sum(parameter.numel() for parameter in model.parameters())


def load_model(name: str, device: torch.device, dtype: torch.dtype | None = None):
    """The model of a folder or hub id on `device`, in evaluation mode.

    `dtype` is bf16 on a GPU and fp32 on a CPU by default. Only safetensors are read, never pickles.
    Raises BadInput with a remedy when it cannot be loaded.
    """
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, report = pretrained(
        "AutoModelForImageTextToText",
        name,
        dtype=dtype or default,
        attn_implementation="sdpa",
        use_safetensors=True,
        output_loading_info=True,
    )
    faulty = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if faulty:
        first = ", ".join(faulty[:3])
        raise BadInput(f"{name}: weights missing or of another shape ({first}); fetch it again")
    stops, words = _eos(model), model.get_input_embeddings().num_embeddings
    if not all(type(i) is int and 0 <= i < words for i in stops):
        fault = f"eos_token_id {stops!r:.80} must name tokens below {words:,}"
        raise BadInput(f"{name}/generation_config.json: {fault}")
    return model.to(device).eval()


def pretrained(kind: str, name: str, **options):
    """`from_pretrained(name)` of the transformers class `kind`; never runs a checkpoint's code.

    Raises BadInput with one line for every failure that a user can mend.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    local = Path(name).is_dir()
    # A hub id is "owner/name". Our default folders look like one, too, but are never meant so.
    folder_like = name.count("/") != 1 or name.startswith((".", "/", "runs/", "assets/", "data/"))
    if not local and (folder_like or Path(name).exists()):
        remedy = "run the stage before, or give a folder or hub id (--model)"
        raise BadInput(f"{name}: no such checkpoint folder; {remedy}")
    if local:
        remedy = "is the folder complete?"
    elif _hub_answers():
        remedy = "no folder; as a hub id: check its spelling, or `hf auth login` if it is gated"
    else:
        remedy = (
            "no folder, and the hub does not answer: check the network, or give --model the folder "
            f"of `hf download {name}`; HF_HUB_OFFLINE=1 uses the cache at once"
        )
    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **options)
    except BROKEN as error:
        place = f"{name}/*.safetensors" if isinstance(error, SafetensorError) else name
        fault = f"cannot be loaded as a checkpoint ({remedy})"
        raise BadInput(f"{place}: {fault}: {_one_line(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers' Rust half raises the bare class
            raise
        raise BadInput(f"{name}: its tokenizer.json is broken: {_one_line(error)}") from error


def _check_folder(folder: Path) -> None:
    """Raises BadInput for a checkpoint folder that lacks a file or has JSON that is no object."""
    for names in PARTS:
        if any((folder / name).is_file() for name in names):
            continue
        pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
        hint = f"; {pickles[0]} is not read, convert it to safetensors" if pickles else ""
        raise BadInput(f"{folder}: is no complete checkpoint: {names[0]} is missing{hint}")
    for name in [*sum(PARTS, ()), *OTHERS]:
        path = folder / name
        if path.suffix == ".json" and path.exists() and not isinstance(read_json(path), dict):
            raise BadInput(f"{path}: must hold a JSON object")


@lru_cache
def _hub_answers() -> bool:
    """Asks the hub once, for 5 s. Unanswered, only its cache is used from here on: the library
    would otherwise try six times for each file."""
    from huggingface_hub import constants, get_session

    if not constants.is_offline_mode():
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except HTTPError:
            constants.HF_HUB_OFFLINE = True
    return not constants.is_offline_mode()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def stored_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype a model was loaded with: of its frozen weights, its reference, its checkpoints."""
    dtype = model.config.dtype or model.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained names it


def save_checkpoint(folder: Path, model, processor: Processor, state: dict | None = None) -> None:
    """Writes a complete Hugging Face folder, its weights in the dtype the model was loaded with.

    `state` stands for `model.state_dict()` where the model's own tensors are shards.
    """
    dtype = stored_dtype(model)
    state = state or model.state_dict()
    weights = {name: tensor.to("cpu", dtype) for name, tensor in state.items()}
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        del weights["lm_head.weight"]  # tied: stored once, under its embedding's name
    model.save_pretrained(folder, state_dict=weights)
    processor.save(folder)


# ==== What is trained ====


def set_trainable(model: torch.nn.Module, group: str) -> dict[str, torch.nn.Parameter]:
    """Freezes all but the parameters of `group`, a key of GROUPS, and returns those by name.

    Trained parameters become fp32 masters, frozen ones keep their dtype. Raises BadInput when
    nothing matches, as for a family of other names.
    """
    chosen = {}
    for name, parameter in model.named_parameters():
        trained = re.fullmatch(GROUPS[group], name) is not None
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
            chosen[name] = parameter
    if not chosen:
        kind = type(model).__name__
        raise BadInput(f"--train {group}: no parameter of {kind} is named like that")
    return chosen


def frozen_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` that never changes: the reference.

    It shares every frozen tensor and copies only the trained ones, in the checkpoint's dtype.
    Nothing is lost by that: the fp32 masters still hold its very values.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    reference = copy.deepcopy(model, shared).requires_grad_(False).eval()
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(stored_dtype(model))
    return reference


# ==== Prompts, pictures and completions ====


def stop_ids(model: torch.nn.Module, processor: Processor) -> list[int]:
    """Every token id that ends a completion: generation_config's and the chat's end of turn."""
    return sorted({processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), *_eos(model)})


def _eos(model: torch.nn.Module) -> list[int]:
    """What generation_config names as the end of a text: nothing, one id or several."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return [i for i in ids if i is not None]


def encode(
    processor: Processor,
    images: list[Image.Image],
    prompts: list[str],
    answers: list[str] | None = None,
) -> dict:
    """One batch of chats, each a picture and a prompt, ready for `model(**batch)`.

    Without `answers` rows are padded on the left, so that completions start in one column. With
    them the answer and the end-of-turn token follow the prompt, rows are padded on the right, and
    `labels` holds the answer's tokens, EOS included, and -100 elsewhere. Labels are built from
    lengths, never from pad ids, since pad and EOS may be one token.

    Returns input_ids, attention_mask, mm_token_type_ids (1 at image tokens; without it the model
    silently loses its 3-D positions), [B, T] each; pixel_values [patches, channels * 2 * 14 * 14];
    image_grid_thw [B, 3]. Raises BadInput for a prompt with an image placeholder of its own.
    """
    tokenizer = processor.tokenizer
    pixels = processor.image_processor(images=images, return_tensors="pt")
    counts = pixels["image_grid_thw"].prod(1) // processor.image_processor.merge_size**2  # [B]
    rows, starts = [], []
    for i, prompt in enumerate(prompts):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        turns = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if text.count(IMAGE_PAD) != 1:
            fault = f"it must not hold {IMAGE_PAD}, which stands for the picture"
            raise BadInput(f"prompt {prompt[:60]!r}: {fault}")
        ids = tokenizer(text.replace(IMAGE_PAD, IMAGE_PAD * int(counts[i])))["input_ids"]
        starts.append(len(ids))
        if answers is not None:
            ids = ids + tokenizer(answers[i] + "<|im_end|>")["input_ids"]
        rows.append(ids)

    width = max(map(len, rows))
    # The pad token's value never matters: it is masked.
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids = torch.full((len(rows), width), pad)  # [B, T]
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for i, ids in enumerate(rows):
        first = 0 if answers is not None else width - len(ids)
        input_ids[i, first : first + len(ids)] = torch.tensor(ids)
        mask[i, first : first + len(ids)] = 1
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


def decode(processor: Processor, ids: list[int], stops: list[int]) -> str:
    """The text of a completion without its end-of-turn token."""
    kept = [i for i in ids if i not in stops]
    return processor.tokenizer.decode(kept, skip_special_tokens=True)


def positions(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """The 3-D rotary positions (time, height, width) of a batch of prompts, [3, B, T].

    Text after a picture goes on from the picture's longer side; padding is 0.
    """
    return model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )[0]


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with every tensor on `device`."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


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
        else:
            repeated[key] = value.repeat_interleave(times, 0)
    return repeated
