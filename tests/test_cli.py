"""The command line: help, speed, exit codes, four lines on standard error, nothing written for bad input."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import farspan
from farspan.errors import ClusterNotReady, DoesNotFit, RunFailed
from farspan.jobs import cli
from farspan.trainer.run_folder import RunFolder, write_json

JOB = """\
name: tiny
model: {family: llama, hidden: 64, layers: 1, heads: 4, kv_heads: 2, ffn: 128, vocab: 512}
data: {source: a.txt, context: 1k}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path / "cache"))
    Path("job.yaml").write_text(JOB)
    write_json(RunFolder(tmp_path / "outputs" / "old").job, {})
    return tmp_path


def command(*args, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(farspan.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "farspan.jobs", *args]
    return subprocess.run(run, capture_output=True, text=True, env=environment, timeout=120, **options)


def listing(folder):
    return sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.name != "driver.lock")


def four_lines(text):
    lines = text.strip().splitlines()
    assert [line[:7] for line in lines] == ["error: ", "   at: ", "  why: ", "  try: "], text
    return lines


# Arguments, a part of each of the four lines.
BAD = [
    (["run", "job.yaml", "--set", "optim.lrr=1"], "unknown key", "--set optim.lrr=1", "Optim has no", "`optim.lr`"),
    (["run", "jab.yaml"], "no job file jab.yaml", "jab.yaml", "looked in", "job.yaml"),
    (["run", "job.yaml", "--set", "name=old"], "folder of run old is in use", "old", "not overwritten", "--resume"),
    (["run", "job.yaml", "--resume"], "no run tiny to resume", "outputs/tiny", "no such folder", "--resume"),
    (["run", "job.yaml", "--resume", "--clean"], "--resume and --clean", "outputs/tiny", "deletes", "one of them"),
    (["run", "job.yaml", "--set", "parallel.sp=5"], "no layout allows SP degree 5", "--set parallel.sp=5",
     "4 attention heads", "1, 2, 4"),
    (["run", "job.yaml", "--set", "optim.tokens_per_step=1500"], "do not divide", "--set optim.tokens_per_step=1500",
     "1.465", "tokens_per_step=1024 or --set optim.tokens_per_step=2048"),
    (["run", "job.yaml", "--set", "model.kv_heads=3"], "does not split", "model.kv_heads", "1.333", "kv_heads=2"),
    (["run", "job.yaml", "--set", "model=./nowhere"], "no model folder", "model.id", "does not exist", "hub id"),
    (["run", "job.yaml", "--set", "output_dir=job.yaml"], "cannot be made", "job.yaml/tiny", "is a file", "output_dir"),
    (["run", "job.yaml", "--set", "parallel={zero: 0, cpu_offload: true}"], "needs ZeRO", "parallel=", "AdamW", "="),
    (["data", "job.yaml", "--set", "data.context=5"], "cannot be 5", "data.context=5", "at least 16", "8192"),
    (["data", "job.yaml"], "there is no file 'a.txt'", "a.txt", "does not exist", "data.source"),
    (["submit", "job.yaml"], "no cluster to submit to", "--address", "dashboard", "--print rayjob"),
    (["submit", "job.yaml", "--address", "host"], "not the address of a Ray dashboard", "--address", "HTTP", "http://"),
    (["report", "nope"], "no run nope", "nope", "job.json", "old"),
    (["report", "old"], "nothing to report", "metrics.jsonl", "no such file", "run folder"),
    (["export", "old"], "no complete checkpoint", "checkpoints", "manifest", "--resume"),
    (["export", "old", "--step", "3"], "no complete checkpoint of step 3", "checkpoints", "manifest", "--resume"),
    (["bench", "nope", "--anything", "1"], "no benchmark nope", "nope.py", "", "farspan bench"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "what", "at", "why", "try_"), BAD, ids=[" ".join(row[0]) for row in BAD])
def test_bad_input(here, capsys, args, what, at, why, try_):
    before = listing(here)
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    lines = four_lines(err)
    assert all(part in line for part, line in zip((what, at, why, try_), lines)), err
    assert out == ""
    assert listing(here) == before


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["run", "job.yaml", "--set", "stepps=1"], 2),
        (["run", "job.yaml", "--set", "parallel.sp=5"], 2),
        (["run", "job.yaml", "--address", "127.0.0.1:1"], 4),
    ],
)
def test_exit_code_of_the_process(here, args, code):
    done = command(*args, cwd=here)
    assert done.returncode == code
    four_lines(done.stderr)
    assert "Traceback" not in done.stderr
    assert not (here / "outputs" / "tiny").exists()


@pytest.mark.parametrize(
    "args", [[], ["fly"], ["run"], ["run", "job.yaml", "--sett", "a=1"], ["export", "x", "--step", "y"]]
)
def test_bad_usage_is_exit_code_2(here, capsys, args):
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    assert "farspan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailed("a", at="b", why="c", try_="d"), 1),
        (DoesNotFit("a", at="b", why="c", try_="d"), 3),
        (ClusterNotReady("a", at="b", why="c", try_="d"), 4),
        (ZeroDivisionError("ours"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_of_errors(here, capsys, monkeypatch, error, code):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("farspan.jobs.run.run", fail)
    assert cli.main(["run", "job.yaml"]) == code
    err = capsys.readouterr().err
    assert ("Traceback" in err) == isinstance(error, ZeroDivisionError)
    if hasattr(error, "exit_code"):
        four_lines(err)


def test_help_names_every_verb_and_is_quick(here):
    taken_s = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = command("--help", cwd=here)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # CPU time: the wall clock of a shared machine says little about us
        taken_s.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0
    verbs = re.findall(r"• (\w+) +(\S.*)", done.stdout)
    assert [verb for verb, _ in verbs] == ["plan", "run", "submit", "data", "doctor", "report", "export", "bench"]
    assert "farspan run job.py --set" in done.stdout and "Exit codes" in done.stdout
    assert min(taken_s) < 0.6, taken_s


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"farspan {verb}" in out and "{None}" not in out and "fixed" not in out


def test_help_imports_neither_torch_nor_ray():
    code = (
        "import sys\nfrom farspan.jobs.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'ray', 'transformers', 'numpy')])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(farspan.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{farspan.__version__}\n"


def test_submit_prints_a_manifest(here, capsys):
    args = ["submit", "job.yaml", "--print", "rayjob", "--set", "parallel.sp=2", "--set", "parallel.dp=1"]
    assert cli.main(args) == 0
    assert "kind: RayJob" in capsys.readouterr().out


def test_bench_hands_on_arguments_and_exit_code(tmp_path, monkeypatch):
    (tmp_path / "py" / "farspan").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "sft.py").write_text(
        "import sys\nsys.exit(3 if sys.argv[1:] == ['--lengths', '2k'] else 1)\n"
    )
    monkeypatch.setattr(farspan, "__file__", str(tmp_path / "py" / "farspan" / "__init__.py"))
    assert cli.main(["bench", "sft", "--lengths", "2k"]) == 3


def test_bench_without_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(farspan, "__file__", str(tmp_path / "lib" / "site-packages" / "farspan" / "__init__.py"))
    assert cli.main(["bench", "sft"]) == 2
    lines = four_lines(capsys.readouterr().err)
    assert "without its benchmarks" in lines[2] and "clone" in lines[3]
