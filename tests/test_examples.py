"""The examples as a reader runs them: in docstrings, and in the notebooks."""

import doctest
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainingArguments, TrainingArguments

import onerec_hf

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "onerec_hf").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
NOTEBOOKS = sorted((ROOT / "recipes" / "notebooks").glob("*.ipynb"))
# Where a reader begins.
WITH_EXAMPLES = (
    *("EASE", "ItemKNN", "OneRecDPOTrainer", "OneRecForConditionalGeneration", "OneRecPretrainer"),
    *("OneRecRewardTrainer", "OneRecTokenizer", "Recommender", "SASRec", "embed_items", "feed_from_log"),
)
TRAINING, USERS = re.compile(r"(max_steps|num_train_epochs)=\d+"), re.compile(r"users=\d+")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed, capfd.readouterr().out


def test_public_names_are_there_and_those_that_a_reader_begins_with_have_an_example():
    assert sorted(onerec_hf.__all__) == onerec_hf.__all__
    named = {name: getattr(onerec_hf, name) for name in onerec_hf.__all__}
    assert all(value.__doc__ for name, value in named.items() if name != "__version__")
    texts = {name: inspect.getsource(named[name]) for name in WITH_EXAMPLES}
    assert {name for name, text in texts.items() if ">>> " not in text} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    """In a few steps for a few users, and without a kernel, which takes longer to start than the cells to run."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(tmp_path)
    scope = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        assert not cell["outputs"] and cell["execution_count"] is None, "clear the outputs before it is committed"
        source = USERS.sub("users=30", TRAINING.sub("max_steps=2", "".join(cell["source"])))
        exec(compile(source, f"{path.name}, {cell['id']}", "exec"), scope)
    assert (tmp_path / "runs").is_dir()


def test_the_recipes_go_from_a_log_to_recommendations_in_python(tmp_path, monkeypatch):
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(feed = onerec_hf.feed_from_log.*?)```", text, re.DOTALL).group(1)
    code = TRAINING.sub("max_steps=1, use_cpu=True", code).replace('"small"', '"debug", history_items=8')
    code = code.replace("r_dpo=0.2", "r_dpo=0.2, num_candidates=8")
    monkeypatch.chdir(tmp_path)
    columns = {"user_id": "uid", "item_id": "video", "timestamp": "time", "like": "is_like"}
    log = onerec_hf.SimulatedFeed.generate(users=20, items=160).feed().interactions[list(columns)]
    scope = {
        "onerec_hf": onerec_hf,
        "log": log.rename(columns=columns),
        "Seq2SeqTrainingArguments": Seq2SeqTrainingArguments,
        "TrainingArguments": TrainingArguments,
    }
    exec(compile(code, "recipes/README.md", "exec"), scope)
    assert scope["recommendations"]["user_id"].nunique() == len(scope["feed"].positive_histories())
