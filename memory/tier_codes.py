"""What codes of rows on host and disk come to, from what the same rows are on the device.

`memory.coded_rows` makes the codes; here are their bytes, which a plan counts without torch, and what compute takes for
them where nobody measured: reading and writing memory, as often as the operators that make and read codes do.
"""

from __future__ import annotations

from farspan.errors import JobError
from farspan.kernels.activation_codecs import LEAST_GROUP, values_bytes
from farspan.memory.hardware import Hardware
from farspan.memory.plan import TierCodec
from farspan.memory.problem import TierCodes
from farspan.memory.profile import AttentionProfile, KindProfile, LinearProfile, Profile, Source
from farspan.memory.shape import ModelShape, Training

FP32 = 4
ENCODE_TRAFFIC = {"cuda": {"fp8": 40, "int4": 3}, "cpu": {"fp8": 40, "int4": 70}}
DECODE_TRAFFIC = {"cuda": {"fp8": 18, "int4": 9}, "cpu": {"fp8": 18, "int4": 35}}
"""Bytes read and written per element, the rows themselves apart. Codes are made in fp32 by torch's operators, one pass
each; those of int4 on a GPU by one kernel."""


def coded_row_bytes(codec: TierCodec, width: int, width_bytes: int) -> int:
    """Of a row of `width` elements on host and disk."""
    return width * width_bytes if codec == "exact" else sum(values_bytes(codec, width))


def check_width(width: int, what: str) -> None:
    """Raises JobError where rows of so many elements have no codes."""
    if width % LEAST_GROUP:
        raise JobError(
            f"rows of {width} elements do not split into groups that share a scale",
            at="memory.tier_codec",
            why=f"{what}: {width} / {LEAST_GROUP} leaves {width % LEAST_GROUP}",
            try_="--set memory.tier_codec=exact",
        )


def coded(profile: Profile, shape: ModelShape, training: Training, hardware: Hardware) -> Profile:
    """The profile with the codes that `training` has for other tiers; the same where it has none.

    Raises:
        JobError: rows do not split into groups that share a scale, or layers need theirs back bit for bit.
    """
    codec, each = training.tier_codec, training.width_bytes
    if codec == "exact":
        return profile.model_copy(update={"codes": None})
    if training.coupling is not None:
        raise JobError(
            f"reversible layers do not go with rows in {codec}",
            at="memory.tier_codec",
            why="they compute their inputs back from side bits, and from O and linear outputs that have to be those "
            "of the forward, bit for bit",
            try_="--set memory.tier_codec=exact, or another adapter",
        )

    def row(bytes_per_row: float, what: str) -> float:
        width = round(bytes_per_row / each)
        check_width(width, what)
        return float(coded_row_bytes(codec, width, each))

    def attention(one: AttentionProfile) -> AttentionProfile:
        heads = round(one.o_bytes_per_row / (each * shape.head_dim + FP32))
        o = row(each * heads * shape.head_dim, "attention's output") + FP32 * heads
        return one.model_copy(update={"coded_o_bytes_per_row": o})

    def linear(one: LinearProfile) -> LinearProfile:
        return one.model_copy(update={"coded_bytes_per_row": row(one.bytes_per_row, one.name)})

    def kind(one: KindProfile) -> KindProfile:
        return one.model_copy(
            update={
                "coded_x_bytes_per_row": row(one.x_bytes_per_row, "a layer's input"),
                "attention": None if one.attention is None else attention(one.attention),
                "linear": tuple(map(linear, one.linear)),
            }
        )

    kinds = tuple(map(kind, profile.kinds))
    if profile.codes is not None and profile.codes.kind == codec:
        return profile.model_copy(update={"kinds": kinds})
    bandwidth, device = hardware.memory_bytes_per_s, hardware.device_type
    codes = TierCodes(
        kind=codec,
        encode_bytes_per_s=bandwidth * each / (each + ENCODE_TRAFFIC[device][codec]),
        decode_bytes_per_s=bandwidth * each / (each + DECODE_TRAFFIC[device][codec]),
    )
    what = f"memory bandwidth, {ENCODE_TRAFFIC[device][codec]} and {DECODE_TRAFFIC[device][codec]} bytes an element"
    sources = {**profile.sources, "codes": Source(how="assumed", what=what)}
    return profile.model_copy(update={"kinds": kinds, "codes": codes, "sources": sources})
