import torch


def block_mask(prompt_mask: torch.Tensor, N: int, L: int) -> torch.Tensor:
    """Who attends to whom: bool [B, 1, T, T], T = P + N * L."""
    P = prompt_mask.shape[1]
    block = torch.tensor([0] * P + [n for n in range(1, N + 1) for _ in range(L)])  # [T]
    seen = (block[:, None] == block) | (block == 0)  # [T, T]: one's own block, or the prompt
    completions = torch.ones(len(prompt_mask), N * L, dtype=torch.bool)
    allowed = torch.cat([prompt_mask.bool(), completions], 1)  # [B, T]
    seen = seen.tril() & allowed[:, None]  # [B, T, T]
    return (seen | torch.eye(P + N * L, dtype=torch.bool))[:, None]
