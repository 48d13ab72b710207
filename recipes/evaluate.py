"""Stage `evaluate`: metrics.json and report.html: baselines, rounds and judges.

    accelerate launch recipes/evaluate.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Writes `<output_dir>/evaluate`. Complete stages are skipped, a killed
one is resumed. `--help` lists all options.
"""

import sys

# This folder's tokenize.py would hide the standard library's module of that name.
sys.path.pop(0)

from onerec_hf.stages import evaluate, parse_recipe_arguments

if __name__ == "__main__":
    evaluate(parse_recipe_arguments())
