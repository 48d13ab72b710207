"""Ablations of the alignment and the paper's Table 1, each with its table, on a run that has a reward model.

    accelerate launch recipes/ablations.py r_dpo --config recipes/quickstart/preference_alignment.yaml --output_dir RUN

The first word is r_dpo, num_candidates, losses, reference, ntp, rounds or table1; further words are the cells that
are run, by default all: `r_dpo 0.01 0.05`, `losses dpo sdpo`, `table1 sasrec ipa`. Reads the run's data, tokenize,
pretrain and reward stages, writes `<output_dir>/ablations/<name>` with `table.md`, `table.json` and `figure.png`, and
prints the table. Complete cells are skipped, a killed one is resumed. `--help` lists all options.
"""

import itertools
import sys

from onerec_hf.stages import parse_recipe_arguments, run_ablation
from onerec_hf.stages.ablations import ABLATIONS, TABLE_1

if __name__ == "__main__":
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    args = parse_recipe_arguments(sys.argv[1 + len(words) :])
    if not words:
        raise SystemExit(f"The first word is the ablation, one of {', '.join([*ABLATIONS, TABLE_1])}.")
    run_ablation(args, *words)
