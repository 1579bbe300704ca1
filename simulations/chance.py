"""Distributions of faults as scenarios name them, and fits of published churn.

A distribution is a number of seconds (always that), or a list: its name and its parameters, such as `["exp", 8]` (mean),
`["uniform", 1, 5]`, `["weibull", shape, scale]`, `["lognormal", mu, sigma]`.
"""

from __future__ import annotations

import random
from typing import Any

MODELS: dict[str, tuple[list[Any], list[Any]]] = {
    "office": (["weibull", 0.55, 35.3], ["lognormal", 1.42, 1.54]),
    "skype": (["weibull", 0.64, 10.86], ["weibull", 0.63, 9.48]),
    "overnet": (["weibull", 0.85, 2.04], ["lognormal", 0.08, 1.80]),
    "planetlab": (["weibull", 0.33, 19.35], ["lognormal", 0.40, 2.45]),
}
"""Hours up and hours down: fits of the Failure Trace Archive (Microsoft99, Skype06, Overnet03, PlanetLab05)."""


def draw(rng: random.Random, distribution: Any) -> float:
    """A number from it, in its own unit."""
    match distribution:
        case int() | float():
            return float(distribution)
        case ["exp", mean]:
            return rng.expovariate(1.0 / mean)
        case ["uniform", lo, hi]:
            return rng.uniform(lo, hi)
        case ["weibull", shape, scale]:
            return rng.weibullvariate(scale, shape)
        case ["lognormal", mu, sigma]:
            return rng.lognormvariate(mu, sigma)
    raise ValueError(f"{distribution!r} is no distribution")


def residual(rng: random.Random, distribution: Any) -> float:
    """What is left of a stay that somebody looks at now: such stays are long ones, by as much as they are long."""
    stays = [draw(rng, distribution) for _ in range(32)]
    return rng.choices(stays, stays)[0] * rng.random()
