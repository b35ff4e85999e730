"""What spawned ranks run in the sequence-parallel tests. Not a test module: `multiprocessing` imports it by name."""

from __future__ import annotations

import pickle
import socket
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(function: Any, world_size: int, *args: Any, timeout_s: float = 290.0, **keywords: Any) -> list[Any]:
    """Run `function(rank, *args)` on spawned gloo ranks and return their results in rank order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["farspan.trainer.sft"])  # imported once, not once a rank
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        arguments = (function, rank, world_size, port, theirs, args, keywords)
        process = context.Process(target=_rank, args=arguments, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout_s), f"rank {rank} gave no answer in {timeout_s} s"
            kind, value = pickle.loads(pipe.recv_bytes())
            assert kind == "result", value
            results.append(value)
        return results
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _rank(
    function: Any,
    rank: int,
    world_size: int,
    port: int,
    pipe: Any,
    args: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
        # plain pickle: torch's own shares tensors through files that vanish with this process
        pipe.send_bytes(pickle.dumps(("result", function(rank, *args, **keywords))))
        dist.barrier()
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))


def ulysses_attention(rank: int, shapes: list[tuple[int, int, int]]) -> dict[Any, Any]:
    """Outputs and input gradients of Ulysses(kernel) in float64, every rank's rows, for (heads, kv_heads, sp)."""
    from farspan.kernels.attention import causal_attention
    from farspan.trainer.parallel.ulysses import Ulysses

    groups = {sp: dist.new_group(list(range(sp))) for sp in (2, 3, 4)}
    results: dict[Any, Any] = {}
    for heads, kv_heads, sp in shapes:
        if rank >= sp:
            continue
        q, k, v, lengths = attention_inputs(heads, kv_heads)
        rows = q.shape[2] // sp
        mine = [x[:, :, rank * rows : (rank + 1) * rows].clone().requires_grad_() for x in (q, k, v)]
        ulysses = Ulysses(groups[sp])
        out, _ = causal_attention(*ulysses.to_heads(*mine), lengths=lengths, scale=0.3)
        out = ulysses.to_rows(out, heads, kv_heads)
        (out * weights(heads)[:, :, rank * rows : (rank + 1) * rows]).sum().backward()
        results[heads, kv_heads, sp] = [out.detach(), *(x.grad for x in mine)]
    return results


