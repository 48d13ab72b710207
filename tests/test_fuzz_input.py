"""Mutated input is read as it was written, or refused with its name: cases of the fuzzer, and the fuzzer itself."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))

import fuzz_input

KINDS = list(dict.fromkeys(kind for kind, _ in fuzz_input.MUTATIONS))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_passes_in_silence(tmp_path_factory, kind):
    numbers = [number for number, (other, _) in enumerate(fuzz_input.MUTATIONS) if other == kind]

    @given(st.sampled_from(numbers), st.integers(0, 2**32))
    @settings(max_examples=12, deadline=None, derandomize=True)
    def attempt(number, seed):
        case = fuzz_input.attempt(number, seed, tmp_path_factory.mktemp("case"))
        assert case["outcome"] in fuzz_input.SOUND, case["detail"]

    attempt()


def test_what_is_sound_is_read(tmp_path):
    rng = np.random.default_rng(0)
    for number, make in enumerate(
        [
            lambda folder: fuzz_input.mapping_case(rng, folder, lambda text: text, known=True),
            lambda folder: fuzz_input.checkpoint_case(folder, {}),
            lambda folder: fuzz_input.checkpoint_case(folder, {}, reward=True),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        case = make(tmp_path / str(number))
        assert case.read() == case.expected


def fuzz(folder, *flags):
    return fuzz_input.main(["--output_dir", str(folder), "--json", str(folder / "table.json"), *flags])


def test_the_fuzzer_goes_on_after_a_kill(tmp_path, capsys):
    whole = fuzz(tmp_path / "whole", "--cases", "12")
    lines = (tmp_path / "whole" / "cases.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "cases.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    assert fuzz(tmp_path / "cut", "--cases", "12") == whole
    assert (tmp_path / "cut" / "cases.jsonl").read_text() == "".join(lines)
    assert json.loads((tmp_path / "cut" / "table.json").read_text()) == whole
    assert sum(row["tried"] for row in whole) == 12
    assert "| ids in CSV | leading zeros | 1 | 1 | 0 | 0 | 0 | 0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fuzz(tmp_path / "cut", "--cases", "12", "--seed", "1")


def test_the_fuzzer_sees_what_goes_wrong(tmp_path, monkeypatch):
    def case(read):
        return lambda rng, folder: fuzz_input.Case(read, [("1", "01")], ("log.csv",))

    def fails(error):
        def read():
            raise error

        return read

    def ends():
        raise SystemExit

    def hangs():
        while True:
            pass

    odd = {
        "same": lambda: [("1", "01")],
        "changed": lambda: [("1", "1")],
        "named": fails(ValueError("log.csv is odd")),
        "nameless": fails(ValueError("odd")),
        "bare": fails(KeyError("log.csv")),
        "hang": hangs,
        "end": ends,
    }
    monkeypatch.setattr(fuzz_input, "MUTATIONS", {("odd", name): case(read) for name, read in odd.items()})
    monkeypatch.setattr(fuzz_input, "SECONDS", 1)
    rows = fuzz(tmp_path, "--cases", "14")
    found = {row["mutation"]: [name for name in fuzz_input.OUTCOMES if row[name]] for row in rows}
    assert found == {
        **{"same": ["read"], "changed": ["id changed"], "named": ["refused"]},
        **{"nameless": ["bare traceback"], "bare": ["bare traceback"], "hang": ["hang"], "end": ["bare traceback"]},
    }
    assert Counter(row["tried"] for row in rows) == {2: 7}
