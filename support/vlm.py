"""The model families: load and save checkpoints, choose what is trained, encode what is asked.

The Hugging Face model is used unmodified. Its `AutoProcessor` needs torchvision (for video); we
need only its two halves, the tokenizer and the image processor, and expand the image placeholder
ourselves (`encode`). transformers is imported where it is used: it takes seconds.
"""

import copy
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError, safe_open

import rewards
from support.files import MAX_SIDE, BadInput, read_json, reading, reason
from support.records import pictures

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen2.5-vl"
DEMO_MARKER = "medreason_demo"  # a key in config.json of checkpoints that descend from TINY
IMAGE_PAD = "<|image_pad|>"
MARKS = {IMAGE_PAD, "<|vision_start|>", "<|im_start|>", "<|im_end|>"}  # each is one token
OPENING = "<think>"  # the templates of some reasoning models end with it
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_vl")  # read by `load_processor`
TEMPLATE_SECONDS = 10  # a chat template takes milliseconds, but may hold any loop

# A checkpoint folder holds one file of each line; the other JSON files may be there.
PARTS = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json"),
    ("tokenizer.json", "vocab.json", "tokenizer.model"),
    ("preprocessor_config.json", "processor_config.json"),
)
OTHERS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
OTHERS += ("chat_template.json",)
# Of config.json: what is built one by one. More than 1,000 need as many tensors.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "depth", "num_labels")
# What the libraries raise over a damaged checkpoint. Caught around their calls only, so that no bug
# of ours hides in them.
BROKEN = (ImportError, OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError)
BROKEN += (ArithmeticError, MemoryError, AssertionError, SafetensorError, StrictDataclassError)
BROKEN += (TemplateError, SyntaxError)  # `{% break %}` compiles to the latter
RUST = ("Exception", "PanicException")  # what the tokenizers' Rust half raises, by exact name

# What `--train` can name: patterns that match a parameter's whole name. An unanchored "mlp" would
# also match in the vision blocks. A tied lm_head is listed under embed_tokens.
MERGER = r"model\.visual\.(merger|deepstack_merger_list)\..+"
LLM_MLP = r"model\.language_model\.layers\.\d+\.mlp\..+"
GROUPS = {
    "merger": MERGER,
    "llm_mlp": LLM_MLP,
    "mlp": f"{MERGER}|{LLM_MLP}",
    "llm": r"model\.language_model\..+|lm_head\..+",
    "full": r".+",
}
# And "lora": the linear layers that get an adapter, its parameters, and its weight, as in
# y = W x + 2 B A x.
ADAPTED = r"model\.language_model\.layers\.\d+\..+_proj\w*"
LORA = r".+\.lora_[AB]\..+"
LORA_SCALE = 2
TRAIN = (*GROUPS, "lora")


@dataclass
class Processor:
    """The two halves of a checkpoint's processor, the most positions that its model takes, and how
    its family writes boxes."""

    tokenizer: object
    image_processor: object
    limit: int = 2**31
    thousandths: bool = False  # boxes are written in 1/1000 of each side, not in px

    def save(self, folder: Path) -> None:
        with guarded(folder, "cannot be written"):
            self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


# ==== Loading and saving ====


@contextmanager
def guarded(name: object, fault: str) -> Iterator[None]:
    """Within, what libraries raise over a checkpoint's files becomes a BadInput of one line."""
    try:
        yield
    except BaseException as error:
        known = isinstance(error, BROKEN) or type(error).__name__ in RUST
        if not known or isinstance(error, torch.OutOfMemoryError):
            raise
        raise BadInput(f"{name}: {fault}: {reason(error)}") from error


def load_config(name: str):
    """The configuration of a checkpoint folder or hub id. Raises BadInput when it is incomplete."""
    if Path(name).is_dir():
        _check_folder(Path(name))
    return pretrained("AutoConfig", name)


def is_demo(name: str) -> bool:
    """Whether a checkpoint descends from the tiny demo model: only then are DEMO values used."""
    return bool(getattr(load_config(str(name)), DEMO_MARKER, False))


