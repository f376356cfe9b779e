#!/usr/bin/env bash
# Create .venv-crewai, an environment of its own for an agent that shares no versions with this project. Needs .venv.
# Safe to run again: it does nothing where the lock has not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
locked=$(sha256sum < requirements/crewai.lock)
if [ -f .venv-crewai/.locked ] && [ "$(cat .venv-crewai/.locked)" = "$locked" ]; then exit 0; fi
.venv/bin/python -m venv --clear .venv-crewai
.venv/bin/uv pip install -q --native-tls --compile-bytecode --no-deps --python .venv-crewai -r requirements/crewai.lock \
  2>/dev/null || .venv-crewai/bin/pip install -q --no-deps -r requirements/crewai.lock
echo "$locked" > .venv-crewai/.locked
