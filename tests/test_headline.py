"""The headline over runs of several seeds, from made-up metrics files."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def entry(number, recall, rewards, kept=True):
    judges = ("reward_model", "independent_judge", "truth")[: len(rewards)]
    figures = {"round": number, "kept": kept, "recall@10": recall, "illegal_rate": 0.0, "kl_to_seed": number / 10}
    figures["judges"] = {judge: {"reward_mean": 1.0, "reward_max": 1.5} for judge in judges}
    if number:
        change = {
            judge: {f"reward_{kind}": {"relative": r, "interval": [r - 0.02, r + 0.02]} for kind in ("mean", "max")}
            for judge, r in zip(judges, rewards, strict=True)
        }
        figures["change"] = {
            "judges": change,
            "recall@10": {"relative": recall / 0.1 - 1, "interval": [-0.05, 0.05]},
            "coverage": {"relative": -0.05, "interval": [-0.06, -0.04]},
        }
    return figures


def write_run(folder, *alignment):
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"onerec": {}, "alignment": list(alignment)}))
    return str(folder)


@pytest.fixture
def headline(monkeypatch):
    """The script's main with the given arguments."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    import headline

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["headline.py", *arguments])
        headline.main()

    return run


def test_means_spreads_and_bars_of_the_last_kept_rounds(tmp_path, headline, capsys):
    seed = entry(0, 0.1, (0, 0, 0))
    runs = [
        write_run(tmp_path / "seed_0", seed, entry(1, 0.098, (0.1, 0.05, 0.03))),
        write_run(
            tmp_path / "seed_1",
            seed,
            entry(1, 0.099, (0.08, 0.035, 0.01)),
            entry(2, 0.05, (0.5, 0.5, 0.5), kept=False),
        ),
    ]
    headline(*runs, "--json", str(tmp_path / "headline.json"))
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "headline.json").read_text())
    assert written["runs"] == runs
    figures = {row["name"]: row for row in written["figures"]}
    judge = figures["independent judge, mean"]
    assert judge["values"] == [0.05, 0.035] and judge["intervals"][0] == pytest.approx([0.03, 0.07])
    assert judge["mean"] == pytest.approx(0.0425) and judge["spread"] == pytest.approx(0.015 / 2**0.5)
    assert figures["rounds kept"]["values"] == [1, 1] and figures["Recall@10, final"]["values"] == [0.098, 0.099]
    assert figures["Recall@10, seed model"]["values"] == [0.1, 0.1]
    assert figures["KL to the seed model [nats]"]["mean"] == pytest.approx(0.1)
    # The mean of the truth is above 0 in both runs, its interval in one of them only.
    holds = {name: row["holds"] for name, row in figures.items() if row["holds"] is not None}
    assert holds == {
        "independent judge, mean": True,
        "independent judge, max": True,
        "truth, mean": False,
        "truth, max": False,
        "Recall@10, change": True,
        "coverage, change": True,
        "illegal rate": True,
    }
    assert figures["reward model (trains), mean"]["mean"] == pytest.approx(0.09)
    assert "+5.0% [+3.0%, +7.0%]" in printed and "+4.2% ± 1.1%" in printed
    assert printed.count("MISSED") == 2 and "seed_0" in printed


def test_runs_without_truth_or_without_a_kept_round(tmp_path, headline, capsys):
    seed = entry(0, 0.1, (0, 0))
    runs = [
        write_run(tmp_path / "good", seed, entry(1, 0.1, (0.1, 0.09))),
        write_run(tmp_path / "none_kept", seed, entry(1, 0.05, (0.1, 0.09), kept=False)),
    ]
    headline(*runs)
    printed = capsys.readouterr().out
    assert "its bar does not apply" in printed
    assert "truth, mean" not in printed and "+4.5% ± 6.4%" in printed
    for folder, reason in (
        (str(tmp_path), f"{tmp_path} holds no metrics.json"),
        (write_run(tmp_path / "unaligned", seed), "no rounds of alignment"),
    ):
        with pytest.raises(SystemExit):
            headline(folder)
        assert reason in capsys.readouterr().err
