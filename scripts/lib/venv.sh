# Sourced by the scripts one folder up. Goes to the checkout's root and gives them:
#   setup runtime|serve|dev    a .venv in step with pyproject.toml and constraints.txt, built from nothing if need be
#   timed NAME COMMAND   runs a command, says how long it took, returns its exit status
# PYTHON names the interpreter to build with, PENSTOCK_VENV another place for the environment.

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd -- "$ROOT"
VENV=${PENSTOCK_VENV:-$ROOT/.venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
# Packages are installed without bytecode: a process that may not write it compiles again whatever it imports.
unset PYTHONDONTWRITEBYTECODE

# An interpreter counts when it runs (a pyenv shim may not), is new enough and can build an environment.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "penstock: needs Python 3.11 or newer with its venv module, and found none." >&2
    echo "penstock: install one (Debian, Ubuntu: python3 and python3-venv) or set PYTHON=/path/to/python3.11." >&2
    return 1
}

# Changes when an installed environment no longer fits. The root is in it because the install points there.
fingerprint() {
    { cat pyproject.toml constraints.txt && echo "$ROOT"; } | cksum
}

# A dev environment serves for runtime too.
is_current() {
    local stamp=$1
    [[ -x $VENV/bin/python && -f $VENV/$stamp && $(<"$VENV/$stamp") == "$(fingerprint)" ]]
}

setup() {
    local kind=$1 extras="" python output=(--quiet --quiet)
    [[ $kind == runtime ]] || extras="[$kind]"
    if is_current .penstock-dev || is_current ".penstock-$kind"; then return; fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        echo "penstock: creating $VENV with $("$python" --version)" >&2
        "$python" -m venv --clear "$VENV"
    fi
    if [[ -t 2 ]]; then output=(--progress-bar on); fi  # someone watches: pip shows what it downloads
    echo "penstock: installing ($kind); the first time takes a few minutes" >&2
    rm -f "$VENV"/.penstock-*
    # Python compiles what it imports by itself. All files of all packages take as long to compile as to fetch and unpack.
    "$VENV/bin/python" -m pip install "${output[@]}" --no-compile --constraint constraints.txt --editable ".$extras" >&2
    fingerprint >"$VENV/.penstock-$kind"
    echo "penstock: installed after $SECONDS s" >&2
}

timed() {
    local name=$1 start=$SECONDS status=0
    shift
    "$@" || status=$?
    if ((status)); then
        echo "== $name: FAILED (exit $status) after $((SECONDS - start)) s"
    else
        echo "== $name: ok, $((SECONDS - start)) s"
    fi
    return "$status"
}
