#!/usr/bin/env bash
# The first five minutes on a GPU (gpu/first_run.py), from a checkout whose packages need not be installed.
#
#     bash tests/gpu/first_run.sh OUT [--dry-run]
#
# PYTHON names another interpreter than python3.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
for folder in adapters clients/cli clients/python clients/demo proto server tests; do
  PYTHONPATH="$root/$folder${PYTHONPATH:+:$PYTHONPATH}"
done
export PYTHONPATH
exec "${PYTHON:-python3}" -m gpu.first_run "$@"
