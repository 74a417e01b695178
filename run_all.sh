#!/usr/bin/env bash
# Everything with one command, on a fresh machine too (an active virtual environment is used, otherwise .venv is made).
#
#   bash run_all.sh demo      the shapes teacher, trained and scored on a CPU: under a minute after installation
#   bash run_all.sh test      the whole test suite; arguments go to pytest (-m "not slow", -k NAME ...)
#   bash run_all.sh table     the tables of README.md from tests/results/*.jsonl
#
# Runs lie in runs/COMMAND/ROW__sSEED: finished ones are skipped, begun ones resumed. Seeds: SEEDS="0 1 2" (default 0).
# Further arguments of demo go to every script: bash run_all.sh demo --device cpu
set -euo pipefail
cd "$(dirname "$0")"

environment() {
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    . .venv/bin/activate
  fi
  python -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
  for package in "$@"; do
    python -c "import $package" 2>/dev/null && continue
    echo "installing into $VIRTUAL_ENV"
    python -m pip install -q -r requirements.txt "$@"
    break
  done
}

# row COMMAND ROW SEED "SCRIPT" FLAGS...: finished: skipped; begun: resumed; a folder with neither steps aside
row() {
  local out="runs/$1" name="$2__s$3" seed="$3" script="$4"
  shift 4
  if [ -f "$out/$name/result.json" ]; then
    echo "$out/$name is finished"
  elif [ -f "$out/$name/ckpt_last.pt" ]; then
    python $script --resume "$out/$name"
  else
    [ ! -e "$out/$name" ] || mv "$out/$name" "$out/$name.aside-$(date +%Y%m%d-%H%M%S)"
    python $script --out_dir "$out" --run_name "$name" --seed "$seed" "$@"
  fi
}

demo() {
  environment torch torchvision numpy tqdm
  for seed in ${SEEDS:-0}; do
    row demo teacher "$seed" "common.py train" --dataset shapes --arch resnet20 "$@"
    python common.py eval "runs/demo/teacher__s$seed"
  done
  python common.py summarize runs/demo
}

tests() {
  environment torch torchvision numpy tqdm pytest
  python -m pytest -q tests "$@"
}

command="${1:-}"
[ $# -eq 0 ] || shift
case "$command" in
  demo) demo "$@" ;;
  test) tests "$@" ;;
  table) environment torch torchvision numpy tqdm; python common.py summarize --readme README.md ;;
  *) sed -n '2,10s/^# \{0,1\}//p' run_all.sh; exit 2 ;;
esac
