"""Makes the arms of a study equal in parameters, MACs or time, by choosing their width or depth."""

from collections.abc import Callable
from typing import Any

from convmixer.errors import RequestError
from convmixer.probe import macs
from convmixer.studies.arms import build_args, check_sizes, parameters, width_step

MAX_DIM, MAX_DEPTH = 4096, 64
Cost = Callable[[str, dict[str, Any]], float]


def count(by: str, img_size: int, in_chans: int, num_classes: int) -> Cost:
    """Return the function (family, sizes) -> parameters or MACs."""
    counted = {"parameters": parameters, "macs": macs}[by]

    def cost(family: str, sizes: dict[str, Any]) -> float:
        return counted(build_args(family, sizes, img_size), img_size, in_chans, num_classes)

    return cost


def solve(
    family: str, sizes: dict[str, Any], key: str, target: float, tolerance: float, cost: Cost
) -> dict[str, Any]:
    """Return the sizes with `key` chosen so that the cost is closest to the target.

    Args:
        family: A name of `FAMILIES`.
        sizes: The arm's sizes; the value of `key` is replaced.
        key: The size to choose, "dim" or "depth".
        target: The cost to reach.
        tolerance: Largest allowed relative difference, 0 to 1.
        cost: (family, sizes) -> the cost, which grows with `key`.

    Raises:
        RequestError: No size comes close enough; the message names the closest.
    """
    check_sizes(family, sizes)
    step = width_step(family, sizes) if key == "dim" else 1
    low, high = 1, (MAX_DIM if key == "dim" else MAX_DEPTH) // step

    def at(steps: int) -> float:
        return cost(family, sizes | {key: steps * step})

    bound = low
    while bound < high and at(bound) < target:
        low, bound = bound, min(2 * bound, high)
    while bound - low > 1:  # at(low) < target <= at(bound), if both exist
        middle = (low + bound) // 2
        low, bound = (middle, bound) if at(middle) < target else (low, middle)
    best = min((low, bound), key=lambda steps: abs(at(steps) - target))
    if abs(at(best) - target) > tolerance * target:
        raise RequestError(
            f"impossible match: no {key} of {family} costs within {100 * tolerance:g}% of {target:,.0f}; "
            f"the nearest is {key} {best * step} with {at(best):,.0f}"
        )
    return sizes | {key: best * step}
