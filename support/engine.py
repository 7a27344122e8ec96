"""How GRPO's sampling and scoring are made fast, each equal to its plain definition up to rounding.

Sampling prefills each prompt and its picture once and expands the cache to the N samples. Scoring
packs a prompt and its N completions into one row under a block mask: `packed_logprobs` gives what
`plain_logprobs` in 04_grpo.py defines. A frozen vision tower runs once per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from support import vlm

CHECK_EVERY = 8  # tokens: looking whether all rows are finished makes the host wait for the GPU


@dataclass
class Rollout:
    """B prompts with N completions each.

    `mask` comes from the sampler: EOS counts, what follows it does not. It is never derived from
    pad ids, which may equal EOS. `features` are what a frozen vision tower made of each picture,
    [image tokens, 1 + deepstack layers, hidden], kept from the prefill: every later pass of the
    step would compute the same. They are None where the tower is trained and each pass must run it.
    """

    prompts: dict  # a left-padded batch of B prompts, see vlm.encode
    tokens: torch.Tensor  # [B, N, L] sampled ids
    mask: torch.Tensor  # [B, N, L] bool
    finished: torch.Tensor  # [B, N] bool, False where --max-new-tokens cut the sample off
    features: list[torch.Tensor] | None = None  # B pictures

    def rows(self, part: slice) -> Rollout:
        """The prompts of `part` with their completions: a micro-batch."""
        prompts = vlm.select(self.prompts, part)
        features = self.features and self.features[part]
        return Rollout(prompts, self.tokens[part], self.mask[part], self.finished[part], features)

    def picture_inputs(self, times: int = 1) -> dict:
        """What the model's forward needs of the pictures, each `times` times in a row."""
        if self.features is None:
            prompts = self.prompts if times == 1 else vlm.repeat(self.prompts, times)
            return {key: prompts[key] for key in ("pixel_values", "image_grid_thw")}
        from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

        features = [picture.unbind(1) for picture in self.features for _ in range(times)]
        merged, *deepstack = zip(*features, strict=True)
        output = qwen3.BaseModelOutputWithDeepstackFeatures
        kept = output(pooler_output=merged, deepstack_features=deepstack)
        return {"mm_encoder_outputs": {"image": kept}}


# ==== Sampling ====


