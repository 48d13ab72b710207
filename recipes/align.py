"""Stage `align`: rounds of iterative preference alignment (paper section 3.3.2).

    accelerate launch recipes/align.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Writes `<output_dir>/align`. Complete stages are skipped, a killed
one is resumed. `--help` lists all options.
"""

from onerec_hf.stages import parse_recipe_arguments, run_align

if __name__ == "__main__":
    run_align(parse_recipe_arguments())
