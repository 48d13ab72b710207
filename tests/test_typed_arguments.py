from functools import partial

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError

from onerec_hf import OneRecConfig
from onerec_hf.alignment import OneRecDPOConfig, PreferenceSampling
from onerec_hf.embedding_adaptation import EmbeddingAdaptation
from onerec_hf.evaluation import EASE, ItemKNN, SASRec
from onerec_hf.reward import OneRecRewardConfig
from onerec_hf.semantic_ids import make_quantizer
from onerec_hf.session_generation import SearchOptions
from onerec_hf.typed_arguments import typed_arguments


def quantizer(**settings):
    return make_quantizer("rqvae", [4, 4, 4], **settings)


@pytest.mark.parametrize(
    "make, name, text, number",
    [
        (quantizer, "learning_rate", "1e-3", 1e-3),
        (quantizer, "seed", "1e0", 1),
        (lambda **given: make_quantizer("rkmeans", [4], **given), "max_iterations", "1e1", 10),
        (SASRec, "learning_rate", "1e-3", 1e-3),
        (EASE, "regularization", "1e2", 100.0),
        (ItemKNN, "half_life", "1e1", 10.0),
        (PreferenceSampling, "loser_quantile", "5e-1", 0.5),
        (lambda **given: SearchOptions(8, "sample", **given), "temperature", "5e-1", 0.5),
        (EmbeddingAdaptation, "temperature", "1e-1", 0.1),
        (OneRecDPOConfig, "beta", "1e-1", 0.1),
        (OneRecDPOConfig, "lambda_dpo", "1e-1", 0.1),
        (OneRecDPOConfig, "learning_rate", "1e-6", 1e-6),
    ],
)
def test_a_number_that_yaml_reads_as_text(make, name, text, number, tmp_path):
    beside = {}
    if make is OneRecDPOConfig:
        beside = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    made = make(**{name: text}, **beside)
    found = getattr(made, name)
    assert found == number and type(found) is type(number)
    with pytest.raises(ValueError, match=f": {name} must be a .*number, got '1e-'"):
        make(**{name: "1e-"}, **beside)


@pytest.mark.parametrize("make", [OneRecConfig, partial(OneRecConfig.from_preset, "debug"), OneRecRewardConfig])
def test_a_configuration_takes_no_text_for_a_number(make):
    with pytest.raises(ValueError, match="Config: dropout must be a number, got the text '1e-1'"):
        make(dropout="1e-1")


def test_the_weight_of_an_objective():
    objective = {"name": "wtr", "source": "follow", "kind": "binary"}
    made = OneRecRewardConfig(objectives=["swt", {**objective, "weight": "1e-1"}])
    assert made.objective_weights == [1.0, 0.1]
    for weight in ("much", True):
        with pytest.raises(ValueError, match="objective 'wtr': positive_weight must be a number"):
            OneRecRewardConfig(objectives=[{**objective, "positive_weight": weight}])
    with pytest.raises(StrictDataclassClassValidationError, match="'wtr': weight must be a number"):
        OneRecRewardConfig(objectives=[{**objective, "weight": None}])


def test_what_is_no_text_is_left_to_the_class():
    @typed_arguments
    class Scaled:
        def __init__(self, factor: float, whole: bool = False, *rest, name: str = ""):
            self.given = (factor, whole, rest, name)

    vector = np.ones(2)
    assert Scaled(vector).given[0] is vector
    assert Scaled("2", True, "3", name="1e-1").given == (2.0, True, ("3",), "1e-1")
    with pytest.raises(ValueError, match="Scaled: whole must be true or false, got 'yes'"):
        Scaled(1, whole="yes")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'factor'"):
        Scaled()
    with pytest.raises(TypeError, match="unexpected keyword argument 'factors'"):
        Scaled(factors="1e-1")
