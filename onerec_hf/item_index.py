"""The item index: catalogue indices by item id, and by semantic ID, of millions of items, and its file.

No Python object is kept per item. Item ids are int64 or `numpy.dtypes.StringDType` arrays; look-ups are arrays too.
"""

import itertools
import os
import string
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# Strings pass through Python objects on their way between Arrow, numpy and pandas, this many at a time.
STRINGS_AT_ONCE = 65_536


def as_item_ids(values: Iterable, what: str = "item_ids") -> pa.Array:
    """Item ids as an Arrow array of type int64 or large_string, without nulls.

    Args:
        values: a list, array, Series or Arrow array of integers or of strings.
        what: their name in messages.

    Raises:
        ValueError: neither integers nor strings, both at once, or a missing id; names the row.
    """
    if not isinstance(values, (pa.Array, pa.ChunkedArray, np.ndarray, pd.Series, pd.Index)):
        values = list(values)
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise ValueError(f"{what} must be one-dimensional, got shape {values.shape}")
    if len(values) == 0:
        return pa.array([], type=pa.int64())
    if isinstance(values, np.ndarray) and values.dtype.kind == "T":
        values = pa.chunked_array([pa.array(part) for part in _object_parts(values)])
    try:
        array = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        for row, value in enumerate(values if isinstance(error, OverflowError) else ()):
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise _too_large(value, row, what) from error
        raise _misfit_error(values, what) or ValueError(f"{what} must be integers or strings: {error}") from error
    if array.null_count:
        raise _misfit_error(values, what)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_integer(array.type):
        if pa.types.is_uint64(array.type):
            row = pc.index(pc.greater(array, pa.scalar(2**63 - 1, pa.uint64())), True).as_py()
            if row >= 0:
                raise _too_large(array[row].as_py(), row, what)
        array = array.cast(pa.int64())
    elif is_text(array.type):
        array = array.cast(pa.large_string())
    else:
        kind = np.dtype(array.type.to_pandas_dtype())
        raise ValueError(f"{what} must be integers or strings, got dtype {kind}; cast the ids first")
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _too_large(value: int, row: int, what: str) -> ValueError:
    return ValueError(f"{what} must fit into 64 bits with a sign; row {row} holds {value}. Give them as strings")


def item_id_array(ids: pa.Array) -> np.ndarray:
    """Item ids of [`as_item_ids`] as a numpy array, int64 or StringDType, (N,)."""
    if pa.types.is_int64(ids.type):
        return np.array(ids)
    array = np.empty(len(ids), dtype=np.dtypes.StringDType())
    for start in range(0, len(ids), STRINGS_AT_ONCE):
        part = ids.slice(start, STRINGS_AT_ONCE)
        array[start : start + len(part)] = part.to_numpy(zero_copy_only=False)
    return array


def _object_parts(strings: np.ndarray) -> Iterable[np.ndarray]:
    for start in range(0, len(strings), STRINGS_AT_ONCE):
        yield strings[start : start + STRINGS_AT_ONCE].astype(object)


def _misfit_error(values, what: str) -> ValueError | None:
    """Names the first id that is missing or not of the first id's type."""
    values = values.to_pylist() if isinstance(values, (pa.Array, pa.ChunkedArray)) else list(values)
    for row, value in enumerate(values):
        if pd.isna(value) is True or not isinstance(value, type(values[0])):
            return ValueError(
                f"{what} must be all integers or all strings; row {row} holds {value!r} ({type(value).__name__}). "
                "Cast the ids to one type and drop missing ones"
            )
    return None


class ItemIdLookup:
    """Catalogue indices of item ids.

    A binary search in the sorted integers, or in the sorted 64-bit hashes of the strings; what is found is compared
    with the id itself.

    Args:
        ids: int64 or StringDType (N,), all distinct.

    Raises:
        ValueError: an id occurs twice; names its rows.
    """

    def __init__(self, ids: np.ndarray):
        self.ids = ids
        for salt in itertools.count():
            self._salt = salt
            keys = self._hash(ids)
            order = np.argsort(keys, kind="stable")
            self._order, self._keys = order.astype(np.int32), keys[order]
            equal = np.flatnonzero(self._keys[1:] == self._keys[:-1])
            if not len(equal):
                break
            first, row = self._order[equal[0] : equal[0] + 2].tolist()
            if ids[first] == ids[row]:
                raise ValueError(
                    f"item_ids holds {ids[row : row + 1].tolist()[0]!r} twice, in rows {first} and {row}; drop "
                    "duplicate items"
                )
            # Two different strings with one hash: another salt tells them apart.

    def _hash(self, ids: np.ndarray) -> np.ndarray:
        if ids.dtype == np.int64:
            return ids
        key = f"{self._salt:016d}"
        parts = [pd.util.hash_array(part, hash_key=key, categorize=False) for part in _object_parts(ids)]
        return np.concatenate([np.zeros(0, dtype=np.uint64), *parts])

    def find(self, wanted: pa.Array) -> np.ndarray:
        """Catalogue indices int64 (M,) of ids (M,) as [`as_item_ids`] gives them, -1 where there is no such item.

        Raises:
            ValueError: integers are wanted of a catalogue of strings, or the other way round.
        """
        if len(wanted) == 0:
            return np.zeros(0, dtype=np.int64)
        kinds = ("strings", "integers")
        own, given = kinds[self.ids.dtype == np.int64], kinds[pa.types.is_int64(wanted.type)]
        if own != given:
            raise ValueError(
                f"item ids of this catalogue are {own}, got {given} (first: {wanted[0].as_py()!r}); cast the ids"
            )
        # Histories repeat items: each distinct id is looked up once.
        encoded = wanted.dictionary_encode()
        distinct = item_id_array(encoded.dictionary)
        nearest = np.searchsorted(self._keys, self._hash(distinct))
        found = self._order[np.minimum(nearest, len(self._keys) - 1)].astype(np.int64)
        found[self.ids[found] != distinct] = -1
        return found[encoded.indices.to_numpy()]


