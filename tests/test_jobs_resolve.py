"""Resolution: no `auto` is left, every value has an origin, contradictions are refused with the cure."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from farspan import (
    AMAQ,
    L4Q,
    LQ,
    NF4,
    PEQA,
    PV,
    S2A,
    Cluster,
    DensityLoss,
    FullFineTune,
    Int8,
    LoRA,
    MemoryBudget,
    Model,
    Optim,
    PaCA,
    Parallel,
    RandomModel,
    Reversible,
    SFTJob,
    TextData,
    UniPT,
)
from farspan.errors import JobError
from farspan.jobs.facts import Machine, model_facts
from farspan.jobs.origins import leaves, origins_in_python
from farspan.jobs.resolve import MIN_ROWS, batch_chain, resolve

GIB = 2**30


def make(*, model=None, context=8192, **fields):
    return SFTJob(name="t", model=model or RandomModel(), data=TextData("stdlib", context=context), **fields)


def done(job, cpus=2, gpus=0, nodes=1, memory=8 * GIB):
    machine = Machine(
        nodes=({"CPU": float(cpus), "GPU": float(gpus)},) * nodes,
        cpu_memory_bytes=memory * nodes,
        gpu_memory_bytes=memory if gpus else 0,
    )
    return resolve(job, model_facts(job.model), machine, origins_in_python(job))


def test_codes_between_ranks_need_ranks():
    coded = make(parallel=Parallel(exchange=AMAQ()))
    assert done(coded, cpus=2).train.mesh.sp == 2 and done(coded, cpus=2).train.exchange == AMAQ()
    for job, cpus in ((coded, 1), (make(parallel=Parallel(sp=1, exchange=AMAQ())), 2)):
        with pytest.raises(JobError, match="nothing crosses ranks") as error:
            done(job, cpus=cpus)
        assert "parallel.exchange" in str(error.value)
    with pytest.raises(ValidationError, match="bits=2 does not lie between least=2 and most=8"):
        AMAQ(bits=2)


def test_batch_chain_says_every_size_once():
    resolved = done(make(parallel=Parallel(sp=2, dp=2), optim=Optim(tokens_per_step="32k")), cpus=4)
    assert batch_chain(resolved) == (
        "tokens per step 32768 = 4 packs of 8192 = dp 2 x accumulation 2; each pack on sp 2 ranks of 4096 rows"
    )


@pytest.mark.parametrize(
    ("cpus", "heads", "context", "dp", "sp", "why"),
    [
        (2, 8, 8192, "auto", 2, "2 ranks for a sequence"),
        (8, 8, 32768, "auto", 8, "8 ranks for a sequence"),
        (8, 4, 32768, "auto", 4, "4 attention heads"),
        (4, 8, 2048, "auto", 1, "at least 2048 rows on a rank"),
        (4, 8, 4096, "auto", 2, "at least 2048 rows on a rank"),
        (1, 8, 65536, "auto", 1, "1 rank for a sequence"),
        (8, 12, 65536, "auto", 4, "4 divides 12 heads"),  # 6 would leave two ranks idle
        (5, 7, 65536, "auto", 5, "none above 1 divides 7 heads"),
        (8, 8, 65536, 2, 4, "4 ranks for a sequence"),
        (2, 8, 65536, 4, 1, "1 rank for a sequence"),  # too many: the cluster layer says so
    ],
)
def test_auto_sp(cpus, heads, context, dp, sp, why):
    model = RandomModel(hidden=heads * 16, heads=heads, kv_heads=1)
    resolved = done(make(model=model, context=context, parallel=Parallel(dp=dp)), cpus=cpus)
    assert resolved.train.mesh.sp == sp
    assert why in resolved.values["parallel.sp"].origin.why


@settings(deadline=None)
@given(
    cpus=st.integers(1, 40),
    nodes=st.integers(1, 3),
    heads=st.integers(1, 40),
    rows=st.integers(4, 18),
    sp=st.none() | st.integers(1, 40),
    dp=st.none() | st.integers(1, 8),
    packs=st.none() | st.integers(1, 24),
    adapter=st.sampled_from([FullFineTune(), LoRA()]),
)
def test_whatever_is_resolved_adds_up(cpus, nodes, heads, rows, sp, dp, packs, adapter):
    context = 2**rows
    job = make(
        model=RandomModel(hidden=heads * 8, heads=heads, kv_heads=1),
        context=context,
        adapter=adapter,
        parallel=Parallel(sp=sp or "auto", dp=dp or "auto"),
        optim=Optim(tokens_per_step=packs * context if packs else "auto"),
    )
    legal = (sp is None or sp <= heads) and (packs is None or dp is None or packs % dp == 0)
    try:
        resolved = done(job, cpus=cpus, nodes=nodes)
    except JobError:
        assert not legal
        return
    assert legal
    train, ranks = resolved.train, cpus * nodes
    mesh = train.mesh
    assert resolved.gang.world_size == mesh.world_size == mesh.dp * mesh.sp
    assert train.optim.tokens_per_step == context * mesh.dp * train.accumulation
    assert mesh.sp == sp if sp else 1 <= mesh.sp <= heads
    assert mesh.dp == dp if dp else mesh.dp >= 1
    if sp is None and dp is None:
        assert mesh.world_size <= ranks
        # Brute force over the degrees a person would consider.
        most = min(ranks, heads, max(1, context // MIN_ROWS))
        even = [d for d in range(1, most + 1) if heads % d == 0]
        best = max(((ranks // d) * d, d) for d in even)[1]
        assert mesh.sp == (most if even == [1] else best)
    assert '"auto"' not in train.model_dump_json()
    assert {".".join(p) for p, _ in leaves(job)} <= set(resolved.values)
    assert all(v.origin.why for v in resolved.values.values() if v.origin.kind == "planner")
    assert done(job, cpus=cpus, nodes=nodes) == resolved


def test_origins_of_every_value():
    resolved = done(make(adapter=LoRA(rank=4), optim=Optim(lr=1e-3)))
    table = json.loads(json.dumps(resolved.to_json()))
    assert table["optim.lr"] == {"value": 1e-3, "origin": "file", "where": "Python"}
    assert table["optim.steps"] == {"value": 100, "origin": "default"}
    assert table["optim.warmup_steps"] == {"value": 3, "origin": "planner", "why": "3 % of 100 steps, at least one"}
    assert table["adapter.alpha"] == {"value": 8.0, "origin": "planner", "why": "2 x rank 4"}
    scaled = done(make(adapter=LoRA(rank=16, rslora=True))).to_json()["adapter.alpha"]
    assert (scaled["value"], scaled["why"]) == (8.0, "2 x sqrt of rank 16")
    assert table["parallel.sp"]["origin"] == table["parallel.dp"]["origin"] == "planner"
    assert table["world_size"]["value"] == 2
    assert resolved.train.adapter.alpha == 8.0
    assert resolved.train.warmup_steps == resolved.train.optim.warmup_steps == 3


LARGE = RandomModel(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336)


@pytest.mark.parametrize(
    ("job", "cpus", "zero", "why"),
    [
        (make(), 1, 0, "one rank"),
        (make(), 2, 0, "less than a tenth"),
        (make(parallel=Parallel(cpu_offload=True)), 1, 2, "CPU offload"),
        (make(parallel=Parallel(cpu_offload=True)), 2, 2, "weights and 1/2 of the state"),
        (make(model=RandomModel(hidden=2048, layers=8, heads=8, ffn=5632)), 2, 2, "less than half"),
        (make(model=RandomModel(hidden=2048, layers=24, heads=8, ffn=5632)), 2, 3, "more than half"),
        (make(model=RandomModel(hidden=2048, layers=24, heads=8, ffn=5632), adapter=LoRA()), 2, 0, "less than a tenth"),
        (
            make(model=RandomModel(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336), adapter=LoRA()),
            2,
            3,
            "alone",
        ),
        (make(model=LARGE, adapter=LoRA(), base=NF4()), 2, 0, "quantized weights goes no further"),
        (make(model=LARGE, adapter=PEQA()), 2, 0, "stay in fp32"),
        (make(model=LARGE, adapter=PV()), 2, 0, "stay in fp32"),
        (make(model=LARGE, adapter=L4Q(group=128)), 2, 0, "stay in fp32"),
        (make(model=LARGE, adapter=LoRA(init="pissa")), 2, 0, "a start that is not zero"),
    ],
)
def test_auto_zero(job, cpus, zero, why):
    resolved = done(job, cpus=cpus, memory=16 * GIB)
    assert resolved.train.zero == zero
    assert why in resolved.values["parallel.zero"].origin.why


def test_gpus_are_the_ranks_where_there_are_some():
    assert done(make(context="64k"), cpus=32, gpus=4).train.mesh.sp == 4
    assert done(make(context="64k"), cpus=32, gpus=4).gang.use_gpu
    assert done(make(context="64k", cluster=Cluster(use_gpu=False)), cpus=8, gpus=4).train.mesh.sp == 8
    assert done(make(context="64k", cluster=Cluster(cpus_per_actor=4)), cpus=6, nodes=2).train.mesh.sp == 2


BAD = [
    (make(parallel=Parallel(sp=9)), "no layout allows SP degree 9", "parallel.sp", "8 attention heads", "1, 2, 4, 8"),
    (make(parallel=Parallel(sp=0)), "SP degree 0", "parallel.sp", "at least one", "--set parallel.sp=1"),
    (make(parallel=Parallel(dp=0)), "dp cannot be 0", "parallel.dp", "groups", "--set parallel.dp=1"),
    (
        make(optim=Optim(tokens_per_step=20000), parallel=Parallel(dp=2)),
        "20000 tokens per step do not divide",
        "optim.tokens_per_step",
        "20000 / (context 8192 x dp 2) = 1.221",
        "--set optim.tokens_per_step=16384 or --set optim.tokens_per_step=32768",
    ),
    (make(optim=Optim(tokens_per_step=100)), "100 tokens", "optim.tokens_per_step", "0.012", "tokens_per_step=8192"),
    (make(optim=Optim(tokens_per_step=0)), "0 tokens", "optim.tokens_per_step", "= 0", "tokens_per_step=8192"),
    (make(optim=Optim(warmup_steps=200)), "warm-up of 200", "optim.warmup_steps", "<= 100", "warmup_steps=auto"),
    (make(parallel=Parallel(zero=0, cpu_offload=True)), "needs ZeRO", "parallel.cpu_offload", "AdamW", "zero=2"),
    (make(model=RandomModel(heads=7, kv_heads=7)), "hidden 256", "model.heads", "36.57", "--set model.heads=8"),
    (make(model=RandomModel(kv_heads=3)), "heads 8 does not split into kv_heads 3", "model.kv_heads", "2.667", "=2"),
    (make(base=NF4()), "nothing would be trained on a base in nf4", "base", "no adapter", "adapter.type=lora"),
    (make(base=LQ()), "nothing would be trained on a base in lq", "base", "no adapter", "adapter.type=lora"),
    (make(adapter=PaCA(), base=LQ()), "base=lq does not go with adapter.type=paca", "base", "other half", "base=nf4"),
    (make(adapter=PEQA(), base=LQ()), "PEQA does its own rounding", "base", "16 bits", "--set base=bf16"),
    (
        make(adapter=LoRA(init="pissa"), base=LQ()),
        "does not start at pissa",
        "adapter.init",
        "low-rank",
        "init=default",
    ),
    (make(adapter=LoRA(dora=True), base=LQ()), "DoRA does not start where", "dora", "lengths", "adapter.dora=false"),
    (make(adapter=LoRA(), base=LQ(bits=2.05)), "2.05 bits a weight", "base.bits", "2.0635", "--set base.bits=2.07"),
    (make(adapter=LoRA(), base=LQ(), parallel=Parallel(zero=3)), "in lq cannot be sharded", "zero", "hold", "zero=2"),
    (make(adapter=LoRA(init="lorc")), "nothing to start from at lorc", "adapter.init", "not rounded", "base=nf4"),
    (
        make(adapter=Reversible(inside=LoRA(init="lorc")), base=LQ()),
        "does not start at lorc",
        "adapter.inside.init",
        "low-rank",
        "--set adapter.inside.init=default",
    ),
    (make(adapter=LoRA(), base=Int8(), parallel=Parallel(zero=3)), "cannot be sharded", "zero", "hold", "zero=2"),
    (make(adapter=PEQA(), base=NF4()), "PEQA does its own rounding", "base", "16 bits", "--set base=bf16"),
    (make(adapter=PEQA(), parallel=Parallel(zero=2)), "PEQA does not go with ZeRO-2", "zero", "fp32", "zero=0"),
    (make(adapter=S2A(bias=False)), "nothing would be trained", "adapter.bias", "neither biases", "adapter.prompt=16"),
    (make(adapter=S2A(prompt=4), parallel=Parallel(zero=3)), "do not go with ZeRO-3", "zero", "read outside", "zero=2"),
    (make(adapter=S2A(side=48)), "width 48 do not fit", "adapter.side", "256 / 48 = 5.333", "adapter.side=16"),
    (
        make(model=RandomModel("mistral"), adapter=S2A(prompt=4)),
        "see the whole context",
        "adapter.prompt",
        "a window of 4096 rows",
        "adapter.prompt=0",
    ),
    (make(adapter=UniPT(reduction=7)), "does not fit", "adapter.reduction", "256 / 7 = 36.57", "adapter.reduction=1"),
    (make(adapter=UniPT(), parallel=Parallel(zero=3)), "side network does not go", "zero", "second time", "zero=2"),
    (make(adapter=UniPT(), density=DensityLoss(weight=1)), "activations", "density", "no gradient", "weight=0"),
    (make(adapter=UniPT(), memory=MemoryBudget(plan="recompute")), "plan=recompute", "plan", "nothing", "plan=solve"),
    (make(adapter=UniPT(), memory=MemoryBudget(profile="measured")), "measured", "profile", "counted", "auto"),
    (make(adapter=PV(), base=Int8()), "PV does its own rounding", "base", "16 bits", "--set base=bf16"),
    (make(adapter=PV(), precision="fp32", parallel=Parallel(zero=1)), "go with ZeRO-1", "zero", "buckets", "zero=0"),
    (make(adapter=PV(), memory=MemoryBudget(mlp_tile=64)), "tiles of the MLP", "mlp_tile", "64 at a time", "=off"),
    (make(adapter=L4Q(), base=Int8()), "L4Q does its own rounding", "base", "16 bits", "--set base=bf16"),
    (make(adapter=L4Q(), parallel=Parallel(zero=2)), "L4Q does not go with ZeRO-2", "zero", "fp32", "zero=0"),
    (
        make(adapter=L4Q(), precision="fp32", parallel=Parallel(zero=3)),
        "L4Q does not go with ZeRO-3",
        "zero",
        "cuts up",
        "zero=0",
    ),
    (make(adapter=LoRA(init="olora"), parallel=Parallel(zero=3)), "starts at olora", "init", "frozen pair", "zero=2"),
    (make(adapter=LoRA(dora=True, init="pissa")), "DoRA does not start at pissa", "init", "lengths", "init=default"),
    (make(adapter=LoRA(keep_rows=0.5, dora=True)), "one node", "keep_rows", "peft's own", "keep_rows=1"),
    (
        make(adapter=Reversible(), memory=MemoryBudget(plan="keep")),
        "not kept",
        "memory.plan",
        "side bits",
        "plan=solve",
    ),
    (
        make(adapter=Reversible(form="float", anchor_every=5)),
        "computed back over 5 layers",
        "adapter.anchor_every",
        "1.2e-07 x 11.9^5 = 0.029",
        "--set adapter.anchor_every=3",
    ),
    (
        make(adapter=Reversible(form="float", wiring=3, tolerance=1e-5, anchor_every=2)),
        "over 2 layers",
        "adapter.anchor_every",
        "142",
        "--set adapter.anchor_every=1",
    ),
    (make(adapter=Reversible(form="float", bits=2)), "not read with", "adapter.bits", "integer", "form=exact"),
    (make(adapter=Reversible(tolerance=0.01)), "not read with", "adapter.tolerance", "anchors", "form=float"),
    (make(model=Model("./nowhere")), "no model folder", "model.id", "does not exist", "safetensors"),
]


@pytest.mark.parametrize(("job", "what", "at", "why", "try_"), BAD)
@pytest.mark.parametrize("cpus", [1, 4])
def test_contradictions_are_refused_on_every_machine(job, what, at, why, try_, cpus):
    with pytest.raises(JobError) as caught:
        done(job, cpus=cpus)
    error = caught.value
    assert what in error.what and at in error.at and why in error.why and try_ in error.try_
    assert error.exit_code == 2 and str(error).count("\n") == 3


def test_model_folder_is_read_without_transformers(tmp_path):
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = model_facts(Model(str(tmp_path)))
    assert (facts.hidden, facts.heads, facts.kv_heads, facts.head_dim, facts.vocab) == (64, 4, 4, 32, 300)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    assert model_facts(Model(str(tmp_path))) == facts
    for text, why in (("{}", "no hidden_size"), ("{", "cannot be read"), ("[]", "no hidden_size")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(JobError) as caught:
            model_facts(Model(str(tmp_path)))
        assert why in caught.value.why


def test_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(JobError) as caught:
        model_facts(Model("nobody/no-such-model"))
    assert caught.value.what == "no model nobody/no-such-model" and "RandomModel" in caught.value.try_


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft 0.21 with transformers 5.23
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_parameter_counts_against_transformers_and_peft(family, tie):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from farspan.trainer.models import random_config

    model = RandomModel(
        family=family, hidden=128, layers=3, heads=8, kv_heads=2, ffn=320, vocab=1024, tie_embeddings=tie
    )
    facts = model_facts(model)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(random_config(model, context=64, eos_id=None, pad_id=None))
    assert facts.parameters == pytest.approx(sum(p.numel() for p in made.parameters()), rel=0.005)  # norms are left out
    for targets in ("all-linear", ("q_proj", "down_proj")):
        made = AutoModelForCausalLM.from_config(random_config(model, context=64, eos_id=None, pad_id=None))
        modules = list(targets) if isinstance(targets, tuple) else targets
        peft = get_peft_model(made, LoraConfig(r=4, target_modules=modules))
        trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
        assert facts.trainable(LoRA(rank=4, target_modules=targets)) == trained


def test_the_density_of_experts_is_refused():
    job = make(density=DensityLoss(weight=0.1))
    machine = Machine(nodes=({"CPU": 2.0},), cpu_memory_bytes=8 * GIB)
    with pytest.raises(JobError, match="density of experts") as refused:
        resolve(job, replace(model_facts(job.model), experts=8), machine, {})
    assert "density.weight=0" in str(refused.value)
    assert done(job).train.density.weight == 0.1
