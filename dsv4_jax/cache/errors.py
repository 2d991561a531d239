"""The errors of the device half: misuse of a step, seen while JAX traces (or, in a debug step, when it runs)."""

from dsv4_jax.errors import Picklable


class StepError(Picklable, ValueError):
    """A step used in a way in which rows would be lost or land in the wrong place."""


class WrongLayerKind(Picklable, TypeError):
    """An operation that the layer's kind does not have, such as keys of an HCA layer, or inputs of another kind."""
