"""Better values for the weights that a mask keeps, by conjugate gradients."""

import torch
from torch import Tensor

from sparsegpt.factor import damped


def refine(W: Tensor, weight: Tensor, mask: Tensor, H: Tensor, *, steps: int, damp: float = 0.01) -> Tensor:
    """Lower tr(D H D^T), D = W - weight, over the kept weights only (ALPS, arXiv 2406.07831, Alg. 2).

    W, weight float [R, C], mask bool [R, C] True for kept, H float [C, C] = sum x x^T (any multiple). H gets damp * mean(H_ii) on
    its diagonal as in `factor`. Each row is a least-squares problem of its own, so step lengths are per row; the preconditioner
    is 1 / H_jj. One product [R, C] x [C, C] a step, and the error never grows beyond rounding. Returns float32 [R, C].
    Raises ValueError for shapes that differ.
    """
    if not W.shape == weight.shape == mask.shape or H.shape != (W.shape[1], W.shape[1]):
        shapes = ", ".join(str(list(t.shape)) for t in (W, weight, mask, H))
        raise ValueError(f"W, weight, mask [R, C] and H [C, C] must fit, got {shapes}")
    H = damped(H.float(), damp)
    inverse = 1 / H.diagonal()
    x = weight.float() * mask
    r = ((W.float() - x) @ H).mul_(mask)  # minus half the gradient, [R, C]
    z = r * inverse
    p = z.clone()
    rz = (r * z).sum(1, keepdim=True)  # [R, 1]
    # Below its rounding a residual is noise, and steps along it grow without bound: such a row has converged.
    floor = rz * torch.finfo(rz.dtype).eps ** 2
    for _ in range(steps):
        q = (p @ H).mul_(mask)
        curvature = (p * q).sum(1, keepdim=True)
        alpha = torch.where((rz > floor) & (curvature > 0), rz / curvature, 0)
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, q, value=-1)
        torch.mul(r, inverse, out=z)
        previous, rz = rz, (r * z).sum(1, keepdim=True)
        p.mul_(torch.where(rz > floor, rz / previous, 0)).add_(z)
    return x.mul_(mask).add_(0.0)  # + 0.0 turns -0.0 into 0.0
