import importlib
import os
import re
import sys

import numpy as np
import pytest
from metrics_keys import undescribed

import onerec_hf.evaluation
from onerec_hf.reporting import Measured, Table, print_table, results_table, run_summary, write_report


def ranking(value):
    return {f"{m}@{c}": value * c / 10 for m in ("recall", "ndcg") for c in (5, 10, 50)} | {"coverage": 0.25}


OBJECTIVES = ("reward", "swt", "vtr", "wtr", "ltr", "click")
JUDGES = ("reward_model", "independent_judge", "truth")


def judged(value):
    figures = {f"{name}_{kind}": value * scale for name in OBJECTIVES for kind, scale in (("mean", 1.0), ("max", 1.5))}
    return figures | {f"{name}_interval": [0.9 * figure, 1.1 * figure] for name, figure in figures.items()}


def changes(gains):
    """Changes of the judges by their gains: +-0.01 around each."""
    return {
        "recall@10": {"relative": -0.015, "interval": [-0.0333, 0.004]},
        "judges": {
            judge: {
                f"{name}_{kind}": {"relative": gain, "interval": [gain - 0.01, gain + 0.01]}
                for name in OBJECTIVES
                for kind in ("mean", "max")
            }
            for judge, gain in zip(JUDGES, gains, strict=True)
        },
    }


def on_log(effective, difference):
    estimates = {"logged": 0.31, "snips": 0.321, "snips_interval": [0.3, 0.35]}
    estimates |= {"doubly_robust": 0.322, "doubly_robust_interval": [0.29, 0.36]}
    if difference:
        for name in ("snips", "doubly_robust"):
            estimates |= {f"{name}_difference": 0.0123, f"{name}_difference_interval": [0.0012, 0.0234]}
    facts = {"exposures": 4321, "effective_sample_size": effective, "mean_weight": 0.9, "clipped_share": 0.01}
    return facts | {"conclusive": effective >= 100, "heads": {"vtr": estimates}}


@pytest.fixture
def metrics():
    rates = {"intra_session_diversity": 0.61, "illegal_rate": 0.0, "duplicate_rate": 0.0}
    return {
        "dataset": {"name": "simulated", "users": 2000},
        "tokenizer": {"levels": [{"use": 1.0, "entropy": 6.9}, {"use": 0.9, "entropy": 6.5}], "collision_rate": 0.01},
        "model": {"parameters": 1_234_567},
        "onerec": ranking(0.0812) | rates,
        "baselines": {name: ranking(0.07) for name in ("popularity", "item_knn", "ease", "sasrec")},
        "reward_models": {
            name: {"swt_auc": 0.7301, "swt_gauc": 0.6402, "exposures": {"click_auc": 0.7503}}
            for name in ("reward_model", "independent_judge")
        },
        "alignment": [
            {"round": r, **ranking(0.0799 + r / 1000), **rates}
            | {"judges": {judge: judged(0.3 + r / 10) for judge in JUDGES}, "popular_item_share": 0.4}
            | {"kl_to_seed": r / 10, "kl_to_seed_interval": [r / 11, r / 9], "kept": True}
            | ({"change": changes((0.08 * r, 0.04 * r, 0.015 * r - 0.01))} if r else {})
            | {"on_log": on_log(250 - 100 * r, r)}
            for r in range(3)
        ],
        "timings": {"pretrain": 61.5},
        "environment": {"torch": "2"},
    }


@pytest.fixture
def arguments():
    return {
        "training_curves": {"Pre-training loss": [(step, 5 / (step + 1)) for step in range(40)], "empty": []},
        "code_use": [np.array([3, 0, 5]), np.array([4, 4])],
        "examples": [
            {
                "user": "u<1>",
                "history": [{"item": 7, "label": "cats & dogs"}],
                "recommendations": [{"item": 9, "label": "<script>", "score": -1.5}, {"item": 3, "score": -2.0}],
                "next_item": 3,
            }
        ],
        "settings": {"pretrain": {"epochs": 2, "codebook_sizes": [128] * 40}},
    }


