"""The mathematics of low-rank contributions: norms and inner products of B·A without forming it, integer coefficients.

What always holds:
- a contribution is judged by its product alone: B -> B R, A -> R^-1 A changes no result but by rounding;
- cost is O((d_out + d_in) r^2) a tensor, never O(d_out d_in);
- coefficients are integers over 2**denominator_log2; unclipped they sum to exactly that, clipped to less.

Norms and inner products are float64 and only steer decisions; the integers that come out stand in the manifest, so
nobody has to repeat a float to replay a version. No I/O, no time, no randomness.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from rankup.errors import InputError
from rankup.fixedpoint import Factors, dequantise


def product_norm(factors: Factors) -> float:
    """Frobenius norm of B A for B (d_out, r) and A (r, d_in).

    With thin QR factorisations B = Q_b R_b and A' = Q_a R_a, |B A| = |Q_b R_b R_a' Q_a'| = |R_b R_a'|, a matrix of at
    most r x r (Golub & Van Loan, Matrix Computations, 5.2: orthogonal factors keep the norm). Against
    sqrt(tr((B'B)(AA'))) it keeps full precision when the columns of B cancel each other in the product.
    """
    b, a = dequantise(factors)  # (d_out, r), (r, d_in) float64
    r_b = np.asarray(np.linalg.qr(b, mode="r"))  # (min(d_out, r), r)
    r_a = np.asarray(np.linalg.qr(a.T, mode="r"))  # (min(d_in, r), r)
    return float(np.linalg.norm(r_b @ r_a.T))


def inner_product(left: Factors, right: Factors) -> float:
    """<B1 A1, B2 A2> = tr((B1 A1)' B2 A2) = tr((B1' B2)(A2 A1')), the sum over an r1 x r2 matrix.

    The trace is cyclic, so both brackets are small: B1' B2 is (r1, r2), A2 A1' is (r2, r1). Raises InputError when the
    two products have different shapes.
    """
    b1, a1 = dequantise(left)
    b2, a2 = dequantise(right)
    if b1.shape[0] != b2.shape[0] or a1.shape[1] != a2.shape[1]:
        raise InputError(
            f"products of {b1.shape[0]}x{a1.shape[1]} and {b2.shape[0]}x{a2.shape[1]} have no inner product"
        )
    return float(np.sum((b1.T @ b2) * (a1 @ a2.T)))


def gram(products: Sequence[Factors]) -> NDArray[np.float64]:
    """Gram matrix (n, n) float64 of n products of one shape: G[i, j] = <B_i A_i, B_j A_j>; symmetric.

    All pairwise distances follow from it, |X - Y|^2 = G_xx + G_yy - 2 G_xy, which is what Krum (arXiv:1703.02757) and
    its kin ask for.
    """
    count = len(products)
    result = np.zeros((count, count))
    for i in range(count):
        for j in range(i, count):
            result[i, j] = result[j, i] = inner_product(products[i], products[j])
    return result


def coefficients(
    norms: Sequence[float], tokens: Sequence[int], clip_norm_ratio: float, denominator_log2: int
) -> list[int]:
    """Integer weights over 2**denominator_log2, one for each contribution.

    The weight is the share of the tokens (FedAvg, arXiv:1602.05629), made an integer by the largest-remainder method,
    so that the weights sum to exactly 2**denominator_log2. A contribution whose norm exceeds `clip_norm_ratio` times
    the median is then scaled down to that norm (rounded down; the sum gets smaller, the others are not scaled up to
    fill it). All steps are exact rational arithmetic, so the answer is the same on every machine; equal remainders go
    to more tokens first, then to the smaller norm, then to the earlier place. Multiplying all tokens by one integer,
    or all norms by one power of two, changes nothing.

    Raises InputError when a norm is not finite and positive, a token count is below 1, lengths differ or there are
    none.
    """
    if not norms or len(norms) != len(tokens):
        raise InputError(
            f"coefficients need one norm and one token count each: {len(norms)} norms, {len(tokens)} counts"
        )
    if not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise InputError("every norm must be finite and above zero")
    if min(tokens) < 1:
        raise InputError("every contribution needs at least one token")
    total = sum(tokens)
    shares = [divmod(count << denominator_log2, total) for count in tokens]  # exact quotient and remainder
    weights = [quotient for quotient, _ in shares]
    by_remainder = sorted(range(len(tokens)), key=lambda i: (-shares[i][1], -tokens[i], norms[i], i))
    for i in by_remainder[: (1 << denominator_log2) - sum(weights)]:
        weights[i] += 1
    limit = Fraction(clip_norm_ratio) * Fraction(statistics.median(norms))
    return [
        weight if norm <= limit else math.floor(weight * limit / Fraction(norm))
        for weight, norm in zip(weights, norms, strict=True)
    ]
