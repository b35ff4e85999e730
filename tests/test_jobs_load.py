"""Job files and overrides: what loads, where each value came from, and how bad input is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import farspan
from farspan import ChatData, FullFineTune, LoRA, Model, RandomModel, SFTJob, TextData
from farspan.errors import FarspanError, JobError
from farspan.jobs.load import load
from farspan.jobs.origins import leaves
from farspan.jobs.variants import section, variants
from farspan.jobs.yaml_file import read_yaml

YAML = """\
name: tiny
model:
  family: llama
  hidden: 64
data: stdlib
optim:
  lr: 1e-5
  steps: 3
memory:
  mlp_tile: off
"""

PYTHON = """\
from farspan import LoRA, Model, Optim, SFTJob, TextData

shared = Optim(
    lr=1e-5,
    steps=3,
)
job = SFTJob(
    name="tiny",
    model=Model("some/model"),
    data=TextData("stdlib", context="4k"),
    optim=shared,
)
"""


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_yaml_loads_with_shorthands_and_yaml_1_2_scalars(tmp_path):
    job = load(write(tmp_path, "job.yaml", YAML)).job
    assert job.model == RandomModel(family="llama", hidden=64)
    assert job.data == TextData("stdlib")
    assert job.optim.lr == 1e-5  # YAML 1.1 reads text
    assert job.memory.mlp_tile == "off"  # YAML 1.1 reads false


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("model: Qwen/Qwen3-8B", Model("Qwen/Qwen3-8B")),
        ("model: random", RandomModel()),
        ("model: {hidden: 64}", RandomModel(hidden=64)),
        ("model: {id: a/b, tokenizer: c/d}", Model("a/b", tokenizer="c/d")),
        ("model: {type: random, layers: 2}", RandomModel(layers=2)),
        ("data: 'src/**/*.py'", TextData("src/**/*.py")),
        ("data: [a.txt, b.txt]", TextData(("a.txt", "b.txt"))),
        ("data: {source: a.jsonl, context: 4k}", TextData("a.jsonl", context=4096)),
        ("data: {source: a.jsonl, messages_field: turns}", ChatData("a.jsonl", messages_field="turns")),
        ("data: {type: chat, source: a.jsonl}", ChatData("a.jsonl")),
        ("adapter: lora", LoRA()),
        ("adapter: {rank: 4}", LoRA(rank=4)),
        ("adapter: {}", FullFineTune()),
    ],
)
def test_type_may_be_left_out(tmp_path, written, expected):
    key = written.partition(":")[0]
    base = {"name": "n", "model": "m", "data": "stdlib"}
    text = yaml.safe_dump({k: v for k, v in base.items() if k != key}) + written
    assert getattr(load(write(tmp_path, "job.yaml", text)).job, key) == expected


def test_python_file_runs_alone(tmp_path):
    write(tmp_path, "beside_the_job.py", "RANK = 5\n")
    ref = write(
        tmp_path,
        "job.py",
        PYTHON + "import beside_the_job\n"
        "assert __name__ != '__main__'\n"
        "small = job.model_copy(update={'adapter': LoRA(rank=beside_the_job.RANK)})\n"
        "alias = small\n",
    )
    before = list(sys.path)
    assert load(f"{ref}:small").job.adapter == LoRA(rank=5)
    assert sys.path == before
    assert "farspan_job_file" not in sys.modules
    with pytest.raises(JobError, match="several jobs") as caught:
        load(ref)
    assert caught.value.why == "at top level it has job, small"  # `alias` is the same job as `small`
    del sys.modules["beside_the_job"]


def test_origins_name_default_file_and_flag(tmp_path):
    ref = write(tmp_path, "job.py", PYTHON)
    loaded = load(ref, ["optim.steps=7", "adapter=lora", "adapter.rank=4"])
    origins = {path: (origin.kind, origin.where) for path, origin in loaded.origins.items()}
    assert origins["name"] == ("file", f"{ref}:8")
    assert origins["model.id"] == ("file", f"{ref}:9")
    assert origins["data.context"] == ("file", f"{ref}:10")
    assert origins["optim.lr"] == ("file", f"{ref}:4")
    assert origins["optim.steps"] == ("flag", "--set optim.steps=7")
    assert origins["adapter.type"] == ("flag", "--set adapter=lora")
    assert origins["adapter.rank"] == ("flag", "--set adapter.rank=4")
    assert origins["adapter.dropout"] == ("default", None)
    assert origins["optim.clip_norm"] == ("default", None)
    assert set(origins) == {".".join(map(str, path)) for path, _ in leaves(loaded.job)}

    ref = write(tmp_path, "job.yaml", YAML)
    origins = {path: (origin.kind, origin.where) for path, origin in load(ref).origins.items()}
    assert origins["optim.steps"] == ("file", f"{ref}:8")
    assert origins["model.hidden"] == ("file", f"{ref}:4")
    assert origins["model.type"] == ("file", f"{ref}:2")  # told by the section that begins there
    assert origins["model.layers"] == ("default", None)


@pytest.mark.parametrize("file", ["job.py", "job.yaml"])
@pytest.mark.parametrize(
    ("overrides", "path", "expected"),
    [
        (["optim.lr=3e-5"], "optim.lr", 3e-5),
        (["optim.tokens_per_step=1M"], "optim.tokens_per_step", 2**20),
        (["optim.steps=4", "optim.steps=5"], "optim.steps", 5),
        (["name=2024"], "name", "2024"),
        (["data=**/*.txt"], "data", TextData("**/*.txt", context=4096)),
        (["data=[a.txt, b.txt]"], "data.source", ("a.txt", "b.txt")),
        (["data=[a.txt]", "data=b.txt"], "data.source", "b.txt"),
        (["data.type=chat"], "data", ChatData("stdlib", context=4096)),
        (["data=x.jsonl", "data.type=chat"], "data", ChatData("x.jsonl", context=4096)),
        (["data=chat", "data.source=y.jsonl"], "data", ChatData("y.jsonl", context=4096)),
        (["adapter.rank=8", "adapter.type=lora"], "adapter", LoRA(rank=8)),
        (["adapter={rank: 2, target_modules: [q_proj]}"], "adapter", LoRA(rank=2, target_modules=("q_proj",))),
        (["adapter=full"], "adapter", FullFineTune()),
        (["model=/some/folder"], "model", Model("/some/folder")),
        (["model=random", "model.hidden=32"], "model", RandomModel(hidden=32)),
        (["model={family: qwen3}"], "model", RandomModel(family="qwen3")),
        (["optim.clip_norm=null"], "optim.clip_norm", None),
        (["track.wandb=7"], "track.wandb", "7"),
        (["track.tensorboard=false"], "track.tensorboard", False),
    ],
)
def test_overrides_mean_the_same_in_both_kinds_of_file(tmp_path, file, overrides, path, expected):
    text = PYTHON if file.endswith(".py") else "name: tiny\nmodel: {id: a/b}\ndata: {source: stdlib, context: 4k}\n"
    value = load(write(tmp_path, file, text), overrides).job
    for part in path.split("."):
        value = getattr(value, part)
    assert value == expected


def test_switching_a_variant_drops_only_what_the_new_one_lacks(tmp_path):
    text = "name: t\nmodel: a/b\ndata: {source: x, text_field: body, context: 2k}\nadapter: {rank: 3, dropout: 0.5}\n"
    ref = write(tmp_path, "job.yaml", text)
    job = load(ref, ["data.type=chat", "adapter.type=full"]).job
    assert job.data == ChatData("x", context=2048)
    assert job.adapter == FullFineTune()
    assert load(ref, ["adapter.type=lora", "adapter.rank=9"]).job.adapter == LoRA(rank=9, dropout=0.5)


# Each row: file name, text (None: no file), overrides, then a part of what, at, why and try.
BAD = [
    ("job.yaml", YAML + "optin: {}\n", [], "unknown key `optin`", "job.yaml:11", "SFTJob has no `optin`", "`optim`"),
    ("job.yaml", YAML.replace("steps", "stepps"), [], "`optim.stepps`", "job.yaml:8", "Optim has no", "`optim.steps`"),
    ("job.yaml", YAML.replace("hidden", "hiden"), [], "`model.hiden`", "job.yaml:4", "RandomModel", "`model.hidden`"),
    ("job.yaml", YAML + "steps: 3\n", [], "unknown key `steps`", "job.yaml:11", "SFTJob has no", "`optim.steps`"),
    ("job.yaml", YAML.replace("steps: 3", "steps: many"), [], "`optim.steps` cannot be 'many' (text)", "job.yaml:8",
     "expected a whole number", "leave `optim.steps` out for the default (100)"),
    ("job.yaml", YAML.replace("steps: 3", "steps: 0"), [], "cannot be 0", "job.yaml:8", "at least 1", "at least 1"),
    ("job.yaml", YAML.replace("  lr: 1e-5\n  steps: 3", "  - 1"), [], "`optim` cannot", "job.yaml:6", "section", ""),
    ("job.yaml", YAML + "parallel: {sp: most}\n", [], "`parallel.sp` cannot be 'most'", "job.yaml:11",
     "a whole number or `auto`", "`auto`"),
    ("job.yaml", YAML.replace("data: stdlib", "data: {context: 8q}"), [], "`data.source` is missing", "job.yaml:5",
     "TextData needs it", "source:"),
    ("job.yaml", YAML.replace("stdlib", "{source: x, context: 8q}"), [], "cannot be '8q'", "job.yaml:5",
     "'8q' is not a count", "256k"),
    ("job.yaml", YAML.replace("name: tiny", "name: a/b"), [], "cannot be 'a/b'", "job.yaml:1", "matches", "`name`"),
    ("job.yaml", YAML.replace("name: tiny\n", ""), [], "`name` is missing", "job.yaml", "no default", "name: my-run"),
    ("job.yaml", YAML + "adapter: {type: loar}\n", [], "of no known type", "job.yaml:11", "lora, full", "lora"),
    ("job.yaml", YAML + "name: again\n", [], "`name` is given twice", "job.yaml:11", "job.yaml:1", "delete one"),
    ("job.yaml", YAML + "memory:\n\t- x\n", [], "not YAML", "job.yaml:12", "cannot start any token", "indentation"),
    ("job.yaml", YAML + "precision: !!python/name:os.system x\n", [], "not allowed", "job.yaml:11", "text", "Python"),
    ("job.yaml", YAML + "track: &a {wandb: *a}\n", [], "alias", "job.yaml:11", "", ""),
    ("job.yaml", "- 1\n", [], "holds no job", "job.yaml", "a list", "name: my-run"),
    ("job.yaml", "", [], "holds no job", "job.yaml", "empty", "name: my-run"),
    ("jobb.yaml", None, [], "no job file", "jobb.yaml", "looked in", "give the path of a job file"),
    ("job.toml", "", [], "is not a job file", "job.toml", "path.py:name", "give the path"),
    ("job.py", PYTHON.replace("steps=3", "stepps=3"), [], "key `stepps`", "job.py:5", "Optim has no", "`steps`"),
    ("job.py", PYTHON.replace("optim=shared", "optm=shared"), [], "key `optm`", "job.py:11", "SFTJob", "`optim`"),
    ("job.py", PYTHON.replace("lr=1e-5", 'lr="fast"'), [], "`lr` cannot be 'fast'", "job.py:4", "a number", "0.0001"),
    ("job.py", PYTHON.replace("optim=shared", 'optim={"lr": 1e-5, "stepps": 4}'), [], "`optim.stepps`", "job.py:11",
     "Optim has no", "`optim.steps`"),
    ("job.py", PYTHON.replace('    name="tiny",\n', ""), [], "`name` is missing", "job.py:7", "no default", "my-run"),
    ("job.py", PYTHON.replace('Model("some/model")', 'Model("a", "b")'), [], "raised TypeError", "job.py:9",
     "one positional argument (id)", "traceback"),
    ("job.py", "import no_such_module\n" + PYTHON, [], "ModuleNotFoundError", "job.py:1", "no_such_module", ""),
    ("job.py", PYTHON + "raise SystemExit(3)\n", [], "raised SystemExit", "job.py:13", "3", "python"),
    ("job.py", PYTHON + "def broken(:\n", [], "not Python", "job.py:13", "invalid syntax", "py_compile"),
    ("job.py", "x = 1\n", [], "no job in the file", "job.py", "top level", "SFTJob("),
    ("job.py:jab", PYTHON, [], "no job named jab", "job.py:jab", "its jobs are job", "job.py:job"),
    ("job.yaml", YAML, ["optim.lr"], "not an override", "--set optim.lr", "equals sign", "--set optim.lr=1e-4"),
    ("job.yaml", YAML, ["=3"], "not an override", "--set =3", "dotted path", "--set"),
    ("job.yaml", YAML, ["optim.lrr=3"], "unknown key `optim.lrr`", "--set optim.lrr=3", "Optim has no", "`optim.lr`"),
    ("job.py", PYTHON, ["optm.lr=3"], "unknown key `optm`", "--set optm.lr=3", "SFTJob has no", "`optim`"),
    ("job.py", PYTHON, ["optim.lr.x=3"], "`optim.lr` has no parts", "--set optim.lr.x=3", "one value", "--set"),
    ("job.py", PYTHON, ["optim.steps=many"], "cannot be 'many'", "--set optim.steps=many", "a whole number", "100"),
    ("job.py", PYTHON, ["adapter.rank=8"], "type full, which has no `rank`", "--set adapter.rank=8",
     "have it", "--set adapter.type=lora --set adapter.rank=8"),
    ("job.py", PYTHON, ["adapter=loar"], "`adapter` cannot be 'loar'", "--set adapter=loar", "lora, full", "=lora"),
    ("job.py", PYTHON, ["adapter.type=loar"], "no type 'loar'", "--set adapter.type=loar", "lora, full", ".type=lora"),
    ("job.py", PYTHON, ["model=random", "model.id=x"], "random, which has no `id`", "--set model.id=x", "pretrained",
     "--set model.type=pretrained"),
    ("job.py", PYTHON, ["data=[**/*.py]"], "cannot be read", "--set data=[**/*.py]", "found '*'", "quote"),
    ("job.yaml", YAML.replace("  lr: 1e-5\n  steps: 3", "  - 1"), ["optim.lr=1"], "`optim` cannot be [1]",
     "--set optim.lr=1", "job.yaml:6", "job file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "overrides", "what", "at", "why", "try_"), BAD)
def test_bad_input_ends_in_four_lines(tmp_path, name, text, overrides, what, at, why, try_):
    if text is not None:
        write(tmp_path, name.partition(":")[0], text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(JobError) as caught:
        load(str(tmp_path / name), overrides)
    error = caught.value
    assert what in error.what
    assert at in error.at
    assert why in error.why
    assert try_ in error.try_
    assert error.exit_code == 2
    lines = str(error).splitlines()
    assert [line[:7] for line in lines] == ["error: ", "   at: ", "  why: ", "  try: "]
    assert all(line[7:].strip() for line in lines)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_inside_a_module_beside_the_job_names_that_module(tmp_path):
    write(tmp_path, "shared_settings.py", "from farspan import Optim\n\nfast = Optim(\n    lrr=1,\n)\n")
    with pytest.raises(JobError) as caught:
        load(write(tmp_path, "job.py", "from shared_settings import fast\n" + PYTHON))
    assert caught.value.at == f"lrr in {tmp_path}/shared_settings.py:4"


def test_the_first_error_is_told_and_the_others_are_counted(tmp_path):
    text = YAML.replace("steps: 3", "steps: many\n  seed: x\n  lrr: 1") + "precision: fp12\n"
    with pytest.raises(JobError) as caught:
        load(write(tmp_path, "job.yaml", text))
    assert caught.value.what == "unknown key `optim.lrr`"
    assert "3 more values are wrong: precision, optim.steps, optim.seed" in caught.value.why


def test_at_most_60_fields():
    """Variants of a union count as one field, the discriminator apart."""

    def count(kind):
        total = 0
        for name, field in kind.model_fields.items():
            inner = section(field)
            total += count(inner) if inner is not None and not variants(field) else name != "type"
        return total

    assert 30 <= count(SFTJob) <= 60


SCALARS = st.one_of(
    st.integers(1, 10**15),
    st.floats(1e-12, 1e12, allow_nan=False),
    st.booleans(),
    st.none(),
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=20),
)


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcd", min_size=1), inner)
    )
)
def test_our_yaml_reads_json_as_json_does(value):
    """JSON is YAML 1.2: Python's own parser is the oracle."""
    text = json.dumps(value, ensure_ascii=False)
    assert read_yaml(text, "x")[0] == json.loads(text)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-300, 1e300, allow_nan=False))
