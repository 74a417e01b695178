"""The rows that the papers publish, each as a command, and their numbers beside ours.

  bash run_all.sh paper                                  run them all, three seeds each
  bash run_all.sh paper pgdi akd_gan --only cifar100     two methods, rows whose name holds a text
  bash run_all.sh paper --dry-run --data_dir DIR         only list the commands, one line per run
  python tests/paper.py table                            theirs beside ours

A line of the list is complete, and started again it goes on where it was, so a Slurm array is
`sed -n "${SLURM_ARRAY_TASK_ID}p"` of it. Other flags go to every script. Without --dry-run each
GPU in sight (CUDA_VISIBLE_DEVICES, MIG names too) gets one run at a time, or PER_GPU=n of them;
Ctrl-C ends all, the same command goes on with them. SEEDS="0 1 2" is the default.
"""
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import results

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("pgdi", "netgraft", "akd_gan", "adadfkd", "gda_kd", "train")


class Row(NamedTuple):
    script: str
    flags: str  # beside the data set and the networks
    dataset: str
    teacher: str  # "" = none
    student: str  # several: one run trains them all
    published: str = ""  # a number for each student; "" = there is none
    protocol: str = ""  # how it was measured

    @property
    def name(self):
        """Of the run folder, without the seed."""
        method = "train" if "train" in self.script else self.script.removesuffix(".py")
        flags = self.flags.replace("--shots ", "k").replace("--gda", "gda")
        flags = flags.replace("--preset ", "").replace("--distiller ", "")
        nets = "-".join(filter(None, (self.teacher, self.student.replace(",", "+"))))
        return "__".join([method, *flags.split(), self.dataset, nets])

    @property
    def words(self):
        networks = ["--teacher", self.teacher] if self.teacher else []
        networks += ["--arch" if self.name.startswith("train") else "--student", self.student]
        return [*self.flags.split(), "--dataset", self.dataset, *networks]


# ---------------------------------------------------- the published numbers, as they were printed

ONE_RUN = "best test epoch of one run"
OF_FIVE = "best test epoch of the last phase, mean of 5 runs"
OF_MANY = "best test epoch, best of many runs"
CMI = "CMI's table, best test epoch"  # AdaDFKD's table prints its columns, but did not measure them
GROUPS = "AdaptConf's table, 8 groups of 64, best test epoch"
META = "Meta-Baseline's paper, 1 shot"

