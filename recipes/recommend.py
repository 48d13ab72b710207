"""Stage `recommend`: histories to sessions and ranked items, Parquet to Parquet.

    accelerate launch recipes/recommend.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Writes `<output_dir>/recommend`. Complete stages are skipped, a killed
one is resumed. `--help` lists all options.
"""

from onerec_hf.stages import parse_recipe_arguments, run_recommend

if __name__ == "__main__":
    run_recommend(parse_recipe_arguments())
