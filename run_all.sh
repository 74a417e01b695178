#!/usr/bin/env bash
# Many runs with one command. An active virtual environment is used, otherwise .venv is made.
#   bash run_all.sh demo      every method on drawn shapes, no data, no GPU: about ten minutes
#   bash run_all.sh laptop    on CIFAR-10, 25 minutes a row: --data_dir DIR --teacher_ckpt FILE ...
#   bash run_all.sh paper     the published rows: [METHOD ...] [--only TEXT] [--dry-run]
#   bash run_all.sh test      the test suite; arguments go to pytest (-m "not slow", -k NAME ...)
#   bash run_all.sh table     README.md's tables from tests/results; published rows beside ours
#   bash run_all.sh row COMMAND NAME SEED "SCRIPT" FLAGS...    one run: runs/COMMAND/NAME__sSEED
# Finished runs are skipped, begun ones resumed. SEEDS="0 1 2" gives the seeds (default 0).
set -euo pipefail
cd "$(dirname "$0")"
cores=$(($(getconf _NPROCESSORS_ONLN) > 4 ? 4 : $(getconf _NPROCESSORS_ONLN)))

environment() {
  [ -n "${VIRTUAL_ENV:-}" ] || [ -x .venv/bin/python ] || python3 -m venv .venv
  [ -n "${VIRTUAL_ENV:-}" ] || . .venv/bin/activate
  python -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
  python -c 'import sys; from importlib.util import find_spec  # quicker than to import them
sys.exit(None in map(find_spec, sys.argv[1:]))' torch torchvision numpy tqdm "$@" && return
  echo "installing what is missing into $VIRTUAL_ENV"
  python -m pip install -q -r requirements.txt "${@/xdist/pytest-xdist}"
}

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

shown() {  # a row, after its command; one that meets a value that is not finite (1) is left out
  printf '\n%s\n== python %s %s\n' "${sees:-}" "$4" "${*:5}"
  row "$@" < /dev/null || [ $? = 1 ]
}

demo() {
  for seed in ${SEEDS:-0}; do
    while IFS="|" read -r name script flags sees; do
      shown demo "$name" "$seed" "$script" $flags "$@"
    done <<'END'
teacher|common.py train|--dataset shapes --arch resnet20|The teacher sees 5,000 labelled shapes.
alone|common.py train|--dataset shapes --arch resnet8|The student alone sees the same images.
fewshot_kd|pgdi.py|--preset demo_fewshot_kd|Plain distillation sees 5 images of each shape.
pgdi|pgdi.py|--preset demo|PGDI sees 5 images of each shape, and inverts the teacher to make more.
netgraft|netgraft.py|--preset demo|NetGraft sees 10 images of each shape, but no labels.
akd_gan|akd_gan.py|--preset demo|AKD-GAN sees no image: it makes those on which the student errs.
adadfkd|adadfkd.py|--preset demo|AdaDFKD sees no image: it makes easy ones first, then hard ones.
gda_kd|gda_kd.py|--preset demo|GDA-KD sees the teacher and all 5,000 labelled images.
END
  done
}

laptop() {
  local wrn="--dataset cifar10 --teacher resnet20 --student wrn16_1" amp # bf16 where it is fast
  amp="$(python -c 'import torch
gpu, cpu = torch.cuda.is_available(), open("/proc/cpuinfo").read()
fast = torch.cuda.get_device_capability() >= (8, 0) if gpu else "512_bf16" in cpu or "amx_bf" in cpu
print("--amp bf16" * fast)' 2> /dev/null || true)"
  for seed in ${SEEDS:-0}; do
    for r in pgdi:small{,_script,_fast,_fewshot_kd} akd_gan:small{,_dfad,_official} \
        gda_kd:small_{alone,kd,kd_zscore,kd_gda,dkd,dkd_gda}; do
      shown laptop "${r/:/_}" "$seed" "${r%:*}.py" --preset "${r#*:}" $amp "$@"
    done
    for preset in small{,_cudfkd,_dfq,_dafl,_zskt,_adi,_cmi}; do
      shown laptop "adadfkd_$preset" "$seed" adadfkd.py --preset "$preset" $wrn $amp "$@"
    done
    shown laptop netgraft "$seed" netgraft.py --preset laptop "$@"
    shown laptop netgraft_recover "$seed" netgraft.py --preset laptop_recover "$@"
    shown laptop adadfkd_no_balance "$seed" adadfkd.py --preset small --balance 0 $wrn $amp "$@"
    shown laptop adadfkd_no_adv "$seed" adadfkd.py --preset small --balance 0 --adv 0 $wrn $amp "$@"
    shown laptop gda_kd_wrn_alone "$seed" gda_kd.py --preset small_alone --student wrn16_1 $amp "$@"
    shown laptop gda_kd_wrn_kd "$seed" gda_kd.py --preset small_kd --student wrn16_1 $amp "$@"
    shown laptop gda_kd_fewshot "$seed" gda_kd.py --preset small_fewshot $amp "$@" --teacher_ckpt ""
  done
}

case "${1:-}" in
  demo | laptop) environment; "$@"; python tests/results.py words "runs/$1" ;;
  row) environment; "$@" ;;
  paper) environment; python tests/paper.py "${@:2}" ;;
  table) environment; python tests/results.py fill; python tests/paper.py table ;;
  test) environment pytest xdist; python -m pytest -q -n "$cores" -o testpaths=tests "${@:2}" ;;
  *) sed -n '2,12s/^# \{0,1\}//p' run_all.sh; exit 2 ;;
esac
