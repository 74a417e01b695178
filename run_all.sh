#!/usr/bin/env bash
# Everything with one command, on a fresh machine too (an active virtual environment is used, otherwise .venv is made).
#
#   bash run_all.sh demo      every method on shapes from one teacher, on a CPU: a few minutes after installation
#   bash run_all.sh laptop    the same on real CIFAR-10, ResNet-20 -> WRN-16-1, about 25 minutes a row on 2 cores
#   bash run_all.sh test      the whole test suite; arguments go to pytest (-m "not slow", -k NAME ...)
#   bash run_all.sh table     the tables of README.md from tests/results/*.jsonl
#
# Runs lie in runs/COMMAND/ROW__sSEED: finished ones are skipped, begun ones resumed. Seeds: SEEDS="0 1 2" (default 0).
# Further arguments go to every script: bash run_all.sh laptop --data_dir DIR --teacher_ckpt FILE
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
    row demo pgdi "$seed" pgdi.py --preset demo "$@"
  done
  python common.py summarize runs/demo
}

# one budget for all rows of a method family; bf16 is fast on new CPUs, --amp none on others
laptop() {
  environment torch torchvision numpy tqdm
  local common="--dataset cifar10 --teacher resnet20 --student wrn16_1 --amp bf16"
  local steps="--epochs 60 --ep_steps 150 --kd_steps 150 --batch_size 64 --lr 0.1 --eval_every 5"
  local synthesis="--warmup 10 --lr_tmax 50 --synthesis_batch_size 128 --ngf 32"
  local shots="--shots 10 --real_fewshot_initial 32 --mixed_distill_stop_epoch 30"
  for seed in ${SEEDS:-0}; do
    row laptop pgdi "$seed" pgdi.py $common $steps $synthesis $shots "$@"
    row laptop pgdi_described "$seed" pgdi.py --preset described $common $steps $synthesis $shots "$@"
    row laptop pgdi_fast "$seed" pgdi.py --preset fast $common $steps $synthesis "$@"
    row laptop pgdi_fewshot_kd "$seed" pgdi.py --preset fewshot_kd $common $steps --shots 10 --lr_tmax 60 "$@"
  done
  python common.py summarize runs/laptop
}

tests() {
  environment torch torchvision numpy tqdm pytest
  python -m pytest -q tests "$@"
}

command="${1:-}"
[ $# -eq 0 ] || shift
case "$command" in
  demo) demo "$@" ;;
  laptop) laptop "$@" ;;
  test) tests "$@" ;;
  table) environment torch torchvision numpy tqdm; python common.py summarize --readme README.md ;;
  *) sed -n '2,11s/^# \{0,1\}//p' run_all.sh; exit 2 ;;
esac