class TestWriteReport:
    def test_is_complete_self_contained_and_escaped(self, tmp_path, metrics, arguments):
        page = write_report(tmp_path / "deep" / "report.html", metrics, **arguments).read_text(encoding="utf-8")
        assert os.listdir(tmp_path / "deep") == ["report.html"]
        assert page.count("<img ") == 6 and "first code" not in page
        assert not re.search(r'(src|href)="(?!data:|#)', page) and "url(" not in page and "@import" not in page
        assert "<script>" not in page and "&lt;script&gt;" in page and "cats &amp; dogs" in page
        for text in ("0.0812", "0.7301", "1,234,567", "(40 values)", "Simulated truth", 'class="hit"', "61.5"):
            assert text in page

    def test_semantic_ids_are_pictured(self, tmp_path, metrics, arguments):
        samples = [{"code": "<a_7>", "num_items": 21, "items": ["cats & dogs", "mice"]}]
        page = write_report(tmp_path / "r.html", metrics, **arguments, item_map=b"png", code_samples=samples)
        page = page.read_text(encoding="utf-8")
        assert page.count("<img ") == 7 and 'src="data:image/png;base64,cG5n"' in page
        assert "<td>&lt;a_7&gt;</td><td>21</td><td>cats &amp; dogs; mice</td>" in page

    def test_judges_are_side_by_side_with_intervals_and_changes(self, tmp_path, metrics, arguments):
        page = write_report(tmp_path / "r.html", metrics, **arguments).read_text(encoding="utf-8")
        groups = "".join(f'<th colspan="2">{name}</th>' for name in ("Reward model", "Independent judge"))
        groups += '<th colspan="2">Simulated truth</th>'
        assert page.count(groups) == len(OBJECTIVES)
        cells = "".join(
            f"<td>{value}<br><small>[{interval}]</small><br><small>{change}</small></td>"
            for change in ("+16.0% [+15.0%, +17.0%]", "+8.0% [+7.0%, +9.0%]", "+2.0% [+1.0%, +3.0%]")
            for value, interval in (("0.5000", "0.45, 0.55"), ("0.7500", "0.675, 0.825"))
        )
        assert page.count(f'<tr class=""><td>2</td>{cells}</tr>') == len(OBJECTIVES)
        assert "-1.5% [-3.3%, +0.4%]" in page and "<h3>click</h3>" in page
        assert "Round 2, mean reward: the reward model, which trains, says +16.0%" in page
        assert "not confirm" not in page

    def test_a_dropped_round_is_shown_and_is_not_what_the_run_ends_in(self, tmp_path, metrics, arguments):
        metrics["alignment"][2]["kept"] = False
        page = write_report(tmp_path / "r.html", metrics, **arguments).read_text(encoding="utf-8")
        # In the tables of rounds, of each objective, of the sample and of the log.
        assert page.count('<tr class="dropped"><td>2 (dropped)</td>') == 1 + len(OBJECTIVES) + 2
        assert "Round 2 was dropped" in page and "The run ends in round 1." in page
        # Round 1's: the truth has gained half a percent, less than its interval.
        assert '<div class="card"><b>+4.0%</b>' in page and '<div class="card"><b>+0.5%</b>' in page
        assert "Round 1, max reward" in page and "The simulated truth does not confirm a gain." in page

    def test_a_run_that_kept_no_round_is_not_called_aligned(self, tmp_path, metrics, arguments):
        metrics["alignment"] = [metrics["alignment"][0], metrics["alignment"][1] | {"kept": False}]
        page = write_report(tmp_path / "r.html", metrics, **arguments).read_text(encoding="utf-8")
        assert "The run ends in round 0." in page and "OneRec, aligned" not in page
        assert "OneRec, aligned" not in print_table(metrics)

    def test_the_log_says_when_it_is_too_small(self, tmp_path, metrics, arguments):
        page = write_report(tmp_path / "r.html", metrics, **arguments).read_text(encoding="utf-8")
        assert "<td>0.0123 [0.0012, 0.0234]</td>" in page and page.count("sample too small") == 1
        sentence = "Round 2: 4,321 logged exposures count as 50, fewer than 100. That is too small to conclude"
        assert sentence in page and sentence in print_table(metrics)

    def test_propensities_that_are_off_conclude_nothing(self, tmp_path, metrics, arguments):
        off = on_log(500, True) | {"mean_weight": 2.85, "conclusive": False}
        metrics["alignment"][1]["on_log"] = off
        page = write_report(tmp_path / "r.html", metrics, **arguments).read_text(encoding="utf-8")
        assert "Round 1: the mean weight is 2.85, where true propensities give 1." in page
        assert page.count("no: propensities off") == 1

    def test_reward_models_have_their_metrics_and_reliability_plots(self, tmp_path, metrics, arguments):
        plots = {"reward_model": {"sessions": b"a", "exposures": b"b"}, "independent_judge": {"sessions": b"c"}}
        page = write_report(tmp_path / "r.html", metrics, **arguments, reliability_plots=plots)
        page = page.read_text(encoding="utf-8")
        assert page.count("<img ") == 9
        row = "<td>Watch time (swt)</td><td>Reward model</td><td>0.7301</td><td>0.6402</td>"
        assert row in page and "<td>click</td><td>Reward model</td><td>0.7503</td>" in page

    def test_the_same_run_writes_the_same_bytes(self, tmp_path, metrics, arguments):
        first = write_report(tmp_path / "a.html", metrics, **arguments).read_bytes()
        assert first == write_report(tmp_path / "b.html", metrics, **arguments).read_bytes()

    def test_leaves_out_what_the_run_did_not_have(self, tmp_path):
        metrics = {"onerec": ranking(0.05) | {"intra_session_diversity": float("nan")}}
        page = write_report(tmp_path / "r.html", metrics, {}, [], [], {}).read_text(encoding="utf-8")
        assert "Rewards by" not in page and "Losses" not in page and page.count("<img ") == 1

    def test_a_failure_leaves_the_old_report(self, tmp_path):
        path = write_report(tmp_path / "r.html", {}, {}, [], [], {"seed": 1})
        before = path.read_bytes()
        with pytest.raises(UnicodeEncodeError):  # a lone surrogate cannot be encoded: the write itself fails
            write_report(path, {}, {}, [], [], {"seed": "\ud800"})
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["r.html"]


