#!/usr/bin/env bash
# For whoever has a GPU: is every stage right on it, and how fast? Prints one JSON object; its lines of progress go to stderr.
#   benchmarks/gpu.sh > gpu.json
# Needs `pip install -e .` and a CUDA device. It downloads nothing, and writes to a temporary folder that it removes.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
