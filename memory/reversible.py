"""What reversible layers cost, from what the same layers cost as they are (`memory.coupling` has the steps).

A layer stores its side bits in the place of x (of the float form nothing, an anchor both streams, the first layer what
it reads), and is always rebuilt, its last matmul included, since the output is
what is taken from the stream. Both streams, int32 or fp32, are there from the first layer's forward to its backward.
"""

from __future__ import annotations

from farspan.memory.profile import Amount, HeadProfile, KindProfile, OnHostProfile, Peak, Profile
from farspan.memory.shape import ModelShape, TrainedTensor, Training, Weights
from farspan.memory.states import gradient_width

INT32 = FLOAT32 = 4
ANCHOR, FIRST = ", anchor", ", first"
"""Of the names of kinds whose layers store streams."""


def reversible(profile: Profile, shape: ModelShape, training: Training, memory_bytes_per_s: float) -> Profile:
    """The profile of the coupled model. `training` has the coupling, the profile all layers of the model."""
    coupling = training.coupling
    assert coupling is not None
    d, e = shape.hidden, training.width_bytes
    x = e * d
    leaps = 2 if coupling.wiring == 3 else 1
    adapter = bool(coupling.width)
    stores_inputs = coupling.store == "inputs"
    anchored = coupling.form == "float" and not stores_inputs
    bits = coupling.bits if coupling.form == "exact" else 0
    side = {"": float(x * (leaps + adapter)) if stores_inputs else leaps * bits * d / 8}
    if anchored:
        side |= {ANCHOR: 2.0 * FLOAT32 * d, FIRST: float(x)}
    # the gradient of the other stream; what the layer reads, made again from the stream; the gradient that a wiring 1
    # adapter adds to
    more = x + (0 if stores_inputs else x) + x * (adapter and coupling.wiring == 1)
    # main read, and written as what the layer reads; both streams read, one written, the layer's output read
    step_s = leaps * (4 * INT32 * d + 2 * x + bits * d / 8) / memory_bytes_per_s
    # gradients: the other stream's added, a share of main's taken away and handed on
    gradients_s = leaps * 8 * x / memory_bytes_per_s

    # an analytic profile has them among a layer's gradients already
    measured = all(one.weights is not None for one in profile.kinds)
    beside = gradient_width(training) * _bottleneck(d, e, coupling.width).trained if measured else 0

    def kind(one: KindProfile, place: str) -> KindProfile:
        last_s = sum(linear.matmul_s.per_row for linear in one.linear if linear.inner_only)
        last_constant_s = sum(linear.matmul_s.constant for linear in one.linear if linear.inner_only)
        # at an anchor streams are read and written, and in backward read and compared
        copied_s = 2 * side[place] / memory_bytes_per_s if anchored else 0.0
        again = _plus(one.elementwise_s, per_row=step_s + copied_s + last_s, constant=last_constant_s)
        return one.model_copy(
            update={
                "name": one.name + place,
                "side_bytes_per_row": side[place],
                "linear": tuple(linear for linear in one.linear if not linear.inner_only),
                "elementwise_s": again,
                "forward_s": _plus(one.forward_s, per_row=step_s + copied_s),
                "backward_s": _plus(one.backward_s, per_row=gradients_s),
                "forward_peak": _raised(one.forward_peak, 2 * INT32 * d if stores_inputs else 0),
                "rebuild_peak": _raised(one.rebuild_peak, more),
                "on_host": None if one.on_host is None else _on_host(one.on_host, more),
                "gradient_bytes": one.gradient_bytes + beside,
                "weights": None if one.weights is None else one.weights + _bottleneck(d, e, coupling.width),
            }
        )

    head = profile.head
    if not stores_inputs:
        head = HeadProfile.model_validate(
            {**head.model_dump(), "held_bytes": _plus(head.held_bytes, per_row=2 * INT32 * d).model_dump()}
        )
    by_name = {one.name: one for one in profile.kinds}
    places = [_place(layer, coupling.anchor_every) if anchored else "" for layer in range(len(profile.layers))]
    pairs = list(zip(profile.layers, places))
    kinds = tuple(kind(by_name[name], place) for name, place in dict.fromkeys(pairs))
    return profile.model_copy(
        update={"layers": tuple(name + place for name, place in pairs), "kinds": kinds, "head": head}
    )


def _place(layer: int, every: int) -> str:
    if layer == 0:
        return FIRST
    return ANCHOR if layer % every == 0 else ""


def _bottleneck(hidden: int, width_bytes: int, width: int) -> Weights:
    count = 2 * hidden * width
    tensors = (TrainedTensor(shape=(width, hidden)), TrainedTensor(shape=(hidden, width))) if width else ()
    return Weights(bytes=width_bytes * count, parameters=count, trained=count, largest=hidden * width, tensors=tensors)


def _on_host(one: OnHostProfile, more: int) -> OnHostProfile:
    return one.model_copy(update={"rebuild_peak": _raised(one.rebuild_peak, more)})


def _plus(amount: Amount, *, per_row: float, constant: float = 0.0) -> Amount:
    return amount.model_copy(update={"per_row": amount.per_row + per_row, "constant": amount.constant + constant})


def _raised(peak: Peak, per_row: float) -> Peak:
    moments = (m.model_copy(update={"bytes": _plus(m.bytes, per_row=per_row)}) for m in peak.moments)
    return Peak(moments=tuple(moments))