PGDI = {"--shots 5": ONE_RUN, "--shots 10": ONE_RUN, "--preset fast": ONE_RUN}, """
cifar10        resnet34  resnet18   94.61  95.10  94.05
cifar10        vgg11     resnet18   90.67  91.32  90.53
cifar10        wrn40_2   wrn16_1    88.45  89.15  89.29
cifar10        wrn40_2   wrn40_1    92.89  93.23  92.51
cifar10        wrn40_2   wrn16_2    92.73  92.83  92.45
cifar100       resnet34  resnet18   76.96  77.13  74.34
cifar100       vgg11     resnet18   70.15  70.97  67.44
cifar100       wrn40_2   wrn16_1    53.65  53.97  54.02
cifar100       wrn40_2   wrn40_1    69.46  69.55  63.91
cifar100       wrn40_2   wrn16_2    69.24  69.40  65.12
tiny_imagenet  resnet34  resnet18   64.13  64.17  -
"""
NETGRAFT = {f"--shots {n}": OF_FIVE for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 50)}, """
cifar10  netgraft_vgg16 netgraft_vgg16_student \
    90.74 92.60 92.70 92.77 92.88 92.84 92.77 92.83 92.88 92.89 92.78 92.76
cifar100 netgraft_vgg16 netgraft_vgg16_student \
    64.22 66.51 67.35 67.69 68.16 68.38 68.46 68.78 68.77 68.86 69.04 69.06
"""
ADADFKD = {"": OF_MANY, "--preset cudfkd": OF_MANY, "--preset dafl": CMI, "--preset zskt": CMI,
           "--preset adi": CMI, "--preset dfq": CMI, "--preset cmi": CMI}, """
cifar10        resnet34       resnet18       95.32  95.28  92.22  93.32  93.26  94.61  94.84
cifar10        vgg11          resnet18       92.19  91.61  81.10  89.46  90.36  90.84  91.13
cifar10        wrn40_2        wrn40_1        93.38  93.18  81.33  86.07  86.85  91.69  92.78
cifar10        wrn40_2        wrn16_2        93.15  92.98  81.55  89.66  89.72  92.01  92.52
cifar10        wrn40_2        wrn16_1        90.05  88.77  65.71  83.74  83.04  86.14  90.01
cifar100       resnet34       resnet18       77.13  75.87  74.47  67.74  61.32  77.01  77.04
cifar100       vgg11          resnet18       71.52  71.22  57.29  34.72  54.13  68.32  70.56
cifar100       wrn40_2        wrn40_1        68.19  66.43  34.66  29.73  61.33  62.92  68.88
cifar100       wrn40_2        wrn16_2        67.54  65.94  40.00  28.44  61.34  59.01  68.75
tiny_imagenet  resnet50_tiny  resnet18_tiny  58.18  -      -      -      -      -      -
"""
NATIVE = {"--preset native_kd": "mdistiller's table", "--preset native_dkd": "mdistiller's table",
          "--preset native_zscore": "logit standardisation, CVPR 2024"}, """
cifar100  resnet56    resnet20   70.66  71.97  -
cifar100  resnet32x4  resnet8x4  73.33  76.32  76.62
cifar100  vgg13       vgg8       72.98  74.68  -
cifar100  wrn40_2     wrn16_2    74.92  76.23  -
"""
ADAPTCONF = {"--preset adaptconf --distiller kd": GROUPS, "--preset adaptconf": GROUPS,
             "--preset adaptconf --distiller augconf": GROUPS}, """
cifar100  resnet20  resnet56  73.81  74.17  73.86
"""
REMARKS = {  # of a number with a story of its own
    "67.54": "best test epoch, the largest of 42 runs, whose mean is 66.79",
    "68.19": "best test epoch, the largest of 50 runs, whose mean is 67.63",
    "58.18": "stored outputs of one run; the published table has no such row",
    "65.71": f"{CMI}; AdaDFKD's prints 72.15",
    "83.04": f"{CMI}; AdaDFKD's prints 83.01",
    "62.92": f"{CMI}; AdaDFKD's prints 61.92",
    "77.04": f"{CMI}; AdaDFKD's prints 77.02",
    "68.88": f"{CMI}; AdaDFKD's prints 66.89",
    "68.75": f"{CMI}; AdaDFKD's prints 65.11",
}


def rows_of(script, table):
    """A row of the list for each number of a table."""
    columns, text = table
    rows = []
    for line in text.strip().split("\n"):
        dataset, teacher, student, *numbers = line.split()
        for (flags, protocol), number in zip(columns.items(), numbers, strict=True):
            if number != "-":
                protocol = REMARKS.get(number, protocol)
                rows.append(Row(script, flags, dataset, teacher, student, number, protocol))
    return rows


AKD, GDA, C100 = "akd_gan.py", "gda_kd.py", "cifar100"
R12, R18, R36 = "resnet12_bottle", "resnet18_bottle", "resnet36_bottle"
ROWS = [
    *rows_of("pgdi.py", PGDI),
    *rows_of("netgraft.py", NETGRAFT),
    Row(AKD, "--preset official", C100, "resnet34_imagenet", "resnet18,resnet18_small",
        "39.90 20.00", "best epoch on 20 % of the test images (on 10 %: 38.10, 19.01)"),
    Row(AKD, "--preset dfad", C100, "resnet34", "resnet18", "67.7", "DFAD's paper, teacher 77.5"),
    Row(AKD, "--preset strong", C100, "resnet34", "resnet18", "77.01",
        "DFQ in CMI's table: wider generator, teacher 78.05"),
    *rows_of("adadfkd.py", ADADFKD),
    # GDA's authors give no numbers: here are those of others, below the same with GDA on top
    *rows_of(GDA, NATIVE),
    *rows_of(GDA, ADAPTCONF),
    Row(GDA, "--preset fs_classifier --distiller vanilla", "mini", "", R12, "58.91", META),
    Row(GDA, "--preset fs_meta --distiller vanilla", "mini", "", R12, "63.17", META),
    Row(GDA, "--preset fs_adaptconf", "mini", R12, R36, "61.50", "AdaptConf's table, 1 shot"),
    Row(GDA, "--preset fs_adaptconf", "mini", R18, R36, "62.29", "AdaptConf's table, 1 shot"),
    Row(GDA, "", C100, "resnet56", "resnet20"),  # the published command
]
ROWS += [row._replace(flags=f"{row.flags} --gda", published="", protocol="") for row in ROWS
         if row.script == GDA and row.flags and "zscore" not in row.flags
         and "vanilla" not in row.flags]
