"""Histories that several target sessions share, so that a causal encoder reads each of them once."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


def share_histories(sessions: Dataset, history_items: int, targets_per_row: int = 16) -> Dataset:
    """Sessions of [`index_sessions`] for a causal encoder, which encodes a history once for the targets after each of
    its prefixes.

    Consecutive sessions of a user whose histories continue one another share the last one's history. Where histories
    are cut to the latest `history_items`, a target may thus lose its oldest behaviours, at most half of
    `history_items`. Histories of similar length with about `targets_per_row` targets in all are packed in a row, so
    that the work of a batch hardly varies.

    Three sessions of a user, whose histories keep 4 items:

    >>> histories = [[10, 11, 12], [10, 11, 12, 13, 14], [10, 11, 12, 13, 14, 15]]
    >>> columns = {"user_id": [7, 7, 7], "history": histories, "length": [3, 5, 6]}
    >>> sessions = Dataset.from_dict(columns | {"session": [[13], [15], [16]]})

    | session | kept history | shift | end | block | shares | prefix |
    |---|---|---|---|---|---|---|
    | 13 | 10 11 12 | -1: continues none | 3 | 0 | its own | 3 |
    | 15 | 11 12 13 14 | 1 | 5 | 1 | that of 16 | 3: 12 13 14 |
    | 16 | 12 13 14 15 | 1 | 6 | 1 | its own | 4 |

    >>> for history in share_histories(sessions, history_items=4)[0]["rows"]:
    ...     print(history["history"][-4:], history["sessions"], history["prefixes"])
    [10, 11, 12] [[13]] [3]
    [12, 13, 14, 15] [[15], [16]] [3, 4]

    Args:
        sessions: a user's sessions stand together, in order of time.
        history_items: n, the latest behaviours of a history that are kept.
        targets_per_row: divide the batch size by it to keep the targets of a batch.

    Returns:
        `rows`, per history the columns of its last session and, in place of `session`, `sessions` and `prefixes`, the
        items of the history before each; and `length`, the items of the longest history.
    """
    table = sessions.with_format("arrow")[:].combine_chunks()
    flat = pc.list_flatten(table["history"].combine_chunks()).to_numpy()
    lengths = np.asarray(sessions["length"][:], dtype=np.int64)
    kept = np.minimum(lengths, history_items)
    users = table["user_id"].combine_chunks()
    same_user = np.r_[False, pc.equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)]
    shift = _continued_histories(flat, np.cumsum(lengths) - kept, kept, same_user)
    run, end = _ends_in_runs(shift, kept)
    opens = _opens_a_shared_history(run, end, history_items)
    shared = np.cumsum(opens) - 1
    last = np.flatnonzero(np.r_[opens[1:], True])
    prefixes = kept[last][shared] - (end[last][shared] - end)

    columns = {name: table[name].combine_chunks().take(pa.array(last)) for name in table.column_names}
    offsets = pa.array(np.r_[np.flatnonzero(opens), len(opens)].astype(np.int32))
    columns["sessions"] = pa.ListArray.from_arrays(offsets, table["session"].combine_chunks())
    columns["prefixes"] = pa.ListArray.from_arrays(offsets, pa.array(prefixes))
    del columns["session"]
    histories = pa.StructArray.from_arrays(list(columns.values()), names=list(columns))
    return _packed(histories, kept[last], np.bincount(shared), targets_per_row)


def _continued_histories(
    flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, same_user: np.ndarray
) -> np.ndarray:
    """By how many behaviours each history begins later than the one before it which it continues; -1 if it does not.

    Args:
        flat: catalogue indices; history i is `flat[starts[i] : starts[i] + lengths[i]]`.
        same_user: whether each history has the user of the one before it.
    """
    shift = np.full(len(starts), -1)
    undecided = np.flatnonzero(same_user)
    undecided = undecided[(lengths[undecided - 1] > 0) & (lengths[undecided] >= lengths[undecided - 1])]
    for step in range(int(lengths.max(initial=0)) // 2 + 1):
        # Only a history that is cut can begin later; most are settled by the first step.
        undecided = undecided[(shift[undecided] < 0) & (lengths[undecided - 1] > step)]
        if not len(undecided):
            break
        possible = undecided[flat[starts[undecided]] == flat[starts[undecided - 1] + step]]
        overlap = lengths[possible - 1] - step
        pair = np.repeat(np.arange(len(possible)), overlap)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(overlap) - overlap, overlap)
        differs = flat[starts[possible][pair] + within] != flat[starts[possible - 1][pair] + step + within]
        shift[possible[np.bincount(pair[differs], minlength=len(possible)) == 0]] = step
    return shift


def _ends_in_runs(shift: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The run of histories that continue one another which each history is in, 0, 1, ..., and where it ends in the
    run, in behaviours from the beginning of the run's first history."""
    first = shift < 0
    run = np.cumsum(first) - 1
    begin = np.cumsum(np.maximum(shift, 0))
    return run, begin - begin[first][run] + kept


def _opens_a_shared_history(run: np.ndarray, end: np.ndarray, history_items: int) -> np.ndarray:
    """Whether each session shares no history with those before it: it is the first of a run or of a block of one.

    A block's ends lie within half of `history_items`, so that cutting its last history takes no more from the others.
    """
    block = np.maximum(-(-(end - history_items) // max(history_items // 2, 1)), 0)
    return (np.diff(run, prepend=-1) != 0) | (np.diff(block, prepend=-1) != 0)


def _packed(histories: pa.Array, lengths: np.ndarray, targets: np.ndarray, targets_per_row: int) -> Dataset:
    """Rows of histories in order of length, each closed by the history that brings it to `targets_per_row` targets."""
    by_length = np.argsort(lengths, kind="stable")
    row = (np.cumsum(targets[by_length]) - 1) // targets_per_row
    bounds = np.r_[np.flatnonzero(np.diff(row, prepend=-1)), len(row)]
    rows = pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), histories.take(pa.array(by_length)))
    return Dataset(pa.table({"rows": rows, "length": lengths[by_length][bounds[1:] - 1]}))


__all__ = ["share_histories"]
