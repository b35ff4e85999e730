"""S2A's trained parts on disk, a few hundred kilobytes to megabytes beside the base they belong to.

    s2a.json                      which parts there are, how the base was stored, the base model
    s2a.safetensors               `<linear layer>.bias` [N], to be added to a bias that is there; `<decoder layer>.side`
    adapter_config.json           with a prompt: peft's files of prefix tuning, which peft opens alone where there are
    adapter_model.safetensors     neither biases nor side modules (`prompt_embeddings` [n, layers x 2 x K x D])

Biases alone cost nothing to run: `farspan export --merged` makes a plain model of them where its family has such.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor, nn

from farspan.trainer.adapters import own_files
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.s2a.apply import SIDE, add_side
from farspan.trainer.adapters.s2a.config import S2A
from farspan.trainer.bases.config import Base

PROMPT = "prompt_embeddings"


def save(
    folder: Path,
    adapter: S2A,
    *,
    base: str,
    revision: str | None,
    stored: Base,
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
    prompt: list[tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """Write the files.

    Args:
        tensors: biases and side modules by their names on disk.
        prompt: keys and values [K, n, D] of each layer; none without a prompt.

    Returns:
        all tensors by their names on disk.
    """
    told = {"adapter": adapter.model_dump(mode="json"), "base_model": base, "revision": revision}
    own_files.write(folder, "s2a", told | {"base": stored.model_dump(mode="json")}, dtype=dtype, tensors=tensors)
    if not prompt:
        return tensors
    from peft import PrefixTuningConfig

    heads, count, size = prompt[0][0].shape
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=count,
        token_dim=heads * size,
        num_attention_heads=heads,
        num_layers=len(prompt),
        num_transformer_submodules=1,
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    by_token = torch.stack([part for layer in prompt for part in layer]).permute(2, 0, 1, 3).flatten(1)
    save_file({PROMPT: by_token.contiguous()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return {**tensors, PROMPT: by_token}


def load(folder: Path | str, *, base: Any = None, dtype: torch.dtype | str = "auto", **options: Any) -> nn.Module:
    """The base model with the trained parts; with a prompt, in peft's model, which generates behind it.

    Args:
        folder: an export of a run with `S2A`.
        base: the loaded base model, changed in place; None: from where the folder says. Rounded as it was in training.
        dtype, options: for `from_pretrained`; `auto`: as in training.

    Raises:
        CheckpointError: the folder is no such export, or belongs to another model.
    """
    folder = Path(folder)
    told, tensors = own_files.read(folder, "s2a")
    adapter = S2A.model_validate(told["adapter"])
    base = own_files.open_base(told, base, dtype, TypeAdapter(Base).validate_python(told["base"]), **options)
    layers = decoder_layers(base)
    if adapter.side:
        for layer in layers:
            add_side(layer, adapter.side, base.config.get_text_config().hidden_size)
    for name, tensor in tensors.items():
        module_name, _, what = name.rpartition(".")
        try:
            module = base.get_submodule(module_name)
            if what == "bias":
                put_bias(module, tensor)
            else:
                module.get_parameter(SIDE).data.copy_(tensor)
        except (AttributeError, RuntimeError) as error:
            why = f"{module_name} of this model: {str(error).split(chr(10), maxsplit=1)[0]}"
            raise own_files.wrong(folder, "s2a", why) from error
    if adapter.prompt:
        from peft import PeftModel

        return PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()
    return base.eval()


def put_bias(layer: Any, bias: Tensor) -> None:
    """Add a bias to a plain linear layer, or to its own."""
    weight: Tensor = layer.weight
    if bias.shape != weight.shape[:1]:
        raise RuntimeError(f"a bias of {list(bias.shape)} on a matrix of {list(weight.shape)}")
    whole = bias.to(weight.device).float()
    if layer.bias is not None:
        whole = whole + layer.bias.detach().float()
    layer.bias = nn.Parameter(whole.to(weight.dtype), requires_grad=False)
