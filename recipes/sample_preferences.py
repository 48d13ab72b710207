r"""Stage `preferences`: one round's preference pairs, drawn and scored (paper section 3.3.2).

    accelerate launch recipes/sample_preferences.py --config recipes/quickstart/pipeline.yaml \
        --output_dir runs/quickstart

Writes `<output_dir>/preferences/pairs.parquet`. A complete stage is skipped, a killed one is resumed. `--help` lists
all options.
"""

from onerec_hf.stages import parse_recipe_arguments, run_sample_preferences

if __name__ == "__main__":
    run_sample_preferences(parse_recipe_arguments())
