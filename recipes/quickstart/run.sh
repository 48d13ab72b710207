#!/usr/bin/env bash
# Installs the package into .venv and runs the quickstart. Arguments are further options of the pipeline, paths among
# them from the root of the repository.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/../install.sh"

install .
.venv/bin/accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/pipeline.py \
  --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart "$@" ||
  failed "the quickstart, see above; the same command resumes it"
