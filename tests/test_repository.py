"""What holds for the repository as a whole: its commands, run_all.sh, its files."""
import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import common
from tools import ROOT

METHODS = ("pgdi", "netgraft", "akd_gan", "adadfkd", "gda_kd")
SCRIPTS = ("common", *METHODS)


# --------------------------------------------------------------------------------------- commands

def parse(words):
    """python SCRIPT FLAGS: the Args that the script makes of it; fails with the command."""
    script, *flags = words
    while "--resume" in flags:  # its folder has to be there
        del flags[flags.index("--resume"):][:2]
    if "--teacher_ckpt" in flags:  # its file too
        at = flags.index("--teacher_ckpt")
        del flags[at:at + 2]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            if script in [f"{name}.py" for name in METHODS]:
                module = importlib.import_module(script.removesuffix(".py"))
                return common.parse_args(module.Args, module.PRESETS, flags)
            if script == "common.py":
                _, cls, first = common.COMMANDS[flags[0]]
                flags = flags[1:]
                if flags and not flags[0].startswith("-"):
                    flags.insert(0, f"--{first}")
                return common.parse_args(cls, None, flags)
    except SystemExit as e:
        if e.code != 0:  # --help
            pytest.fail(f"python {shlex.join(words)}\n{errors.getvalue()}")
    assert (ROOT / script).is_file() or script in ("-m", "-c"), f"no such file: python {script}"


def commands_in(text):
    """Lines of the text that are a command, and what stands between backticks in a line."""
    found = re.findall(r"^ *(python [^`\n]+)", text, re.M) + re.findall(r"`(python [^`\n]+)`", text)
    return [shlex.split(line, comments=True)[1:] for line in found if ".py" in line]


def readme_commands():
    text = (ROOT / "README.md").read_text()
    in_blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return commands_in(in_blocks) + commands_in(outside)


def test_commands_of_the_readme():
    commands = readme_commands()
    assert len(commands) > 10
    for words in commands:
        parse(words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_of_the_docstrings(name):
    commands = commands_in(importlib.import_module(name).__doc__)
    assert commands and all(words[0] == f"{name}.py" for words in commands)
    for words in commands:
        parse(words)


@pytest.fixture
def house(tmp_path):
    """run_all.sh in a folder of its own, with a python that notes its words and runs no script."""
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python"
    fake.write_text(f'#!/bin/bash\n[ "$1" != -c ] || exec {shlex.quote(sys.executable)} "$@"\n'
                    'printf "%q " "$@" >> log\necho >> log\nexit ${CODE:-0}\n')
    fake.chmod(0o755)

    def run(*words, **more):
        env = {**os.environ, "VIRTUAL_ENV": str(tmp_path), "SEEDS": "3", **more,
               "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        log = tmp_path / "log"
        log.write_text("")
        out = subprocess.run(["bash", "run_all.sh", *words], cwd=tmp_path, env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return out.stdout, [shlex.split(line) for line in log.read_text().splitlines()]

    run.folder = tmp_path
    return run


@pytest.mark.parametrize("command, least", [("demo", 8), ("laptop", 25)])
def test_rows_of_run_all(house, command, least):
    """Each has flags that parse, a name of its own, the seed and what the user adds."""
    screen, runs = house(command, "--data_dir", "elsewhere")
    assert runs.pop()[:2] == ["tests/results.py", "words"] and len(runs) >= least
    for words in runs:
        args = parse(words)
        assert (args.seed, args.data_dir, args.out_dir) == (3, "elsewhere", f"runs/{command}")
        assert command == "demo" or args.dataset in ("cifar10", "cifarfs")
        assert f"== python {words[0]}" in screen
    assert len({words[words.index("--run_name") + 1] for words in runs}) == len(runs)
    cpu = Path("/proc/cpuinfo")
    fast = cpu.is_file() and re.search("avx512_bf16|amx_bf16", cpu.read_text()) is not None
    if command == "laptop":
        assert any("bf16" in words for words in runs) == fast
    else:
        assert screen.count(" sees ") == len(runs)


def test_a_row_that_fails(house):
    """A value that is not finite (exit code 1) leaves the other rows; bad input ends them all."""
    assert len(house("demo", CODE="1")[1]) > 8
    assert len(house("demo", CODE="2")[1]) == 1


def test_row_skips_resumes_and_moves_aside(house):
    run = house.folder / "runs" / "mine" / "a__s5"
    row = ("row", "mine", "a", "5", "common.py train", "--epochs", "2")
    fresh = "common.py train --out_dir runs/mine --run_name a__s5 --seed 5 --epochs 2".split()
    assert house(*row)[1] == [fresh]
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("of the user")
    assert house(*row)[1] == [fresh]  # neither finished nor begun
    aside, = run.parent.glob("a__s5.aside-*")
    assert (aside / "notes.txt").read_text() == "of the user" and not run.exists()
    run.mkdir()
    (run / "ckpt_last.pt").touch()
    assert house(*row)[1] == ["common.py train --resume runs/mine/a__s5".split()]
    (run / "result.json").touch()
    assert house(*row) == ("runs/mine/a__s5 is finished\n", [])


# -------------------------------------------------------------------------------------- the files

def test_top_level_files():
    git = subprocess.run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"],
                         capture_output=True, text=True)
    if git.returncode:
        pytest.skip("no git repository")
    top = {line.split("/")[0] for line in git.stdout.splitlines() if (ROOT / line).exists()}
    assert top - {"LICENSE"} == {".ci", ".gitignore", "README.md", "requirements.txt", "run_all.sh",
                                 "tests", *(f"{name}.py" for name in SCRIPTS)}


def test_scripts_import_only_common_and_do_nothing_then(tmp_path):
    for name in METHODS:
        imported = re.findall(r"^(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        assert not set(imported) & set(METHODS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(SCRIPTS)}"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_a_script_and_common_are_a_whole_project(name, tmp_path):
    for file in (f"{name}.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    for flag in ["--help"] + ["--smoke"] * (name == "pgdi"):
        out = subprocess.run([sys.executable, f"{name}.py", flag], cwd=tmp_path, text=True,
                             capture_output=True)
        assert out.returncode == 0, out.stderr
    assert name != "pgdi" or list(tmp_path.glob("runs/*/student.pt"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_comprehension_in_another(name):
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        inner = [n for n in ast.walk(node) if n is not node and isinstance(n, kinds)]
        assert not isinstance(node, kinds) or not inner, f"line {node.lineno}"
