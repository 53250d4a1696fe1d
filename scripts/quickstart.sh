#!/usr/bin/env bash
# Unlearns one topic of the embedded handbook benchmark, with and without TRACE, and prints the comparison.
# Works from any directory. Run again, it continues an interrupted run or shows the finished one.
#
#   bash scripts/quickstart.sh                                        # configs/quickstart.py into runs/quickstart
#   bash scripts/quickstart.sh --config.unlearning.learning_rate=5e-4 # further arguments go to the program
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment

python -m trace_jax.main --config configs/quickstart.py --workdir "$root/runs/quickstart" "$@"
echo "first:  source $root/.venv/bin/activate    # once in a terminal, before any command"
