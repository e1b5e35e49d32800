#!/usr/bin/env bash
# The card check: what of the GPU path runs on this machine, how fast, in how much memory. One command, under six minutes on one
# H100, no download: random models of the tiny shape and of a slice of a 7B model's.
#
#   tests/gpu/check.sh [OUT.json]          then: ./run_all.sh paper --dry-run --from OUT.json
#
# What is not installed, or not there, is named and skipped; without a GPU the tiny model alone is tried, on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -z "${CAI_EM_SKIP_SETUP:-}" ] && [ -d .venv ]; then PATH=$PWD/.venv/bin:$PATH; fi
PYTHONPATH=$PWD/lib${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 exec python tests/gpu/check.py all "${1:-card.json}"
