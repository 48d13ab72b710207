"""Stage `pretrain`: sessions to the seed model, by next-token prediction (paper section 3.2).

    accelerate launch recipes/pretrain.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Writes `<output_dir>/pretrain`. Complete stages are skipped, a killed
one is resumed. `--help` lists all options.
"""

from onerec_hf.stages import parse_recipe_arguments, run_pretrain

if __name__ == "__main__":
    run_pretrain(parse_recipe_arguments())
