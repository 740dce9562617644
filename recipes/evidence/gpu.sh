#!/bin/sh
# Seconds, memory, launches and agreement of a bilevel step of InternVL3-1B on one GPU, in at most
# nine minutes: a table, and results/gpu.json. --size tiny --device cpu tries it without a GPU.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
test -x "$python" || python=python3
exec "$python" -m recipes.evidence.gpu "$@"
