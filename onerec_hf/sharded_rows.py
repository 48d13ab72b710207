"""Training rows that are made shard by shard, so that memory does not grow with their number.

A row is found by its number, as in a table in memory; what is random is the order in which a [`ShardSampler`] asks for
them. So whatever a trainer does with a data set of known length (steps per epoch, schedules, batches for each of
several processes, an exact resume that skips batches without making them) it does with shards too.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_dataset
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

SHARDS_AT_ONCE = 4


class ShardedRows(torch.utils.data.Dataset):
    """Rows of a streaming data set, each shard of which is read whole when its rows are asked for.

    >>> import tempfile
    >>> from functools import partial
    >>> from onerec_hf import OneRecTokenizer
    >>> from onerec_hf.session_rows import index_sessions
    >>> tokenizer = OneRecTokenizer.from_semantic_ids(["a", "b"], [[0], [1]], [torch.zeros(2, 2)])
    >>> folder = tempfile.mkdtemp()
    >>> for number, user in enumerate("xy"):
    ...     columns = {"user_id": [user], "history_item_ids": [["a"]], "session_item_ids": [["b"]]}
    ...     _ = Dataset.from_dict(columns).to_parquet(f"{folder}/part-{number:05}.parquet")
    >>> rows = ShardedRows.from_parquet(folder, partial(index_sessions, tokenizer=tokenizer))
    >>> len(rows), rows[1]
    (2, {'user_id': 'y', 'history': [0], 'session': [1], 'length': 1})

    Every process, and every worker of a data loader, reads all shards: their batches are of the same rows' order.

    Args:
        stream: From `load_dataset(..., streaming=True)`, in its own order, of shards that each fit in memory several
            times.
        rows_of: The rows of a shard's table, such as those of [`index_sessions`]; the same at every call.
        num_rows: Of each shard. By default they are counted by reading the shards once.
        shards_at_once: Rows of so many shards are shuffled together; of twice as many they are in memory.

    Raises:
        ValueError: there is no shard.
    """

    def __init__(
        self,
        stream: IterableDataset,
        rows_of: Callable[[Dataset], Dataset],
        num_rows: Sequence[int] | None = None,
        shards_at_once: int = SHARDS_AT_ONCE,
    ):
        self.stream, self.rows_of, self.shards_at_once = stream, rows_of, shards_at_once
        self.epoch = 0
        if num_rows is None:
            hidden = not PartialState().is_main_process
            shards = tqdm(range(stream.num_shards), "counting rows", unit="shard", disable=hidden)
            num_rows = [len(self._read(shard)) for shard in shards]
        self.num_rows = list(num_rows)
        self.first = np.r_[0, np.cumsum(self.num_rows)].astype(np.int64)
        self._keep_latest()

    @classmethod
    def from_parquet(
        cls,
        folder: str | Path,
        rows_of: Callable[[Dataset], Dataset],
        filters: pyarrow.dataset.Expression | None = None,
    ) -> "ShardedRows":
        """Shards that are the folder's Parquet files. How many rows they have the files' footers say, or of those that
        are filtered the columns that the filter reads; so `rows_of` must keep a table's rows.

        Args:
            filters: which rows are read, by the files' columns.

        Raises:
            ValueError: there is no Parquet file in the folder.
        """
        files = sorted(str(file) for file in Path(folder).glob("*.parquet"))
        if not files:
            raise ValueError(f"{folder} has no Parquet file: shards are named part-00000.parquet, part-00001.parquet.")
        fragments = (pyarrow.dataset.dataset(file) for file in files)
        num_rows = [fragment.count_rows(filter=filters) for fragment in fragments]
        stream = load_dataset("parquet", data_files=files, split="train", streaming=True, filters=filters)
        return cls(stream, rows_of, num_rows)

    def then(self, further: Callable[[Dataset], Dataset]) -> "ShardedRows":
        """The rows that `further` makes of each shard's; they are counted by making them once."""
        return ShardedRows(self.stream, _Composed((self.rows_of, further)), shards_at_once=self.shards_at_once)

    def shard(self, number: int) -> pa.Table:
        """The rows of a shard."""
        return self._latest(number)

    def set_epoch(self, epoch: int) -> None:
        """Tells the sampler which epoch's order to give; the trainer's data loader does so."""
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"row {indices.max()} of {len(self)}")
        shards = np.searchsorted(self.first, indices, side="right") - 1
        by_shard = np.argsort(shards, kind="stable")
        found = []
        for number in np.unique(shards):
            places = indices[by_shard][shards[by_shard] == number] - self.first[number]
            found += self.shard(int(number)).take(pa.array(places)).to_pylist()
        return [found[place] for place in np.argsort(by_shard)]

    def _read(self, number: int) -> pa.Table:
        stream = self.stream.shard(self.stream.num_shards, number).with_format("arrow")
        tables = list(stream.iter(batch_size=2**31))
        rows = Dataset(pa.concat_tables(tables)) if tables else None
        # A filter may leave nothing of a shard, of which there is not even a table then.
        return pa.table({}) if rows is None else self.rows_of(rows).with_format("arrow")[:].combine_chunks()

    def _keep_latest(self) -> None:
        self._latest = lru_cache(maxsize=2 * self.shards_at_once)(self._read)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_latest"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._keep_latest()


