"""A run of a later period, which goes on from an earlier run: new items get semantic IDs, models are trained further.

    accelerate launch recipes/update.py --config recipes/quickstart/pipeline.yaml --previous_run runs/monday \
        --output_dir runs/tuesday

The log is the whole one; what came since the period that `previous_run` was evaluated on is trained on, with a share
of what was before. With `update_starts` a run for each period, each from the one before. An earlier run is gone back
to by naming it. Complete stages are skipped, a killed one is resumed. `--help` lists all options.
"""

from onerec_hf.stages import parse_recipe_arguments, run_update

if __name__ == "__main__":
    run_update(parse_recipe_arguments())
