"""Wrong and unusual input by the thousand: what is read, what is refused, and whether anything goes wrong in silence.

Usage:
    python recipes/benchmarks/fuzz_input.py --output_dir runs/fuzz --json fuzz_input.json

Each case is a log, archive, column mapping, list of histories or checkpoint with one mutation, drawn by `--seed` and
the case's number. What is read is compared with the ids that were written. An error is readable if it is a ValueError
or an OSError that names the file or the argument. Cases run in a process beside, which is replaced where one takes
more than 10 s. The same command goes on after a kill: `OUTPUT_DIR/cases.jsonl` has a line for each case that is done.
"""

import argparse
import bz2
import functools
import gzip
import io
import json
import logging
import lzma
import multiprocessing
import pickle
import resource
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load, save
from tqdm.auto import tqdm

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, Recommender
from onerec_hf.data import DataError, read_table
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer
from onerec_hf.semantic_ids import ResidualQuantizer

SECONDS, MEMORY = 10, 8 * 2**30  # [s] and [bytes] that a case may take
OUTCOMES = ("read", "refused", "bare traceback", "hang", "id changed")
SOUND = OUTCOMES[:2]
START = 1_700_000_000  # [s]
COLUMNS = {"user_id": "uid", "item_id": "item", "timestamp": "time"}
CATALOGUE = list(range(500, 540))
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ODD_VALUES = (
    *(None, True, 0, -1, 5, 1.5, float("nan"), float("inf"), 10**9, 10**18, 2**70, "", "5", "nope", "\0", "é", "../x"),
    *([], [5], [[]], [None], ["a", "a"], {}, {"a": 5}, {"column": "uid"}, {"column": ["uid"], "type": "string"}),
)


@dataclass
class Case:
    """`read()` gives what was read, which must be `expected` unless that is None, or raises an error with one of the
    `names` in it."""

    read: Callable[[], Any]
    expected: Any
    names: tuple[str, ...]


MUTATIONS: dict[tuple[str, str], Callable[[np.random.Generator, Path], Case]] = {}


def mutation(kind: str, *names: str):
    """Enters a function under its kind of input, once for each name, which it gets as its third argument."""

    def enter(function):
        for name in names:
            MUTATIONS[kind, name] = lambda rng, folder, name=name: function(rng, folder, name)
        return function

    return enter


