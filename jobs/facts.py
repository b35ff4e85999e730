"""What resolution needs to know about the world, read beforehand: the shape of the model and the size of the machine.

`jobs.resolve` is pure; everything it would have to look up is looked up here and handed to it. A model's shape comes
from the fields of a `RandomModel`, from `config.json` of a local folder, or, for a hub id, from transformers, which is
imported only then.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farspan.errors import ClusterNotReady, JobError
from farspan.jobs.config import SFTJob
from farspan.memory.hardware import Hardware, hardware_names, load_hardware
from farspan.memory.shape import LayerForm
from farspan.trainer.config import (
    L4Q,
    PEQA,
    PV,
    S2A,
    Adapter,
    FullFineTune,
    Model,
    PaCA,
    RandomModel,
    Reversible,
    UniPT,
)


@dataclass(frozen=True)
class Machine:
    """What the cluster can give."""

    nodes: tuple[Mapping[str, float], ...]
    """Resources of each node, as Ray names them: `CPU`, `GPU`."""
    cpu_memory_bytes: int
    """Memory that Ray offers, all nodes together."""
    gpu_memory_bytes: int = 0
    """Memory of one GPU."""
    gpu_name: str = ""
    """Its name, as CUDA gives it."""

    @property
    def gpus(self) -> float:
        return sum(node.get("GPU", 0.0) for node in self.nodes)


@dataclass(frozen=True)
class ModelFacts:
    """Shape of a causal language model, as far as splitting it among ranks depends on it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    experts: int = 1
    family: str = "llama"
    """`model_type` in transformers."""
    windows: tuple[int | None, ...] = (None,)
    """Rows each layer's queries look back on, bottom first; None: all. A single one stands for every layer."""
    linear_layers: tuple[int, ...] = ()
    """Layers that mix rows by a recurrence (linear attention)."""
    dense_layers: tuple[int, ...] = ()
    """Layers of a mixture of experts that have a plain MLP instead."""

    stored_as: str | None = None
    """`nf4` and the like where the checkpoint is quantized."""

    @property
    def must_be_measured(self) -> bool:
        """Whether there are layers without an analytic profile."""
        return self.experts > 1 or bool(self.linear_layers)

    def form(self, layer: int) -> LayerForm:
        linear = layer in self.linear_layers
        return LayerForm(
            mixer="linear" if linear else "attention",
            window=None if linear else self.windows[layer % len(self.windows)],
            experts=1 if layer in self.dense_layers else self.experts,
        )

    def linears(self) -> dict[str, int]:
        """Inputs plus outputs of each linear layer of one block: what a LoRA of rank 1 adds, by module name."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        wide = (self.hidden + self.ffn) * self.experts
        return {
            "q_proj": self.hidden + query,
            "k_proj": self.hidden + key,
            "v_proj": self.hidden + key,
            "o_proj": self.hidden + query,
            "gate_proj": wide,
            "up_proj": wide,
            "down_proj": wide,
        }

    def outputs(self) -> dict[str, int]:
        """Outputs of each linear layer of one block: what a trained column adds."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        wide = {"gate_proj": self.ffn, "up_proj": self.ffn, "down_proj": self.hidden}
        attention = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": self.hidden}
        return {**attention, **{name: width * self.experts for name, width in wide.items()}}

    @property
    def layer_weights(self) -> int:
        """About how many weights of linear layers one block has."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * self.hidden * (query + key) + 3 * self.hidden * self.ffn * self.experts

    @property
    def parameters(self) -> int:
        """About how many weights, for a gated MLP; norms and biases are left out."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.layers * self.layer_weights

    def trainable(self, adapter: Adapter) -> int:
        """About how many weights are trained."""
        if isinstance(adapter, PEQA | PV):
            groups = 1 if adapter.group is None else self.hidden // adapter.group
            return self.layers * groups * sum(self.outputs().values())
        if isinstance(adapter, UniPT):
            width = self.hidden // adapter.reduction
            return width * (self.layers * (self.hidden + 2) + self.hidden + width + 1)
        if isinstance(adapter, S2A):
            named = self.outputs() if adapter.target_modules == "all-linear" else adapter.target_modules
            biases = sum(self.outputs().get(name.split(".")[-1], 0) for name in named) if adapter.bias else 0
            return self.layers * (biases + 2 * adapter.prompt * self.kv_heads * self.head_dim + adapter.side**2)
        if isinstance(adapter, L4Q):
            groups = 1 if adapter.group is None else self.hidden // adapter.group
            per_block = adapter.rank * sum(self.linears().values()) + 2 * groups * sum(self.outputs().values())
            return self.layers * per_block
        if isinstance(adapter, Reversible):
            return self.trainable(adapter.inside) + 2 * self.layers * self.hidden * adapter.width
        if isinstance(adapter, FullFineTune):
            return self.parameters
        linears = self.outputs() if isinstance(adapter, PaCA) else self.linears()
        targets = linears if adapter.target_modules == "all-linear" else adapter.target_modules
        per_block = adapter.rank * sum(linears.get(name.split(".")[-1], 0) for name in targets)
        saved = () if isinstance(adapter, PaCA) else adapter.modules_to_save
        whole = sum(name.split(".")[-1] in ("lm_head", "embed_tokens") for name in saved)
        return self.layers * per_block + whole * self.vocab * self.hidden


