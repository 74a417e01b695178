#!/usr/bin/env bash
# Everything with one command, on a fresh machine too (an active virtual environment is used, otherwise .venv is made).
#
#   bash run_all.sh demo      every method on shapes from one teacher, on a CPU: under ten minutes on two slow cores
#   bash run_all.sh laptop    the same on real CIFAR-10, ResNet-20 -> WRN-16-1, about 25 minutes a row, one thread each
#   bash run_all.sh paper     every published row, three seeds, a process per GPU (METHOD ..., --only TEXT, --dry-run)
#   bash run_all.sh test      the whole test suite; arguments go to pytest (-m "not slow", -k NAME ...)
#   bash run_all.sh table     the tables of README.md from tests/results/*.jsonl; published rows beside ours
#
# Runs lie in runs/COMMAND/ROW__sSEED: finished ones are skipped, begun ones resumed. Seeds: SEEDS="0 1 2" (default 0;
# paper: 0 1 2). Further arguments go to every script (paths from this folder): laptop --data_dir DIR --teacher_ckpt FILE
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

# row COMMAND ROW SEED "SCRIPT" FLAGS...: finished: skipped; begun: resumed; a folder with neither is renamed
row() {
  local out="runs/$1" name="$2__s$3" seed="$3" script="$4"
  shift 4
  if [ -f "$out/$name/result.json" ]; then
    echo "$out/$name is finished"
  elif [ -f "$out/$name/ckpt_last.pt" ]; then
    python $script --resume "$out/$name"
  else
    if [ -e "$out/$name" ]; then
      python -c 'import fcntl, sys; fcntl.flock(open(sys.argv[1], "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)' \
        "$out/$name/lock" || { echo "$out/$name is in use by another process"; return 1; }
      mv "$out/$name" "$out/$name.aside-$(date +%Y%m%d-%H%M%S)"
    fi
    python $script --out_dir "$out" --run_name "$name" --seed "$seed" "$@"
  fi
}

demo() {
  environment torch torchvision numpy tqdm
  for seed in ${SEEDS:-0}; do
    row demo teacher "$seed" "common.py train" --dataset shapes --arch resnet20 "$@"
    row demo scratch "$seed" "common.py train" --dataset shapes --arch resnet8 "$@"
    row demo fewshot_kd "$seed" pgdi.py --preset fewshot_kd --dataset shapes --teacher resnet20 --student resnet8 \
      --shots 5 --epochs 4 --ep_steps 50 --kd_steps 50 --batch_size 48 --lr 0.1 --lr_tmax 4 "$@"
    row demo pgdi "$seed" pgdi.py --preset demo "$@"
    row demo netgraft "$seed" netgraft.py --preset demo "$@"
    row demo akd_gan "$seed" akd_gan.py --preset demo "$@"
    row demo adadfkd "$seed" adadfkd.py --preset demo "$@"
    row demo gda_kd "$seed" gda_kd.py --preset demo "$@"
  done
  python common.py summarize runs/demo
}

