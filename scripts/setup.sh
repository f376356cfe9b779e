#!/usr/bin/env bash
# Create .venv and install the locked CPU set, and with the argument "examples" what the examples and their tests need.
# Safe to run again: it does nothing where the locks have not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
install_project() { # the entry points and commands of this checkout; a second, and again where pyproject.toml changed
  .venv/bin/pip install -q --no-deps --no-build-isolation --editable . 2>/dev/null ||
    .venv/bin/pip install -q --no-deps --editable .
  sha256sum pyproject.toml > .venv/.project
}
install_lock() { # install_lock FILE
  # uv is about eight times faster than pip; pip reads configuration that uv does not, so it is the second try. Bytecode
  # is made here, as pip does: where PYTHONDONTWRITEBYTECODE is set, each of a dozen processes would compile its imports.
  # --python: left to itself, uv takes the environment that is active, which may be another project's.
  .venv/bin/uv pip install -q --python .venv/bin/python --native-tls --compile-bytecode --no-deps -r "$1" 2>/dev/null ||
    .venv/bin/pip install -q --no-deps -r "$1"
}
install_examples() {
  [ "${1:-}" = examples ] || return 0
  local wanted; wanted=$(sha256sum < requirements/examples.lock)
  if [ -f .venv/.examples ] && [ "$(cat .venv/.examples)" = "$wanted" ]; then return 0; fi
  install_lock requirements/examples.lock
  echo "$wanted" > .venv/.examples
}
locked=$(cat requirements/cpu.lock scripts/setup.sh | sha256sum)
if [ -f .venv/.locked ] && [ "$(cat .venv/.locked)" = "$locked" ]; then
  install_examples "$@"
  sha256sum --check --status .venv/.project 2>/dev/null || install_project
  exit 0
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then python=$candidate; break; fi
  done
fi
[ -n "$python" ] || { echo "setup: needs Python 3.11 or 3.12 on the PATH (or PYTHON=/path/to/python make …)" >&2; exit 2; }

echo "setup: .venv with $("$python" --version), half a minute to two minutes, once"
"$python" -m venv --clear .venv
pip=.venv/bin/pip
"$pip" install -q --disable-pip-version-check uv
# The CPU build of torch: from wherever pip is configured to look, or from PyTorch's own index. Never the plain
# build, which would bring several GB of CUDA packages.
"$pip" install -q --no-deps torch==2.13.0+cpu 2>/dev/null ||
  "$pip" install -q --no-deps torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
install_lock requirements/cpu.lock
install_examples "$@"
install_project
echo "$locked" > .venv/.locked
