"""Stage `reward`: exposed sessions to the reward model and an independent judge (paper section 3.3.1).

    accelerate launch recipes/reward.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Writes `<output_dir>/reward`. Complete stages are skipped, a killed
one is resumed. `--help` lists all options.
"""

from onerec_hf.stages import parse_recipe_arguments, run_reward

if __name__ == "__main__":
    run_reward(parse_recipe_arguments())
