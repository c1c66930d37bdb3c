"""What a weight should become whose input is no longer the one it was trained on."""

import torch
from torch import Tensor

from sparsegpt.factor import Factor


def asymmetric_target(W: Tensor, drift: Tensor, factor: Factor, *, strength: float) -> Tensor:
    """The weight that makes, of the inputs xhat there are, what W makes of the inputs x there should be: float32 [R, C].

    W' = W + a W E (H + lambda I)^-1, E = sum (x - xhat) xhat^T. At a = 1 and lambda = 0 this is the least-squares solution of
    ||W x - W' xhat||^2, the asymmetric calibration of GPTAQ (arXiv 2504.02692) in closed form; with few tokens the whole step fits
    their noise, so strength a in 0..1 goes part of the way.
    W: float [R, C]. drift: E, float [C, C], in the same multiple as H. factor: that of H = sum xhat xhat^T.
    Raises ValueError for shapes that do not fit or a strength outside 0..1.
    """
    C = factor.order.numel()
    if W.ndim != 2 or W.shape[1] != C or drift.shape != (C, C):
        raise ValueError(f"W [R, C] and drift [C, C] must fit C = {C}, got {list(W.shape)} and {list(drift.shape)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in 0..1, got {strength}")
    W = W.float()
    Y = (W @ drift.float())[:, factor.order]  # [R, C], columns by step
    # (V V^T)^-1 from the right: first V^-T, then V^-1.
    Y = torch.linalg.solve_triangular(factor.V.t(), Y, upper=False, left=False)
    Y = torch.linalg.solve_triangular(factor.V, Y, upper=True, left=False)
    return W.index_add(1, factor.order, Y, alpha=strength)
