"""Stage `align`: rounds of iterative preference alignment (paper section 3.3.2).

    accelerate launch recipes/align.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Writes `<output_dir>/align`. Complete stages are skipped, a killed
one is resumed. `--help` lists all options.
"""

import sys

# This folder's tokenize.py would hide the standard library's module of that name.
sys.path.pop(0)

from onerec_hf.stages import align, parse_recipe_arguments

if __name__ == "__main__":
    align(parse_recipe_arguments())
