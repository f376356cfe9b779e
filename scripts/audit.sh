#!/usr/bin/env bash
# Ask OSV (https://osv.dev) for known vulnerabilities of every locked version. Exit code 1 where one is found; 0 with a
# line that says so where the service cannot be asked, so that a machine without a network can still run the checks.
set -euo pipefail
cd "$(dirname "$0")/.."
found=$(mktemp); trap 'rm -f "$found"' EXIT
if ! timeout 60 .venv/bin/uv tool run --native-tls --from 'pip-audit>=2.9,<3' pip-audit --version >"$found" 2>&1; then
  echo "audit: not done, pip-audit cannot be installed here: $(tail -n 1 "$found")"
  exit 0
fi
status=0
for lock in requirements/cpu.lock requirements/examples.lock; do
  code=0
  # --disable-pip and --no-deps: the locks are whole, so nothing is resolved and no package index is asked.
  timeout 300 .venv/bin/uv tool run --native-tls --from 'pip-audit>=2.9,<3' pip-audit --vulnerability-service osv \
    --timeout 10 --progress-spinner off --disable-pip --no-deps --requirement "$lock" >"$found" 2>&1 || code=$?
  if [ "$code" = 0 ]; then
    echo "audit: $lock: no known vulnerabilities"
  elif grep -qE '^Found [0-9]+ known vulnerabilit' "$found"; then
    cat "$found"
    status=1
  else
    echo "audit: $lock: not done, the service cannot be asked: $(tail -n 1 "$found" | cut -c1-200)"
  fi
done
exit "$status"
