"""Mask and weights together by ADMM: Boza's short form (arXiv 2401.02938) and ALPS (arXiv 2406.07831).

Minimize tr((W - X) H (W - X)^T) over X = Z, Z with the pattern. In coordinates where H has a unit diagonal the projection onto
the pattern keeps the largest |X|, which is Wanda's score |w| sqrt(H_jj).
    X = (W H + rho (Z - U)) (H + rho I)^-1,  Z = project(X + U),  U = U + X - Z
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsegpt.factor import damped
from sparsegpt.pattern import Pattern, alone
from sparsegpt.scores import choose


def admm(
    W: Tensor,
    H: Tensor,
    pattern: Pattern,
    *,
    start: Tensor | None = None,
    damp: float = 0.01,
    rho: float = 0.1,
    doublings: int = 6,
    iterations: int = 5,
    parts: list[int] | None = None,
    **rows: Callable,
) -> tuple[Tensor, Tensor]:
    """Short ADMM with a doubling penalty: `iterations` at each of `doublings` values of rho (H with a unit diagonal).

    W float [R, C], H float [C, C] = sum x x^T (any multiple). start: [R, C], the first Z, by default W projected. parts: rows of
    each of the weights stacked in W; each has its own threshold, or each row with scope "row". rows: `lowest` and `total` as for `solve`.
    Returns (weight float32 [R, C], mask bool [R, C]); refine the weight, ADMM leaves it short of the optimum on its mask.
    Costs `doublings` inversions of H and one product [R, C] x [C, C] an iteration.
    Raises what `choose` raises, and torch.linalg.LinAlgError for an H that damping leaves indefinite.
    """
    problem = _scaled(W, H, pattern, damp, parts, rows)
    Z, mask = problem.project(problem.W if start is None else start.float() * problem.scale)
    U = torch.zeros_like(Z)
    eye = torch.eye(W.shape[1], device=W.device)
    for _ in range(doublings):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.H + rho * eye))
        for _ in range(iterations):
            Z, U, mask = problem.step(Z, U, rho, partial(torch.matmul, other=inverse))
        # rho U is the multiplier, which stays as rho grows.
        rho, U = 2 * rho, U / 2
    return Z / problem.scale + 0.0, mask  # + 0.0 turns -0.0 into 0.0


def alps(
    W: Tensor,
    H: Tensor,
    pattern: Pattern,
    *,
    damp: float = 0.01,
    rho: float = 0.03,
    rounds: int = 100,
    parts: list[int] | None = None,
    total: Callable = alone,
    **rows: Callable,
) -> tuple[Tensor, Tensor]:
    """ALPS (arXiv 2406.07831, Alg. 1): rho grows every third step by how much the support still moves, until it stands.

    Arguments and result as for `admm`. rounds bounds the growth steps; the support usually stands long before. Costs one
    eigendecomposition of H, then two products an iteration whatever rho is. Raises what `choose` raises.
    """
    problem = _scaled(W, H, pattern, damp, parts, rows | {"total": total})
    Z, mask = problem.project(problem.W)
    U = torch.zeros_like(Z)
    eigenvalues, Q = torch.linalg.eigh(problem.H)
    target = int(total(mask.sum()))
    for _ in range(rounds):
        before = mask
        for _ in range(3):
            Z, U, mask = problem.step(Z, U, rho, partial(_solve_shifted, Q, eigenvalues + rho))
        moved = int(total((before ^ mask).sum()))
        if moved == 0:
            break
        growth = 1.3 if moved >= 0.1 * target else 1.2 if moved >= 0.005 * target else 1.1
        rho, U = rho * growth, U / growth
    return Z / problem.scale + 0.0, mask  # + 0.0 turns -0.0 into 0.0


@dataclass(frozen=True)
class _Scaled:
    """The layer problem in coordinates where H has a unit diagonal: W scale, H / (scale scale^T)."""

    W: Tensor
    H: Tensor
    target: Tensor
    scale: Tensor
    project: Callable[[Tensor], tuple[Tensor, Tensor]]

    def step(
        self, Z: Tensor, U: Tensor, rho: float, solve: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next Z and U, and the mask of Z."""
        U = U + solve(self.target + rho * (Z - U))  # X + U
        Z, mask = self.project(U)
        return Z, U.sub_(Z), mask


def _solve_shifted(Q: Tensor, eigenvalues: Tensor, A: Tensor) -> Tensor:
    """A (Q diag(eigenvalues) Q^T)^-1 for A [R, C], Q [C, C], eigenvalues [C]."""
    return ((A @ Q) / eigenvalues) @ Q.t()


def _scaled(W: Tensor, H: Tensor, pattern: Pattern, damp: float, parts: list[int] | None, rows) -> _Scaled:
    dead = H.diagonal() == 0
    damped_H = damped(H.float(), damp)
    scale = damped_H.diagonal().sqrt()
    fixed = (W == 0) | dead if pattern.preserve else dead.expand_as(W)

    def project(X: Tensor) -> tuple[Tensor, Tensor]:
        X = X.masked_fill(fixed, 0)
        mask = choose(X, None, pattern, method="magnitude", parts=parts, dead=dead, **rows)
        return X * mask, mask

    scaled_H = damped_H.div_(scale[:, None]).div_(scale)
    scaled_W = W.float() * scale
    return _Scaled(scaled_W, scaled_H, scaled_W @ scaled_H, scale, project)
