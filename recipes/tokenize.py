"""Stage `tokenize`: logs and items to semantic IDs and their tokenizer (paper section 3.1).

    accelerate launch recipes/tokenize.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Writes `<output_dir>/data` and `<output_dir>/tokenize`. Complete stages are skipped, a killed
one is resumed. `--help` lists all options.
"""

import sys

# This folder's tokenize.py would hide the standard library's module of that name.
sys.path.pop(0)

from onerec_hf.stages import parse_recipe_arguments, tokenize

if __name__ == "__main__":
    tokenize(parse_recipe_arguments())