def load_processor(name: str) -> Processor:
    """Tokenizer and image processor of a folder or hub id.

    Raises BadInput when they cannot be had, lack a needed token, or belong to another model.
    """
    config = load_config(name)
    tokenizer, images = pretrained("AutoTokenizer", name), pretrained("AutoImageProcessor", name)
    tokens, text, vision = tokenizer.get_vocab(), config.get_text_config(), config.vision_config
    found = [tokens.get(IMAGE_PAD), images.patch_size, images.merge_size]
    wanted = [config.image_token_id, vision.patch_size, vision.spatial_merge_size]
    found.append(images.temporal_patch_size)
    wanted.append(vision.temporal_patch_size)
    if found != wanted or not tokens.keys() >= MARKS or max(tokens.values()) >= text.vocab_size:
        fault = "its token ids, preprocessor_config.json and config.json are not of one Qwen model"
        raise BadInput(f"{name}: {fault}; fetch it again")
    try_template(name, tokenizer, [{"type": "image"}, {"type": "text", "text": "?"}])
    thousandths = config.model_type != "qwen2_5_vl"
    return Processor(tokenizer, images, text.max_position_embeddings, thousandths)


def try_template(name: str, tokenizer, content: object) -> None:
    """Renders one chat in a process of its own: a template is a program, which may never end.

    Raises BadInput when it takes TEMPLATE_SECONDS or more memory than there is. What else is wrong
    with it shows where it is used.
    """

    def render() -> None:
        with suppress(BaseException):
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)

    child = multiprocessing.get_context("fork").Process(target=render)
    child.start()
    child.join(TEMPLATE_SECONDS)
    child.kill()
    if child.exitcode != 0:
        limit = f"it takes more than {TEMPLATE_SECONDS} s, or too much memory"
        raise BadInput(f"{name}: the chat template does not work: {limit}")


def any_processor(name: str):
    """For evaluation: our `Processor` where it fits, else the checkpoint's own AutoProcessor
    (tested with LLaVA alone; some need torchvision)."""
    if load_config(name).model_type in FAMILIES:
        return load_processor(name)
    return pretrained("AutoProcessor", name)


def count_parameters(name: str) -> int:
    """The parameters of a folder or hub id by its configuration alone; a tied head counts once."""
    with guarded(name, "config.json does not work"):
        model = without_weights(load_config(name))
    return sum(parameter.numel() for parameter in model.parameters())


def without_weights(config) -> torch.nn.Module:
    """The model of this configuration, its parameters mere shapes."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def load_model(name: str, device: torch.device, dtype: torch.dtype | None = None, split: int = 1):
    """The model of a folder or hub id on `device`, in evaluation mode.

    `dtype` is bf16 on a GPU and fp32 on a CPU by default. Only safetensors are read, never pickles.
    `split` > 1: each layer of the language model is split over that many processes (tensor
    parallelism), which then must call the model together. Raises BadInput with a remedy when it
    cannot be loaded.
    """
    # Before anything is built from a folder's files, they are looked at.
    text, parts = load_config(name).get_text_config(), None
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    if split > 1:
        from transformers.distributed import DistributedConfig

        if not text.base_model_tp_plan:
            fault = f"transformers has no --tensor-parallel plan for {text.model_type}"
            raise BadInput(f"{name}: {fault}")
        if text.num_key_value_heads % split:
            heads = f"its {text.num_key_value_heads} key-value heads"
            raise BadInput(f"{name}: {heads} cannot be split over {split} processes")
        parts = DistributedConfig(tp_size=split)
    model, report = pretrained(
        "AutoModelForImageTextToText",
        name,
        dtype=dtype or default,
        attn_implementation="sdpa",
        use_safetensors=True,
        output_loading_info=True,
        distributed_config=parts,
    )
    faulty = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if faulty:
        first = ", ".join(faulty[:3])
        raise BadInput(f"{name}: weights missing or of another shape ({first}); fetch it again")
    generate_plainly(model, name)
    return (model if parts else model.to(device)).eval()


def generate_plainly(model, name: str) -> None:
    """Makes `model.generate` greedy: of its generation_config only the ends and padding stay."""
    from transformers import GenerationConfig

    given, words = model.generation_config, model.get_input_embeddings().num_embeddings
    ends = {"eos_token_id": given.eos_token_id, "pad_token_id": given.pad_token_id}
    for key, value in ends.items():
        for i in value if isinstance(value, list) else [value]:
            if i is not None and not (type(i) is int and 0 <= i < words):
                fault = f"{key} {value!r:.80} must name tokens below {words:,}"
                raise BadInput(f"{name}/generation_config.json: {fault}")
    model.generation_config = GenerationConfig(**ends)


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
    remedy = "is the folder complete?"
    if not local:
        _try_hub()
        remedy = "no folder; as a hub id: check its spelling and the network, `hf auth login` if "
        remedy += "gated; `hf download` gives a folder, HF_HUB_OFFLINE=1 uses the cache at once"
    with guarded(name, f"cannot be loaded as a checkpoint ({remedy})"):
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **options)


def _check_folder(folder: Path) -> None:
    """Raises BadInput for a checkpoint folder that lacks a file, has JSON that is no object, or
    whose config.json asks for more layers than there are tensors: building them would not end."""
    with guarded(folder, "cannot be read"):
        str(folder).encode()  # a name that is not UTF-8 would stop the libraries that write
        files = sorted(folder.iterdir())
        for path in files:
            if path.exists() and not path.is_dir() and not path.is_file():
                raise OSError(f"{path.name} is no regular file")
    if folder / "adapter_config.json" in files:
        raise BadInput(f"{folder}: holds adapters, which are not read; merge them into the weights")
    for names in PARTS:
        if not any((folder / name).is_file() for name in names):
            pickles = [path.name for path in files if path.suffix in (".bin", ".pt", ".pth")]
            hint = f"; {pickles[0]} is not read, convert it to safetensors" if pickles else ""
            raise BadInput(f"{folder}: is no complete checkpoint: {names[0]} is missing{hint}")
    for name in [*sum(PARTS, ()), *OTHERS]:
        path = folder / name
        if path.suffix == ".json" and path.exists() and not isinstance(read_json(path), dict):
            raise BadInput(f"{path}: must hold a JSON object")
    index = folder / "model.safetensors.index.json"
    if index in files:  # it could name a pipe or device anywhere
        with guarded(index, "does not work"):
            for shard in read_json(index)["weight_map"].values():
                if folder / shard not in files or not shard.endswith(".safetensors"):
                    raise ValueError(f"{shard!r:.80} is no file of this folder")
    count = 0
    for path in folder.glob("*.safetensors"):
        with reading(path, SafetensorError), safe_open(path, "pt") as weights:
            count += len(weights.keys())
    config = read_json(folder / "config.json")
    for part in filter(lambda part: isinstance(part, dict), [config, *config.values()]):
        for key in DEPTHS:
            if isinstance(part.get(key), (int, float)) and part[key] > max(count, 1000):
                fault = f"{key} {part[key]:,}, but the weights are {count:,} tensors"
                raise BadInput(f"{folder}/config.json: {fault}")


@lru_cache
def _try_hub() -> None:
    """Asks the hub once, for 5 s. Unanswered, only its cache is used from here on: the library
    would otherwise try six times for each file."""
    from huggingface_hub import constants, get_session

    if not constants.is_offline_mode():
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except HTTPError:
            constants.HF_HUB_OFFLINE = True


def stored_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype a model was loaded with: of its frozen weights, its reference, its checkpoints."""
    dtype = model.config.dtype or model.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained names it