def sample_tokens(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Draws from softmax(logits) by inverting its distribution function at u in [0, 1).

    [R, V], [R] -> [R].
    """
    cdf = logits.double().softmax(-1).cumsum(-1)  # float64: 152,000 small numbers are added up
    drawn = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # [R, 1]
    return drawn.squeeze(1).clamp(max=logits.shape[-1] - 1)


def as_input(tokens: torch.Tensor, config) -> torch.Tensor:
    """Sampled tokens as the model may read them: the picture's placeholder is read as token 0.

    Nothing forbids sampling it, but fed back it would ask for a picture that is not there. Rollout
    and scoring both read it so.
    """
    pictures = (tokens == config.image_token_id) | (tokens == config.video_token_id)
    return tokens.masked_fill(pictures, 0)


def prefill(model, prompts: dict, position: torch.Tensor):
    """One pass over the prompts: the model's output, and a frozen tower's features per picture.

    A hook reads the features off: so the tower runs once.
    """
    tower, features = model.model.visual, []

    def keep(module, inputs, output):
        layers = [output.pooler_output, *(output.get("deepstack_features") or [])]
        features.append(torch.stack(layers, 1))  # [image tokens of all pictures, layers, hidden]

    hook = tower.register_forward_hook(keep)
    out = model(**prompts, position_ids=position, use_cache=True, logits_to_keep=1)
    hook.remove()
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return out, None
    merge = model.config.vision_config.spatial_merge_size
    counts = prompts["image_grid_thw"].prod(1) // merge**2  # [B] image tokens
    return out, list(features[0].split(counts.tolist()))


def decode_step(model, token, mask, position, cache) -> torch.Tensor:
    """The logits after one more token per row: [R, 1], [R, 1, 1, columns], [3, R, 1] -> [R, V].

    A 4-D mask is read as it is: the host neither builds one nor waits to look at it.
    """
    inputs = {"input_ids": token, "attention_mask": mask, "position_ids": position}
    return model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]


class DynamicDecode:
    """Decodes with a cache that grows by one column per token; finished rows can leave it.

    Row b * N + n is sample n of prompt b (AABB). `mask` is the prompts', [B, P].
    """

    def __init__(self, model, cache, mask: torch.Tensor, N: int):
        self.model, self.cache, self.mask = model, cache, mask.bool()
        self.keep(torch.arange(len(mask), device=mask.device).repeat_interleave(N))

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows of the batch alone. Every family's cache can be reordered."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]

    def step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The logits [R, V] after each row's next token [R], which stands at `position` [R]."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        mask, position = self.mask[:, None, None], position.expand(3, -1)[..., None]
        return decode_step(self.model, token[:, None], mask, position, self.cache)


class StaticDecode:
    """Decodes with tensors of fixed shapes and addresses, so that a GPU can replay the step alone.

    A step is more than a thousand kernels, and launching them takes longer than running them. On
    CUDA the eager step is captured once in a graph, which is launched as a whole; on a CPU it runs
    as it is. A graph reads the weights where they were: they may change in place, but copies that
    autocast made of them would stay old. So the step runs outside autocast, from weights that need
    no cast (distributed.load_twin). `static_decode` keeps those of the last two shapes.
    """

    def __init__(self, model, rows: int, length: int):
        from transformers import StaticCache

        device = model.device
        self.model, self.graph = model, None
        self.cache = StaticCache(model.config, max_cache_len=length)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position = self.token.repeat(3, 1, 1)  # [3, rows, 1]
        # Not False: a row that sees nothing leaves NaN in the cache, which no mask hides later.
        self.mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=device)
        self.forward()  # the cache makes its tensors in the first call, outside of any graph
        if device.type == "cuda":
            self.capture()

    def forward(self) -> torch.Tensor:
        """The step that is captured: the host reads nothing in it."""
        with torch.autocast(self.token.device.type, enabled=False):
            return decode_step(self.model, self.token, self.mask, self.position, self.cache)

    def capture(self) -> None:
        """Records `forward` in a graph. What it leaves in the cache, `start` overwrites."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up in the first calls
            for _ in range(3):
                self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()  # its own pool holds what a step makes: some megabytes
        # "thread_local": other threads, as NCCL's watchdog, may call CUDA meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.logits = self.forward()
        self.graph = graph

    def start(self, cache, mask: torch.Tensor, N: int) -> None:
        """Takes over the prompts' cache, each prompt N times (AABB), and their mask [B, P]."""
        self.column = mask.shape[1]  # the next token's
        for layer, prompts in zip(self.cache.layers, cache.layers, strict=True):
            for own, given in ((layer.keys, prompts.keys), (layer.values, prompts.values)):
                own.unflatten(0, (-1, N))[..., : self.column, :] = given[:, None]
            layer.cumulative_length.fill_(self.column)
        self.mask.zero_()
        self.mask[:, 0, 0, : self.column] = mask.bool().repeat_interleave(N, 0)

    def step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """As DynamicDecode's; the logits are good until the next step."""
        self.token.copy_(token[:, None])
        self.position.copy_(position[:, None])
        self.mask[..., self.column] = True
        self.column += 1
        if self.graph is None:
            return self.forward()
        self.graph.replay()
        return self.logits


static_decode = lru_cache(maxsize=2)(StaticDecode)


@torch.no_grad()
def rollout(
    model, prompts: dict, u: torch.Tensor, stops: list[int], temperature: float, decode="dynamic"
) -> Rollout:
    """Samples N completions per prompt; u [B, N, L] are their random numbers, L the most tokens.

    Sampling and scoring use the same distribution, softmax(logits / temperature): no top-k, no
    top-p, no penalty, whatever the checkpoint's generation_config says. `decode`, "dynamic" or
    "static", changes the time it takes alone; caches of other than keys and values are dynamic.
    """
    (B, N, L), device = u.shape, u.device
    stop = torch.tensor(stops, device=device)
    position = vlm.positions(model, prompts)  # [3, B, P]
    out, features = prefill(model, prompts, position)
    if decode == "static" and can_pack(model.config):
        # In steps of 64 columns, so that nearly all batches of prompts share one decode.
        length = 64 * math.ceil((position.shape[2] + L) / 64)
        decoder = static_decode(model, B * N, length)
        decoder.start(out.past_key_values, prompts["attention_mask"], N)
    else:
        decoder = DynamicDecode(model, out.past_key_values, prompts["attention_mask"], N)
    # A picture's text goes on after its longer side, which may lie beyond the last column.
    following = position.amax((0, 2)).repeat_interleave(N) + 1  # [B * N]
    logits = out.logits[:, -1].repeat_interleave(N, 0)  # [B * N, V]
    u, rows = u.flatten(0, 1), torch.arange(B * N, device=device)  # the rows in the batch, [R]
    tokens = torch.zeros(B * N, L, dtype=torch.long, device=device)
    for t in range(L):
        token = sample_tokens(logits.float() / temperature, u[rows, t])  # [R]
        tokens[rows, t] = token
        if t + 1 == L:
            break
        if t % CHECK_EVERY == CHECK_EVERY - 1:
            left = ~torch.isin(tokens[rows, : t + 1], stop).any(1)  # [R]
            count = int(left.sum())
            if count == 0:
                break
            if isinstance(decoder, DynamicDecode) and count <= len(rows) / 2:
                decoder.keep(left.nonzero().squeeze(1))
                rows, token = rows[left], token[left]
        logits = decoder.step(as_input(token, model.config), following[rows] + t)

    tokens = tokens.view(B, N, L)
    stopped = torch.isin(tokens, stop)
    mask = stopped.cumsum(2) - stopped.long() == 0  # True up to the first stop
    longest = int(mask.sum(2).max())
    tokens = (tokens * mask)[..., :longest]
    mask = mask[..., :longest]
    return Rollout(prompts, tokens, mask, stopped.any(2), features)


# ==== Scoring ====


def gather_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) at `tokens`, in fp32: [B, T, V], [B, T] -> [B, T].

    It works through chunks of columns, whose fp32 copies are made again in the backward pass: with
    152,000 words in the vocabulary they would be the largest tensors in memory.
    """
    from torch.utils.checkpoint import checkpoint

    def score(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = logits.float() / temperature
        return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)

    parts = []
    for chunk in zip(logits.split(128, 1), tokens.split(128, 1), strict=True):
        parts.append(checkpoint(score, *chunk, use_reentrant=False))
    return torch.cat(parts, 1)


def block_mask(prompt_mask: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Who attends to whom in a row [prompt | completion 1 | .. | completion N].

    Causal, and a completion sees the prompt and itself but no other completion. `prompt_mask`
    [B, P]; `block` [B, W] is the number of each later column's completion, from 1. bool
    [B, 1, T, T], T = P + W. With P = 2 and block = 1 1 2 2:

        p p . . . .        prompt
        p p a . . .        completion 1
        p p a a . .
        p p . . b .        completion 2
        p p . . b b
    """
    P = prompt_mask.shape[1]
    block = torch.nn.functional.pad(block, (P, 0))  # [B, T], 0 is the prompt
    seen = (block[:, :, None] == block[:, None]) | (block[:, None] == 0)
    seen = seen.tril()  # [B, T, T]
    seen[:, :, :P] &= prompt_mask.bool()[:, None]  # not the padding
    # A padding row must see something, or its softmax is NaN: it sees itself.
    seen |= torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
    return seen[:, None]


