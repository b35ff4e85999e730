"""Loading with quantization on the way: a matrix is rounded as it is read, so that the model is never whole.

transformers reads checkpoints tensor by tensor and asks a quantizer what to do with each; ours swaps the linear layer
for a quantized one. Checkpoints that bitsandbytes has quantized to nf4 are opened by transformers and bitsandbytes, and
their layers then taken over as they are, byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from farspan.errors import JobError
from farspan.kernels.quantized.normal_float import NormalFloat4
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.bases.config import NF4, Base, Unquantized
from farspan.trainer.bases.linear import NF4Linear, QuantizedLinear, quantized
from farspan.trainer.bases.prepared.store import PreparedBase

METHOD = "farspan"


def loading_options(base: Base, source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """For `from_pretrained` of `source`; a checkpoint that is quantized is opened as it is."""
    if isinstance(base, Unquantized):
        return {}
    told, _ = PreTrainedConfig.get_config_dict(str(source), revision=revision)
    return {} if told.get("quantization_config") else {"quantization_config": _Config(base)}


def prepared_options(prepared: PreparedBase) -> dict[str, Any]:
    """For `from_pretrained` of the model that a base was prepared from: its matrices are read, and not used."""
    return {"quantization_config": _Config(prepared)}


class _Config(QuantizationConfigMixin):
    def __init__(self, base: Base | PreparedBase) -> None:
        self.quant_method = METHOD
        self.base = base

    def to_dict(self) -> dict[str, Any]:
        told = {"type": "prepared"} if isinstance(self.base, PreparedBase) else self.base.model_dump(mode="json")
        return {"quant_method": METHOD, **told}

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


class _Quantizer(HfQuantizer):
    """Linear layers of the decoder layers; embedding, head and norms stay as they are."""

    def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
        name, _, last = param_name.rpartition(".")
        if last != "weight" or not any(name.startswith(f"{prefix}.") for prefix in self._layers(model)):
            return False
        return type(model.get_submodule(name)) is nn.Linear

    def _layers(self, model: Any) -> list[str]:
        if not hasattr(self, "_prefixes"):
            inside = {id(layer) for layer in decoder_layers(model)}
            self._prefixes = [name for name, module in model.named_modules() if id(module) in inside]
        return self._prefixes

    @property
    def quantized_element_size(self) -> float:
        """Bytes: what transformers sizes its warm-up of the GPU's allocator by."""
        base = self.quantization_config.base
        if isinstance(base, PreparedBase):
            return base.bits_per_weight / 8
        return 0.5 if isinstance(base, NF4) else 1.0

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config.base)

    def is_serializable(self, **_: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    def __init__(self, base: Base | PreparedBase) -> None:
        self.base = base

    def convert(
        self,
        input_dict: Any,
        model: Any = None,
        full_layer_name: Any = None,
        missing_keys: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        for param_name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = (full_layer_name or param_name).removesuffix(".weight")
            layer = model.get_submodule(name)
            if isinstance(self.base, PreparedBase):
                made = self.base.layer(name, layer.bias, weight.dtype, weight.device)
            else:
                made = quantized(weight, self.base, layer.bias)
            made._is_hf_initialized = True  # type: ignore[assignment]
            model.set_submodule(name, made)
            if missing_keys is not None:
                missing_keys.discard(f"{name}.weight")
        return {}


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(_Quantizer)
    register_quantization_config(METHOD)(_Config)


def take_over(model: nn.Module) -> NF4 | None:
    """Replace bitsandbytes' 4-bit layers by ours with the same bytes; None: there are none.

    Raises:
        JobError: they are of a type that is not nf4.
    """
    found: NF4 | None = None
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Linear4bit" or not type(module).__module__.startswith("bitsandbytes"):
            continue
        weight: Any = module.weight
        state = weight.quant_state
        if state.quant_type != "nf4":
            raise JobError(
                f"the checkpoint is quantized to {state.quant_type}",
                at=f"model, layer {name}",
                why="of bitsandbytes' types only nf4 is known here",
                try_="give a checkpoint in 16 bits and --set base=nf4",
            )
        double = bool(state.nested)
        scales = state.absmax if double else state.absmax.float()
        stored = NormalFloat4(
            packed=weight.data.view(-1),
            scales=scales,
            scales_scale=state.state2.absmax if double else None,
            mean=state.offset if double else None,
            block=state.blocksize,
        )
        bias: Any = module.bias
        model.set_submodule(name, NF4Linear(tuple(state.shape), stored, bias, state.dtype))
        found = NF4(double=double)
    return found


def take_in(model: nn.Module, prepared: PreparedBase) -> None:
    """Put prepared matrices into a model that is there already."""
    for name in prepared.matrices:
        plain: Any = model.get_submodule(name)
        model.set_submodule(name, prepared.layer(name, plain.bias, plain.weight.dtype, plain.weight.device))


def quantize(model: nn.Module, base: Base) -> None:
    """Round the linear layers of a model that is there already, for one without a checkpoint."""
    if isinstance(base, Unquantized):
        return
    for layer in decoder_layers(model):
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear:
                layer.set_submodule(name, quantized(module.weight, base, module.bias))


def dequantize(model: nn.Module) -> None:
    """Make plain layers of the quantized ones, with the very weights they stood for."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=False, dtype=module.dtype)
            plain.weight = nn.Parameter(module.whole(), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)
    some: Any = model
    if getattr(some, "hf_quantizer", None) is not None:
        some.hf_quantizer.remove_quantization_config(some)
