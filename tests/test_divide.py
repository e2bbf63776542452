"""Why the quotient of plugins/include/fp8/divide.cuh has the e4m3 code of IEEE's: its operations in numpy."""

from __future__ import annotations

import numpy as np
import pytest

F32, F64 = np.float32, np.float64
Array = np.ndarray


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once: the product is exact in float64; the sum is rounded there to odd, so that the
    rounding to float32 is the only one."""
    product, c = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = product + c
    virtual = total - product
    rest = (product - (total - virtual)) + (c - virtual)  # Knuth's two-sum: total + rest is exact
    bits = total.view(np.int64)
    toward_zero = np.where((rest != 0) & ((rest < 0) == (total > 0)), bits - 1, bits)
    odd = np.where(rest != 0, toward_zero | 1, bits)
    return odd.view(F64).astype(F32)


def quotient(x: Array, scale: Array) -> Array:
    """As the kernels compute it, of quotients in e4m3's range."""
    reciprocal = F32(1) / scale
    q = x * reciprocal
    return fma(-fma(q, scale, -x), reciprocal, q)


def boundaries() -> Array:
    """The significands halfway between two neighbouring e4m3 values: with three bits of fraction, or with fewer."""
    normal = [1 + (2 * k + 1) / 16 for k in range(8)]
    subnormal = [k / 2 ** (k.bit_length() - 1) for k in range(1, 16, 2)]
    return np.unique(np.array(normal + subnormal, dtype=F32))


def scales() -> Array:
    """Significands: every 509th, and neighbours of multiples of 1/64, where quotients come nearest to boundaries."""
    near = np.arange(64)[:, None] * 2**17 + np.arange(-16, 17)
    bits = np.unique(np.concatenate([np.arange(0, 2**23, 509), near.clip(0, 2**23 - 1).ravel()]))
    return (bits + 0x3F800000).astype(np.int32).view(F32)


@pytest.mark.parametrize("boundary", boundaries(), ids=str)
def test_quotients_at_the_boundaries_of_e4m3_are_ieee_s(boundary: np.float32) -> None:
    """The quotients of all 2^23 significands were compared like this on a GPU; powers of two change nothing."""
    scale = scales()[:, None]
    x = ((scale * boundary).view(np.int32) + np.arange(-4, 5, dtype=np.int32)).view(F32)
    assert np.array_equal(quotient(x, scale), x / scale)
    assert (x / scale < boundary).any() and (x / scale > boundary).any()


def test_the_quotient_of_a_negative_zero_is_one() -> None:
    """Whose code is 0x80, as ONNX's QuantizeLinear has it."""
    zeros = np.array([0.0, -0.0], F32)
    assert np.array_equal(np.signbit(quotient(zeros, np.full(2, 3, F32))), [False, True])


def test_a_product_with_the_reciprocal_alone_has_other_codes() -> None:
    """What the correction is for."""
    scale = scales()[:, None]
    x = scale * boundaries()
    wrong = np.sign(x * (F32(1) / scale) - boundaries()) != np.sign(x / scale - boundaries())
    assert 0.05 < wrong.mean() < 0.5


def test_the_emulated_fma_rounds_once() -> None:
    a, b = np.array([1 + 2**-12], F32), np.array([1 + 2**-12], F32)
    tiny = np.array([-(2.0**-80)], F32)  # the square alone is halfway between two float32
    assert fma(a, b, np.zeros(1, F32))[0] == 1 + 2**-11
    assert fma(a, b, tiny)[0] == 1 + 2**-11 and fma(a, b, -tiny)[0] == F32(1 + 2**-11 + 2**-23)