class TestPrintTable:
    def test_methods_and_rounds(self, metrics):
        text = print_table(metrics)
        lines = [line.split("  ")[0] for line in text.splitlines()]
        methods = ["OneRec, aligned", "OneRec, pre-trained", "Popularity", "Item-KNN", "EASE", "SASRec"]
        assert [line for line in lines if line in methods] == methods
        assert re.search(r"OneRec, aligned +0\.0812 +0\.4060 +0\.0812 +0\.2500", text)
        value = r"0\.5000 \[0\.45, 0\.55\]"
        assert re.search(rf"reward mean +2 +{value} +{value} +{value}", text)
        changed = [r"\+16\.0% \[\+15\.0%, \+17\.0%\]", r"\+8\.0% \[.*\]", r"\+2\.0% \[\+1\.0%, \+3\.0%\]"]
        assert re.search(" +".join(["change", *changed]), text)
        assert re.search(r"2 +0\.0819 +0\.2500 +0\.4000 +0\.2000 \[0\.182, 0\.222\]", text)
        assert "illegal rate 0," in text

    def test_what_did_not_fit_into_memory_is_said(self, tmp_path, metrics, arguments):
        metrics["skipped_baselines"] = {"ease": "EASE needs 257.1 GiB <more>"}
        assert "\nWithout EASE: EASE needs 257.1 GiB <more>.\n" in print_table(metrics)
        page = write_report(tmp_path / "r.html", metrics, **arguments).read_text(encoding="utf-8")
        assert page.count("Without EASE: EASE needs 257.1 GiB &lt;more&gt;.") == 1

    def test_without_alignment(self):
        assert "OneRec " in print_table({"onerec": ranking(0.05)}) and "aligned" not in print_table({"onerec": {}})


def test_one_table_in_three_forms():
    change = {"relative": 0.25, "interval": [0.1, 0.375]}
    figures = {"recall": 0.5, "recall_interval": [0.4, 0.6]}
    rows = [["a|b", Measured.of(figures, "recall", change)], ["c", Measured.of(figures, "none")], ["d", 1234]]
    table = Table(["policy", "recall"], rows)
    assert table.text().splitlines() == [
        "policy                     recall",
        "-" * 33,
        "a|b             0.5000 [0.4, 0.6]",
        "  change  +25.0% [+10.0%, +37.5%]",
        "c                               –",
        "d                           1,234",
    ]
    assert table.markdown().splitlines()[2] == "| a\\|b | 0.5000 [0.4, 0.6] +25.0% [+10.0%, +37.5%] |"
    cell = "0.5000<br><small>[0.4, 0.6]</small><br><small>+25.0% [+10.0%, +37.5%]</small>"
    assert f"<td>a|b</td><td>{cell}</td>" in table.html() and "<td>d</td><td>1,234</td>" in table.html()
    assert Table(["policy"], []).markdown() == ""


def test_the_schema_knows_keys_their_intervals_and_what_stands_for_many(metrics):
    known = {name: metrics[name] for name in ("onerec", "baselines", "alignment", "reward_models", "timings")}
    assert undescribed(known) == []
    known["onerec"] = {"recall": 0.1, "coverage_interval": [0, 1]}
    known["alignment"] = [{"judges": {"truth": {"vtr_median": 0.1}}}]
    known["timings"] = {"align": {"seconds": 1}}
    found = [".onerec.recall", ".alignment.0.judges.truth.vtr_median", ".timings.align"]
    assert undescribed(known) == found


def test_what_has_moved_is_found_at_its_former_place():
    with pytest.warns(FutureWarning, match="moved to onerec_hf.reporting"):
        assert onerec_hf.evaluation.write_report is write_report
    with pytest.raises(AttributeError, match="write_reports"):
        _ = onerec_hf.evaluation.write_reports
    sys.modules.pop("onerec_hf.model_cards", None)
    with pytest.warns(FutureWarning, match="moved to onerec_hf.reporting.model_cards"):
        cards = importlib.import_module("onerec_hf.model_cards")
    assert cards.push_to_hub is onerec_hf.reporting.push_to_hub


