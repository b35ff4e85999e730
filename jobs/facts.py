"""What resolution needs to know about the world, read beforehand: the shape of the model and the size of the machine.

`jobs.resolve` is pure; everything it would have to look up is looked up here and handed to it. A model's shape comes
from the fields of a `RandomModel`, from `config.json` of a local folder, or, for a hub id, from transformers, which is
imported only then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farspan.errors import ClusterNotReady, JobError
from farspan.trainer.config import FullFineTune, LoRA, Model, RandomModel


@dataclass(frozen=True)
class Machine:
    """What the cluster can give."""

    nodes: tuple[Mapping[str, float], ...]
    """Resources of each node, as Ray names them: `CPU`, `GPU`."""
    cpu_memory_bytes: int
    """Memory that Ray offers, all nodes together."""
    gpu_memory_bytes: int = 0
    """Memory of one GPU."""

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

    @property
    def parameters(self) -> int:
        """About how many weights, for a gated MLP; norms and biases are left out."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = 2 * self.hidden * (query + key) + 3 * self.hidden * self.ffn * self.experts
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.layers * block

    def trainable(self, adapter: LoRA | FullFineTune) -> int:
        """About how many weights are trained."""
        if isinstance(adapter, FullFineTune):
            return self.parameters
        linears = self.linears()
        targets = linears if adapter.target_modules == "all-linear" else adapter.target_modules
        per_block = adapter.rank * sum(linears.get(name.split(".")[-1], 0) for name in targets)
        whole = sum(name.split(".")[-1] in ("lm_head", "embed_tokens") for name in adapter.modules_to_save)
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
    )


def machine(*, wait_s: float) -> Machine:
    """What the Ray cluster this process is connected to offers.

    Args:
        wait_s: how long to wait for a GPU that can be asked for its memory.

    Raises:
        ClusterNotReady: the cluster has GPUs, and none was free in that time.
    """
    import ray

    nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    return Machine(
        nodes=nodes,
        cpu_memory_bytes=int(sum(node.get("memory", 0.0) for node in nodes)),
        gpu_memory_bytes=_gpu_memory_bytes(wait_s) if any(node.get("GPU", 0.0) >= 1 for node in nodes) else 0,
    )


def _gpu_memory_bytes(wait_s: float) -> int:
    """Ray knows how many GPUs there are, not how large; so one of them is asked."""
    import ray

    def ask() -> int:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)

    answer = ray.remote(num_cpus=0, num_gpus=0.01, max_retries=0)(ask).remote()
    try:
        return int(ray.get(answer, timeout=wait_s))
    except ray.exceptions.GetTimeoutError as problem:
        raise ClusterNotReady(
            "no GPU is free",
            at="cluster",
            why=f"a task that reads the memory of a GPU waited {wait_s:g} s; the others hold all GPUs",
            try_="wait for them, or --set cluster.use_gpu=false",
        ) from problem