def test_set_round_trips_numbers(tmp_path_factory, lr):
    ref = tmp_path_factory.getbasetemp() / "round.yaml"
    if not ref.exists():
        ref.write_text(YAML)
    assert load(str(ref), [f"optim.lr={lr!r}"]).job.optim.lr == lr


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp", "Zs"]), min_size=1, max_size=30))
def test_set_round_trips_text(tmp_path_factory, text):
    """Text is taken as it stands unless it begins like a list, a map or a quotation, or says null."""
    ref = tmp_path_factory.getbasetemp() / "round.yaml"
    if not ref.exists():
        ref.write_text(YAML)
    if text[0] in "[{\"'":
        assert load(str(ref), [f"track.wandb={json.dumps(text, ensure_ascii=False)}"]).job.track.wandb == text
        return
    expected = None if text in ("~", "null", "Null", "NULL") else text
    assert load(str(ref), [f"track.wandb={text}"]).job.track.wandb == expected


def test_a_dumped_job_loads_as_itself(tmp_path):
    """What `farspan submit` uploads."""
    job = load(write(tmp_path, "job.py", PYTHON), ["adapter=lora", "parallel.cpu_offload=true"]).job
    again = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False)
    assert load(write(tmp_path, "again.yaml", again)).job == job


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40))
def test_any_override_gives_a_job_or_a_job_error(tmp_path_factory, text):
    ref = tmp_path_factory.getbasetemp() / "round.yaml"
    if not ref.exists():
        ref.write_text(YAML)
    for override in (text, f"optim.{text}", f"optim.lr={text}", f"model={text}", f"adapter.{text}=1", f"data={text}"):
        try:
            load(str(ref), [override])
        except FarspanError as error:
            assert isinstance(error, JobError) and str(error).count("\n") == 3


def test_loading_and_resolving_imports_neither_torch_nor_ray(tmp_path):
    """Every schema, loading, resolving, the folder claim and the command line; in a fresh interpreter."""
    ref = write(tmp_path, "job.yaml", YAML)
    code = f"""
import sys
import farspan, farspan.jobs.cli, farspan.jobs.claim, farspan.jobs.run, farspan.jobs.export
import farspan.memory.config, farspan.trainer.config, farspan.cluster.config
from farspan.jobs.facts import Machine, model_facts
from farspan.jobs.load import load
from farspan.jobs.resolve import resolve
loaded = load({ref!r}, ["optim.lr=1e-3"])
resolve(loaded.job, model_facts(loaded.job.model), Machine(({{"CPU": 2.0}},), 2**30), loaded.origins)
print(sorted(m for m in sys.modules if m.split(".")[0] in ("torch", "ray", "deepspeed", "transformers", "numpy")))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(farspan.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
