"""Runs transformers' own common tests against OneRec's models and prints what passed, did not apply or failed.

Usage:
    pip download --no-deps --no-binary :all: transformers==5.23.0 && tar xf transformers-5.23.0.tar.gz
    pip install parameterized
    python recipes/benchmarks/conformance.py --transformers_source transformers-5.23.0 --json conformance.json

The mixins are not part of transformers' wheel. The source distribution holds those of the folder `tests/` itself; a
checkout of the release's tag has the generation mixin (`tests/generation/`) too, which is run when it is there.
"""

import argparse
import functools
import importlib
import json
import os
import re
import sys
import tempfile
import time
import types
import unittest
import unittest.mock
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecModel, modeling_onerec
from onerec_hf.modeling_onerec import session_generation_config
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel

CASES = {
    "OneRecModelTest": "OneRec, token positions",
    "OneRecItemPositionsTest": "OneRec, item positions",
    "OneRecRewardModelTest": "reward model",
}
OUTCOMES = ("passed", "not applicable", "failed")

# What the test modules import from files that a source distribution leaves out, and what stands in for it.
LEFT_OUT = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n\n\nclass ExportGenerateTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": 'config_common_kwargs = {"return_dict": False, "dtype": "float16"}\n',
}
# Tests that do not bear on these models and would pass without looking at them, or fail; patterns of whole names.
NOT_APPLICABLE = {
    r"test_get_(text|image|audio|video)_features_.*": "no towers of other modalities",
    "test_problem_types|test_load_with_mismatched_shapes": "sequence classifiers only",
    "test_generation_tester_mixin_inheritance": "looks at the test case, not at the model",
    "test_sdpa_can_dispatch_composite_models": "not a composite model",
}
ONEREC_NOT_APPLICABLE = NOT_APPLICABLE | {
    "test_moe_models_record_router_logits": "the library's encoder-decoder outputs call them decoder_router_logits; "
    "asked for in tests/test_modeling_onerec.py",
    "test_can_capture_specific_layers_hidden_states": "the library's encoder-decoder outputs call them "
    "encoder_hidden_states and decoder_hidden_states",
    "test_tp_plan_matches_params|test_tied_head_has_a_tp_plan_entry": "the plans stand on the classes, not in the "
    "configuration; run by two processes in tests/test_distributed_model.py",
    r"test_generate_from_(random_)?inputs_embeds(_\d.*)?|test_custom_4d_attention_mask": "decoder-only models",
    "test_prompt_lookup_decoding_stops_at_eos": "looks at the library's candidates, not at the model",
}
# Tests that leave the decoding to the model's default and assume a greedy one. OneRec's is a beam search, which the
# library does not compile, and whose cache of all beams cannot be continued from the best.
GREEDY = {
    "test_generate_compile_model_forward_fullgraph",
    "test_static_cache_no_recompile_with_smaller_length",
    "test_generate_continue_from_past_key_values",
}
ITEM_POSITIONS_NOT_APPLICABLE = ONEREC_NOT_APPLICABLE | {
    "test_inputs_embeds|test_inputs_embeds_matches_input_ids": "gives an embedding per token where the encoder has a "
    "position per item",
}
REWARD_NOT_APPLICABLE = NOT_APPLICABLE | {
    "test_resize_tokens_embeddings": "writes to input_ids, which are history_ids and session_ids here; resized in "
    "tests/model_conformance.py",
    "test_inputs_embeds_matches_input_ids": "no inputs_embeds",
    "test_model_forward_default_config_values": "looks at base models by name only",
    "test_eager_matches_batched_and_grouped_inference.*": "no experts",
}


def link_tests(source: Path, package: Path) -> list[str]:
    """Makes `package` a Python package of links to `source/tests` and stand-ins for the files that it lacks.

    Returns:
        The files of [`LEFT_OUT`] that `source` lacks.

    Raises:
        FileNotFoundError: If `source` has no tests.
        RuntimeError: If its version is not that of the installed transformers.
    """
    if not (source / "tests" / "test_modeling_common.py").is_file():
        raise FileNotFoundError(
            f"{source} has no tests/test_modeling_common.py: give the unpacked source distribution of transformers "
            f"{transformers.__version__} (pip download --no-deps --no-binary :all: transformers)."
        )
    init = (source / "src/transformers/__init__.py").read_text(encoding="utf-8")
    if f'__version__ = "{transformers.__version__}"' not in init:
        raise RuntimeError(f"{source} is not transformers {transformers.__version__}, which is installed.")
    package.mkdir()
    for path in (source / "tests").resolve().iterdir():
        (package / path.name).symlink_to(path)
    missing = [name for name in LEFT_OUT if not (package / name).exists()]
    for name in missing:
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(LEFT_OUT[name], encoding="utf-8")
    return missing


def greedy_generation_config(config: OneRecConfig) -> transformers.GenerationConfig:
    generation_config = session_generation_config(config)
    generation_config.num_beams = 1
    return generation_config


