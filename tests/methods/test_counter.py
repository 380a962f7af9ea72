"""The counter-based generator: known values, any portion in any order, no other generator touched."""

from __future__ import annotations

import pytest
import torch

from petiole.methods.lowrank.counter import Basis, Combine, bits, uniform


def test_known_values() -> None:
    """First outputs of SplitMix64 as its authors' C code gives them."""
    assert [hex(z % (1 << 64)) for z in bits(0, 0, 3).tolist()] == [
        "0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f",
    ]  # fmt: skip
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [z % (1 << 64) for z in bits(1234567, 0, 5).tolist()] == wanted


def test_numbers_are_the_bits() -> None:
    (z,) = bits(7, 0, 1).tolist()
    low, high = uniform(7, 0, 1, 2)[0].tolist()
    assert low == ((z % (1 << 64)) & 0xFFFFFF) / 2**23 - 1
    assert high == ((z % (1 << 64)) >> 40) / 2**23 - 1


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_any_portion_in_any_order(n: int) -> None:
    whole = uniform(3, 0, 6, n)
    assert whole.shape == (6, n)
    for first, count in ((5, 1), (0, 2), (2, 3), (4, 2)):
        assert torch.equal(uniform(3, first, count, n), whole[first : first + count])


def test_uniform_and_uncorrelated() -> None:
    u = uniform(11, 0, 40, 5001)
    assert u.min() >= -1 and u.max() < 1
    assert abs(float(u.mean())) < 4 * 3**-0.5 / u.numel() ** 0.5
    assert abs(float(u.var()) - 1 / 3) < 5e-3
    others = torch.corrcoef(torch.cat([u, uniform(12, 0, 40, 5001)])) - torch.eye(80)
    assert float(others.abs().max()) < 6 / 5001**0.5
    counts = torch.histc(u, 20, -1, 1) / u.numel()
    assert float((counts - 0.05).abs().max()) < 2e-3


def test_no_generator_moves() -> None:
    before = torch.get_rng_state()
    uniform(1, 0, 3, 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_a_mixture_and_its_gradient(chunk: int, keep: bool) -> None:
    basis = Basis(5, 8, (3, 5))
    c = torch.randn(8, requires_grad=True)
    g = torch.randn(3, 5)
    explicit = torch.einsum("m,mrd->rd", c, basis.whole().view(8, 3, 5))
    found = Combine.apply(c, basis, chunk, keep, None)
    torch.testing.assert_close(found, explicit, rtol=1e-5, atol=1e-6)
    mine, autograd = (torch.autograd.grad((value * g).sum(), c)[0] for value in (found, explicit))
    torch.testing.assert_close(mine, autograd, rtol=1e-5, atol=1e-6)
