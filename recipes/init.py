"""A look at your files: writes the column mapping that reads them, with the reason of every choice.

    onerec init my_data

Writes my_data/mapping.yaml, never over a file that is there, and prints it with the command to run next.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import yaml

from onerec_hf.data import DataError
from onerec_hf.data.mapping_writer import MAPPING, next_commands, public_set, read_back, write_mapping


def main() -> int:
    """Returns the exit status: 1 where nothing was written, or what was written does not read the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder of CSV, TSV, JSON lines or Parquet files")
    parser.add_argument("--column_mapping", type=Path, help=f"file to write; default: DATA_DIR/{MAPPING}")
    parser.add_argument(
        "--columns",
        type=yaml.safe_load,
        metavar="YAML",
        help='columns that you know, e.g. "{user_id: who, item_id: what, timestamp: when}"; a public set is then read '
        "as files like any other",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a mapping that is there")
    given = parser.parse_args()
    if given.columns is not None and not isinstance(given.columns, dict):
        parser.error('--columns must be a mapping such as "{user_id: who, item_id: what}".')
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.simplefilter("ignore", UserWarning)
    path = given.column_mapping or given.data_dir / MAPPING
    try:
        known = None if given.columns else public_set(given.data_dir)
        if known is not None:
            print(f"These are the official files of {known}, which has a reader of its own: no mapping is needed.")
            print(next_commands(None, given.data_dir, path, known))
            return 0
        mapping, text = write_mapping(given.data_dir, path, given.columns, given.overwrite)
        print(f"{text}\nWritten: {path}. Correct there what is wrong.")
        print(read_back(mapping, given.data_dir, path))
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    print(next_commands(mapping, given.data_dir, path, mapping.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