def can_pack(config) -> bool:
    """Whether every layer of the language model is attention that a mask governs wholly.

    Linear attention carries a state from one completion into the next, and a sliding window counts
    columns: a packed row would silently be wrong.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None)
    return kinds is None or set(kinds) == {"full_attention"}


def packed_logprobs(model, roll: Rollout, temperature: float) -> torch.Tensor:
    """The log-probs of the completions, [B, N, L], from one row per group: prompt and picture are
    computed once instead of N times.

    A row holds a group's sampled tokens alone, W of them in the longest row of the part. Beyond
    `roll.mask` the log-probs are 0.
    """
    (B, N, L), prompts = roll.tokens.shape, roll.prompts
    P, device = prompts["input_ids"].shape[1], roll.tokens.device
    # Token t of completion n of row b is in column P + w.
    b, n, t = roll.mask.nonzero(as_tuple=True)
    w = (roll.mask.flatten(1).cumsum(1) - 1)[roll.mask.flatten(1)]
    W = int(w.max()) + 1
    tokens = torch.zeros(B, W, dtype=torch.long, device=device)
    tokens[b, w] = roll.tokens[b, n, t]
    block = torch.full((B, W), N + 1, device=device)  # a shorter row's padding: a block of its own
    block[b, w] = n + 1
    position = vlm.positions(model, prompts)  # [3, B, P]
    following = torch.zeros(B, W, dtype=torch.long, device=device)
    # The positions of every completion go on from the prompt.
    following[b, w] = position.amax((0, 2))[b] + 1 + t
    # The prompt's last column predicts each completion's first token; column P + w - 1 token w.
    first = torch.full((N,), P - 1, device=device)
    columns = torch.cat([first, torch.arange(P, P + W - 1, device=device)])
    k = torch.where(t == 0, n, N - 1 + w)  # where in `columns`
    logits = model(
        input_ids=torch.cat([prompts["input_ids"], as_input(tokens, model.config)], 1),
        attention_mask=block_mask(prompts["attention_mask"], block),
        position_ids=torch.cat([position, following.expand(3, -1, -1)], 2),
        **roll.picture_inputs(),
        logits_to_keep=columns,
        use_cache=False,
    ).logits  # [B, N + W - 1, V]
    predicted = torch.zeros(logits.shape[:2], dtype=torch.long, device=device)
    predicted[b, k] = roll.tokens[b, n, t]
    logp = gather_logprobs(logits, predicted, temperature)
    return logp.new_zeros(B, N, L).index_put((b, n, t), logp[b, k])