def save_checkpoint(folder: Path, model, processor: Processor, state: dict | None = None) -> None:
    """Writes a complete Hugging Face folder, its weights in the dtype the model was loaded with.

    `state` stands for `model.state_dict()` where the model's own tensors are shards. Adapters are
    merged: what is written is a plain model.
    """
    dtype = stored_dtype(model)
    state = state or model.state_dict()
    weights = {}
    for name, tensor in state.items():
        layer, adapted, _ = name.partition(".base_layer.weight")
        if adapted:
            A, B = (state[f"{layer}.lora_{letter}.default.weight"] for letter in "AB")
            tensor = tensor + LORA_SCALE * B @ A
        if ".lora_" not in name:
            weights[name.replace(".base_layer", "")] = tensor.to("cpu", dtype)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        del weights["lm_head.weight"]  # tied: stored once, under its embedding's name
    if has_adapters(model):  # it would write those alone
        ends, model = model.generation_config, without_weights(model.config)
        model.generation_config = ends
    model.save_pretrained(folder, state_dict=weights)
    processor.save(folder)


# ==== What is trained ====


def set_trainable(model, group: str, rank: int = 16) -> dict[str, torch.nn.Parameter]:
    """Freezes all but the parameters of `group`, one of TRAIN, and returns those by name.

    "lora" adds adapters of `rank` first. Raises BadInput when nothing matches, as for a family of
    other names.
    """
    if group == "lora":
        add_adapters(model, rank)
    pattern, chosen = GROUPS.get(group, LORA), {}
    for name, parameter in model.named_parameters():
        trained = re.fullmatch(pattern, name) is not None
        parameter.requires_grad_(trained)
        if trained:
            chosen[name] = parameter
    if not chosen:
        kind = type(model).__name__
        raise BadInput(f"--train {group}: no parameter of {kind} is named like that")
    return chosen


