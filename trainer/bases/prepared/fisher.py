"""How much each weight of a model matters: the mean over some sequences of its squared gradient.

The diagonal of the empirical Fisher matrix, F = mean_i (dL_i / dW)^2. A sequence's gradient of a matrix is formed from
its input and output gradient where backward passes, squared, added and dropped: no two are there at a time. What is
kept of all is a number for each weight, or with `factored` one for each row and each column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from farspan.trainer.bases.prepared.decompose import Importance
from farspan.trainer.batch import rows_of
from farspan.trainer.data.packing import Pack, PackedStream
from farspan.trainer.data.store import TokenStore
from farspan.trainer.models import CausalLMLoss

ROW, COLUMN = ".row", ".column"


def sequences(tokens_dir: Path, count: int, tokens: int, seed: int) -> list[Pack]:
    """The first of the training data, documents cut to `tokens`."""
    stream = PackedStream(TokenStore(tokens_dir).train, tokens, "truncate", True, seed)
    return [stream.pack(index) for index in range(count)]


def gather(causal: Any, names: Sequence[str], packs: Iterable[Pack], *, factored: bool) -> dict[str, Tensor]:
    """Squared gradients of the linear layers called `names`, on the CPU in fp32.

    Args:
        causal: a model with Farspan's attention, in plain layers; left as it was.

    Returns:
        `<name>` [N, C]; factored: `<name>.row` [N] and `<name>.column` [C], means over the other.
    """
    found: dict[str, Tensor] = {}
    count = 0

    def add(name: str, x_RC: Tensor, dy_RN: Tensor) -> None:
        squared = (dy_RN.float().t() @ x_RC.float()).square_()
        parts = {name + ROW: squared.mean(1), name + COLUMN: squared.mean(0)} if factored else {name: squared}
        for key, part in parts.items():
            found[key] = found[key].add_(part.cpu()) if key in found else part.cpu()

    asked = [p for p in causal.parameters() if p.requires_grad]
    hooks = [causal.get_submodule(name).register_forward_hook(_watch(name, add)) for name in names]
    embedding = causal.get_input_embeddings()
    # nothing is trained here: what backward needs is that the hidden states have a gradient
    hooks.append(embedding.register_forward_hook(lambda _, __, out: out.requires_grad_()))
    module = CausalLMLoss(causal, causal, loss_tile=512)
    try:
        causal.requires_grad_(False)
        for pack in packs:
            rows = rows_of(pack, sp=1, sp_index=0, ulysses=None, device=embedding.weight.device)
            loss = module(rows.input_ids, rows.labels, rows.position_ids, rows.sequence)
            (loss / max(pack.trained_tokens, 1)).backward()
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in asked:
            parameter.requires_grad_(True)
    return {name: total / count for name, total in found.items()}


def _watch(name: str, add: Callable[[str, Tensor, Tensor], None]) -> Callable[..., None]:
    def forward_hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda dy: add(name, x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])))

    return forward_hook


def write(path: Path, gathered: dict[str, Tensor]) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    save_file(gathered, beside)
    beside.replace(path)


def read(path: Path, name: str) -> Importance:
    """Of one matrix."""
    with safe_open(path, framework="pt") as file:
        if name in file.keys():  # noqa: SIM118  not a mapping
            return Importance.of(file.get_tensor(name))
        return Importance.factored(file.get_tensor(name + ROW), file.get_tensor(name + COLUMN))
