# Sourced by the other scripts. Makes .venv in the repository and installs the package into it, once per pyproject.toml.
#
#   prepare_environment              the package
#   prepare_environment test         the package and what its tests need
#   prepare_environment test .other  the same in .other
#
# Afterwards $root is the repository and .venv/bin is first in PATH. PYTHON=/path/to/python3.12 chooses the interpreter.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

fail() { printf '%s\n' "$@" >&2; exit 1; }

# Prints the first interpreter that is new enough and can make a virtual environment.
find_python() {
  local candidate version without_venv=""
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    command -v "$candidate" >/dev/null || continue
    version="$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))')" || continue
    if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then command -v "$candidate"; return; fi
    without_venv="${without_venv:-$version}"
  done
  if [ -n "$without_venv" ]; then
    fail "Python $without_venv is here, but not the module that makes virtual environments." \
         "On Debian or Ubuntu: apt-get install python$without_venv-venv (or python3-venv). Then run this again."
  fi
  fail "No Python 3.11 or newer found (tried ${PYTHON:+$PYTHON, }python3, python3.13, python3.12, python3.11)." \
       "On Debian or Ubuntu: apt-get install python3 python3-venv. Or name one: PYTHON=/path/to/python3.12 bash $0"
}

prepare_environment() {
  local extra="${1:-}" venv="$root/${2:-.venv}" python stamp expected
  cd "$root" || exit 1
  # One that was moved, half made or whose Python is gone can't be repaired, only made again.
  if ! grep -qF "$venv" "$venv/bin/pip" 2>/dev/null || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(find_python)" || exit 1
    echo "Making $venv with $python"
    "$python" -m venv --clear "$venv" || fail "Could not make $venv with $python."
  fi
  PATH="$venv/bin:$PATH"; export PATH; unset PYTHONHOME
  stamp="$venv/installed${extra:+-$extra}"
  expected="$root $(cksum <pyproject.toml)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$expected" ]; then
    echo "Installing trace_jax${extra:+[$extra]} and what it needs into $venv (once; a minute or two) ..."
    python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" \
      || fail "The installation failed; the lines above say why. Run the same command again to retry."
    echo "$expected" >"$venv/installed"
    echo "$expected" >"$stamp"
  fi
}