def attempt(number: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs a case in a folder, and says what came of it."""
    kind, name = list(MUTATIONS)[number % len(MUTATIONS)]
    case = MUTATIONS[kind, name](np.random.default_rng([seed, number]), folder)
    outcome, detail = "read", ""
    try:
        found = case.read()
        if case.expected is not None and found != case.expected:
            outcome, detail = "id changed", f"{found} in place of {case.expected}"[:500]
    except Exception as error:
        lines = traceback.format_exception(error)
        readable = type(error) in (ValueError, DataError, FileNotFoundError, OSError)
        readable = readable and any(word in str(error) for word in case.names)
        outcome = "refused" if readable else "bare traceback"
        detail = str(error)[:300] if readable else "".join(lines)[-1500:]
    return {"number": number, "kind": kind, "mutation": name, "outcome": outcome, "detail": detail}


def pick(rng: np.random.Generator, values: Iterable) -> Any:
    values = list(values)
    return values[int(rng.integers(len(values)))]


def damaged(rng: np.random.Generator, data: bytes, how: str) -> bytes:
    place = int(rng.integers(len(data)))
    return {
        "truncated": data[:place],
        "bytes flipped": data[:place] + bytes(byte ^ 0xFF for byte in data[place : place + 8]) + data[place + 8 :],
        "zeros": data[:place] + bytes(len(data) - place),
        "garbage behind": data + rng.bytes(20),
        "empty": b"",
        "a web page": b"<html><body>404</body></html>",
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a pickle": pickle.dumps({"a": [1, 2]}),
    }[how]


DAMAGE = ("truncated", "bytes flipped", "zeros", "garbage behind", "empty", "a web page", "a pointer of Git LFS")


# Logs


def drawn_log(rng: np.random.Generator, users: list | None = None, items: list | None = None) -> pd.DataFrame:
    """12 rows of text or of what is given; every id is there."""
    rows = 12
    users = [str(user) for user in rng.integers(1, 10**6, size=3)] if users is None else users
    items = [str(item) for item in rng.integers(1, 10**6, size=4)] if items is None else items
    columns = {"uid": [users[row % len(users)] for row in range(rows)]}
    columns["item"] = [items[(row // 2) % len(items)] for row in range(rows)]
    return pd.DataFrame(columns | {"time": [str(START + 60 * row) for row in range(rows)]}, dtype=object)


def pairs(users: Iterable, items: Iterable) -> list[tuple[str, str]]:
    return sorted(zip(map(str, users), map(str, items), strict=True))


def log_case(folder: Path, log: pd.DataFrame | None, file="log.csv", columns=COLUMNS, **sections) -> Case:
    """A log that is written, read by a mapping; `log` says what ids it has, None where they are not known."""
    content = {"interactions": {"file": file, "columns": columns}} | sections
    (folder / "mapping.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    expected = None if log is None else pairs(log["uid"], log["item"])
    return Case(lambda: ids_read(folder), expected, tuple(path.name for path in folder.iterdir()))


def ids_read(folder: Path) -> list[tuple[str, str]]:
    interactions = read_table(folder, folder / "mapping.yaml").interactions
    return pairs(interactions["user_id"], interactions["item_id"])


ODD_IDS = {
    "leading zeros": lambda rng, n: f"{rng.integers(100):0{n}d}",
    "19 digits": lambda rng, n: str(rng.integers(10**18, 2**63 - 1)),
    "beyond 63 bits": lambda rng, n: str(2**63 + int(rng.integers(2**63 - 1)) + 2 ** (60 + n % 5)),
    "floats": lambda rng, n: f"{rng.integers(10**n)}.0",
    "exponents": lambda rng, n: f"{rng.integers(10)}e{n}",
    "signs": lambda rng, n: pick(rng, "+-") + str(rng.integers(10)),
    "words of other types": lambda rng, n: pick(rng, ("NA", "null", "None", "True", "false", "inf", "0x1F", "1_000")),
    "odd characters": lambda rng, n: "".join(pick(rng, "01.-'\";,| \té\u200b\u0301\U0001f600aN") for _ in range(n)),
    "quoted line breaks": lambda rng, n: "a" + pick(rng, ("\n", "\r\n", "\r")) + str(n),
    "NUL": lambda rng, n: f"{n}\0{rng.integers(10)}",
    "thousands of characters": lambda rng, n: "x" * 1000 * n + str(rng.integers(10)),
}


@mutation("ids in CSV", *ODD_IDS)
def odd_ids(rng, folder, name):
    draw = ODD_IDS[name]
    users, items = ([draw(rng, int(rng.integers(1, 9))) for _ in range(4)] for _ in range(2))
    log = drawn_log(rng, [*users, "7"], items)
    log.to_csv(folder / "log.csv", index=False, lineterminator=pick(rng, ("\n", "\r\n")))
    blank = log.isin(["", "nan", "NaN"]).any(axis=None)
    return log_case(folder, None if blank else log)


TYPES = {
    "uint64": lambda rng: pa.array([2**63 + int(n) for n in rng.integers(9, size=12)], pa.uint64()),
    "int64 of 19 digits": lambda rng: pa.array(rng.integers(10**18, 2**63 - 1, size=12)),
    "int8": lambda rng: pa.array(rng.integers(-128, 128, size=12), pa.int8()),
    "gaps": lambda rng: pa.array([None, *map(int, rng.integers(2**60, size=11))], pa.int64()),
    "float64": lambda rng: pa.array(rng.integers(2**62, size=12).astype(float)),
    "decimal": lambda rng: pa.array(rng.integers(99, size=12), pa.int64()).cast(pa.decimal128(38, 2)),
    "binary": lambda rng: pa.array([rng.bytes(3) for _ in range(12)]),
    "text views": lambda rng: pa.array([f"0{n}" for n in rng.integers(99, size=12)], pa.string_view()),
    "large text": lambda rng: pa.array([f"0{n}" for n in rng.integers(99, size=12)], pa.large_string()),
    "dictionary": lambda rng: pa.array([f"0{n}" for n in rng.integers(99, size=12)]).dictionary_encode(),
    "dictionary of integers": lambda rng: pa.array(rng.integers(2**60, size=12)).dictionary_encode(),
    "bool": lambda rng: pa.array(rng.integers(2, size=12).astype(bool)),
    "date-times": lambda rng: pa.array(rng.integers(2**40, size=12), pa.timestamp("us")),
    "dates": lambda rng: pa.array([19_000] * 12, pa.date32()),
    "lists": lambda rng: pa.array([[int(n)] for n in rng.integers(9, size=12)]),
    "structs": lambda rng: pa.array([{"a": int(n)} for n in rng.integers(9, size=12)]),
    "nulls": lambda rng: pa.nulls(12),
}


@mutation("types in Parquet", *TYPES)
def odd_types(rng, folder, name):
    place, values = pick(rng, COLUMNS.values()), TYPES[name](rng)
    log = drawn_log(rng).astype({"time": int})
    table = pa.table({column: values if column == place else pa.array(log[column]) for column in log})
    pq.write_table(table, folder / "log.parquet", compression=pick(rng, ("snappy", "zstd", "gzip", "none")))
    if place != "time":
        log[place] = values.to_pylist()
    return log_case(folder, log, "log.parquet")


@mutation("damaged Parquet", *DAMAGE)
def damaged_parquet(rng, folder, name):
    buffer = io.BytesIO()
    pq.write_table(
        pa.Table.from_pandas(drawn_log(rng).astype({"time": int})),
        buffer,
        compression=pick(rng, ("snappy", "zstd", "none")),
    )
    (folder / "log.parquet").write_bytes(damaged(rng, buffer.getvalue(), name))
    return log_case(folder, None, "log.parquet")  # pages have no check sum


@mutation("damaged CSV", *DAMAGE)
def damaged_csv(rng, folder, name):
    (folder / "log.csv").write_bytes(damaged(rng, drawn_log(rng).to_csv(index=False).encode(), name))
    return log_case(folder, None)


LAYOUTS = {
    "delimiter ;": lambda log, rng: log.to_csv(index=False, sep=";"),
    "delimiter tab": lambda log, rng: log.to_csv(index=False, sep="\t"),
    "delimiter bar": lambda log, rng: log.to_csv(index=False, sep="|"),
    "no header": lambda log, rng: log.to_csv(index=False, header=False),
    "a column twice": lambda log, rng: log.assign(x="1").to_csv(index=False, header=["uid", "item", "time", "uid"]),
    "all quoted": lambda log, rng: log.to_csv(index=False, quoting=1),
    "CR alone": lambda log, rng: log.to_csv(index=False, lineterminator="\r"),
    "a quote left open": lambda log, rng: log.to_csv(index=False).replace(pick(rng, log["item"]), '"5', 1),
    "blanks around": lambda log, rng: log.to_csv(index=False).replace(",", " , "),
    "blank lines": lambda log, rng: log.to_csv(index=False, lineterminator="\n\n"),
    "a comment first": lambda log, rng: "# exported\n" + log.to_csv(index=False),
    "a line too long": lambda log, rng: log.to_csv(index=False).replace(pick(rng, log["item"]), "5,6,7", 1),
    "a line too short": lambda log, rng: log.to_csv(index=False) + "5\n",
    "an index column": lambda log, rng: log.to_csv(),
    "header alone": lambda log, rng: log[:0].to_csv(index=False),
    "NUL bytes": lambda log, rng: damaged(rng, log.to_csv(index=False).encode(), "truncated").decode() + "\0\0",
}


@mutation("layout of CSV", *LAYOUTS)
def odd_layout(rng, folder, name):
    log = drawn_log(rng)
    (folder / "log.csv").write_bytes(LAYOUTS[name](log, rng).encode())
    known = name.startswith("delimiter") or name in ("all quoted", "CR alone", "blank lines", "an index column")
    return log_case(folder, log if known else None)


@mutation("encoding of CSV", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "cp037", "utf-7")
def odd_encoding(rng, folder, name):
    log = drawn_log(rng, [f"é{n}" for n in rng.integers(100, size=3)])
    (folder / "log.csv").write_bytes(log.to_csv(index=False).encode(name))
    return log_case(folder, None if name == "utf-7" else log)


TIMES = {
    "milliseconds": lambda rng, row: str((START + row) * 1000),
    "units mixed": lambda rng, row: str((START + row) * pick(rng, (1, 1000, 10**6, 10**9))),
    "sentinels": lambda rng, row: pick(rng, ("0", "-1", "253402300799999", "9999999999999", "1e300", str(START))),
    "words": lambda rng, row: pick(rng, ("", "-", "NULL", "now", "2024-13-45", "inf", str(START))),
    "ISO": lambda rng, row: pick(
        rng, ("2024-01-01", "2024-01-01T00:00:00+08:00", "20240101", "0001-01-01", "9999-1-1")
    ),
    "float": lambda rng, row: f"{START + row}.{rng.integers(10**6)}",
}


@mutation("times", *TIMES)
def odd_times(rng, folder, name):
    log = drawn_log(rng)
    log["time"] = [TIMES[name](rng, row) for row in range(len(log))]
    log.to_csv(folder / "log.csv", index=False)
    case = log_case(folder, log)
    if rng.integers(2):
        unit = pick(rng, ("s", "ms", "iso"))
        mapping = yaml.safe_load((folder / "mapping.yaml").read_text(encoding="utf-8"))
        mapping["interactions"]["timestamp_unit"] = unit
        (folder / "mapping.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    return case


LISTS = {
    "JSON": json.dumps,
    "Python": str,
    "bars": "|".join,
    "commas": ",".join,
    "numpy": lambda tags: f"[{' '.join(map(repr, tags))}]",
    "Postgres": lambda tags: "{" + ",".join(tags) + "}",
    "cut off": lambda tags: str(tags)[:-2],
    "nested": lambda tags: json.dumps([tags, [tags]]),
    "an object": lambda tags: json.dumps({"tags": tags}),
    "brackets without end": lambda tags: "[" * 5000 + "]" * 5000,
}


@mutation("lists of items", *LISTS)
def odd_lists(rng, folder, name):
    log = drawn_log(rng)
    log.to_csv(folder / "log.csv", index=False)
    tags = [
        [pick(rng, ("a", "b c", "1", "1.0", "é", "'", '"', "a,b")) for _ in range(rng.integers(4))] for _ in range(4)
    ]
    items = pd.DataFrame({"item": log["item"].unique()})
    items["tags"] = [LISTS[name](own) for own in tags[: len(items)]]
    items.to_csv(folder / "items.csv", index=False)
    role = pick(rng, ("multi_categorical", "multi_categorical", "categorical", "numeric", "embedding", "text"))
    named = "tags" if role in ("embedding", "text") else ["tags"]
    return log_case(folder, log, items={"file": "items.csv", "columns": {"item_id": "item"}, role: named})


@mutation(
    "parts of a log", "no bytes", "header alone", "ids of another kind", "a column less", "another type", "damaged"
)
def odd_parts(rng, folder, name):
    log, more = drawn_log(rng), drawn_log(rng)
    text = log.to_csv(index=False)
    part = {
        "no bytes": lambda: "",
        "header alone": lambda: more[:0].to_csv(index=False),
        "ids of another kind": lambda: more.assign(uid="x").to_csv(index=False),
        "a column less": lambda: more.drop(columns="item").to_csv(index=False),
        "another type": lambda: "",
        "damaged": lambda: damaged(rng, text.encode(), "truncated").decode(),
    }[name]()
    (folder / "log_1.csv").write_text(text, encoding="utf-8")
    (folder / "log_2.csv").write_text(part, encoding="utf-8")
    if name == "ids of another kind":
        log = pd.concat([log, more.assign(uid="x")])
    if name == "another type":
        (folder / "log_2.csv").unlink()
        integers = more.astype({"uid": int, "item": int, "time": float})
        integers.to_parquet(folder / "log_2.parquet")
        log = pd.concat([log, integers.astype({"uid": str, "item": str})])
    return log_case(folder, None if name == "damaged" else log, "log_*")


# Archives


def zipped(text: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log.csv", text)
    return buffer.getvalue()


PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda text: pa.compress(text, codec="zstd", asbytes=True),
    "zip": zipped,
}


@mutation("damaged archive", *(f"{suffix} {how}" for suffix in PACK for how in DAMAGE))
def damaged_archive(rng, folder, name):
    suffix, how = name.split(" ", 1)
    log = drawn_log(rng)
    packed = PACK[suffix](log.to_csv(index=False).encode())
    (folder / f"log.csv.{suffix}").write_bytes(damaged(rng, packed, how))
    # The only one without a check sum of what it holds.
    known = suffix != "zst" or how not in ("bytes flipped", "zeros")
    return log_case(folder, log if known else None, f"log.csv.{suffix}")


@mutation("archive", "twice packed", "of another kind", "several members", "two files", "a folder alone", "encrypted")
def odd_archive(rng, folder, name):
    log = drawn_log(rng)
    text = log.to_csv(index=False).encode()
    suffix = pick(rng, PACK)
    half = text.index(b"\n", len(text) // 2) + 1
    if name in ("two files", "a folder alone", "encrypted"):
        suffix, buffer = "zip", io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("data/", "")
            for number in range({"two files": 2, "a folder alone": 0, "encrypted": 1}[name]):
                archive.writestr(f"data/log_{number}.csv", text)
        data = bytearray(buffer.getvalue())
        if name == "encrypted":  # bit 0 of the flags, of the file and of the list of files
            data[data.rindex(b"PK\x03\x04") + 6] |= 1
            data[data.rindex(b"PK\x01\x02") + 8] |= 1
    elif name == "several members":
        suffix = pick(rng, ("gz", "bz2", "xz", "zst"))
        data = PACK[suffix](text[:half]) + PACK[suffix](text[half:])
    else:
        other = suffix if name == "twice packed" else pick(rng, PACK)
        data = PACK[suffix](PACK[suffix](text)) if name == "twice packed" else PACK[other](text)
    (folder / f"log.csv.{suffix}").write_bytes(bytes(data))
    return log_case(folder, log, f"log.csv.{suffix}")


# Column mappings


def paths_of(content: Any, path: tuple = ()) -> list[tuple]:
    """Of all values below a mapping."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for key, value in inner for found in ((*path, key), *paths_of(value, (*path, key)))]


def parent_of(content: Any, path: tuple) -> Any:
    return functools.reduce(lambda inner, key: inner[key], path[:-1], content)


def sound_mapping() -> dict[str, Any]:
    return {
        "name": "feed",
        "timezone": "Europe/Berlin",
        "interactions": {
            "file": "log.csv",
            "columns": {**COLUMNS, "user_id": {"column": "uid", "type": "string"}, "session_id": "time"},
            "timestamp_unit": "s",
            "feedback": {"seen": {"column": "item", "scale": 0.001}, "more": "time"},
        },
        "items": {
            **{"file": "items.csv", "columns": {"item_id": "item"}, "text": "title", "embedding": "vector"},
            **{"categorical": ["maker"], "multi_categorical": ["tags"], "numeric": ["age"]},
        },
        "users": {"file": ["users.csv"], "columns": {"user_id": "uid"}, "categorical": ["country"]},
        "positive_feedback": ["seen>=0"],
    }


def mapping_case(rng: np.random.Generator, folder: Path, change: Callable[[str], str | bytes], known=False) -> Case:
    """A log, items and users, with a mapping that is changed as text."""
    log = drawn_log(rng)
    log.to_csv(folder / "log.csv", index=False)
    items = pd.DataFrame({"item": log["item"].unique(), "title": "t", "maker": "m", "tags": "a|b", "age": "1"})
    items.assign(vector="[1, 2]").to_csv(folder / "items.csv", index=False)
    pd.DataFrame({"uid": log["uid"].unique(), "country": "de"}).to_csv(folder / "users.csv", index=False)
    changed = change(yaml.safe_dump(sound_mapping(), sort_keys=False, allow_unicode=True))
    changed = changed if isinstance(changed, bytes) else changed.encode()
    (folder / "mapping.yaml").write_bytes(changed)
    names = ("mapping.yaml", "log.csv", "items.csv", "users.csv", "feedback", "timezone")
    return Case(lambda: ids_read(folder), pairs(log["uid"], log["item"]) if known else None, names)


@mutation("mapping", "a key less", "another value", "another key", "a value twice", "an odd list")
def changed_mapping(rng, folder, name):
    def change(text: str) -> str:
        content = yaml.safe_load(text)
        path = pick(rng, paths_of(content))
        parent, key = parent_of(content, path), path[-1]
        value = parent[key]
        if name == "a key less":
            del parent[key]
        elif name == "another value":
            parent[key] = pick(rng, ODD_VALUES)
        elif name == "a value twice":
            parent[key] = [value, value]
        elif name == "an odd list":
            parent[key] = [pick(rng, ODD_VALUES), value]
        elif isinstance(parent, dict):
            odd = pick(rng, [other for other in ODD_VALUES if not isinstance(other, (list, dict))])
            parent[odd] = parent.pop(key)
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    return mapping_case(rng, folder, change)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
YAML_TEXTS = {
    "python tag": lambda text, key: text.replace(f"{key}: ", f"{key}: !!python/object/apply:os.getcwd [] #", 1),
    "tag of another type": lambda text, key: text.replace(f"{key}: ", f"{key}: !!binary ", 1),
    "unknown tag": lambda text, key: text.replace(f"{key}: ", f"{key}: !mine ", 1),
    "a bomb of aliases": lambda text, key: BOMB + text.replace(f"{key}: ", f"{key}: *a9 #", 1),
    "itself": lambda text, key: text.replace(f"{key}: ", f"{key}: &self [*self] #", 1),
    "a key twice": lambda text, key: text + f"\n{key}: 5\n",
    "tabs": lambda text, key: text.replace("  ", "\t"),
    "deep": lambda text, key: text.replace(f"{key}: ", f"{key}: " + "[" * 500 + "]" * 500 + " #", 1),
    "two documents": lambda text, key: text + "---\n" + text,
    "a list": lambda text, key: "- " + text.replace("\n", "\n  "),
    "nothing": lambda text, key: pick_first(("", "null", "5", "[]", "name: x"), key),
    "NUL": lambda text, key: text.replace(key, f"{key}\0", 1),
    "cut off": lambda text, key: text[: text.index(key) + len(key)],
    "a merge": lambda text, key: text.replace(f"{key}: ", "<<: ", 1),
    "a complex key": lambda text, key: text.replace(f"{key}: ", f"? [{key}]\n: ", 1),
}


def pick_first(values: tuple, key: str) -> str:
    return values[len(key) % len(values)]


@mutation("mapping as text", *YAML_TEXTS)
def mapping_text(rng, folder, name):
    key = pick(
        rng, ("name", "timezone", "file", "item_id", "timestamp_unit", "text", "more", "column", "type", "scale")
    )
    return mapping_case(rng, folder, lambda text: YAML_TEXTS[name](text, key))


@mutation("mapping's encoding", "utf-8-sig", "utf-16", "utf-32", "latin-1")
def mapping_encoding(rng, folder, name):
    return mapping_case(rng, folder, lambda text: text.replace("name: feed", "name: é").encode(name), known=True)


@mutation("mapping's bytes", *DAMAGE, "a pickle")
def mapping_bytes(rng, folder, name):
    return mapping_case(rng, folder, lambda text: damaged(rng, text.encode(), name))


# Histories


@functools.cache
def sound_checkpoint() -> dict[str, bytes]:
    """The files of a tiny model and its tokenizer."""
    vectors = np.random.default_rng(0).normal(size=(len(CATALOGUE), 8)).astype(np.float32)
    tokenizer = OneRecTokenizer.fit(CATALOGUE, vectors, ResidualQuantizer([8, 8, 8]))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_attention_heads": 2}
    sizes |= {"encoder_layers": 1, "decoder_layers": 1, "num_experts": 2, "history_items": 8, "session_items": 2}
    config = OneRecConfig.from_preset("debug", codebook_sizes=[8, 8, 8], **sizes)
    config.catalogue_fingerprint = tokenizer.catalogue_fingerprint()
    with tempfile.TemporaryDirectory() as folder:
        OneRecForConditionalGeneration(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@functools.cache
def sound_reward_model() -> dict[str, bytes]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "tower_hidden_size": 8, "num_hidden_layers": 1}
    model = OneRecRewardModel(OneRecRewardConfig(codebook_sizes=[8, 8, 8], history_items=8, session_items=2, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return {name: data for name, data in sound_checkpoint().items() if "model" not in name} | files


def load_recommender(folder: Path) -> Recommender:
    model = OneRecForConditionalGeneration.from_pretrained(folder).eval()
    return Recommender(model, OneRecTokenizer.from_pretrained(folder))


@functools.cache
def sound_recommender() -> Recommender:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in sound_checkpoint().items():
            (Path(folder) / name).write_bytes(data)
        return load_recommender(Path(folder))


def lists_of(results: list[dict]) -> list[list]:
    assert all(np.isfinite(row["scores"]).all() for row in results), "scores that are not finite"
    return [row["items"] for row in results]


HISTORIES = {
    "tuples": lambda rng, rows: [tuple(row) for row in rows],
    "arrays": lambda rng, rows: [
        np.array(row, dtype=pick(rng, ("int16", "int32", "uint16", "uint64"))) for row in rows
    ],
    "tensors": lambda rng, rows: [torch.tensor(row) for row in rows],
    "a Series": lambda rng, rows: pd.Series(rows, index=range(7, 7 + len(rows))),
    "Series of Series": lambda rng, rows: pd.Series([pd.Series(row, dtype=pick(rng, ("Int64", "O"))) for row in rows]),
    "Arrow arrays": lambda rng, rows: [pa.array(row, pa.int64()) for row in rows],
    "rows": lambda rng, rows: [{"history_item_ids": row} for row in rows],
    "a table": lambda rng, rows: pd.DataFrame({"history_item_ids": rows}),
    "a generator": lambda rng, rows: (iter(row) for row in rows),
    "a nested array": lambda rng, rows: np.array([[500, 501], [502, 503]])[:, None],
    "None among them": lambda rng, rows: [*rows, None],
    "None for all": lambda rng, rows: None,
    "None in one": lambda rng, rows: [*rows, [500, None]],
    "NaN in one": lambda rng, rows: [*rows, [500, float("nan")]],
    "NA in one": lambda rng, rows: [*rows, pd.Series([500, pd.NA], dtype="Int64")],
    "text": lambda rng, rows: [str(row) for row in rows],
    "text for all": lambda rng, rows: str(rows),
    "ids as text": lambda rng, rows: [[str(item) for item in row] for row in rows],
    "ids as floats": lambda rng, rows: [[float(item) for item in row] for row in rows],
    "one history alone": lambda rng, rows: [500, 501, 502],
    "nested lists": lambda rng, rows: [[row] for row in rows],
    "dicts": lambda rng, rows: [dict.fromkeys(row) for row in rows],
    "a set": lambda rng, rows: [set(row) for row in rows],
    "unknown ids": lambda rng, rows: [*rows, [500, int(rng.integers(540, 10**9))]],
    "huge ids": lambda rng, rows: [*rows, [500, pick(rng, (2**63, 2**64, 10**30, -(2**63) - 1, 500 + 2**64))]],
    "booleans": lambda rng, rows: [*rows, [True, False]],
    "numbers": lambda rng, rows: pick(rng, (5, 1.5, np.int64(5), np.array(5), torch.tensor(5))),
    "objects": lambda rng, rows: pick(rng, ([object()], [[object()]], [500, [500]], [[500, "501"]], [[500, 501.5]])),
    "bytes": lambda rng, rows: pick(rng, (b"500", [b"500"], [[b"500"]], [bytearray(b"5")])),
    "complex": lambda rng, rows: [[500 + 0j]],
    "date-times": lambda rng, rows: [pd.to_datetime(["2024-01-01"])],
    "other keys": lambda rng, rows: [{pick(rng, ("history", "items", "", 5, None)): row} for row in rows],
}
SAME = ("tuples", "tensors", "a Series", "Series of Series", "Arrow arrays", "rows", "a table", "a generator")


@mutation("histories", *HISTORIES)
def odd_histories(rng, folder, name):
    rows = [[int(item) for item in rng.choice(CATALOGUE, size=rng.integers(4))] for _ in range(rng.integers(1, 4))]
    given, options = HISTORIES[name](rng, rows), {"top_k": 3, "num_beams": 4}
    if name == "ids as text" and not any(rows):
        rows, given = [[500]], [["500"]]
    expected = lists_of(sound_recommender()(rows, **options)) if name in SAME else None
    if name in ("unknown ids", "huge ids") and rng.integers(2):
        options["unknown_items"] = "skip"
        expected = lists_of(sound_recommender()([*rows, [500]], **options))
    return Case(lambda: lists_of(sound_recommender()(given, **options)), expected, ("histories", "history_item_ids"))


ODD_OPTIONS = (
    "top_k",
    "num_beams",
    "batch_size",
    "blocked_items",
    "allowed_items",
    "unknown_items",
    "seed",
    "item_share",
)


@mutation("options of recommend", *ODD_OPTIONS)
def odd_options(rng, folder, name):
    options = {"top_k": 3, "num_beams": 4, name: pick(rng, (*ODD_VALUES, [500], ["500"], [500.0], {500}, [None, 500]))}
    return Case(lambda: lists_of(sound_recommender()([[500, 501]], **options)), None, (name,))


# Checkpoints


def checkpoint_case(folder: Path, changes: dict[str, bytes | None], reward: bool = False) -> Case:
    """A folder with some files changed, or left out where they are None."""
    for name, data in ((sound_reward_model() if reward else sound_checkpoint()) | changes).items():
        if data is not None:
            (folder / name).write_bytes(data)

    def read() -> list:
        if reward:
            scorer = SessionScorer.from_pretrained(folder)
            found = scorer.score([{"history": [0, 1]}], torch.tensor([[[2, 3]]]))
            assert np.isfinite(found.reward).all(), "rewards that are not finite"
            return scorer.tokenizer.item_ids.tolist()
        recommender = load_recommender(folder)
        lists_of(recommender([[500, 501], []], top_k=3))
        return recommender.tokenizer.item_ids.tolist()

    return Case(read, CATALOGUE, (folder.name, "weights", *changes))


@mutation(
    "configuration", "a field less", "another value", "another value, reward model", "huge", "huge, reward model"
)
def odd_configuration(rng, folder, name):
    reward = "reward" in name
    config = json.loads((sound_reward_model() if reward else sound_checkpoint())[CONFIG])
    field = pick(rng, config)
    if name == "a field less":
        del config[field]
    elif name.startswith("another value"):
        config[field] = pick(rng, ODD_VALUES)
    else:
        field = pick(rng, [key for key, value in config.items() if type(value) in (int, float, list)])
        sizes = [pick(rng, (10**7, 10**9, 10**18, -(10**9)))]
        config[field] = sizes * 3 if isinstance(config[field], list) else sizes[0]
    return checkpoint_case(folder, {CONFIG: json.dumps(config).encode()}, reward)


JSON_FILES = (CONFIG, "generation_config.json", "tokenizer_config.json", "tokenizer.json", "quantizer.json")
TOKENIZER_FILES = (*JSON_FILES[2:], "semantic_id_report.json", "item_index.parquet", "codebooks.safetensors")


@mutation("checkpoint's JSON", *JSON_FILES, "semantic_id_report.json")
def odd_json(rng, folder, name):
    content = json.loads(sound_checkpoint()[name])
    path = pick(rng, paths_of(content))
    if rng.integers(4) == 0:
        content = pick(rng, ODD_VALUES)
    elif rng.integers(2):
        parent_of(content, path)[path[-1]] = pick(rng, ODD_VALUES)
    else:
        del parent_of(content, path)[path[-1]]
    return checkpoint_case(folder, {name: json.dumps(content).encode()})


@mutation(
    "checkpoint's bytes", *(f"{name} {how}" for name in (WEIGHTS, *JSON_FILES, *TOKENIZER_FILES[3:]) for how in DAMAGE)
)
def damaged_checkpoint(rng, folder, name):
    file, how = name.split(" ", 1)
    return checkpoint_case(folder, {file: damaged(rng, sound_checkpoint()[file], how)})


@mutation("checkpoint's files", *(f"no {name}" for name in (WEIGHTS, CONFIG, *TOKENIZER_FILES)))
def missing_file(rng, folder, name):
    return checkpoint_case(folder, {name.removeprefix("no "): None})


TENSORS = {
    "wrong shape": lambda rng, tensor: torch.zeros([int(n) for n in rng.integers(0, 4, size=rng.integers(4))]),
    "NaN": lambda rng, tensor: torch.full_like(tensor, float("nan"), dtype=torch.float32),
    "infinite": lambda rng, tensor: torch.full_like(tensor, float("inf"), dtype=torch.float32),
    "another type": lambda rng, tensor: tensor.to(pick(rng, (torch.int64, torch.bool, torch.float64, torch.int8))),
}


@mutation("weights", *TENSORS, *(f"{name}, reward model" for name in TENSORS), "a header of 2^62 bytes", "a pickle")
def odd_weights(rng, folder, name):
    reward = "reward" in name
    data = (sound_reward_model() if reward else sound_checkpoint())[WEIGHTS]
    if name.startswith("a header"):
        return checkpoint_case(folder, {WEIGHTS: (2**62).to_bytes(8, "little") + data[8:]})
    if name == "a pickle":
        return checkpoint_case(folder, {WEIGHTS: damaged(rng, data, name)})
    tensors = load(data)
    place = pick(rng, sorted(tensors))
    tensors[place] = TENSORS[name.partition(",")[0]](rng, tensors[place]).contiguous()
    return checkpoint_case(folder, {WEIGHTS: save(tensors, {"format": "pt"})}, reward)


@mutation("index of shards", "outside", "another value", "no file", "damaged")
def odd_index(rng, folder, name):
    data = sound_checkpoint()[WEIGHTS]
    content = {"metadata": {"total_size": len(data)}, "weight_map": dict.fromkeys(load(data), "part.safetensors")}
    changes = {WEIGHTS: None, "part.safetensors": None if name == "no file" else data}
    if name == "outside":
        (folder.parent / "part.safetensors").write_bytes(data)
        outside = pick(rng, ("../part.safetensors", str((folder.parent / "part.safetensors").resolve())))
        content["weight_map"] = dict.fromkeys(load(data), outside)
    elif name == "another value":
        path = pick(rng, paths_of(content))
        parent_of(content, path)[path[-1]] = pick(rng, ODD_VALUES)
    text = json.dumps(content).encode()
    case = checkpoint_case(folder, changes | {INDEX: damaged(rng, text, "truncated") if name == "damaged" else text})
    if name == "outside":
        case.expected = "an error"
    return case


# The run


def work(connection, seed: int, folder: Path) -> None:
    """Runs the cases whose numbers come, in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    quiet()
    while True:
        number = connection.recv()
        with tempfile.TemporaryDirectory(dir=folder) as own:
            inner = Path(own) / "case"
            inner.mkdir()
            connection.send(attempt(number, seed, inner))


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)


class Worker:
    """A process that is replaced where a case hangs or ends it."""

    def __init__(self, seed: int, folder: Path):
        self.seed, self.folder, self.process = seed, folder, None

    def run(self, number: int) -> dict[str, Any]:
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.connection, other = context.Pipe()
            self.process = context.Process(target=work, args=(other, self.seed, self.folder), daemon=True)
            self.process.start()
            other.close()
        self.connection.send(number)
        kind, name = list(MUTATIONS)[number % len(MUTATIONS)]
        failed = {"number": number, "kind": kind, "mutation": name}
        try:
            if self.connection.poll(SECONDS):
                return self.connection.recv()
            failed |= {"outcome": "hang", "detail": f"more than {SECONDS} s"}
        except EOFError:
            failed |= {"outcome": "bare traceback", "detail": "the process ended"}
        self.close()
        return failed

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def finished(path: Path) -> list[dict[str, Any]]:
    """The cases of a file, of which a kill may have cut off the last line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    return [json.loads(line) for line in whole]


def table(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was tried and what came, by kind of input and mutation."""
    counts = Counter((case["kind"], case["mutation"], case["outcome"]) for case in cases)
    rows = []
    for kind, name in MUTATIONS:
        found = {outcome: counts[kind, name, outcome] for outcome in OUTCOMES}
        if sum(found.values()):
            rows.append({"kind": kind, "mutation": name, "tried": sum(found.values()), **found})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"| input | mutation | tried | {' | '.join(OUTCOMES)} |\n|---|---|{'---|' * (len(OUTCOMES) + 1)}")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the cases that are done are kept")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file of the table")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings, log = args.output_dir / "settings.json", args.output_dir / "cases.jsonl"
    described = {"seed": args.seed, "mutations": [" ".join(key) for key in MUTATIONS]}
    if settings.exists() and json.loads(settings.read_text(encoding="utf-8")) != described:
        parser.error(f"{args.output_dir} holds cases of another seed or of other mutations: give another folder.")
    settings.write_text(json.dumps(described), encoding="utf-8")
    cases = finished(log)
    done = {case["number"] for case in cases}
    sound_recommender(), sound_reward_model()  # before the processes part, which then need not build them
    with tempfile.TemporaryDirectory() as folder, log.open("a", encoding="utf-8") as file:
        worker = Worker(args.seed, Path(folder))
        for number in tqdm(range(args.cases), desc="trying", unit="case"):
            if number not in done:
                cases.append(worker.run(number))
                file.write(json.dumps(cases[-1]) + "\n")
                file.flush()
        worker.close()
    rows = table([case for case in cases if case["number"] < args.cases])
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for case in cases:
        if case["outcome"] not in SOUND:
            print(f"\ncase {case['number']}, {case['kind']}, {case['mutation']}: {case['outcome']}\n{case['detail']}")
    return rows


if __name__ == "__main__":
    main()
