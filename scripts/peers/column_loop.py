"""SparseGPT (arXiv 2301.00774, Alg. 1) as its formulas read: three factorizations, then one column of W at a time.

What the layer solver is timed against. Written from the formulas; in plain torch, every operation over all rows at once.
"""

import torch
from torch import Tensor


def prune_by_columns(
    W: Tensor,
    H: Tensor,
    *,
    sparsity: float | None = None,
    keep: tuple[int, int] | None = None,
    block: int = 128,
    damp: float = 0.01,
) -> Tensor:
    """Prune W float32 [R, C] on H = sum x x^T float32 [C, C]; returns the compensated weight float32 [R, C].

    sparsity: share of zeros over all rows of each `block` columns, chosen before the block's first column; as the
    formulas read, the weight at the threshold goes too, one more than the share asks for. keep: (n, m), the n of every m
    columns that stay, chosen when the first of them is reached; C and `block` must be multiples of m. H must have no zero
    on its diagonal.
    """
    W = W.clone()
    U = inverse_factor(H, damp)
    C = W.shape[1]
    for start in range(0, C, block):
        stop = min(start + block, C)
        W1, U1 = W[:, start:stop].clone(), U[start:stop, start:stop]  # [R, b], [b, b]
        kept, errors = torch.zeros_like(W1), torch.zeros_like(W1)
        if sparsity is not None:
            score = W1.square() / U1.diagonal().square()  # [R, b]
            pruned = score <= score.flatten().sort().values[int(score.numel() * sparsity)]
        else:
            pruned = torch.zeros_like(W1, dtype=torch.bool)
        for i in range(stop - start):
            if keep is not None and i % keep[1] == 0:
                n, m = keep
                score = W1[:, i : i + m].square() / U1.diagonal()[i : i + m].square()  # [R, m]
                pruned.scatter_(1, i + score.topk(m - n, dim=1, largest=False).indices, True)
            w = W1[:, i]
            kept[:, i] = w.masked_fill(pruned[:, i], 0)
            error = (w - kept[:, i]) / U1[i, i]
            W1[:, i:] -= error[:, None] * U1[i, i:]  # [R, 1] x [b - i] -> [R, b - i]
            errors[:, i] = error
        W[:, start:stop] = kept
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W


def inverse_factor(H: Tensor, damp: float) -> Tensor:
    """U upper triangular with (H + lambda I)^-1 = U^T U, lambda = damp * mean(H_ii). [C, C] -> [C, C]."""
    damped = H.clone()
    damped.diagonal().add_(damp * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
