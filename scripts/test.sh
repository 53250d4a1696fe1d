#!/usr/bin/env bash
# Format, lint, types, import contract, documentation and tests: what CI runs. Every check runs; the exit status is
# non-zero if one failed.
#
#   bash scripts/test.sh                    # everything
#   bash scripts/test.sh tests/routing -k calibration   # the same checks, these tests only
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test

# Two workers share the cores: one thread each for XLA and BLAS, or they would fight for them.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NPROC=1
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" MPLBACKEND=agg

failed=()
check() {
  local name="$1"
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  "$@" || failed+=("$name")
}

check "format" ruff format --check .
check "lint" ruff check .
check "types" pyright --pythonpath "$root/.venv/bin/python"
check "imports" lint-imports
check "docs" sphinx-build -W --keep-going -q docs "$root/.venv/site"
check "tests" pytest -n "${TEST_WORKERS:-2}" "$@"

# What the house weighs: it is to stay one that a person can hold in mind.
weigh() {
  find "$1" -name '*.py' -exec wc -l {} + | awk -v name="$1" -v most="$2" '
    $2 != "total" { files++; lines += $1; if ($1 > long) { long = $1; longest = $2 } }
    END { printf "%s: %d lines in %d files, longest %s %d (at most %s)\n", name, lines, files, longest, long, most }'
}
printf '\n'
weigh trace_jax "20,700 in 130 files, 400 in one"
weigh tests "16,500"

if [ "${#failed[@]}" -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[*]}"
  exit 1
fi
printf '\nAll checks passed.\n'
