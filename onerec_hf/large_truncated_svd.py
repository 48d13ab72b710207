"""Truncated SVD of a sparse matrix of millions of rows: randomised subspace iteration that holds two dense matrices.

Halko, Martinsson and Tropp, Finding Structure with Randomness, SIAM Review 53 (2011), algorithm 4.4. The bases are
made orthonormal in place, in blocks of rows, by the eigenvectors of their Gram matrix.
"""

import numpy as np
from scipy import sparse

ROWS_AT_ONCE = 2**16
OVERSAMPLES = 10
ITERATIONS = 4
# Directions whose share of the largest one's length is below this are rounding errors in single precision.
SMALLEST_SHARE = 1e-6


def large_truncated_svd(matrix: sparse.csr_matrix, dim: int, power: float, seed: int) -> np.ndarray:
    """U S^power of about the `dim` largest singular values of a matrix (N, M), float32 (N, dim), largest first.

    Memory beside the matrix and its float32 copy: (N + M) (dim + 10) float32.
    """
    values = matrix.data.astype(np.float32)
    matrix = sparse.csr_matrix((values, matrix.indices, matrix.indptr), shape=matrix.shape)
    width = min(dim + OVERSAMPLES, *matrix.shape)
    basis = np.random.default_rng(seed).standard_normal((matrix.shape[1], width), dtype=np.float32)
    for _ in range(ITERATIONS):
        image = matrix @ basis
        del basis
        _orthonormalise(image)
        basis = matrix.T @ image
        del image
        _orthonormalise(basis)
    image = matrix @ basis
    del basis
    directions, lengths = _principal_directions(image)
    scale = np.where(lengths > 0, np.maximum(lengths, 1e-30) ** (power - 1), 0.0)
    return _times(image, directions * scale)[:, :dim]


def _principal_directions(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right singular vectors (p, p) of x (N, p) and its singular values (p,), largest first; rounding errors are 0."""
    gram = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = x[start : start + ROWS_AT_ONCE].astype(np.float64)
        gram += rows.T @ rows
    squares, directions = np.linalg.eigh(gram)
    lengths = np.sqrt(np.maximum(squares[::-1], 0.0))
    return directions[:, ::-1], np.where(lengths > SMALLEST_SHARE * lengths[0], lengths, 0.0)


def _orthonormalise(x: np.ndarray) -> None:
    directions, lengths = _principal_directions(x)
    _times(x, directions * np.where(lengths > 0, 1 / np.maximum(lengths, 1e-30), 0.0))


def _times(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """x (N, p) times factor (p, p), in place."""
    for start in range(0, len(x), ROWS_AT_ONCE):
        x[start : start + ROWS_AT_ONCE] = x[start : start + ROWS_AT_ONCE] @ factor.astype(np.float32)
    return x
