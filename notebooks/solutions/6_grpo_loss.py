import torch


def advantages(reward: torch.Tensor) -> torch.Tensor:
    """[B, N] -> [B, N]"""
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)


def clipped_loss(logp: torch.Tensor, old_logp: torch.Tensor, A: torch.Tensor, delta: float):
    """logp, old_logp [B, N, L] and A [B, N] -> the loss of each token, [B, N, L]"""
    rho, A = (logp - old_logp).exp(), A[..., None]
    return -torch.min(rho * A, rho.clamp(1 - delta, 1 + delta) * A)