class TestRunSummary:
    def test_methods_with_their_sessions_and_users_with_names(self, metrics, arguments):
        def served(method, retriever, candidates=None, round=None, guided=False, ranker=None, truth=1.0):
            judges = {
                "reward_model": {"reward": 9.0},
                "independent_judge": {"reward": 2.0},
                "truth": {"reward": truth},
            }
            names = {"method": method, "retriever": retriever, "candidates": candidates, "ranker": ranker}
            weight = 8.0 if guided else None
            names |= {"round": round, "guided": guided, "guidance_weight": weight}
            return {**names, "judges": judges, "milliseconds": 10 * truth}

        metrics["alignment"][2]["kept"] = False
        metrics["served"] = [
            *(served("onerec", "beam", round=number, truth=1.1 + number / 10) for number in range(3)),
            served("onerec", "ranked_list", round=1, truth=0.5),
            served("onerec", "beam", 128, 1, guided=True, truth=1.7),
            served("onerec", "beam", 128, 2, guided=True, truth=1.9),
            served("ease", "ease", truth=1.01),
            served("cascade", "ease", 32, ranker="session", truth=1.5),
            served("cascade", "popularity", 32, ranker="session", truth=1.6),
            served("oracle", None, truth=3.0),
        ]
        examples = [
            {
                "user": f"u{number}",
                "history": [{"item": item, "label": f"title {item} " + "long " * 10} for item in range(9)],
                "recommendations": [{"item": item, "label": ""} for item in range(20, 30)],
            }
            for number in range(6)
        ]
        text = run_summary(metrics, examples)
        lines = text.split("\n")
        assert len(lines) <= 24 and max(map(len, lines)) <= 119
        header, _, *rows = lines[: lines.index("")]
        assert header.split()[:2] == ["Recall@10", "NDCG@10"] and "reward model" not in header
        found = {row[:30].strip(): row[30:].split() for row in rows}
        assert found["OneRec, aligned"][-3:] == ["2.0000", "1.2000", "12"]
        assert found["OneRec, pre-trained"][-3:] == ["2.0000", "1.1000", "11"]
        assert found["EASE"][-2] == "1.0100" and found["SASRec"][-3:] == ["–", "–", "–"]
        assert found["OneRec, guided by reward"][-2] == "1.7000"
        assert found["Popularity's 32, session by re"][-2] == "1.6000"  # the best cascade
        assert len(rows) == 2 + 4 + 2
        assert (
            lines[-6].startswith("User u0 took title 4 long")
            and lines[-5] == "  and is recommended 20, 21, 22, 23, 24"
        )

    def test_without_alignment(self):
        text = run_summary({"onerec": {"recall@10": 0.05}, "baselines": {"ease": {"recall@10": 0.04}}})
        assert [line.split() for line in text.split("\n")[2:]] == [["OneRec", "0.0500", "–"], ["EASE", "0.0400", "–"]]


def test_results_are_a_row_by_figure():
    truth = {"reward_mean": 1.5, "reward_mean_interval": [1.25, 1.75]}
    served = {
        "method": "ease",
        "retriever": "ease",
        "candidates": None,
        "ranker": None,
        "guided": False,
        "round": None,
    }
    of_log = {"items": 4, "feedback": {"like": {"mean": 0.5, "interval": [0.25, 0.75]}}}
    judges = {"truth": {"reward": 2.5, "interval": [2.0, 3.0]}}
    metrics = {
        "onerec": {"recall@10": 0.25},
        "alignment": [
            {"round": 0, "kept": True, "recall@10": 0.25, "recall@10_interval": [0.125, 0.375], "judges": {}},
            {"round": 1, "kept": False, "judges": {"truth": truth}, "change": {"recall@10": {"relative": -0.5}}},
        ],
        "baselines": {"ease": {"recall@10": 0.5, "num_parameters": 9}},
        "served": [served | {"recall": 0.1, "milliseconds": None, "judges": judges, "replay": of_log}],
    }
    table = results_table(metrics)
    rows = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    assert rows == [
        ["ranked", "onerec", 0, True, "recall@10", 0.25, 0.125, 0.375],
        ["ranked", "onerec", 1, False, "truth/reward_mean", 1.5, 1.25, 1.75],
        ["ranked", "ease", None, None, "recall@10", 0.5, None, None],
        ["ranked", "ease", None, None, "num_parameters", 9, None, None],
        ["served", "EASE, first items", None, None, "recall", 0.1, None, None],
        ["served", "EASE, first items", None, None, "replay/items", 4, None, None],
        ["served", "EASE, first items", None, None, "replay/feedback/like/mean", 0.5, 0.25, 0.75],
        ["served", "EASE, first items", None, None, "truth/reward", 2.5, 2.0, 3.0],
    ]
