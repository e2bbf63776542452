# Sourced by quickstart.sh and test.sh: finds or makes a Python that has what the project needs. Sets $PYTHON.
#
# In this order: the Python named by --no-venv (an environment of yours, used as it is), the checkout's .venv, the
# current python3 if it has everything, and else a new .venv, filled by pip. Only the last needs the network.

say() { printf '\033[1m%s\033[0m\n' "== $*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

prepare() { # prepare EXTRA NO_VENV: EXTRA is "" or "test"
  local extra=$1 no_venv=$2 base
  base=$(find_python)
  if [ -n "$no_venv" ]; then
    PYTHON=$base
    missing "" || fail "$PYTHON lacks these packages; install them, or run without --no-venv"
  elif [ -x .venv/bin/python ] && missing "$extra" .venv/bin/python 2>/dev/null; then
    PYTHON=$PWD/.venv/bin/python
  elif missing "$extra" "$base" 2>/dev/null; then
    PYTHON=$base
  else
    make_venv "$base" "$extra"
    PYTHON=$PWD/.venv/bin/python
  fi
  link_sources
  say "using $PYTHON ($("$PYTHON" -c 'import platform, torch; print(platform.python_version() + ", torch " + torch.__version__)'))"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or later found; install one, or name it: PYTHON=/path/to/python3 bash $0"
}

# Whether pyproject.toml's packages are there: names them on stderr if not. Versions are pip's business.
missing() { # missing EXTRA [PYTHON]
  "${2:-$PYTHON}" - "$1" <<'PY'
import importlib.metadata, re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = project["dependencies"] + project["optional-dependencies"].get(sys.argv[1], [])
names = [re.match(r"[\w.-]+", line)[0] for line in wanted]

def absent(name):
    try:
        return not importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True

if lacking := [name for name in names if absent(name)]:
    sys.exit("missing: " + " ".join(lacking))
PY
}

make_venv() { # make_venv BASE EXTRA
  say "making .venv with $1"
  [ -x .venv/bin/python ] || "$1" -m venv .venv || fail "$1 -m venv failed; on Debian: apt install python3-venv"
  local pip=".venv/bin/python -m pip --disable-pip-version-check"
  missing_torch() { ! .venv/bin/python -c 'import torch' 2>/dev/null; }
  if missing_torch; then install_torch "$pip"; fi
  say "installing the project and its dependencies"
  $pip install --quiet --editable ".${2:+[$2]}" || fail "pip could not install the dependencies; see above"
}

# The CPU build of torch saves gigabytes where there is no NVIDIA GPU.
install_torch() { # install_torch PIP
  local versions="torch>=2.11,<2.14" cpu_index=https://download.pytorch.org/whl/cpu
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    say "installing torch with CUDA"
    $1 install --quiet "$versions" || fail "pip could not install torch"
    return
  fi
  say "installing torch for the CPU"
  # A wheel that pip has at hand, torch's own index of CPU builds, whatever PyPI gives: the first that works.
  $1 install --quiet --no-index --no-deps torch==2.13.0 2>/dev/null ||
    { reachable "$cpu_index/" && $1 install --quiet --index-url "$cpu_index" "$versions"; } ||
    $1 install --quiet torch==2.13.0 || fail "pip could not install torch"
}

reachable() {
  .venv/bin/python -c "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)" "$1" 2>/dev/null
}

# `import fp8...` from the checkout without installing it: a namespace folder whose entries point at the sources, and the
# record by which a package knows its own version. What others that run from this checkout use stays as it is.
link_sources() {
  local here=build/namespace folder version info found
  version=$("$PYTHON" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
  info=$here/fp8_engine-$version.dist-info
  mkdir -p "$here/fp8" "$info"
  for found in "$here"/*.dist-info; do [ "$found" = "$info" ] || rm -rf "$found"; done
  for folder in builder plugins runtime models scripts; do ln -sfn "$PWD/$folder" "$here/fp8/$folder"; done
  printf 'Metadata-Version: 2.1\nName: fp8-engine\nVersion: %s\n' "$version" >"$info/METADATA.$$"
  mv "$info/METADATA.$$" "$info/METADATA"
  export PYTHONPATH="$PWD/$here${PYTHONPATH:+:$PYTHONPATH}"
}
