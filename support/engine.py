"""How GRPO's sampling and scoring are made fast, each exactly equal to its plain definition.

Sampling prefills each prompt and its picture once and expands the cache to the N samples. Scoring
packs a prompt and its N completions into one row under a block mask: `packed_logprobs` gives what
`plain_logprobs` in 04_grpo.py defines. A frozen vision tower runs once per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from support import vlm


@dataclass
class Rollout:
    """B prompts with N completions each.

    `mask` comes from the sampler: EOS counts, what follows it does not. It is never derived from
    pad ids, which may equal EOS. `features` are what a frozen vision tower made of each picture,
    [image tokens, hidden], kept from the prefill: every later pass of the step would compute the
    same. They are None where the tower is trained and each pass must run it.
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
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features = [picture for picture in self.features for _ in range(times)]
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


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

    A hook reads the features off, since under FSDP2 only the root's forward may be called.
    """
    tower, features = model.model.visual, []

    def keep(module, inputs, output):
        features.append(output.pooler_output)  # [image tokens of all pictures, hidden]

    hook = tower.register_forward_hook(keep)
    out = model(**prompts, position_ids=position, use_cache=True, logits_to_keep=1)
    hook.remove()
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return out, None
    merge = model.config.vision_config.spatial_merge_size
    counts = prompts["image_grid_thw"].prod(1) // merge**2  # [B] image tokens
    return out, list(features[0].split(counts.tolist()))


@torch.no_grad()
def rollout(model, prompts: dict, u: torch.Tensor, stops: list[int], temperature: float) -> Rollout:
    """Samples N completions per prompt; u [B, N, L] are their random numbers, L the most tokens.

    Sampling and scoring use the same distribution, softmax(logits / temperature): no top-k, no
    top-p, no penalty, whatever the checkpoint's generation_config says.
    """
    B, N, L = u.shape
    stop = torch.tensor(stops, device=u.device)
    position = vlm.positions(model, prompts)  # [3, B, P]
    out, features = prefill(model, prompts, position)
    cache = out.past_key_values
    cache.batch_repeat_interleave(N)  # AABB: row b * N + n is sample n of prompt b
    logits = out.logits[:, -1].repeat_interleave(N, 0)  # [B * N, V]
    mask = prompts["attention_mask"].repeat_interleave(N, 0)  # [B * N, P]
    # A picture's text goes on after its longer side, which may lie beyond the last column.
    following = position.amax((0, 2)).repeat_interleave(N) + 1  # [B * N]
    done = torch.zeros(B * N, dtype=torch.bool, device=u.device)
    tokens, alive = [], []
    for t in range(L):
        token = sample_tokens(logits.float() / temperature, u[:, :, t].flatten())  # [B * N]
        tokens.append(token)
        alive.append(~done)
        done = done | torch.isin(token, stop)
        if done.all() or t + 1 == L:
            break
        mask = torch.cat([mask, mask.new_ones(B * N, 1)], 1)
        out = model(
            input_ids=as_input(token, model.config)[:, None],
            attention_mask=mask,
            position_ids=(following + t).expand(3, -1)[..., None],  # [3, B * N, 1]
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1]
    tokens = torch.stack(tokens, 1).view(B, N, -1)
    alive = torch.stack(alive, 1).view(B, N, -1)
    return Rollout(prompts, tokens, alive, done.view(B, N), features)


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


def block_mask(prompt_mask: torch.Tensor, N: int, L: int) -> torch.Tensor:
    """Who attends to whom in a row [prompt | completion 1 | .. | completion N].

    Causal, and a completion sees the prompt and itself but no other completion. bool [B, 1, T, T],
    T = P + N * L. With P = 2, N = 2, L = 2:

        p p . . . .        prompt
        p p a . . .        completion 1
        p p a a . .
        p p . . b .        completion 2
        p p . . b b
    """
    B, P = prompt_mask.shape
    completion = torch.arange(1, N + 1).repeat_interleave(L)
    block = torch.cat([torch.zeros(P), completion]).to(prompt_mask.device)  # [T], 0 is the prompt
    seen = (block[:, None] == block[None]) | (block[None] == 0)  # its own block or the prompt
    seen = seen.tril()[None].repeat(B, 1, 1)  # [B, T, T]
    seen[:, :, :P] &= prompt_mask.bool()[:, None]  # not the padding
    # A padding row must see something, or its softmax is NaN: it sees itself.
    seen |= torch.eye(P + N * L, dtype=torch.bool, device=seen.device)
    return seen[:, None]


def packed_logprobs(model, roll: Rollout, temperature: float) -> torch.Tensor:
    """The log-probs of the completions, [B, N, L], from one row per group: prompt and picture are
    computed once instead of N times."""
    B, N, L = roll.tokens.shape
    prompts, P = roll.prompts, roll.prompts["input_ids"].shape[1]
    position = vlm.positions(model, prompts)  # [3, B, P]
    # The positions of every completion go on from the prompt.
    offsets = torch.arange(1, L + 1, device=position.device).repeat(N)  # [N * L]
    following = (position.amax((0, 2))[:, None] + offsets).expand(3, -1, -1)
    tokens = roll.tokens.flatten(1)  # [B, N * L]
    # The prompt's last column predicts a completion's first token, its token j - 1 its token j.
    columns = P - 1 + torch.arange(N * L, device=tokens.device)
    columns[::L] = P - 1
    logits = model(
        input_ids=torch.cat([prompts["input_ids"], as_input(tokens, model.config)], 1),
        attention_mask=block_mask(prompts["attention_mask"], N, L),
        position_ids=torch.cat([position, following], 2),
        **roll.picture_inputs(),
        logits_to_keep=columns,
        use_cache=False,
    ).logits  # [B, N * L, V]
    return gather_logprobs(logits, tokens, temperature).view(B, N, L)
