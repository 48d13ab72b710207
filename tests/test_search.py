"""The hyper-parameter search in debug size: what a kill leaves, what is written, and what spaces must be."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from onerec_hf.evaluation import EASE
from onerec_hf.stages import parse_recipe_arguments, run_search, search
from onerec_hf.stages.search import Budget
from onerec_hf.stages.search_space import SearchedField, present_values, read_space

pytest.importorskip("optuna")
ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes" / "quickstart" / "debug.yaml"
SPACE = {
    "item_knn": {
        "neighbours": {"low": 1, "high": 100, "log": True},
        "half_life": {"choices": [None, 2.0]},
        "shrinkage": {"low": 10.0, "high": 20.0},
    },
    "ease": {"regularization": {"low": 1.0, "high": 500.0, "log": True}},
    "fused": {"weights.sasrec": {"low": 0.1, "high": 10.0, "log": True}},
    "onerec": {"model.dropout": {"low": 0.0, "high": 0.3}, "codebook_sizes": {"choices": [[8, 8, 8]]}},
}


class Kill(BaseException):
    """Ends a search where it is, as a signal does: nothing is written any more."""


@pytest.fixture
def arguments(tmp_path):
    threads = torch.get_num_threads()
    flags = ["--config", str(CONFIG), "--output_dir", str(tmp_path / "search"), "--threads", "1"]
    short = ["--pretrain", '{"max_steps": 3, "learning_rate": 3.0e-3}', "--pretrain_recent", '{"max_steps": 1}']
    yield lambda *more: parse_recipe_arguments([*flags, *short, *more])
    torch.set_num_threads(threads)


@pytest.fixture
def space(tmp_path):
    def write(content):
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_killed_search_goes_on_and_its_best_options_are_a_part_of_a_recipe(arguments, space, monkeypatch, caplog):
    args, path, measured, at = arguments(), space(SPACE), [], {"killed": 3, "raised": 5}
    folder, figures = args.output_dir, search._Trials.figures

    def measure(self, method, args, key):
        measured.append(key)
        assert args.evaluation_split == "validation"
        if len(measured) == at["killed"]:
            raise Kill
        if len(measured) == at["raised"]:
            raise RuntimeError("no luck")
        return figures(self, method, args, key)

    monkeypatch.setattr(search._Trials, "figures", measure)
    with pytest.raises(Kill):
        run_search(args, path, ["item_knn"], Budget(4, 10))
    before = table(folder / "item_knn")
    assert [row["state"] for row in before] == ["complete", "complete"]
    run_search(args, path, ["item_knn"], Budget(4, 10))
    rows = table(folder / "item_knn")
    assert rows[:2] == before and len(measured) == 5
    assert [row["state"] for row in rows] == ["complete", "complete", "killed", "complete", "failed"]
    fields = list(SPACE["item_knn"])
    assert {name: rows[2][name] for name in fields} == {name: rows[3][name] for name in fields}
    assert measured[2] == measured[3] and rows[4]["error"] == "RuntimeError: no luck"
    # The first trial has the recipe's settings; what the space does not hold of them is left out of its row.
    assert rows[0]["neighbours"] == rows[0]["half_life"] == rows[0]["shrinkage"] == ""
    assert "reads the validation split alone" in caplog.text

    run_search(args, path, ["item_knn"], Budget(4, 10))
    assert len(measured) == 5
    with pytest.raises(ValueError, match=r"searched with other settings \(options\)"):
        run_search(replace(args, baselines={"item_knn": {"shrinkage": 1.0}}), path, ["item_knn"], Budget(5, 10))

    fitted, fit = [], EASE.fit
    monkeypatch.setattr(EASE, "fit", lambda self, *given: fitted.append(self.regularization) or fit(self, *given))
    run_search(args, path, ["fused", "ease", "onerec"], Budget(2, 10))
    ease, fused = (json.loads((folder / name / "best.json").read_text()) for name in ("ease", "fused"))
    drawn = float(table(folder / "ease")[1]["regularization"])
    # Of the search of EASE, then of the fused one: with the recipe's options, and with the best.
    best = ease["options"].get("regularization", 300.0)
    assert fitted == pytest.approx([300.0, drawn, 300.0, *([best] if best != 300.0 else [])])
    fragment = yaml.safe_load((folder / "best.yaml").read_text())
    assert fragment["baselines"]["fused"] == fused["options"] and fragment["baselines"]["ease"] == ease["options"]
    assert fragment["baselines"]["sasrec"] == args.baselines["sasrec"]  # which was not searched
    merged = {**yaml.safe_load(CONFIG.read_text()), **fragment, "output_dir": str(folder)}
    (folder / "merged.yaml").write_text(yaml.safe_dump(merged))
    assert parse_recipe_arguments(["--config", str(folder / "merged.yaml")]).baselines == fragment["baselines"]
    assert [row["state"] for row in table(folder / "onerec")] == ["complete"] * 2
    assert not list((folder / "onerec" / "trials").iterdir())


def test_spaces_name_what_is_wrong(arguments, space):
    args = arguments()
    for content, message in [
        ({"ease": {"lambda": {"low": 1, "high": 2}}}, "ease.lambda: baselines.ease has 'lambda', which EASE"),
        ({"ease": {"regularization": {"low": "1e-3", "high": 2}}}, "ease.regularization.low must be a number"),
        ({"ease": {"regularization": {"low": 0, "high": 2, "log": True}}}, "ease.regularization.low is 0"),
        ({"ease": {"regularization": {"low": 3, "high": 2}}}, "ease.regularization.low is 3, above high: 2"),
        ({"ease": {"regularization": [1, 2]}}, "ease.regularization must be {low, high}"),
        ({"ease": {"half_life": {"choices": []}}}, "ease.half_life.choices must be a list"),
        ({"ease": {}}, "has no fields of ease"),
        ({"fused": {"weights.item_knn": {"low": 1, "high": 2}}}, "fused.weights.item_knn: .* which is no member"),
        ({"fused": {"members": {"choices": [["ease"]]}}}, "fused.members is not searched"),
        ({"onerec": {"min_history_items": {"choices": [1]}}}, "onerec.min_history_items is not searched"),
        (
            {"onerec": {"pretrain.lerning_rate": {"low": 1.0, "high": 2.0}}},
            "onerec.pretrain.lerning_rate: .* 'learning_",
        ),
        ({"onerec": {"model.item_share": {"low": 2.0, "high": 3.0}, "x": 1}}, "onerec.x must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_space(space(content), list(content), args)
    with pytest.raises(ValueError, match="no method 'als' to search; there are popularity"):
        read_space(space({}), ["als"], args)
    with pytest.raises(ValueError, match="needs a trial or more and some minutes, got 0"):
        Budget(0, 1)
    methods = ["item_knn", "ease", "sasrec", "fused", "onerec"]
    assert list(read_space(ROOT / "recipes" / "search_spaces.yaml", methods, args)) == methods


def test_the_recipes_own_values_are_found_where_they_stand(arguments):
    args = arguments("--baselines", '{"item_knn": {"half_life": 2}, "fused": {"weights": {"ease": 0.5}}}')

    def present(method, **fields):
        return present_values(args, method, [SearchedField.parse(method, *each) for each in fields.items()])

    ends = {"low": 0.0, "high": 1000.0}
    found = present("item_knn", neighbours=ends, shrinkage=ends, half_life={"choices": [None, 2.0]})
    assert found == {"neighbours": 500, "shrinkage": 5.0, "half_life": 2}
    weights = {f"weights.{name}": ends for name in ("ease", "sasrec")}
    assert present("fused", **weights) == {"weights.ease": 0.5, "weights.sasrec": 1.0}
    nested = {"pretrain.learning_rate": ends, "pretrain_recent.learning_rate": ends, "model.dropout": ends}
    found = present("onerec", **nested, **{"pretrain.weight_decay": ends, "ranking_beams": {"low": 1, "high": 9}})
    assert found == {
        "pretrain.learning_rate": 3e-3,
        "pretrain_recent.learning_rate": 3e-3,
        "model.dropout": 0.1,
        "pretrain.weight_decay": 0.0,
    }