def add_adapters(model: torch.nn.Module, rank: int) -> None:
    """Puts a LoRA adapter beside each linear layer of the language model's blocks.

    A [rank, in] is random, the same in every process, and B [out, rank] is 0: nothing changes yet.
    Raises BadInput when the package peft, which transformers needs for that, is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        remedy = "pip install -r benchmarks/requirements.txt"
        raise BadInput(f"--train lora needs the package peft: {remedy}") from error
    torch.manual_seed(0)
    # No dropout: what is sampled and what is scored must be one policy.
    model.add_adapter(LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=ADAPTED))


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether `add_adapters` has been here."""
    return hasattr(model, "peft_config")


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """Within, a model with adapters is what it was before training; another stays as it is."""
    if not has_adapters(model):
        yield
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.disable_adapters()
    for parameter in trained:  # peft has frozen them: FSDP2, in its first pass, must not see that
        parameter.requires_grad_(True)
    yield
    model.enable_adapters()


def frozen_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` that shares every frozen tensor and holds the trained ones in the dtype of
    the checkpoint, never in fp32 between. Before training nothing is lost by that: the fp32 masters
    still hold the checkpoint's very values."""
    copies, dtype = {}, stored_dtype(model)
    for parameter in model.parameters():
        copies[id(parameter)] = parameter
        if parameter.requires_grad:
            values = parameter.detach().to(dtype, copy=True)
            copies[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
    return copy.deepcopy(model, copies).eval()


# ==== Prompts, pictures and completions ====


def stop_ids(model: torch.nn.Module, processor: Processor) -> list[int]:
    """Every token id that ends a completion: generation_config's and the chat's end of turn."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    turn = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    return sorted({turn, *ends} - {None})


def encode(
    processor: Processor,
    images: list[Image.Image],
    prompts: list[str],
    answers: list[str] | None = None,
    names: list[str] | None = None,
    begun: Sequence[str] | None = None,
) -> dict:
    """One batch of chats, each a picture and a prompt, ready for `model(**batch)`.

    Without `answers` rows are padded on the left, so that completions start in one column. With
    them the answer and the end-of-turn token follow the prompt, rows are padded on the right, and
    `labels` holds the answer's tokens, EOS included, and -100 elsewhere. Labels are built from
    lengths, never from pad ids, since pad and EOS may be one token. `begun`: how each completion
    begins; it belongs to the prompt.

    Returns input_ids, attention_mask, mm_token_type_ids (1 at image tokens; without it the model
    silently loses its 3-D positions), [B, T] each; pixel_values [patches, channels * 2 * patch**2];
    image_grid_thw [B, 3]. Raises BadInput, by the `names` of the records, for a prompt that is too
    long or has an image placeholder of its own, and for a checkpoint whose files fail on it.
    """
    tokenizer, cut = processor.tokenizer, processor.image_processor
    source, rows, starts = tokenizer.name_or_path, [], []
    with guarded(source, "preprocessor_config.json does not work"):
        for side, other in {image.size for image in images}:
            area = cut.get_number_of_image_patches(other, side) * cut.patch_size**2
            if area > MAX_SIDE**2:
                raise ValueError(f"it makes {area:,} px of {side} x {other}")
        pixels = cut(images=images, return_tensors="pt")
        counts = pixels["image_grid_thw"].prod(1) // cut.merge_size**2  # [B]
    for i, prompt in enumerate(prompts):
        name = names[i] if names else f"prompt {prompt[:60]!r}"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        turns = [{"role": "user", "content": content}]
        fault = f"the chat template or tokenizer does not work with {name}"
        with guarded(source, fault):
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            if text.count(IMAGE_PAD) != 1:
                raise ValueError(f"{IMAGE_PAD}, the picture's place, must stand once in a chat")
            # No tokenizer could make more characters fit.
            text = text[: 200 * processor.limit].replace(IMAGE_PAD, IMAGE_PAD * int(counts[i]))
            ids = tokenizer(text)["input_ids"]
            if begun:  # a model wrote it: what looks like a special token is plain text
                start = beginning(tokenizer, text, begun[i])
                ids = ids + tokenizer(start, split_special_tokens=True)["input_ids"]
        starts.append(len(ids))
        if answers is not None:
            # Where the template opens the reasoning, an answer without any must close it first.
            end = "</think>\n\n" if text.rstrip().endswith(OPENING) else ""
            ids = ids + tokenizer(end + answers[i] + "<|im_end|>")["input_ids"]
        if len(ids) > processor.limit:
            limit = f"{processor.limit:,} (max_position_embeddings)"
            raise BadInput(f"{name}: {len(ids):,} tokens; the model takes at most {limit}")
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


def beginning(tokenizer, chat: str, begun: str) -> str:
    """The text that makes a model go on from `begun`, an answer's start, after a rendered chat.

    A template may have opened the reasoning. A last ">" that the tokenizer joins with what follows,
    a tag or a new line, is left to the model: alone it is a token that no answer has there.
    """
    if chat.rstrip().endswith(OPENING):
        begun = begun.removeprefix(OPENING)
    ids = tokenizer(begun)["input_ids"]
    longer = [tokenizer(begun + following)["input_ids"] for following in ("<", "\n")]
    return begun if all(one[: len(ids)] == ids for one in longer) else begun[:-1]


def encode_any(
    model, processor, images: list, prompts: list[str], begun: Sequence[str] | None = None
) -> tuple[dict, dict]:
    """The batch as by `encode`, of any family, and what `model.generate` must know of its ends."""
    if isinstance(processor, Processor):
        stops = stop_ids(model, processor)
        ends = {"eos_token_id": stops, "pad_token_id": stops[0]}
        return encode(processor, images, prompts, begun=begun), ends
    # Another family: its own processor, stop tokens and padding.
    chats, form = [], {"add_generation_prompt": True}
    for image, prompt in zip(images, prompts, strict=True):
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        chats.append([{"role": "user", "content": content}])
    padding = {"padding": True, "padding_side": "left"}
    with guarded(model.name_or_path, "its processor does not work"):
        if begun and any(begun):
            for i, text in enumerate(processor.apply_chat_template(chats, **form)):
                chats[i][0]["begun"] = beginning(processor.tokenizer, text, begun[i])
            template = processor.chat_template.removesuffix("\n")  # as Jinja does at an end
            form["chat_template"] = template + "{{ messages[0].begun }}"
        form |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(chats, **form, processor_kwargs=padding), {}


# ==== The trial, when a checkpoint is opened ====


def generate(model, batch: dict, tokens: int, **ends: object) -> list[list[int]]:
    """The model's greedy completions of a batch by its own `generate`, [B][at most `tokens`]."""
    with guarded(model.name_or_path, "config.json or the weights do not work"):
        out = model.generate(**batch, **ends, max_new_tokens=tokens)
        return out[:, batch["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def try_out(model, processor: Processor, records: list, form: str, task: str, device) -> dict:
    """Runs one batch: the record with the longest question, and a blank picture of odd sides.

    Whatever is wrong with a checkpoint's files shows here, before a run begins. All ranks must call
    it, since the model may be sharded. Returns the encoded batch.
    """
    record = max(records, key=lambda record: len(record["question"]))
    images = [*pictures([record]), Image.new("RGB", (61, 57))]
    prompts = [rewards.prompt(record["question"], form, task), rewards.QUESTION]
    batch = encode(processor, images, prompts, names=[record["id"], rewards.QUESTION])
    cuda = device.type == "cuda"
    with guarded(model.name_or_path, "config.json or the weights do not work"):
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):  # as in training
            model(**to_device(batch, device), logits_to_keep=1).logits.argmax(-1).tolist()
    return batch


def check_room(model, batch: dict, samples: float, sequences: float = 0, tokens: int = 0) -> None:
    """Raises BadInput when a step asks for more than the model takes or the machine holds.

    That is `samples` encoded prompts like the batch's, and keys and values of `sequences`, each a
    prompt and `tokens` more tokens.
    """
    text, (rows, length) = model.config.get_text_config(), batch["input_ids"].shape
    length += tokens
    if length > text.max_position_embeddings:
        limit = f"{text.max_position_embeddings:,} (max_position_embeddings)"
        raise BadInput(f"--max-new-tokens {tokens:,}: with the prompt more than {limit}")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * width * model.dtype.itemsize * length
    need = sequences * cache + samples * sum(value.nbytes for value in batch.values()) / rows
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > memory:
        step = f"{samples:,.0f} prompts and {sequences:,.0f} completions at once"
        sizes = f"about {need / 2**30:,.0f} GiB, and there are {memory / 2**30:,.0f}"
        raise BadInput(f"{step} need {sizes}; ask for fewer")


def decode(processor: Processor, ids: list[int], stops: list[int]) -> str:
    """The text of a completion without its end-of-turn token."""
    kept = [i for i in ids if i not in stops]
    return processor.tokenizer.decode(kept, skip_special_tokens=True)


def opening(processor, prompts: dict) -> str:
    """With what the chat template already begins each answer: "<think>" or nothing.

    A completion goes on from there. The format is read from both together.
    """
    tail = processor.tokenizer.decode(prompts["input_ids"][0, -8:])
    return OPENING if tail.rstrip().endswith(OPENING) else ""


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
