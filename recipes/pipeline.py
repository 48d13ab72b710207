"""All stages: raw logs to aligned recommendations, metrics and a report.

    accelerate launch recipes/pipeline.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Every stage writes one folder of `<output_dir>`; complete ones are skipped, a killed one is resumed by the same
command. `--help` lists all options.
"""

from onerec_hf.stages import parse_recipe_arguments, run_pipeline

if __name__ == "__main__":
    run_pipeline(parse_recipe_arguments())