class _Composed(tuple):
    """Functions, one after the other, as one that can be pickled."""

    def __call__(self, value):
        for function in self:
            value = function(value)
        return value


def order_seed(args: TrainingArguments) -> int:
    """What decides the order of a training's rows, beside the epoch."""
    return args.seed if args.data_seed is None else args.data_seed


def torch_generator(generator: np.random.Generator) -> torch.Generator:
    """One of torch's, seeded by numpy's."""
    return torch.Generator().manual_seed(int(generator.integers(2**62)))


class ShardSampler(torch.utils.data.Sampler):
    """The numbers of all rows of an epoch: shards in random order, and the rows of every `rows.shards_at_once` of them
    too, those of similar length together as transformers' `LengthGroupedSampler` has them. The order follows from the
    seed and `rows.epoch` alone. While one half of such rows is asked for, the shards of the next are read.

    Args:
        batch_size: Rows that are to be of similar length; not for `by_length=False`.
        by_length: Whether rows, which then have a column `length`, are grouped by it.
    """

    def __init__(self, rows: ShardedRows, batch_size: int, by_length: bool, seed: int):
        self.rows, self.batch_size, self.by_length, self.seed = rows, batch_size, by_length, seed

    @classmethod
    def for_training(cls, rows: ShardedRows, args: TrainingArguments) -> "ShardSampler":
        """As a trainer's arguments have its batches."""
        together = args.train_batch_size * args.gradient_accumulation_steps
        return cls(rows, together, args.train_sampling_strategy == "group_by_length", order_seed(args))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.rows.epoch])
        size = self.rows.shards_at_once
        order = [number for number in generator.permutation(len(self.rows.num_rows)) if self.rows.num_rows[number]]
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        open_places = 0  # of the last batch
        with ThreadPoolExecutor(1) as reader:
            read = reader.submit(self._lengths, groups[0]) if groups else None
            for following, group in enumerate(groups, start=1):
                indices = np.concatenate([np.arange(*self.rows.first[number : number + 2]) for number in group])
                shuffled = generator.permutation(len(indices))
                closing, others = shuffled[:open_places], shuffled[open_places:]
                open_places = (open_places - len(indices)) % self.batch_size
                lengths = read.result()
                if lengths is not None and len(others):
                    own, drawn = lengths[others].tolist(), torch_generator(generator)
                    others = others[get_length_grouped_indices(own, self.batch_size, generator=drawn)]
                ordered = indices[np.r_[closing, others]].tolist()
                middle = len(ordered) // 2
                yield from ordered[:middle]
                # Not before: rows of the last group may still be read, whose shards these replace.
                read = reader.submit(self._lengths, groups[following]) if following < len(groups) else None
                yield from ordered[middle:]

    def _lengths(self, group: Sequence[int]) -> np.ndarray | None:
        shards = [self.rows.shard(int(number)) for number in group]
        if not self.by_length:
            return None
        return np.fromiter(chain.from_iterable(shard["length"].to_numpy() for shard in shards), dtype=np.int64)


__all__ = ["SHARDS_AT_ONCE", "ShardSampler", "ShardedRows"]
