"""Stage `tokenize`: logs and items to semantic IDs and their tokenizer (paper section 3.1).

    accelerate launch recipes/fit_tokenizer.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Writes `<output_dir>/data` and `<output_dir>/tokenize`. Complete stages are skipped, a killed
one is resumed. `--help` lists all options.
"""

from onerec_hf.stages import parse_recipe_arguments, run_tokenize

if __name__ == "__main__":
    run_tokenize(parse_recipe_arguments())
