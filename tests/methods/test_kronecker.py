"""Products with sums of Kronecker products, against the sums formed."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch import Tensor

from petiole.methods.adapters import kronecker
from petiole.methods.adapters.kronecker import Matrices

SIZES = ((2, 2, 2, 8, 3), (2, 2, 2, 3, 8), (4, 4, 4, 3, 5), (3, 5, 2, 4, 7), (3, 5, 7, 1, 1), (1, 1, 1, 4, 3))


def matrices(n: int, size_in: int, size_out: int, factored: bool, generator: torch.Generator) -> Matrices:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return (draw(n, size_in, 2), draw(n, 2, size_out)) if factored else draw(n, size_in, size_out)


def leaves(M: Matrices) -> list[Tensor]:
    return [M] if isinstance(M, Tensor) else list(M)


@pytest.mark.parametrize("factored", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("size", SIZES)
def test_the_product_is_that_with_the_sum(size: tuple[int, ...], factored: tuple[bool, bool]) -> None:
    n, a, c, b, d = size
    generator = torch.Generator().manual_seed(0)
    A, B = matrices(n, a, c, factored[0], generator), matrices(n, b, d, factored[1], generator)
    x = torch.randn(2, 5, a * b, generator=generator, dtype=torch.float64).requires_grad_()
    terms = [torch.kron(outer, inner) for outer, inner in zip(kronecker.whole(A), kronecker.whole(B), strict=True)]
    H = reduce(torch.add, terms)
    torch.testing.assert_close(kronecker.dense(A, B), H)
    y = kronecker.product(x, A, B)
    torch.testing.assert_close(y, x @ H)
    inputs = [x, *leaves(A), *leaves(B)]
    mine = torch.autograd.grad(y.square().sum(), inputs)
    theirs = torch.autograd.grad((x @ H).square().sum(), inputs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_sums_in_half_precision_are_added_up_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(8, 8, 8, generator=generator).bfloat16() for _ in "AB")
    H = kronecker.dense(A, B)
    assert H.dtype == torch.float32
    assert torch.equal(H, kronecker.dense(A.float(), B.float()))
