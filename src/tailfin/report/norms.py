"""Weight norms of a classifier from frequent to rare classes, and their trend (2DRCL, figure A.2): plain functions.

norms = class_norms(weight, columns)          # of the final layer's rows, no bias, no background
solid = trend(norms[by_frequency])
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

DEGREE = 5  # of the polynomial; the paper does not say


def class_norms(weight: ArrayLike, columns: ArrayLike) -> NDArray[np.float64]:
    """L2 norm of each class's row, as stored.

    Args:
        weight: float [L, D], a row per logit.
        columns: int [C], the rows of the foreground classes.
    """
    rows = np.asarray(weight, dtype=np.float64)[np.asarray(columns, dtype=np.int64)]
    return np.asarray(np.linalg.norm(rows, axis=1))


def trend(values: ArrayLike, degree: int = DEGREE) -> NDArray[np.float64]:
    """Least-squares polynomial through values [C] in the order of the classes, at their places scaled to 0..1."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return values.copy()
    x = np.linspace(0, 1, len(values))
    fitted = np.polynomial.Polynomial.fit(x, values, min(degree, len(values) - 1), domain=[0, 1])
    return np.asarray(fitted(x))


def balance(norms: ArrayLike) -> float:
    """Largest over smallest norm; infinite where one is 0."""
    norms = np.asarray(norms, dtype=np.float64)
    low = float(norms.min())
    return float(norms.max()) / low if low else float("inf")