class SemanticIdLookup:
    """Items by semantic ID, whatever the number of levels and codes.

    Items are sorted by code tuple, so that the items of an ID, and of every prefix, are a range of that order. The
    prefixes of each length are found by binary search in sorted keys, (rank of the prefix before) * K + code: products
    of all K, which overflow int64, are not needed.

    Args:
        codes: integers (N, L).
        codebook_sizes: K_l, L of them.
        last: bool (N,). Of the items that share an ID these come last; otherwise catalogue order decides.
    """

    def __init__(self, codes: np.ndarray, codebook_sizes: Sequence[int], last: np.ndarray):
        self.codebook_sizes = tuple(codebook_sizes)
        order = np.lexsort((last, *codes.T[::-1]))
        self._order = order.astype(np.int32)
        self._keys: list[np.ndarray] = []
        starts = np.arange(len(order)) == 0
        rank = np.zeros(len(order), dtype=np.int64)
        for level, size in enumerate(self.codebook_sizes):
            column = codes[order, level]
            starts[1:] |= column[1:] != column[:-1]
            first = np.flatnonzero(starts)
            self._keys.append(rank[first] * size + column[first])
            rank = np.cumsum(starts) - 1
        self._bounds = np.append(first, len(order)).astype(np.int32)

    def _ranks(self, codes: np.ndarray) -> np.ndarray:
        """Rank (...) of IDs (..., L) among those in use, -1 for others."""
        rank = np.zeros(codes.shape[:-1], dtype=np.int64)
        found = ((codes >= 0) & (codes < np.asarray(self.codebook_sizes))).all(-1)
        for level, (keys, size) in enumerate(zip(self._keys, self.codebook_sizes, strict=True)):
            key = rank * size + codes[..., level]
            rank = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            found &= keys[rank] == key
        return np.where(found, rank, -1)

    def first(self, codes: np.ndarray) -> np.ndarray:
        """Catalogue index int64 (...) of the first item of each ID int64 (..., L), -1 where no item has it."""
        ranks = self._ranks(codes)
        return np.where(ranks < 0, -1, self._order[self._bounds[np.maximum(ranks, 0)]]).astype(np.int64)

    def all(self, codes: np.ndarray) -> np.ndarray:
        """Catalogue indices int64 of all the items of one ID int64 (L,), first ones first."""
        rank = int(self._ranks(codes))
        found = slice(self._bounds[rank], self._bounds[rank + 1]) if rank >= 0 else slice(0)
        return self._order[found].astype(np.int64)


def _columns(num_levels: int) -> list[str]:
    return ["item_id", *(f"code_{letter}" for letter in string.ascii_lowercase[:num_levels]), "removed"]


def write_item_index(path: str | os.PathLike, item_ids: np.ndarray, codes: np.ndarray, removed: np.ndarray) -> None:
    """Writes a Parquet file of item_id, one column of codes per level (`code_a`, `code_b`, ...) and removed.

    Args:
        item_ids: (N,) int64 or StringDType, in catalogue order.
        codes: (N, L) integers.
        removed: (N,) bool.
    """
    columns = [as_item_ids(item_ids), *(pa.array(column, type=pa.int32()) for column in codes.T), pa.array(removed)]
    pq.write_table(pa.table(columns, names=_columns(codes.shape[1])), path, compression="zstd")


def read_item_index(path: str | os.PathLike, num_levels: int) -> tuple[pa.ChunkedArray, np.ndarray, np.ndarray | None]:
    """Item ids (N,), codes (N, L) and removed (N,) of [`write_item_index`]; None for a file without `removed`.

    Raises:
        ValueError: a file that cannot be read, or that has other columns; names it.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); save or download it again") from error
    columns = _columns(num_levels)
    # `removed` came later: an index without it has all its items.
    if table.column_names not in (columns, columns[:-1]):
        raise ValueError(
            f"{path} has the columns {table.column_names}, expected {columns}: it is the item index of another "
            "tokenizer"
        )
    for column in columns[1:-1]:
        if not pa.types.is_integer(table[column].type) or table[column].null_count:
            raise ValueError(
                f"{path}: column {column} is not a column of codes ({table[column].type}, {table[column].null_count} "
                "missing); save or download it again"
            )
    codes = np.stack([table[column].to_numpy() for column in columns[1:-1]], axis=1)
    return table["item_id"], codes, table["removed"].to_numpy() if "removed" in table.column_names else None