def attention_inputs(heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """q [2, H, 24, 8], k and v [2, K, 24, 8] in float64, and the lengths of three documents."""
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    draw = [torch.randn(2, n, 24, 8, generator=generator, dtype=torch.float64) for n in (heads, kv_heads, kv_heads)]
    return draw[0], draw[1], draw[2], (11, 1, 12)


def weights(heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(2, heads, 24, 8, generator=generator, dtype=torch.float64)


def peer_sequence(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and shifted labels, int64 [1, 96]."""
    ids = torch.randint(0, vocab, (1, 96), generator=torch.Generator().manual_seed(5))
    return ids, torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)


def farspan_ulysses(rank: int, folder: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one sequence over two ranks, by Farspan."""
    from farspan.memory.config import MemoryBudget
    from farspan.trainer.attention import PackedSequence
    from farspan.trainer.config import FullFineTune
    from farspan.trainer.models import load_model, prepare_model
    from farspan.trainer.parallel.ulysses import Ulysses

    causal = load_model(folder, revision=None, dtype=torch.float32, device=torch.device("cpu"))
    module, trainable = prepare_model(causal, adapter=FullFineTune(), memory=MemoryBudget(), seed=0)
    ids, labels = peer_sequence(causal.config.vocab_size)
    rows = slice(rank * 48, (rank + 1) * 48)
    sequence = PackedSequence((96,), Ulysses(dist.group.WORLD))
    loss = module(ids[:, rows], labels[:, rows], torch.arange(96)[None, rows], sequence) / 95
    return _summed(loss, list(trainable.items()))


def deepspeed_ulysses(rank: int, folder: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by DeepSpeed's UlyssesSPAttentionHF, which replaces transformers' `sdpa` in this process."""
    import os
    import warnings

    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from transformers import AutoModelForCausalLM

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        UlyssesSPAttentionHF.register_with_transformers(
            folder, "sdpa", sequence_parallel_size=2, micro_batch_size=1, seq_length=96, seq_length_is_variable=False
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    ids, labels = peer_sequence(model.config.vocab_size)
    rows = slice(rank * 48, (rank + 1) * 48)
    logits = model(input_ids=ids[:, rows], position_ids=torch.arange(96)[None, rows], use_cache=False).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, labels[0, rows], reduction="sum") / 95
    return _summed(loss, list(model.named_parameters()))


def _summed(loss: torch.Tensor, named: list[tuple[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    loss.backward()
    total = loss.detach()
    dist.all_reduce(total)
    gradients = {}
    for name, parameter in named:
        dist.all_reduce(parameter.grad)
        gradients[name] = parameter.grad
    return float(total), gradients


def write_peer_model(family: str, kv_heads: int, folder: Path) -> None:
    from farspan.trainer.config import RandomModel
    from farspan.trainer.models import write_random_model

    model = RandomModel(family=family, hidden=64, layers=2, heads=4, kv_heads=kv_heads, ffn=96, vocab=260)
    write_random_model(model, folder, precision="fp32", context=128, eos_id=0, pad_id=1)


def train_rank(rank: int, spec_json: str) -> dict[str, Any]:
    """One rank of an SFT run on the group that `on_ranks` has formed; the last record."""
    from farspan.trainer.config import TrainSpec
    from farspan.trainer.sft import train
    from farspan.trainer.world import World

    spec = TrainSpec.model_validate_json(spec_json)
    return train(spec, World(rank=rank, world_size=spec.mesh.world_size, local_rank=rank)).last_record


def coded_exchange(rank: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """A layer's exchange in bits of all sizes, and the same by rounding beforehand and exchanging exactly."""
    from torch import nn

    from farspan.trainer.config import AMAQ
    from farspan.trainer.parallel.learned_bits import LearnedBits
    from farspan.trainer.parallel.ulysses import Ulysses, head_layout

    rows, D, others = 24, 8, dist.get_world_size() - 1
    ulysses, draw = Ulysses(dist.group.WORLD), torch.Generator().manual_seed(7)
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": D}
    exchange = AMAQ(bits=4, start=5, lr=0.1, gradients="exact")
    bits = LearnedBits(exchange, [nn.Identity()], **sizes, device=torch.device("cpu"), steps=4, seed=0)
    bits._use(torch.randint(2, 9, bits.bits_LID.shape, generator=draw))
    real_ID = bits.bits_LID[0].double().requires_grad_()
    layer, layout = bits.layers[0], head_layout(heads, kv_heads, ulysses.ranks)
    mine = slice(rank * rows, (rank + 1) * rows)

    def rounded(x: torch.Tensor, first: int) -> torch.Tensor:
        """[1, N, r, D] of items from `first` on, each channel at its levels; gradients pass rounding by."""
        n = real_ID[first : first + x.shape[1]][None, :, None]
        low, high = x.double().amin(2, keepdim=True), x.double().amax(2, keepdim=True)
        step = (high - low) / (2**n - 1)
        at = (x.double() - low) / step
        return (low + (at + (torch.floor(at.detach() + 0.5) - at).detach()) * step).float()

    draw.manual_seed(rank)
    q, k, v = (torch.randn(1, n, rows, D, generator=draw) for n in (heads, kv_heads, kv_heads))
    coded_in, exact_in = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    coded, exact = ulysses.to_heads(*coded_in, layer), ulysses.to_heads(*exact_in)
    before = ulysses.to_heads(*(rounded(x, at) for x, at in zip((q, k, v), (0, heads, heads + kv_heads))))
    whole = [there.detach().clone() for there in before]
    for there, as_it_is in zip(whole, exact):
        there[:, :, mine] = as_it_is.detach()[:, :, mine]
    weights = [torch.randn(t.shape, generator=draw) for t in coded]
    for tensors in (coded, exact):
        torch.autograd.backward(tensors, weights)
    gate_gradient = bits.gradient_LID[0].clone()
    for weight in weights:  # a rank's own part has no bits
        weight[:, :, mine] = 0
    torch.autograd.backward(before, weights)
    assert real_ID.grad is not None

    h = len(layout.query[rank])
    o, first = (
        torch.randn(1, h, rows * ulysses.ranks, D, generator=draw),
        heads + 2 * kv_heads + layout.query[rank].start,
    )
    parts = [rounded(part, first).detach() for part in o.split(rows, dim=2)]
    parts[rank] = o[:, :, mine]
    sent = [r for at, pair in enumerate(zip(layout.query, layout.kv)) for r in layer.inputs(*pair) if at != rank]
    sent += [range(first, first + h)] * others
    planes, channels = sum(int(bits.bits_LID[0, r.start : r.stop].sum()) for r in sent), D * sum(map(len, sent))
    gradients = 4 * rows * D * others * (h + 2 * len(layout.kv[rank]))
    to_rows = ulysses.to_rows(o, heads, kv_heads, layer)
    return {
        "heads, coded": torch.cat([t.detach().flatten() for t in coded]),
        "heads, exact": torch.cat([t.detach().flatten() for t in exact]),
        "heads, rounded before": torch.cat([t.flatten() for t in whole]),
        "rows, coded": to_rows,
        "rows, exact": ulysses.to_rows(o, heads, kv_heads),
        "rows, rounded before": ulysses.to_rows(torch.cat(parts, dim=2), heads, kv_heads),
        **{f"d{name}": x.grad for name, x in zip("qkv", coded_in)},
        **{f"d{name}, exact": x.grad for name, x in zip("qkv", exact_in)},
        "gate gradient": gate_gradient,
        "gate gradient, autograd": real_ID.grad.float(),
        "bytes": bits.traffic.sent_bytes - gradients,
        "bytes by formula": planes * rows // 8 + 8 * channels,
    }


def rl_updates(rank: int, spec: Any, samples: Any, count: int) -> Any:
    """Scores and two optimizer steps of an RL trainer on the group that `on_ranks` has formed; rank 0's findings."""
    from farspan.trainer.rl.policy import PolicyRank
    from farspan.trainer.world import World

    made = PolicyRank(spec, World(rank=rank, world_size=spec.train.mesh.world_size))
    scored = made.score(samples)
    records = [made.update(samples) for _ in range(count)]
    weights = made.weights()
    made.close()
    if rank:
        return None
    assert scored is not None and weights is not None
    return scored, [record["loss"] for record in records if record], {n: w.numpy() for n, w in weights.items()}
