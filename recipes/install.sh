# Sourced by the scripts that start from a fresh clone: goes to the root of the repository and installs there what
# `install` is told, into .venv, which is made where there is none.
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

failed() {
  local status=$?
  echo "FAILED: $1" >&2
  exit "$status"
}

install() {
  [ -x .venv/bin/pip ] || python3.11 -m venv --clear .venv 2>/dev/null || python3 -m venv --clear .venv ||
    failed "creating .venv, which needs Python 3.11 or newer with venv"
  .venv/bin/pip install -c constraints.txt -e "$1" || failed "installing, see pip above"
}