def model_facts(model: Model | RandomModel) -> ModelFacts:
    """Read the shape of `model`.

    Raises:
        JobError: no such folder or hub id, or its `config.json` lacks what a causal language model has.
    """
    if isinstance(model, RandomModel):
        _check_heads(model)
        return ModelFacts(
            hidden=model.hidden,
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.hidden // model.heads,
            ffn=model.ffn,
            vocab=model.vocab,
            tied=model.tie_embeddings,
            family=model.family,
            windows=(_DEFAULT_WINDOWS.get(model.family),),
        )
    folder = Path(model.id).expanduser()
    if folder.is_dir():
        return _from_config(_read_folder(folder), str(folder / "config.json"))
    if model.id.startswith((".", "/", "~")):
        raise JobError(
            f"no model folder {model.id}",
            at="model.id",
            why=f"{folder.absolute()} does not exist",
            try_="give a folder with config.json and safetensors, or a hub id",
        )
    return _from_config(_ask_transformers(model), model.id)


def _check_heads(model: RandomModel) -> None:
    """Heads share the hidden size evenly, KV heads share the heads evenly, and rotary embedding pairs up a head."""
    for whole, part, unit in (("hidden", "heads", 2), ("heads", "kv_heads", 1)):
        total, count = getattr(model, whole), getattr(model, part)
        if total % (count * unit) != 0:
            near = [n for n in range(1, total + 1) if total % (n * unit) == 0]
            raise JobError(
                f"{whole} {total} does not split into {part} {count}",
                at=f"model.{part}",
                why=f"{total} / {count} = {total / count:.4g}, not {'an even' if unit == 2 else 'a whole'} number",
                try_=f"--set model.{part}={min(near, key=lambda n: abs(n - count), default=1)}",
            )


def _read_folder(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise JobError(
            f"{folder} is not a model folder",
            at="model.id",
            why=f"config.json cannot be read: {problem}",
            try_="give a folder written by save_pretrained",
        ) from None
    return config if isinstance(config, dict) else {}


def _ask_transformers(model: Model) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(model.id, revision=model.revision).to_dict()
    except (OSError, ValueError) as problem:
        raise JobError(
            f"no model {model.id}",
            at="model.id",
            why=str(problem).strip().splitlines()[0],
            try_="give a local folder with config.json and safetensors, a hub id, or a RandomModel",
        ) from problem
    return config


_DEFAULT_WINDOWS = {"mistral": 4096}
"""Of families made on the spot whose configuration in transformers has a window by default."""

_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocab": ("vocab_size",),
}


def _from_config(config: dict[str, Any], name: str) -> ModelFacts:
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, dict) else config
    found = {key: next((config[n] for n in names if config.get(n)), None) for key, names in _NAMES.items()}
    missing = [_NAMES[key][0] for key, value in found.items() if value is None]
    if missing:
        raise JobError(
            f"{name} is not the config of a causal language model",
            at="model.id",
            why=f"it has no {', '.join(missing)}",
            try_="give a decoder-only model of transformers",
        )
    hidden, heads = int(found["hidden"] or 0), int(found["heads"] or 0)
    experts = int(config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 1)
    ffn = config.get("moe_intermediate_size") if experts > 1 else None
    return ModelFacts(
        hidden=hidden,
        layers=int(found["layers"] or 0),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        ffn=int(ffn or config.get("intermediate_size") or config.get("n_inner") or 4 * hidden),
        vocab=int(found["vocab"] or 0),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
        family=str(config.get("model_type", "llama")),
        windows=_windows(config, int(found["layers"] or 0)),
        linear_layers=tuple(i for i, kind in enumerate(config.get("layer_types") or ()) if kind == "linear_attention"),
        dense_layers=_dense_layers(config, int(found["layers"] or 0)) if experts > 1 else (),
        stored_as=_stored_as(config, name),
    )


def _stored_as(config: dict[str, Any], name: str) -> str | None:
    """Of quantized checkpoints those of bitsandbytes in nf4 are known."""
    told = config.get("quantization_config")
    if not told:
        return None
    if told.get("load_in_4bit") and told.get("bnb_4bit_quant_type") == "nf4":
        return "nf4, double" if told.get("bnb_4bit_use_double_quant") else "nf4"
    raise JobError(
        f"{name} is quantized in a way that is not known here",
        at="model.id",
        why=f"quant_method {told.get('quant_method')!r}; known is bitsandbytes' nf4",
        try_="give the checkpoint in 16 bits and --set base=nf4 or base=int8",
    )


