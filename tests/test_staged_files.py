"""Files appear whole, the telling one last, or not at all."""

import os

import pytest

from onerec_hf.staged_files import staged_file, staged_files


def test_files_are_moved_at_the_end_the_named_one_last(tmp_path, monkeypatch):
    target = tmp_path / "new" / "folder"
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, goal: (moved.append(goal.name), replace(source, goal)))
    with staged_files(target, last="config.json") as staging:
        for name in ("weights", "config.json", "tokenizer_config.json"):
            (staging / name).write_text(name)
        assert not (target / "weights").exists()
    assert moved == ["tokenizer_config.json", "weights", "config.json"]
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "tokenizer_config.json", "weights"]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "weights").write_text("old")
    with pytest.raises(RuntimeError), staged_files(tmp_path, last="weights") as staging:
        (staging / "weights").write_text("new")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("weights", "old")]


def test_a_single_file_takes_the_place_of_another_or_leaves_it(tmp_path):
    path = tmp_path / "table.parquet"
    with staged_file(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    with pytest.raises(RuntimeError), staged_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("table.parquet", "whole")]


def test_a_file_in_place_of_the_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"), staged_files(tmp_path / "file", last="x"):
        pass