ALONE = sorted({(row.dataset, student) for row in ROWS for student in row.student.split(",")
                if row.dataset != "mini" and "netgraft" not in student})
ROWS += [Row("common.py train", "", dataset, "", student) for dataset, student in ALONE]


# ------------------------------------------------------------------------------ list, run, table

def jobs(words):
    """The commands of the wanted rows and seeds."""
    methods, text = [], ""
    while words and words[0] in METHODS:
        methods.append(words.pop(0))
    if "--only" in words[:-1]:
        at = words.index("--only")
        text = words[at + 1]
        del words[at:at + 2]
    if words and not words[0].startswith("--"):
        sys.exit(f"{words[0]} is no method; choose of {', '.join(METHODS)}")
    wanted = [row for row in ROWS if text in row.name
              and (not methods or row.name.split("__")[0] in methods)]
    return [["bash", "run_all.sh", "row", "paper", row.name, seed, row.script, *row.words, *words]
            for row in wanted for seed in os.environ.get("SEEDS", "0 1 2").split()]


def places():
    """A name of a GPU for each run that may go on at once; "" is the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch
        visible = ",".join(map(str, range(torch.cuda.device_count())))
    return visible.replace(" ", "").split(",") * int(os.environ.get("PER_GPU", 1))


def spread(commands, free, logs):
    """Run them all, one on each free place; returns those that failed. Ctrl-C ends all."""
    waiting, running, failed = list(commands), [], []
    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and free:
                command, place = waiting.pop(0), free.pop(0)
                log = logs / f"{command[4]}__s{command[5]}.log"
                with open(log, "a") as out:
                    process = subprocess.Popen(
                        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": place}, cwd=ROOT,
                        stdout=out, stderr=out, start_new_session=True)
                running.append((process, command, place, log))
                print(f"begun on {place or 'the CPU'}: tail -f {log}", flush=True)
            time.sleep(0.2)
            for job in [job for job in running if job[0].poll() is not None]:
                running.remove(job)
                process, command, place, log = job
                free.append(place)
                failed += [command] * (process.returncode != 0)
                end = f"failed ({process.returncode})" if process.returncode else "finished"
                print(f"{end}: {log.stem}; {len(waiting)} wait", flush=True)
    except KeyboardInterrupt:
        for process, *_ in running:
            os.killpg(process.pid, signal.SIGTERM)
        for process, *_ in running:
            process.wait()
        sys.exit("stopped; the same command goes on")
    return failed


def table(names=()):
    """Each published number and ours; runs with further flags than the row's do not count."""
    lines = ["| row | last epoch | best epoch | n | published | how |", "|" + "---|" * 6]
    ours = results.kept("paper") + results.finished(ROOT / "runs" / "paper")
    for row in [row for row in ROWS if not names or row.name in names]:
        numbers = row.published.split() or [""] * len(row.student.split(","))
        for student, number in zip(row.student.split(","), numbers, strict=True):
            own = {word.removeprefix("--").removeprefix("no_") for word in row.words}
            found = {r["seed"]: r for r in ours if r["row"] == row.name and r["student"] == student
                     and r["typed"].keys() <= own | {"amp", "compile"}}.values()
            cells = [results.mean_and_deviation(found, key) for key in ("last", "best")]
            cells = [cell or "not run" for cell in cells] + [str(len(found)), number, row.protocol]
            name = row.name if row.student == student else f"{row.name} ({student})"
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(words):
    if words == ["table"]:
        return print(table())
    commands = jobs([word for word in words if word != "--dry-run"])
    if "--dry-run" in words:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for a reader that has seen enough (head)
        return print("\n".join(map(shlex.join, commands)))
    failed = spread(commands, places(), ROOT / "runs" / "paper" / "logs")
    print(table({command[4] for command in commands}))
    sys.exit(f"{len(failed)} failed; the same command goes on with them" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
