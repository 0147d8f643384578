#!/usr/bin/env bash
# Make .venv: the packages of constraints.txt, mem_nb itself (editable), nbdev's git hooks. Safe to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
candidates=${PYTHON:-python3.11 python3.12 python3.13 python3 python}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if ! { new_enough $venv/bin/python && $venv/bin/python -m pip --version >/dev/null 2>&1; }; then
  found=
  for python in $candidates; do
    if new_enough "$python"; then found=$python; break; fi
  done
  if [ -z "$found" ]; then
    echo "mem_nb needs Python 3.11 or newer, and none of these is: $candidates." >&2
    echo "Install it (Debian, Ubuntu: apt-get install python3 python3-venv)," >&2
    echo "or say where it is: make setup PYTHON=/path/to/python3.11" >&2
    exit 1
  fi
  if ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "$found cannot make virtual environments. Debian, Ubuntu: apt-get install python3-venv" >&2
    exit 1
  fi
  echo "Making $venv with $("$found" --version)."
  "$found" -m venv --clear $venv
fi

echo "Installing what constraints.txt pins: about 6 GB and some minutes the first time."
$venv/bin/python -m pip install --disable-pip-version-check --use-pep517 -c constraints.txt -e '.[dev]' \
  | { grep --line-buffered -v '^Requirement already satisfied' || true; }

if [ -d .git ]; then  # absent in a tarball, a file in a linked worktree
  PATH="$PWD/$venv/bin:$PATH" nbdev_install_hooks || echo "nbdev's git hooks are left out; everything else works."
  # its hook looks for nbdev_trust on the PATH; a pull outside of the environment should work, too
  if [ -f .git/hooks/post-merge ]; then sed -i "s|^nbdev_trust|PATH=\"\$PWD/$venv/bin:\$PATH\" nbdev_trust|" .git/hooks/post-merge; fi
fi
touch $venv/.installed
echo "Set up. To work in it: source $venv/bin/activate"
