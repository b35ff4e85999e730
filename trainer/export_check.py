"""Opens an export again, as a user would, and compares it with the state it was made from.

Names, shapes and dtypes are read from the written files. Values are compared bit for bit, and a short forward must be
finite, on the model as transformers or peft loads it; that needs the model in host memory once. Where it does not fit,
values are compared on the files and the report says that the forward was left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from farspan.errors import CheckpointError
from farspan.trainer.adapters.own_files import Kind
from farspan.trainer.bases.config import Base
from farspan.trainer.bases.prepared.store import PREPARED, PreparedBase, open_dequantized
from farspan.trainer.checkpoint_format import gib

_FORWARD_ROWS = 16


def check_model(
    out_dir: Path,
    written: Mapping[str, tuple[int, ...]],
    names: Iterable[str],
    value: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
) -> list[str]:
    """Check a folder with a whole model.

    Args:
        out_dir: the export.
        written: names and shapes that should be on disk.
        names: names in the model's state dict, tied ones once.
        value: the tensor that should be there, by its name in the state dict.
        dtype: of every floating-point weight.

    Returns:
        what was compared, in words.

    Raises:
        CheckpointError: anything is off.
    """
    size_bytes = _check_headers(out_dir, written, dtype)
    done = [f"names, shapes and dtypes of {len(written)} tensors"]
    left_out = _too_large(size_bytes)
    if left_out is None:
        model, info = AutoModelForCausalLM.from_pretrained(
            out_dir, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
        _require_clean(out_dir, info)
        loaded = model.state_dict()
        _check_values(out_dir, names, loaded.__getitem__, value)
        _check_forward(out_dir, model)
        return [*done, "values bit for bit after transformers loaded them", "a finite forward"]
    if set(names) != set(written):
        return [*done, f"values: not compared, {left_out}", f"forward: not run, {left_out}"]
    with _Files(out_dir) as files:
        _check_values(out_dir, names, files.tensor, value)
    return [*done, "values bit for bit in the files", f"forward: not run, {left_out}"]


def check_adapter(
    out_dir: Path,
    base: Path,
    saved: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    prepared: PreparedBase | None = None,
) -> list[str]:
    """Check a PEFT folder; see `check_model`.

    Args:
        saved: the adapter's tensors by their name on disk.
        prepared: the base that it was trained on, copied beside it.
    """
    from peft import PeftModel, get_peft_model_state_dict

    written = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    _check_headers(out_dir, written, dtype)
    done = [f"names, shapes and dtypes of {len(written)} tensors"]
    if not any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name or "lora_embedding_B" in name):
        raise _off(out_dir, "every lora_B is zero, so the adapter changes nothing: it was not trained or not saved")
    done.append("a non-zero adapter")
    left_out = _too_large(_base_bytes(base))
    if left_out is None:
        if prepared is None:
            whole = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
        else:
            whole = open_dequantized(out_dir / PREPARED, source=base, attn_implementation="eager")
            done.append(f"{len(prepared.matrices)} rounded matrices that open")
        model = PeftModel.from_pretrained(whole, out_dir, autocast_adapter_dtype=False)
        loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
        if loaded.keys() != saved.keys():
            raise _off(out_dir, f"peft opens it with other names, first {min(loaded.keys() ^ saved.keys())}")
        _check_values(out_dir, saved, loaded.__getitem__, saved.__getitem__)
        _check_forward(out_dir, model)
        return [*done, "values bit for bit after peft loaded them", "a finite forward"]
    with _Files(out_dir) as files:
        _check_values(out_dir, saved, files.tensor, saved.__getitem__)
    return [*done, "values bit for bit in the files", f"forward: not run, {left_out}"]


def _compared(
    out_dir: Path, base: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, stored: Base | None = None
) -> tuple[list[str], Any]:
    """Compare the file with what was saved; what was done, and the base to open it on: None, and why, where it is too
    large for this machine."""
    from farspan.trainer.bases.load import loading_options

    with _Files(out_dir) as files:
        _check_values(out_dir, tensors, files.tensor, tensors.__getitem__)
    done = [f"{len(tensors)} tensors bit for bit in the file"]
    left_out = _too_large(_base_bytes(base))
    if left_out is not None:
        return [*done, f"forward: not run, {left_out}"], None
    options = loading_options(stored, base) if stored is not None else {}
    return done, AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager", **options)


def check_columns(
    out_dir: Path, base: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, stored: Base
) -> list[str]:
    """Check a folder with trained columns; see `check_model`.

    Args:
        tensors: columns and indices by their name on disk.
        stored: how the base was stored in training.
    """
    from farspan.trainer.adapters.paca.files import load
    from farspan.trainer.bases.load import dequantize, take_over

    done, whole = _compared(out_dir, base, tensors, dtype=dtype, stored=stored)
    if whole is None:
        return done
    take_over(whole)
    dequantize(whole)
    names = [name.removesuffix(".columns") for name in tensors if name.endswith(".columns")]
    before = {name: whole.get_submodule(name).weight.detach()[:, tensors[f"{name}.indices"]] for name in names}
    model: Any = load(out_dir, base=whole)
    after = {name: model.get_submodule(name).weight.detach()[:, tensors[f"{name}.indices"]] for name in names}
    _check_values(out_dir, names, after.__getitem__, lambda name: tensors[f"{name}.columns"])
    if not any(not torch.equal(after[name], before[name]) for name in names):
        raise _off(
            out_dir, "every column is the base's, so the adapter changes nothing: it was not trained or not saved"
        )
    _check_forward(out_dir, model)
    return [*done, "columns that are not the base's", "a finite forward"]


def check_scales(out_dir: Path, base: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype) -> list[str]:
    """Check a folder with trained scales; see `check_model`."""
    from farspan.trainer.adapters.peqa.files import load

    done, whole = _compared(out_dir, base, tensors, dtype=dtype)
    if whole is None:
        return done
    model: Any = load(out_dir, base=whole)
    there = dict(model.named_parameters())
    fresh = {name: model.get_submodule(name.removesuffix(".scale")).fresh_scale for name in tensors}
    if all(torch.equal(tensors[name], fresh[name]) for name in tensors):
        raise _off(out_dir, "every scale is what rounding gave: the adapter was not trained, or not saved")
    _check_values(out_dir, tensors, there.__getitem__, tensors.__getitem__)
    _check_forward(out_dir, model)
    return [*done, "scales after they were loaded", "a finite forward"]


def check_network(
    out_dir: Path, base: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, stored: Base
) -> list[str]:
    """Check a folder with a side network; see `check_model`."""
    from farspan.trainer.adapters.unipt.apply import CHILD
    from farspan.trainer.adapters.unipt.files import load

    if not bool(tensors["up"].any()):
        raise _off(out_dir, "the last matrix is zero, so the network adds nothing: it was not trained or not saved")
    done, whole = _compared(out_dir, base, tensors, dtype=dtype, stored=stored)
    if whole is None:
        return done
    model: Any = load(out_dir, base=whole)
    _check_values(out_dir, tensors, lambda name: model.get_parameter(f"{CHILD}.{name}"), tensors.__getitem__)
    _check_forward(out_dir, model)
    return [*done, "values after they were loaded", "a finite forward"]


def check_parts(
    out_dir: Path, base: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, stored: Base
) -> list[str]:
    """Check a folder with S2A's parts; see `check_model`."""
    from farspan.trainer.adapters.s2a.files import PROMPT, load

    if not any(bool(tensor.any()) for tensor in tensors.values()):
        raise _off(out_dir, "every bias and side module is zero, so the adapter changes nothing")
    done, whole = _compared(out_dir, base, tensors, dtype=dtype, stored=stored)
    if whole is None:
        return done
    model: Any = load(out_dir, base=whole)
    if PROMPT in tensors:
        there = model.get_prompt_embedding_to_save("default")
        _check_values(out_dir, [PROMPT], lambda _: there, tensors.__getitem__)
        done.append("a prompt that peft has opened")
    _check_forward(out_dir, model)
    return [*done, "a finite forward"]


