#!/usr/bin/env bash
# Installs the package with what its tests need into .venv, which is made where there is none, and runs them. Arguments
# go to pytest, paths among them from the root of the repository.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

failed() {
  local status=$?
  echo "FAILED: $1" >&2
  exit "$status"
}

[ -x .venv/bin/pip ] || python3.11 -m venv --clear .venv 2>/dev/null || python3 -m venv --clear .venv ||
  failed "creating .venv, which needs Python 3.11 or newer with venv"
.venv/bin/pip install -c constraints.txt -e ".[test]" || failed "installing, see pip above"
.venv/bin/python -m pytest "$@" || failed "the tests, see above"
