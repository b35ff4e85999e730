"""The GPU's kernels for 4-bit codes against their definition in torch."""

from __future__ import annotations

from triton_process import in_process

INTERPRETED = """
import json, math, torch
from farspan.kernels.activation_codecs import triton_kernels as kernels
from farspan.kernels.activation_codecs.codes import Groups4, Range4
draw, wrong, cases = torch.Generator().manual_seed(0), [], 0
same = lambda a, b: torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) if a.is_floating_point() else torch.equal(a, b)
for dtype in (torch.float32, torch.float16):
    for rows, width, group in ((1, 16, 16), (37, 192, 64), (5, 96, 32)):
        for scale in (0.0, 1e-4, 1.0, 300.0):
            x = (torch.randn(rows, width, generator=draw) * scale + scale).to(dtype)
            x[0, 3] = -scale
            x[-1, -1] = float("nan") if rows > 1 else 0.0
            codec = Groups4(group)
            got, want = kernels.encode_groups(x, group, None), codec.encode(x.float(), None)
            lost = torch.isnan(want[1].view(rows, -1, 2)).any(-1)  # where nothing is promised of the codes
            lost_bytes = lost.repeat_interleave(group // 2, dim=1)
            ok = same(got[0].masked_fill(lost_bytes, 0), want[0].masked_fill(lost_bytes, 0))
            ok = ok and same(got[1].view(rows, -1, 2)[~lost].float(), want[1].view(rows, -1, 2)[~lost].float())
            back = kernels.decode_groups(*got, group)
            ok = ok and same(back, codec.decode(*want)) and bool(torch.isnan(back).any()) == (rows > 1)
            ranged = Range4(-0.1, 1.1)
            y = x.nan_to_num(0.0).float().clamp(-0.1, 1.1).to(dtype)
            (want_codes,) = ranged.encode(y.float(), None)
            codes = kernels.encode_range(y, ranged.low, ranged.step, None)
            ok = ok and same(codes, want_codes)
            off = kernels.decode_range(codes, ranged.low, ranged.step) - ranged.decode(want_codes)
            ok = ok and float(off.abs().max()) < 1e-6
            cases += 1
            if not ok:
                wrong.append([str(dtype), rows, width, scale])
# noise is of (key, element): copies of x side by side, since the interpreter takes as long for one as for a program's
x, copies, keys, fine = torch.rand(4, 64, generator=draw), 16, 10, 1 / 15
draws, wide = copies * keys, x.repeat(copies, 1)
apart = lambda y: y.view(copies, *x.shape)
found = [apart(kernels.decode_groups(*kernels.encode_groups(wide, 64, key), 64)) for key in range(keys)]
ranged = [apart(kernels.decode_range(kernels.encode_range(wide, 0.0, fine, key), 0.0, fine)) for key in range(keys)]
found, ranged = torch.cat(found).double(), torch.cat(ranged).double()
again = [kernels.encode_groups(x, 64, 5)[0] for _ in range(2)]
print(json.dumps({
    "wrong": wrong, "cases": cases,
    "mean": float((found.mean(0) - x).abs().max() * math.sqrt(draws) * 15 * 2),
    "mean of a range": float((ranged.mean(0) - x).abs().max() * math.sqrt(draws) * 15 * 2),
    "drawn": [float(found.view(keys, copies, *x.shape).std(axis).mean()) > 0.02 for axis in (0, 1)],
    "repeats": torch.equal(*again),
}))
"""


def test_the_kernels_agree_with_the_definition() -> None:
    """Under Triton's interpreter: to the nearest bit for bit; at random unbiased, within five standard errors."""
    found = in_process(INTERPRETED, TRITON_INTERPRET="1")
    for name in ("mean", "mean of a range"):
        error = found.pop(name)
        assert isinstance(error, float) and error < 5
    assert found == {"wrong": [], "cases": 24, "drawn": [True, True], "repeats": True}


COMPILED = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from farspan.kernels.activation_codecs import triton_kernels as k
sizes = {}
types = {"codes": "*u8", "scales": "*bf16", "out": "*fp32", "groups": "i32", "bytes_": "i32", "key": "i32",
         "low": "fp32", "step": "fp32"}
constants = {"GROUP": 64, "GROUPS": 64, "BLOCK": 2048, "DRAWS": True}
for arch in (80, 90):
    for kernel in (k.encode_groups_kernel, k.decode_groups_kernel, k.encode_range_kernel, k.decode_range_kernel):
        for width in ("bf16", "fp32") if kernel.arg_names[0] == "x" else ("",):
            names = kernel.arg_names
            signature = {n: "constexpr" if n in constants else {**types, "x": f"*{width}"}[n] for n in names}
            source = ASTSource(
                fn=kernel, signature=signature, constexprs={n: constants[n] for n in names if n in constants},
                attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")},
            )
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
            sizes[f"{kernel.__name__} {width} sm_{arch}"] = len(made.asm["cubin"])
print(json.dumps(sizes))
"""


def test_the_kernels_compile_for_gpus() -> None:
    sizes = in_process(COMPILED)
    assert len(sizes) == 12 and all(size for size in sizes.values())