def check_integers(
    out_dir: Path, base: Path, kind: Kind, tensors: Mapping[str, Tensor], *, dtype: torch.dtype
) -> list[str]:
    """Check a folder with matrices of integers; see `check_model`. `tensors`: by their name on disk."""
    from farspan.trainer.adapters.integer_files import load

    done, whole = _compared(out_dir, base, tensors, dtype=dtype)
    if whole is None:
        return done
    model: Any = load(out_dir, kind, base=whole)
    there = dict(model.named_buffers())
    _check_values(out_dir, tensors, there.__getitem__, tensors.__getitem__)
    _check_forward(out_dir, model)
    return [*done, "integers after they were loaded", "a finite forward"]


def check_streams(out_dir: Path, base: Path, weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
    """Open a reversible model again, compare its adapters, run it.

    Args:
        weights: of the adapters between the streams, by their names in the model.
    """
    from farspan.trainer.adapters.reversible.files import is_bottleneck, load, name_on_disk

    if _too_large(_base_bytes(base)) is not None:
        return
    opened: Any = None
    if any((out_dir / name).exists() for name in ("adapter_config.json", "paca.json", "peqa.json", "l4q.json")):
        opened = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
    model: Any = load(out_dir, base=opened, dtype=dtype, **({} if opened else {"attn_implementation": "eager"}))
    there = {name_on_disk(name): p for name, p in model.named_parameters() if is_bottleneck(name)}
    saved = {name_on_disk(name): tensor for name, tensor in weights.items()}
    if there.keys() != saved.keys():
        raise _off(out_dir, f"{len(there)} weights between the streams where {len(saved)} were trained")
    _check_values(out_dir, saved, there.__getitem__, saved.__getitem__)
    _check_forward(out_dir, model)


class _Files:
    """The tensors in a folder's safetensors files, by name."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> _Files:
        for file in self._files:
            file.__enter__()
            self._owner.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(self, *exception: Any) -> None:
        for file in self._files:
            file.__exit__(*exception)

    def tensor(self, name: str) -> Tensor:
        return self._owner[name].get_tensor(name)

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        slices = {name: file.get_slice(name) for name, file in self._owner.items()}
        return {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in slices.items()}


def _check_headers(out_dir: Path, written: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Compare what the files say of themselves; returns the bytes of all tensors."""
    called = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    with _Files(out_dir) as files:
        headers = files.headers()
    if headers.keys() != written.keys():
        raise _off(out_dir, f"other names than were written, first {min(headers.keys() ^ written.keys())}")
    for name, (shape, stored) in headers.items():
        if shape != written[name]:
            raise _off(out_dir, f"{name} has shape {list(shape)}, not {list(written[name])}")
        if stored.startswith(("F", "BF")) and stored != called:
            raise _off(out_dir, f"{name} is {stored}, not {called}")
    return sum(torch.Size(shape).numel() for shape, _ in headers.values()) * dtype.itemsize


def _require_clean(out_dir: Path, info: Mapping[str, Any]) -> None:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise _off(out_dir, f"transformers reports {problem}: {sorted(map(str, info[problem]))[:3]}")


def _check_values(
    out_dir: Path, names: Iterable[str], found: Callable[[str], Tensor], wanted: Callable[[str], Tensor]
) -> None:
    for name in names:
        there, should = found(name), wanted(name)
        if not _same_bits(there.detach().to(should.dtype), should.detach()):
            raise _off(out_dir, f"{name} differs from the checkpoint")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0 from 0 and holds for NaN."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _check_forward(out_dir: Path, model: PreTrainedModel) -> None:
    vocab = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        logits = model(input_ids=torch.arange(_FORWARD_ROWS).remainder(vocab)[None], use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise _off(out_dir, f"logits of {_FORWARD_ROWS} tokens are not finite")


def _base_bytes(base: Path) -> int:
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))


def _too_large(size_bytes: int) -> str | None:
    """Why a model of so many bytes cannot be loaded here, or None. A fifth more is left for the forward."""
    available_bytes = psutil.virtual_memory().available
    if size_bytes * 1.2 <= available_bytes:
        return None
    return f"it needs {gib(int(size_bytes * 1.2))} of host memory, {gib(available_bytes)} are free"


def untrained(out_dir: Path, what: str) -> CheckpointError:
    return _off(out_dir, f"{what}: the adapter was not trained, or not saved")


def _off(out_dir: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        "what was exported is not what was saved",
        at=str(out_dir),
        why=problem,
        try_="report this with the versions of transformers and peft; the training state itself is untouched",
    )
