#!/usr/bin/env bash
# Installs the package with what its tests need into .venv and runs them. Arguments go to pytest, paths among them from
# the root of the repository.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/../recipes/install.sh"

install ".[test]"
.venv/bin/python -m pytest "$@" || failed "the tests, see above"
