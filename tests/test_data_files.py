"""What stands in files is what is read: ids, categories, lists and times, in parts, archives and odd tables."""

import gzip
import io
import json
import logging
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf import OneRecTokenizer
from onerec_hf.data import DataError, load_saved_feed, read_hub_dataset, read_table, save_feed
from onerec_hf.data.data_files import read_columns
from onerec_hf.data.readers import source_paths
from onerec_hf.data.schema import CATEGORY, ID, NUMBER, TEXT, canonical_lists

START = 1_700_000_000


def log_frame(**changes):
    frame = {"uid": [1, 1, 2, 2, 3, 3], "item": [1, 2, 3, 1, 2, 3], "time": [START + 60 * step for step in range(6)]}
    return pd.DataFrame(frame | changes)


def read(folder, file="log.csv", **changes):
    """A feed of `file`; changes update the mapping's sections."""
    columns = {"user_id": "uid", "item_id": "item", "timestamp": "time"}
    mapping = {"interactions": {"file": file, "columns": columns} | changes.pop("interactions", {}), **changes}
    (folder / "mapping.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    return read_table(folder, folder / "mapping.yaml")


def write_parts(folder, name, *parts):
    """A folder of Parquet files, as Spark writes them."""
    (folder / name).mkdir()
    for number, part in enumerate(parts):
        part = part if isinstance(part, pa.Table) else pa.Table.from_pandas(part, preserve_index=False)
        pq.write_table(part.replace_schema_metadata(None), folder / name / f"part-{number:05d}.parquet")
    (folder / name / "_SUCCESS").touch()


def ids_of_csv(folder, texts):
    pd.DataFrame({"id": texts}).to_csv(folder / "ids.csv", index=False)
    return read_columns(folder / "ids.csv", ["id"], {"id": ID})["id"]


@pytest.mark.parametrize(
    "texts",
    [
        ["0108775015", "0108775044"],
        ["1", "01", "001", "2"],
        ["12e3", "7e1", "44"],
        ["0047583311587E590003", "12"],
        ["123.0", "124.0"],
        ["True", "False"],
        ["inf", "1"],
        ["NA", "null", "None"],
        ["0x10", "+5", "-0"],
        [str(2**63), "-7"],
        [str(2**64 + 1), "5"],
        [" 1", "1"],
    ],
)
def test_ids_stay_what_they_are(tmp_path, texts):
    assert ids_of_csv(tmp_path, texts).tolist() == texts


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
@settings(max_examples=30, deadline=None)
def test_integer_ids_are_integers(tmp_path_factory, numbers):
    found = ids_of_csv(tmp_path_factory.mktemp("ids"), numbers)
    assert found.dtype == np.int64 and found.tolist() == numbers


ODD_TEXT = st.text(st.sampled_from("0123456789.-+eExX \"',;|aNn\n"), min_size=1).filter(
    lambda text: text not in ("nan", "NaN") and text.strip("\r\n")
)


@given(st.lists(ODD_TEXT, min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_no_id_or_category_changes(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    pd.DataFrame({"id": texts, "c": texts}).to_csv(folder / "log.csv", index=False)
    found = read_columns(folder / "log.csv", ["id", "c"], {"id": ID, "c": CATEGORY})
    assert found["id"].astype("str").tolist() == texts and found["c"].tolist() == texts


def test_numbers_are_what_their_column_says(tmp_path):
    frame = pd.DataFrame({"n": ["1", " 2", ""], "f": ["0.5", "1e-3", "-inf"], "b": ["True", "false", ""]})
    frame.assign(t=["1", "2", "3"], w=["1", "x", ""]).to_csv(tmp_path / "log.csv", index=False)
    kinds = {"n": NUMBER, "f": NUMBER, "b": NUMBER, "t": TEXT, "w": NUMBER}
    found = read_columns(tmp_path / "log.csv", list(kinds), kinds)
    np.testing.assert_array_equal(found["n"], [1, 2, np.nan])
    assert found["f"].tolist() == [0.5, 1e-3, -np.inf] and found["b"].tolist() == [True, False, None]
    assert found["t"].tolist() == ["1", "2", "3"] and found["w"].tolist()[:2] == ["1", "x"]


@pytest.mark.parametrize(
    ("log", "name"), [("_delta_log/00000.json", "Delta Lake"), ("metadata/v1.metadata.json", "Iceberg")]
)
@pytest.mark.parametrize("remote", [False, True])
def test_files_that_hold_deleted_rows_are_not_read(tmp_path, log, name, remote):
    write_parts(tmp_path, "clicks", log_frame())
    assert len(read(tmp_path, "clicks").interactions) == 6
    (tmp_path / "clicks" / log).parent.mkdir()
    (tmp_path / "clicks" / log).write_text("{}")
    with pytest.raises(DataError, match=f"clicks: is a table of {name}.*as plain Parquet"):
        if remote:
            source_paths({"file": "clicks"}, f"file://{tmp_path}", "mapping.yaml")
        else:
            read(tmp_path, "clicks")
    # Files that are named are read as they are.
    assert len(read(tmp_path, "clicks/*.parquet").interactions) == 6


BIG = 1_234_567_890_123_456_789


@pytest.mark.parametrize("kind", ["csv", "parquet", "hub"])
def test_large_integers_with_gaps_stay_exact(tmp_path, kind):
    request = pd.array([BIG, BIG + 1, pd.NA, BIG, BIG + 1, BIG], dtype="Int64")
    frame = log_frame(req=request)
    items = pd.DataFrame({"item": [1, 2, 3], "author": pd.array([BIG, BIG + 1, pd.NA], dtype="Int64")})
    columns = {"user_id": "uid", "item_id": "item", "timestamp": "time", "session_id": "req"}
    if kind == "hub":
        (tmp_path / "set").mkdir()
        frame.to_parquet(tmp_path / "set" / "train.parquet", index=False)
        (tmp_path / "mapping.yaml").write_text(yaml.safe_dump({"interactions": {"columns": columns}}))
        feed = read_hub_dataset(str(tmp_path / "set"), tmp_path / "mapping.yaml")
    else:
        for name, table in (("log", frame), ("items", items)):
            write = table.to_csv if kind == "csv" else table.to_parquet
            write(tmp_path / f"{name}.{kind}", index=False)
        section = {"file": f"items.{kind}", "columns": {"item_id": "item"}, "categorical": ["author"]}
        feed = read(tmp_path, f"log.{kind}", interactions={"columns": columns}, items=section)
        assert feed.items["author"].tolist()[:2] == [str(BIG), str(BIG + 1)] and feed.items["author"].isna()[2]
    found = feed.interactions["session_id"]
    assert found.dropna().tolist() == [BIG, BIG + 1, BIG, BIG + 1, BIG] and found.isna().sum() == 1


def test_floats_that_lost_digits_are_refused(tmp_path):
    columns = {"user_id": "uid", "item_id": "item", "timestamp": "time", "session_id": "req"}
    log_frame(req=[5.0, np.nan, float(BIG), 1.0, 2.0, 3.0]).to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="'session_id' has ids that were rounded as floats, first at row 2"):
        read(tmp_path, "log.parquet", interactions={"columns": columns})


def test_ids_without_a_sign_are_text_beyond_63_bits(tmp_path):
    log_frame(uid=np.arange(6, dtype=np.uint64) // 2 + np.uint64(2**63)).to_parquet(tmp_path / "log.parquet")
    assert read(tmp_path, "log.parquet").interactions["user_id"].iloc[-1] == str(2**63 + 2)
    codes = np.array([[0], [1]])
    for ids in (np.array([1, 2**63], dtype=np.uint64), [1, 2**63]):
        with pytest.raises(ValueError, match=f"row 1 holds {2**63}"):
            OneRecTokenizer.from_semantic_ids(ids, codes, codebook_sizes=[2])


def test_a_csv_of_a_data_set_repository_is_read_as_text_too(tmp_path):
    (tmp_path / "set").mkdir()
    log_frame(item=["NA", "01", "1"] * 2).to_csv(tmp_path / "set" / "train.csv", index=False)
    columns = {"user_id": "uid", "item_id": "item", "timestamp": "time"}
    (tmp_path / "mapping.yaml").write_text(yaml.safe_dump({"interactions": {"columns": columns}}))
    feed = read_hub_dataset(str(tmp_path / "set"), tmp_path / "mapping.yaml")
    assert sorted(feed.items["item_id"]) == ["01", "1", "NA"] and feed.interactions["user_id"].dtype == np.int64


def test_ids_of_several_tables_are_of_one_kind(tmp_path):
    columns = {"user_id": "uid", "item_id": "item", "timestamp": "time", "session_id": "req"}
    log_frame(uid=[10, 11] * 3, req=5).to_csv(tmp_path / "log_1.csv", index=False)
    log_frame(uid=["x", "10"] * 3, req=None).to_csv(tmp_path / "log_2.csv", index=False)
    pd.DataFrame({"item": [1, 2, 3, "04"], "a": ["1", "", "2", "x"]}).to_csv(tmp_path / "items.csv", index=False)
    pd.DataFrame({"uid": [10, 11], "country": ["01", "1"]}).to_csv(tmp_path / "users.csv", index=False)
    feed = read(
        tmp_path,
        "log_*.csv",
        interactions={"columns": columns},
        items={"file": "items.csv", "columns": {"item_id": "item"}, "categorical": ["a"]},
        users={"file": "users.csv", "columns": {"user_id": "uid"}, "categorical": ["country"]},
    )
    assert feed.interactions["user_id"].value_counts().to_dict() == {"10": 6, "11": 3, "x": 3}
    assert feed.items["item_id"].tolist() == ["1", "2", "3", "04"] and feed.users["user_id"].tolist() == ["10", "11"]
    assert feed.users["country"].tolist() == ["01", "1"] and feed.items["a"].dropna().tolist() == ["1", "2", "x"]
    save_feed(feed, tmp_path / "saved")
    pd.testing.assert_frame_equal(load_saved_feed(tmp_path / "saved").interactions, feed.interactions)


def test_a_mapping_can_state_an_ids_type(tmp_path):
    log_frame().to_parquet(tmp_path / "log.parquet")
    columns = {"user_id": "uid", "item_id": {"column": "item", "type": "string"}, "timestamp": "time"}
    assert read(tmp_path, "log.parquet", interactions={"columns": columns}).items["item_id"].tolist() == [
        "1",
        "2",
        "3",
    ]
    log_frame(item=["1", "02", "3"] * 2).to_csv(tmp_path / "log.csv", index=False)
    columns["item_id"]["type"] = "integer"
    with pytest.raises(
        DataError, match="log.csv: column 'item' is no integer as it is written, first at row 1 .*'02'"
    ):
        read(tmp_path, interactions={"columns": columns})
    columns["item_id"]["type"] = "float"
    with pytest.raises(DataError, match="'interactions.columns.item_id' must be a column"):
        read(tmp_path, interactions={"columns": columns})


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["['a', 'b']", "['c']", "[]"], [["a", "b"], ["c"], []]),
        (['["a", "b"]', '["c", null]', ""], [["a", "b"], ["c"], []]),
        (["a|b, c", "b", None], [["a", "b, c"], ["b"], []]),
        (["a;b", " b ; c", "; "], [["a", "b"], ["b", "c"], []]),
        (["a, b", "b,c", "a"], [["a", "b"], ["b", "c"], ["a"]]),
        (['{a,"b, c"}', "{b}", "{}"], [["a", "b, c"], ["b"], []]),
        (["[1 2]", "[2, 3]", "[4.0]"], [["1", "2"], ["2", "3"], ["4"]]),
        ([1.0, np.nan, 3.0], [["1"], [], ["3"]]),
        (["1.0", "", "3"], [["1"], [], ["3"]]),
        (["1.10", "1.0", "2"], [["1.10"], ["1.0"], ["2"]]),
        ([np.array([1.0, np.nan]), ["a", None], ("b",)], [["1"], ["a"], ["b"]]),
    ],
)
def test_lists_as_people_write_them(cells, expected):
    assert canonical_lists(pd.Series(cells, dtype=object), "tags", "items.csv").tolist() == expected


@given(st.lists(st.lists(st.text(min_size=1).filter(lambda t: t == t.strip()), max_size=3), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_lists_as_json_or_python_come_back(lists):
    for write in (json.dumps, str):
        assert canonical_lists(pd.Series([write(tags) for tags in lists]), "tags", "items.csv").tolist() == lists


def test_what_is_no_list_is_refused(tmp_path):
    with pytest.raises(DataError, match="items.csv: column 'tags' holds what is no list, first at row 1"):
        canonical_lists(pd.Series(["a", '{"a": 1}']), "tags", "items.csv")
    log_frame().to_csv(tmp_path / "log.csv", index=False)
    pd.DataFrame({"item": [1, 2, 3], "tags": [["a"], ["b"], ["c"]]}).to_parquet(tmp_path / "items.parquet")
    items = {"file": "items.parquet", "columns": {"item_id": "item"}, "categorical": ["tags"]}
    with pytest.raises(DataError, match="'tags' holds lists .* row 0 .* multi_categorical"):
        read(tmp_path, items=items)


def test_embeddings_may_be_text(tmp_path):
    log_frame().to_csv(tmp_path / "log.csv", index=False)
    pd.DataFrame({"item": [1, 2, 3], "v": ["[0.5, 1]", "[1 2]", "[3e0, 4]"]}).to_csv(
        tmp_path / "items.csv", index=False
    )
    feed = read(tmp_path, items={"file": "items.csv", "columns": {"item_id": "item"}, "embedding": "v"})
    assert np.stack(feed.items["v"]).tolist() == [[0.5, 1.0], [1.0, 2.0], [3.0, 4.0]]


def test_an_item_is_known_by_its_text_or_else_by_what_there_is(tmp_path):
    log_frame().to_csv(tmp_path / "log.csv", index=False)
    frame = {"item": [1, 2, 3], "title": ["Film", "", ""], "tags": ["a|b", "c", ""], "maker": ["x", "", ""]}
    pd.DataFrame(frame).to_csv(tmp_path / "items.csv", index=False)
    roles = {"text": "title", "categorical": ["maker"], "multi_categorical": ["tags"]}
    feed = read(tmp_path, items={"file": "items.csv", "columns": {"item_id": "item"}, **roles})
    assert [feed.item_name(index) for index in range(3)] == ["Film", "tags c", "item 3"]


@pytest.mark.parametrize(("unit", "per_second"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_the_unit_of_times_is_told_from_them(tmp_path, caplog, unit, per_second):
    frame = log_frame()
    frame["time"] *= per_second
    frame.to_csv(tmp_path / "log.csv", index=False)
    with caplog.at_level(logging.WARNING):
        feed = read(tmp_path)
    assert sorted(feed.interactions["timestamp"]) == log_frame()["time"].tolist()
    assert (f"timestamp_unit: {unit}" in caplog.text) == (unit != "s")
    for other in {"s", "ms", "us", "ns"} - {unit}:
        with pytest.raises(DataError, match=f"2023-11-14 in {unit}, but timestamp_unit is {other}"):
            read(tmp_path, interactions={"timestamp_unit": other})


def test_times_of_no_date_are_seconds_and_sentinels_are_named(tmp_path, caplog):
    log_frame(time=[1, 2, 3, 4, 5, 6]).to_csv(tmp_path / "log.csv", index=False)
    assert read(tmp_path).interactions["timestamp"].max() == 6
    dates = [f"2024-01-0{day}T00:00:00Z" for day in range(1, 7)]
    log_frame(time=dates).to_csv(tmp_path / "log.csv", index=False)
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path).interactions["timestamp"].max() == 1704499200
    assert "timestamp_unit: iso" in caplog.text
    times = log_frame()["time"].tolist()
    for sentinel in (253402300799999, -62135596801):
        log_frame(time=[*times[:4], sentinel, times[5]]).to_csv(tmp_path / "log.csv", index=False)
        with pytest.raises(DataError, match=f"'time' holds what is no date of a log .* row 4 .*{sentinel}"):
            read(tmp_path)
    log_frame(time=[*times[:4], -1, times[5]]).to_csv(tmp_path / "log.csv", index=False)
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path).interactions) == 6
    assert "column 'time' is -1.0 in 1 of 6 rows, first at row 4" in caplog.text or "is -1 in 1" in caplog.text
    log_frame(time=[True, False] * 3).to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="'time' holds true and false where times are needed, first at row 0"):
        read(tmp_path, "log.parquet")
    log_frame(time=[*map(str, times[:4]), "-", ""]).to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(DataError, match="'time' has dtype str where times are needed, first at row 4 .*'-' .1 of 6"):
        read(tmp_path)


def test_parts_of_a_table(tmp_path):
    frame = log_frame(like=[1.0, 0, 1, 0, 1, 0])
    nulls = pa.Table.from_pandas(frame[3:]).set_column(3, "like", pa.nulls(3))
    write_parts(tmp_path, "log.parquet", frame[:0], frame[:3], nulls)
    for file in ("log.parquet", "log.parquet/*.parquet", str(tmp_path / "log.parquet")):
        found = read(tmp_path, file, interactions={"feedback": {"like": "like"}}).interactions
        assert len(found) == 6 and found["like"].isna().sum() == 3
    frame[:3].to_csv(tmp_path / "log [2024].csv", index=False)
    frame[3:].to_csv(tmp_path / "LOG.CSV", index=False)
    names = ["log [2024].csv", "LOG.CSV", "./LOG.CSV", "*.CSV"]
    assert len(read(tmp_path, names).interactions) == 6
    for file in ("", None, "none.csv"):
        with pytest.raises(DataError, match="no file matches|needs 'file'"):
            read(tmp_path, file)


def test_archives_are_read_and_broken_ones_are_named(tmp_path):
    text = log_frame().to_csv(index=False).encode()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("log.csv", text)
        archive.writestr("__MACOSX/._log.csv", b"\0")
    parquet = io.BytesIO()
    log_frame().to_parquet(parquet)
    whole = {"log.csv.gz": gzip.compress(text), "log.csv.zip": zipped.getvalue(), "log.parquet": parquet.getvalue()}
    packed = io.BytesIO()
    with pa.output_stream(packed, compression="zstd") as stream:
        stream.write(text)
    whole["log.csv.zst"] = packed.getvalue() if not packed.closed else b""
    for name, data in whole.items():
        if data:
            (tmp_path / name).write_bytes(data)
            assert len(read(tmp_path, name).interactions) == 6
        for broken in (data[: len(data) // 2], text, b"<html>404</html>"):
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(DataError, match=name):
                read(tmp_path, name)


def test_an_encrypted_archive_and_text_that_is_none_are_named(tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("log.csv", log_frame().to_csv(index=False))
    data = bytearray(packed.getvalue())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(mark) + flags] |= 1
    (tmp_path / "log.csv.zip").write_bytes(data)
    with pytest.raises(DataError, match="log.csv.zip: cannot be read: .* is encrypted"):
        read(tmp_path, "log.csv.zip")
    table = pa.Table.from_pandas(log_frame(time="2024-01-01"), preserve_index=False)
    pq.write_table(table, tmp_path / "log.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(data.replace(b"2024-01-01", b"\xff024-01-01"))
    with pytest.raises(DataError, match="log.parquet: is not written in utf-8"):
        read(tmp_path, "log.parquet")


def test_a_mapping_of_other_values_is_named(tmp_path):
    log_frame().to_csv(tmp_path / "log.csv", index=False)
    pd.DataFrame({"item": [1, 2, 3], "t": "x"}).to_csv(tmp_path / "items.csv", index=False)
    columns = {"user_id": "uid", "item_id": "item", "timestamp": "time"}
    items = {"file": "items.csv", "columns": {"item_id": "item"}}
    for place, changes in {
        "interactions.columns.user_id": {"interactions": {"columns": columns | {"user_id": ["uid"]}}},
        "interactions.feedback.view": {"interactions": {"feedback": {"view": ["time"]}}},
        "interactions.feedback.view.column": {"interactions": {"feedback": {"view": {"column": ["time"]}}}},
        "interactions.file": {"interactions": {"file": "log\0.csv"}},
        "items.text": {"items": items | {"text": ["t"]}},
        "items.categorical": {"items": items | {"categorical": [["t"]]}},
        "timezone": {"timezone": ["UTC"]},
    }.items():
        with pytest.raises(DataError, match=f"mapping.yaml: '{place}' must be text or a number, got"):
            read(tmp_path, **changes)
    typed = columns | {"user_id": {"column": "uid", "type": ["string"]}}
    with pytest.raises(DataError, match="mapping.yaml: 'interactions.columns.user_id' must be a column"):
        read(tmp_path, interactions={"columns": typed})
    for text in ("[" * 500 + "]" * 500, "name: !!binary |\n  AA==\n"):
        (tmp_path / "mapping.yaml").write_text(text)
        with pytest.raises(DataError, match="mapping.yaml"):
            read_table(tmp_path, tmp_path / "mapping.yaml")


def test_odd_tables_are_read_or_named(tmp_path):
    frame = log_frame()
    for delimiter in (";", "\t"):
        frame.to_csv(tmp_path / "log.csv", index=False, sep=delimiter)
        assert len(read(tmp_path).interactions) == 6
    refused = {
        "header": frame.to_csv(index=False, header=False).encode(),
        "utf-8": frame.assign(uid="é").to_csv(index=False).encode("latin-1"),
        "UTF-16": frame.to_csv(index=False).encode("utf-16"),
        "a quote is opened in row 4": frame.to_csv(index=False).replace("\n3,2", '\n"3,2').encode(),
        "Row #3": frame.to_csv(index=False).replace("1,2,", "1,2,5,").encode(),
        "'time' stands there 2 times": frame.assign(other=1).to_csv(index=False, header=[*frame, "time"]).encode(),
    }
    for part, data in refused.items():
        (tmp_path / "log.csv").write_bytes(data)
        with pytest.raises(DataError, match=f"log.csv.*{part}"):
            read(tmp_path)
    frame.to_csv(tmp_path / "log.csv", index=False)
    (tmp_path / "mapping.yaml").write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(DataError, match="mapping.yaml: is not written in utf-8"):
        read_table(tmp_path, tmp_path / "mapping.yaml")
