#!/usr/bin/env bash
# Create .venv-NAME from requirements/NAME.lock, an environment of its own for agents that share no versions with this
# project: `bash scripts/venv.sh crewai`. Needs .venv. Safe to run again: it does nothing where the lock has not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 environment=.venv-$1
locked=$(sha256sum < "requirements/$name.lock")
if [ -f "$environment/.locked" ] && [ "$(cat "$environment/.locked")" = "$locked" ]; then exit 0; fi
.venv/bin/python -m venv --clear "$environment"
.venv/bin/uv pip install -q --native-tls --compile-bytecode --no-deps --python "$environment" \
  -r "requirements/$name.lock" 2>/dev/null || "$environment/bin/pip" install -q --no-deps -r "requirements/$name.lock"
echo "$locked" > "$environment/.locked"