def _dense_layers(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """As transformers reads it: the first few (DeepSeek), every n-th but one, or those listed (Qwen)."""
    first, step = int(config.get("first_k_dense_replace") or 0), int(config.get("decoder_sparse_step") or 1)
    listed = config.get("mlp_only_layers") or ()
    return tuple(i for i in range(layers) if i < first or i in listed or (i + 1) % step)


def _windows(config: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    """Sliding windows as transformers reads them: by layer type, or for all layers unless switched off."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types")
    if window is None or not kinds:
        return (window,)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])


def machine(*, wait_s: float) -> Machine:
    """What the Ray cluster this process is connected to offers.

    Args:
        wait_s: how long to wait for a GPU that can be asked for its memory.

    Raises:
        ClusterNotReady: the cluster has GPUs, and none was free in that time.
    """
    import ray

    nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    gpu_name, gpu_memory_bytes = "", 0
    if any(node.get("GPU", 0.0) >= 1 for node in nodes):
        gpu_name, gpu_memory_bytes = _ask_gpu(wait_s)
    return Machine(
        nodes=nodes,
        cpu_memory_bytes=int(sum(node.get("memory", 0.0) for node in nodes)),
        gpu_memory_bytes=gpu_memory_bytes,
        gpu_name=gpu_name,
    )


def _ask_gpu(wait_s: float) -> tuple[str, int]:
    """Name and memory: Ray knows how many GPUs there are, not what they are; so one of them is asked."""
    import ray

    def ask() -> tuple[str, int]:
        import torch

        properties = torch.cuda.get_device_properties(0)
        return str(properties.name), int(properties.total_memory)

    answer = ray.remote(num_cpus=0, num_gpus=0.01, max_retries=0)(ask).remote()
    try:
        name, memory_bytes = ray.get(answer, timeout=wait_s)
    except ray.exceptions.GetTimeoutError as problem:
        raise ClusterNotReady(
            "no GPU is free",
            at="cluster",
            why=f"a task that reads the memory of a GPU waited {wait_s:g} s; the others hold all GPUs",
            try_="wait for them, or --set cluster.use_gpu=false",
        ) from problem
    return name, memory_bytes


def machine_beside(job: SFTJob) -> Machine:
    """What to resolve a job for when nothing is to be started: this machine, or the one named in `memory.hardware`."""
    import psutil

    asked = job.memory.hardware
    if asked not in ("auto", "cpu"):
        hardware = load_hardware(asked)
        if hardware.device_type == "cuda":
            degrees = (job.parallel.sp, job.parallel.dp)
            ranks = math.prod(degree for degree in degrees if isinstance(degree, int))
            node = {"CPU": job.cluster.cpus_per_actor * ranks, "GPU": float(ranks)}
            return Machine(
                (node,), cpu_memory_bytes=hardware.host_bytes * ranks, gpu_memory_bytes=hardware.device_bytes
            )
    node = {"CPU": float(len(os.sched_getaffinity(0)))}
    memory_bytes = int(RAY_SHARE * psutil.virtual_memory().total)
    gpus = _gpus_here() if asked == "auto" and job.cluster.use_gpu is not False else []
    if not gpus:
        return Machine((node,), cpu_memory_bytes=memory_bytes)
    name, gpu_bytes = gpus[0]
    return Machine(({**node, "GPU": float(len(gpus))},), memory_bytes, gpu_bytes, name)


def _gpus_here() -> list[tuple[str, int]]:
    """Name and memory of each GPU that this process may use, as the driver's tool tells them: planning needs no torch.

    The driver's total is a little more than what CUDA gives; a plan keeps away from it anyway.
    """
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    query = [tool, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [[field.strip() for field in line.split(",")] for line in told.splitlines() if line.strip()]
        found = [(index, uuid, name, int(mib) << 20) for index, uuid, name, mib in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = [each.strip() for each in visible.split(",")]
        found = [gpu for gpu in found if any(w == gpu[0] or (w and gpu[1].startswith(w)) for w in wanted)]
    return [(name, size_bytes) for _, _, name, size_bytes in found]


RAY_SHARE = 0.7
"""Of a node's memory Ray offers this much to actors; the rest is for its object store and the system."""


def hardware_of(job: SFTJob, machine: Machine, *, ranks: int, use_gpu: bool) -> Hardware:
    """The rates and sizes to plan with: what the job names, or what the machine has."""
    if job.memory.hardware != "auto":
        return load_hardware(job.memory.hardware)
    if not use_gpu:
        share = machine.cpu_memory_bytes // max(1, ranks)
        return load_hardware("cpu").model_copy(update={"device_bytes": share, "host_bytes": 0, "disk_bytes": 0})
    known = [load_hardware(name) for name in hardware_names()]
    known = [hardware for hardware in known if hardware.device_type == "cuda"]
    near = min(known, key=lambda hardware: abs(hardware.device_bytes - machine.gpu_memory_bytes))
    usable_bytes = min(near.device_bytes, int(0.95 * machine.gpu_memory_bytes))
    per_gpu = int(machine.cpu_memory_bytes / max(1.0, machine.gpus))
    return near.model_copy(
        update={"device_bytes": usable_bytes, "host_bytes": min(near.host_bytes, per_gpu), "title": machine.gpu_name}
    )
