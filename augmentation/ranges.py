"""Ranges that plug-ins take: a value outside of them ends in a ValueError that names it, when the plug-in is made."""

import math


def within(name: str, values, low: float, high: float):
    """Return a range (lowest, highest) of numbers from ``low`` to ``high``; ValueError if it goes beyond."""
    if not low <= values[0] <= values[1] <= high:
        raise ValueError(f"{name}: {list(values)}, expected from {low:g} to {high:g}")
    return values


def counts(name: str, values):
    """Return a range of whole numbers of at least 0; ValueError if it is none."""
    if not (0 <= values[0] <= values[1] < math.inf and all(value == int(value) for value in values)):
        raise ValueError(f"{name}: {list(values)}, expected whole numbers of at least 0")
    return int(values[0]), int(values[1])


def decibels(name: str, values):
    """Return a range in dB, of which float32 holds the factors."""
    return within(name, values, -200, 200)
