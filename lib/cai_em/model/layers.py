"""Layers by number, without a model at hand: what reads tables of layers needs no torch (five seconds of import)."""

from __future__ import annotations


class SteeringError(ValueError):
    """A direction cannot be found or applied. The message says why."""


def layer_number(layer: int, count: int) -> int:
    """A layer counted from the first; a negative number counts from the last.

    Raises:
        SteeringError: there is no such layer.
    """
    if not -count <= layer < count:
        raise SteeringError(f"no layer {layer}: the model has {count}, numbered 0 to {count - 1} (or -1 from the last)")
    return layer % count