decoding_greedily = unittest.mock.patch.object(modeling_onerec, "session_generation_config", greedy_generation_config)


def skipped_unless_it_runs(test: Callable[..., None]) -> Callable[..., None]:
    """The test, not applicable if it returns something: a decorator's inner function, and nothing has been tested."""

    @functools.wraps(test)
    def run_test(self, *args, **kwargs):
        if test(self, *args, **kwargs) is not None:
            self.skipTest("its decorators keep it from running")

    return run_test


class OneRecTester:
    """Small sizes and inputs, by the names that transformers' tests read."""

    is_training = True
    batch_size, seq_length, decoder_seq_length, encoder_seq_length = 4, 7, 8, 7
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    tie_word_embeddings = False

    def __init__(self, parent: unittest.TestCase, history_positions: str):
        self.parent = parent
        self.history_positions = history_positions
        if history_positions == "item":
            self.encoder_seq_length = 2

    def get_config(self) -> OneRecConfig:
        return OneRecConfig(
            codebook_sizes=[31, 31, 31],
            hidden_size=self.hidden_size,
            intermediate_size=37,
            moe_intermediate_size=16,
            encoder_layers=self.num_hidden_layers,
            decoder_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_experts=4,
            history_items=8,
            session_items=4,
            history_positions=self.history_positions,
            dropout=0.0,
            tie_word_embeddings=self.tie_word_embeddings,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[OneRecConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        codes = config.level_offsets[0]
        input_ids = torch.randint(codes, config.vocab_size, (self.batch_size, self.seq_length))
        decoder_input_ids = torch.randint(codes, config.vocab_size, (self.batch_size, self.decoder_seq_length))
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": torch.ones_like(decoder_input_ids),
        }


class RewardTester:
    """The same for the reward model: its sequence is the session."""

    is_training = True
    batch_size, seq_length, key_length = 4, 5, 5
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> OneRecRewardConfig:
        return OneRecRewardConfig(
            codebook_sizes=[31, 31, 31],
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_hidden_layers=self.num_hidden_layers,
            tower_hidden_size=16,
            history_items=8,
            dropout=0.0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[OneRecRewardConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        return config, {
            "history_ids": torch.randint(5, config.vocab_size, (self.batch_size, 7, 3)),
            "session_ids": torch.randint(5, config.vocab_size, (self.batch_size, self.seq_length, 3)),
        }


def make_test_cases(modelling: types.ModuleType, configuration: types.ModuleType) -> list[type[unittest.TestCase]]:
    """Test cases as transformers' own models have them, one for each of our two architectures."""
    # Many tests ask by these names whether a class has a head.
    MODEL_MAPPING_NAMES["onerec"] = "OneRecModel"
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES["onerec"] = "OneRecForConditionalGeneration"

    def not_applicable(reason: str):
        return lambda self, *args, **kwargs: self.skipTest(reason)

    class OneRecModelTest(modelling.ModelTesterMixin, modelling.GenerationTesterMixin, unittest.TestCase):
        all_model_classes = (OneRecModel, OneRecForConditionalGeneration)
        history_positions = "token"
        is_encoder_decoder = True
        test_can_init_all_missing_weights_before_2023 = True  # asked by the year of a copyright line; there is none

        def setUp(self):
            self.model_tester = OneRecTester(self, self.history_positions)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = dict(super()._prepare_for_class(inputs_dict, model_class))
            if return_labels and model_class is OneRecForConditionalGeneration:
                inputs["labels"] = inputs["decoder_input_ids"].clone()
            return inputs

        def test_inputs_embeds_matches_input_ids(self):
            # The test embeds the decoder's ids by the encoder's embeddings.
            self.model_tester.tie_word_embeddings = True
            super().test_inputs_embeds_matches_input_ids()

        def test_config(self):
            tester = configuration.ConfigTester(self, config_class=OneRecConfig, hidden_size=40)
            tester.run_common_tests()

    class OneRecItemPositionsTest(OneRecModelTest):
        history_positions = "item"

    class OneRecRewardModelTest(modelling.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (OneRecRewardModel,)
        additional_model_inputs = ["session_ids"]
        test_can_init_all_missing_weights_before_2023 = True  # asked by the year of a copyright line; there is none

        def setUp(self):
            self.model_tester = RewardTester(self)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = dict(super()._prepare_for_class(inputs_dict, model_class))
            if return_labels:
                inputs["labels"] = torch.tensor([[0.0, 1.0, 0.5, float("nan")]]).repeat(
                    self.model_tester.batch_size, 1
                )
            return inputs

        def test_config(self):
            tester = configuration.ConfigTester(self, config_class=OneRecRewardConfig, hidden_size=40)
            tester.run_common_tests()

    cases = {
        OneRecModelTest: ONEREC_NOT_APPLICABLE,
        OneRecItemPositionsTest: ITEM_POSITIONS_NOT_APPLICABLE,
        OneRecRewardModelTest: REWARD_NOT_APPLICABLE,
    }
    for case, reasons in cases.items():
        for name in unittest.TestLoader().getTestCaseNames(case):
            for pattern, reason in reasons.items():
                if re.fullmatch(pattern, name):
                    setattr(case, name, not_applicable(reason))
            test = getattr(case, name)
            setattr(case, name, skipped_unless_it_runs(decoding_greedily(test) if name in GREEDY else test))
    return list(cases)


class OutcomeRecorder(unittest.TestResult):
    """Outcome, reason and seconds of every test and of every subtest that failed or did not apply."""

    def __init__(self):
        super().__init__()
        self.outcomes: list[dict[str, str | float]] = []

    def startTest(self, test):
        super().startTest(test)
        self.started = time.perf_counter()

    def _record(self, test: unittest.TestCase, outcome: str, reason: str = ""):
        case, name = test.id().split(" ")[0].split(".")[-2:]
        seconds = round(time.perf_counter() - self.started, 2)
        self.outcomes.append(
            {"case": case, "test": name, "outcome": outcome, "reason": reason.strip(), "seconds": seconds}
        )

    def addSuccess(self, test):
        self._record(test, "passed")

    def addSkip(self, test, reason):
        self._record(test, "not applicable", reason)

    def addFailure(self, test, err):
        self._record(test, "failed", self._exc_info_to_string(err, test))

    addError = addFailure

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.addFailure(test, err)


def run(source: Path, only: str = "") -> tuple[list[dict[str, str | float]], list[str]]:
    """Runs every test whose name contains `only`.

    Returns:
        For every test a dict of case, test, outcome, reason and seconds, and the files that `source` lacks.
    """
    recorder = OutcomeRecorder()
    with tempfile.TemporaryDirectory() as directory:
        package = Path(directory) / "tests"  # which is how some of the modules import one another
        missing = link_tests(source, package)
        sys.path.insert(0, directory)
        modelling = importlib.import_module("tests.test_modeling_common")
        configuration = importlib.import_module("tests.test_configuration_common")
        for case in make_test_cases(modelling, configuration):
            for name in unittest.TestLoader().getTestCaseNames(case):
                if only in name:
                    case(name).run(recorder)
        sys.path.remove(directory)
    return recorder.outcomes, missing


def markdown_table(rows: list[dict[str, str | float]]) -> str:
    """A line for each test, its parametrizations counted together, a column for each case; then the reasons."""
    cells: dict[str, dict[str, Counter]] = {}
    reasons: dict[str, set[str]] = {}
    for row in rows:
        test = re.sub(r"(?<!flash_attn)_\d+(_.*)?$", "", row["test"])
        cells.setdefault(test, {}).setdefault(row["case"], Counter())[row["outcome"]] += 1
        if row["outcome"] == "not applicable":
            # The same reason differs between the models in their names.
            reason = re.sub(
                r"<class '[\w.]+'>|\bOneRec\w+|^The model|^This model|^Model\b", "the model", row["reason"]
            )
            reasons.setdefault(reason.rstrip("."), set()).add(test)
    lines = [f"| test | {' | '.join(CASES.values())} |", f"| --- |{' --- |' * len(CASES)}"]
    for test, by_case in sorted(cells.items()):
        shown = []
        for case in CASES:
            outcomes = by_case.get(case)
            if outcomes is None:
                shown.append("")
            elif outcomes["failed"]:
                shown.append(f"FAILED {outcomes['failed']}")
            elif outcomes["not applicable"]:
                shown.append("n/a")
            else:
                shown.append("passed" if outcomes["passed"] < 2 else f"passed {outcomes['passed']}")
        lines.append(f"| {test} | {' | '.join(shown)} |")
    lines += ["", "Not applicable:"]
    lines += [f"- {reason}: {', '.join(sorted(tests))}" for reason, tests in sorted(reasons.items())]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers_source", type=Path, required=True)
    parser.add_argument("--only", default="", help="run the tests whose names contain this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Their slow tests too; read when the test modules are imported.
    os.environ.setdefault("RUN_SLOW", "1")
    transformers.logging.disable_progress_bar()

    started = time.perf_counter()
    rows, missing = run(options.transformers_source, options.only)
    totals = {case: Counter(row["outcome"] for row in rows if row["case"] == case) for case in CASES}
    print(markdown_table(rows))
    print(f"\nNot in {options.transformers_source}: {', '.join(missing) or 'nothing'}.")
    for case, title in CASES.items():
        print(f"{title}: " + ", ".join(f"{totals[case][outcome]} {outcome}" for outcome in OUTCOMES))
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {time.perf_counter() - started:.0f} s")
    for row in rows:
        if row["outcome"] == "failed":
            print(f"\nFAILED {row['case']}.{row['test']}\n{row['reason']}", file=sys.stderr)
    if options.json:
        record = {"rows": rows, "totals": totals, "missing": missing, "transformers": transformers.__version__}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(counts["failed"] for counts in totals.values()))


if __name__ == "__main__":
    sys.exit(main())
