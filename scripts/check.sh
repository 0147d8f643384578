#!/usr/bin/env bash
# All that a change must pass. Looks at the tree as it is and leaves it so; pytest comes last, whatever failed before.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" WANDB_MODE=offline HF_HUB_OFFLINE=1
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
failed=

check() { # title, remedy, command …
  local title=$1 remedy=$2; shift 2
  printf '\n== %s\n' "$title"
  if "$@"; then echo "good"; else echo "NOT GOOD: $remedy"; failed="$failed$title; "; fi
}
exports()   { (cd "$copy" && nbdev_export) && diff -ru -x __pycache__ -x py.typed "$copy/mem_nb" mem_nb; }
clean()     { (cd "$copy" && nbdev_clean) && diff -rq -x .last_checked nbs "$copy/nbs"; }
notebooks() { OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --timing; }  # two workers share two cores

cp -r settings.ini nbs "$copy" || exit 1
check "mem_nb/ is what the notebooks export" "run 'make export'"                   exports
check "the notebooks are clean"              "run '.venv/bin/nbdev_clean'"         clean
check "README.md is what the index shows"    "run 'make readme'"                   python scripts/readme.py --check
check "the notebooks run and their tests pass" "see the notebook's message above"  notebooks
check "the documentation builds, no link is dead, every name is documented" "see the lines above" python scripts/docs.py

[ -z "$failed" ] || printf '\nNOT GOOD before pytest: %s\n' "$failed"
printf '\n== pytest\n'
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile || exit 1   # a file stays in one process: its tests share trainings
[ -z "$failed" ]
