#!/usr/bin/env bash
# Makes a virtual environment and installs Farspan with its pinned dependencies. torch comes first and pinned: the
# resolver then keeps that build (CPU or CUDA, whichever the registry serves for this machine) for everything else.
set -euo pipefail
venv="${1:-.venv}"
python="${PYTHON:-python3}"
root="$(cd "$(dirname "$0")/../.." && pwd)"
cd "$root"

"$python" - <<'PY' || exit 1
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"error: Python {sys.version.split()[0]} cannot install Farspan\n   at: {sys.executable}\n"
             "  why: torch and Ray are pinned to builds for 3.11 and 3.12\n  try: make install PYTHON=python3.11")
PY
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt)
"${pip[@]}" torch==2.13.0
"${pip[@]}" --editable '.[dev,bench]'
# what tests and benchmarks compare with, apart: peft and transformers import it wherever they find it
[ -d "$venv/oracles/bitsandbytes" ] || "${pip[@]}" --no-deps --target "$venv/oracles" bitsandbytes==0.50.2