# about one budget for all rows; in bf16 where the machine has it
laptop() {
  environment torch torchvision numpy tqdm
  local amp="none"
  python -c 'import sys, torch
sys.exit(not (torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"))' && amp="bf16"
  local real="--dataset cifar10 --teacher resnet20 --amp $amp --eval_every 5" wrn="--student wrn16_1"
  local steps="--epochs 60 --ep_steps 150 --kd_steps 150 --batch_size 64 --lr 0.1"
  local synthesis="--lr_tmax 50 --warmup 10 --synthesis_batch_size 128 --ngf 32"
  local shots="--shots 10 --real_fewshot_initial 32 --mixed_distill_stop_epoch 30"
  local game="--student wrn16_1,resnet8 --epochs 30 --batch_size 32 --ngf 32"
  local labels="--recipe native --limit_train 5000 --epochs 60"
  for seed in ${SEEDS:-0}; do
    row laptop pgdi "$seed" pgdi.py $real $wrn $steps $synthesis $shots "$@"
    row laptop pgdi_described "$seed" pgdi.py --preset described $real $wrn $steps $synthesis $shots "$@"
    row laptop pgdi_fast "$seed" pgdi.py --preset fast $real $wrn $steps $synthesis "$@"
    row laptop pgdi_fewshot_kd "$seed" pgdi.py --preset fewshot_kd $real $wrn $steps --lr_tmax 60 --shots 10 "$@"
    row laptop akd_gan_official "$seed" akd_gan.py --preset official $real $game --epoch_itrs 17 "$@"
    row laptop akd_gan_dfad "$seed" akd_gan.py --preset dfad $real $game --epoch_itrs 50 --milestones 18,25 "$@"
    row laptop akd_gan_strong "$seed" akd_gan.py --preset strong $real $game --epoch_itrs 50 --kd_steps 5 \
      --lr 0.05 --lr_g 2e-3 --T 20 "$@"
    local round="--epochs 30 --ep_steps 300 --kd_steps 10"
    for preset in auto cudfkd dfq dafl zskt; do
      row laptop "adadfkd_$preset" "$seed" adadfkd.py --preset $preset $real $wrn $round "$@"
    done
    row laptop adadfkd_plain "$seed" adadfkd.py $real $wrn $round --adv 0 --balance 0 "$@"
    row laptop adadfkd_adv "$seed" adadfkd.py $real $wrn $round --balance 0 "$@"
    row laptop adadfkd_adi "$seed" adadfkd.py --preset adi $real $wrn --epochs 21 --ep_steps 200 --kd_steps 200 \
      --g_steps 100 --synthesis_batch_size 128 "$@"
    row laptop adadfkd_cmi "$seed" adadfkd.py --preset cmi $real $wrn --epochs 10 --ep_steps 250 --kd_steps 250 \
      --g_steps 70 --synthesis_batch_size 128 "$@"
    row laptop netgraft "$seed" netgraft.py $real --student resnet8 "$@"
    row laptop netgraft_recover "$seed" netgraft.py --preset recover $real --student resnet8 --lr_block 2.5e-3 \
      --lr_net 1e-3 "$@"
    row laptop gda_kd_vanilla "$seed" gda_kd.py --distiller vanilla $real $labels --student resnet8 "$@"
    for distiller in kd dkd; do
      row laptop "gda_kd_$distiller" "$seed" gda_kd.py --distiller $distiller --no_gda $real $labels \
        --student resnet8 "$@"
      row laptop "gda_kd_${distiller}_gda" "$seed" gda_kd.py --distiller $distiller $real $labels --student resnet8 "$@"
    done
    row laptop gda_kd_wrn "$seed" gda_kd.py $real $labels $wrn "$@"
    row laptop gda_kd_wrn_alone "$seed" gda_kd.py --distiller vanilla $real $labels $wrn "$@"
    row laptop gda_kd_weak "$seed" gda_kd.py $real $labels --teacher resnet8 --student resnet20 "$@" \
      --teacher_ckpt "runs/laptop/gda_kd_vanilla__s$seed/student.pt"
    row laptop gda_kd_weak_alone "$seed" gda_kd.py --distiller vanilla $real $labels --student resnet20 "$@"
    row laptop gda_kd_fewshot "$seed" gda_kd.py --task fewshot --fs_data cifarfs --teacher resnet18_thin \
      --student resnet12_thin --epochs 3 --meta_epochs 2 --amp "$amp" "$@" --teacher_ckpt ""
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
  paper) environment torch torchvision numpy tqdm; python tests/paper.py "$@" ;;
  row) row "$@" ;;
  test) tests "$@" ;;
  table) environment torch torchvision numpy tqdm; python common.py summarize --readme README.md; python tests/paper.py table ;;
  *) sed -n '2,12s/^# \{0,1\}//p' run_all.sh; exit 2 ;;
esac
