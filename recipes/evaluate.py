"""Stage `evaluate`: metrics.json and report.html: baselines, rounds and judges.

    accelerate launch recipes/evaluate.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Writes `<output_dir>/evaluate`. Complete stages are skipped, a killed
one is resumed. `--help` lists all options.
"""

from onerec_hf.stages import parse_recipe_arguments, run_evaluate

if __name__ == "__main__":
    run_evaluate(parse_recipe_arguments())
