"""A reversible model on disk: what peft or transformers open, and two files beside it.

    reversible.json                   wiring, side bits, bits behind the point; or wiring, lambda and beta
    reversible_adapter.safetensors    bottleneck adapters, if there are any: `<layer>.down.weight`, `<layer>.up.weight`

peft and transformers open such a folder too, and know nothing of the streams: what they run is the model with what was
trained inside its layers, uncoupled. `load` opens the model that was trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from farspan.errors import CheckpointError
from farspan.trainer.adapters import integer_files, own_files
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.lora.apply import install
from farspan.trainer.adapters.paca import files as paca
from farspan.trainer.adapters.peqa import files as peqa
from farspan.trainer.adapters.reversible.apply import CHILD, couple
from farspan.trainer.adapters.reversible.config import Reversible
from farspan.trainer.bases.config import Base
from farspan.trainer.bases.load import loading_options, prepared_options, quantize, take_in, take_over
from farspan.trainer.bases.prepared.store import INDEX, PREPARED, PreparedBase

CONFIG, WEIGHTS = "reversible.json", "reversible_adapter.safetensors"


def is_bottleneck(name: str) -> bool:
    """Whether a parameter, by its name in the model, belongs to an adapter between the streams."""
    return f".{CHILD}." in name


def name_on_disk(name: str) -> str:
    layer, _, rest = name.partition(f".{CHILD}.")
    return f"{layer.rpartition('.')[2]}.{rest}"


def save(folder: Path, adapter: Reversible, weights: dict[str, Tensor], *, stored: Base, dtype: torch.dtype) -> None:
    """Write both files.

    Args:
        weights: adapters between the streams, by their names in the model.
        stored, dtype: how the base was stored in training, and the model's dtype.
    """
    told: dict[str, Any]
    if adapter.form == "float":
        told = {"form": "float", "wiring": adapter.wiring, "factors": adapter.lambda_beta, "width": adapter.width}
    else:
        assert adapter.fraction_bits != "auto", "a trained model has its range"
        told = {name: getattr(adapter, name) for name in ("wiring", "bits", "fraction_bits", "width")}
    told |= {"format": 1, "base": stored.model_dump(mode="json"), "dtype": str(dtype).removeprefix("torch.")}
    (folder / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if weights:
        on_disk = {name_on_disk(name): tensor.contiguous() for name, tensor in weights.items()}
        save_file(on_disk, folder / WEIGHTS, metadata={"format": "pt"})


def load(folder: Path | str, *, base: Any = None, dtype: torch.dtype | str = "auto", **options: Any) -> nn.Module:
    """Open an exported reversible model for evaluation and generation.

    Args:
        folder: an export of a run with `Reversible`.
        base: the loaded base model, for a folder with an adapter; None: from where the adapter says.
        dtype, options: for `from_pretrained` (`attn_implementation`, `device_map`, ...); `auto`: as in training.

    Raises:
        CheckpointError: the folder is no such export.
    """
    folder = Path(folder)
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if told.pop("format") != 1:
            raise ValueError("written by a later version")
        stored = TypeAdapter(Base).validate_python(told.pop("base"))
        trained_in = getattr(torch, told.pop("dtype"))
        dtype = trained_in if dtype == "auto" else dtype
        adapter = Reversible(**told)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the folder has no reversible model",
            at=str(folder / CONFIG),
            why=str(error).split("\n", maxsplit=1)[0],
            try_="give the export folder of a run with adapter.type=reversible",
        ) from error
    model: Any
    causal: Any
    if own_files.config_of(folder, "paca").exists():
        causal = model = paca.load(folder, base=base, dtype=dtype, **options)
    elif own_files.config_of(folder, "peqa").exists():
        causal = model = peqa.load(folder, base=base, dtype=dtype, **options)
    elif own_files.config_of(folder, "l4q").exists():
        causal = model = integer_files.load(folder, "l4q", base=base, dtype=dtype, **options)
    elif (folder / "adapter_config.json").exists():
        from peft import PeftConfig, PeftModel

        prepared = PreparedBase.open(folder / PREPARED) if (folder / PREPARED / INDEX).exists() else None
        if base is None and prepared is not None:
            source, revision = prepared.told["source"], prepared.told["revision"]
            options |= prepared_options(prepared)
            base = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype, **options)
        elif base is None:
            where = PeftConfig.from_pretrained(folder)
            name = str(where.base_model_name_or_path)
            options |= loading_options(stored, name, where.revision)
            base = AutoModelForCausalLM.from_pretrained(name, revision=where.revision, dtype=dtype, **options)
        elif prepared is not None:
            take_in(base, prepared)
        else:
            quantize(base, stored)
        take_over(base)
        model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
        install(model)
        causal = model.get_base_model()
    else:
        causal = model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    devices = {p.device for layer in decoder_layers(causal) for p in layer.parameters()}
    if len(devices) > 1:
        raise CheckpointError(
            "a reversible model was to be opened over several devices",
            at="device_map",
            why=f"its streams run through all layers on one; these are on {', '.join(sorted(map(str, devices)))}",
            try_="device_map={'': 'cuda:0'}, or one that fits",
        )
    couple(causal, adapter, seed=0)
    if adapter.width:
        weights = load_file(folder / WEIGHTS)
        for index, layer in enumerate(decoder_layers(causal)):
            if hasattr(layer, CHILD):
                own = {n.partition(".")[2]: w for n, w in weights.items() if n.startswith(f"{index}.")}
                getattr(layer, CHILD).load_state_dict(own)
    return model.eval()
