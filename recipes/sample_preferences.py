r"""Stage `preferences`: one round's preference pairs, drawn and scored (paper section 3.3.2).

    accelerate launch recipes/sample_preferences.py --config recipes/quickstart/pipeline.yaml \
        --output_dir runs/quickstart

Writes `<output_dir>/preferences/pairs.parquet`. A complete stage is skipped, a killed one is resumed. `--help` lists
all options.
"""

import sys

# This folder's tokenize.py would hide the standard library's module of that name.
sys.path.pop(0)

from onerec_hf.stages import parse_recipe_arguments, sample_preference_pairs

if __name__ == "__main__":
    sample_preference_pairs(parse_recipe_arguments())
