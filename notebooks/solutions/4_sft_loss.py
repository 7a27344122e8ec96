import torch


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, total: int) -> torch.Tensor:
    """logits [B, T, V], labels [B, T] -> this micro-batch's share of the loss, a scalar."""
    following = labels[:, 1:]  # [B, T - 1]: column t predicts token t + 1
    counts = following >= 0
    logp = logits[:, :-1].log_softmax(-1)  # [B, T - 1, V]
    logp = logp.gather(-1, following.clamp(min=0)[..., None]).squeeze(-1)  # [B, T - 1]
    return -(logp * counts).sum() / total
