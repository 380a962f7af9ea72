"""Products with a sum of Kronecker products, without forming the sum: what `compacter` and `polyhistor` build their adapters from.

    H = Σ_i A_i ⊗ B_i        A_i (a, c), B_i (b, d), i < n, so H (a b, c d)
    y = x H                  x read as a matrix X (a, b), y as (c, d):  Y = Σ_i A_iᵀ X B_i

A is the outer one: H is made of blocks A_i[u, p] · B_i. Either may come as two factors, M_i = S_i T_i with S_i (in, k) and T_i (k, out).
For W = Σ_j K_j ⊗ T_j that stands in front of a column, y = W x, give K_jᵀ and T_jᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petiole.method import wide

Matrices = Tensor | tuple[Tensor, Tensor]  # M_i stacked, (n, in, out); or their factors, (n, in, k) and (n, k, out)


def product(x: Tensor, A: Matrices, B: Matrices) -> Tensor:
    """x (..., a b) -> x Σ_i A_i ⊗ B_i (..., c d), in whichever order takes the fewest multiplications.

    Where one of the two has factors, the other acts between them, where the state is narrow.
    """
    X = x.unflatten(-1, (sizes(A)[0], sizes(B)[0]))
    if isinstance(A, tuple) and isinstance(B, Tensor):
        # Σ A_i ⊗ B_i of X is Σ B_i ⊗ A_i of its transpose, transposed.
        return _product(X.mT, B, A).mT.flatten(-2)
    return _product(X, whole(A), B).flatten(-2)


def _product(X: Tensor, A: Tensor, B: Matrices) -> Tensor:
    """X (..., a, b) -> Σ_i A_iᵀ X B_i (..., c, d)"""
    if isinstance(B, tuple):
        S, T = B
        low = torch.einsum("...ab,nbk->...ank", X, S)
        return torch.einsum("...cnk,nkd->...cd", torch.einsum("...ank,nac->...cnk", low, A), T)
    (a, c), (b, d) = sizes(A), sizes(B)
    if a * d * (b + c) <= c * b * (a + d):
        return torch.einsum("...and,nac->...cd", torch.einsum("...ab,nbd->...and", X, B), A)
    return torch.einsum("...cnb,nbd->...cd", torch.einsum("...ab,nac->...cnb", X, A), B)


def dense(A: Matrices, B: Matrices) -> Tensor:
    """H (a b, c d), added up in float32 at least."""
    return torch.einsum("nac,nbd->abcd", wide(whole(A)), wide(whole(B))).flatten(2).flatten(0, 1)


def whole(M: Matrices) -> Tensor:
    """M_i (n, in, out), multiplied out if they are factors."""
    return M if isinstance(M, Tensor) else M[0] @ M[1]


def sizes(M: Matrices) -> tuple[int, int]:
    """in and out of each M_i."""
    return (M.shape[1], M.shape[2]) if isinstance(M, Tensor) else (M[0].shape[1], M[1].shape[2])
