"""What private training gives away, as `dp_accounting` reckons it."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

_TIGHT = 0.3  # below this noise multiplier the tight accountant takes too much memory
_MOST = 1e6  # above this one nothing is learnt


class Privacy(NamedTuple):
    """What training has given away, as `dp_accounting` reckons it.

    It is for neighbours that differ by one training example's being there or not, and for whoever
    sees the parameters after every step, the optimizer's state included. History, callbacks and
    errors are of the data itself, and not covered.

    Attributes:
        epsilon: of (epsilon, delta)-differential privacy; infinite without noise.
        delta: as it was asked for.
        noise_multiplier: standard deviation of the noise over the sensitivity of the clipped sum.
        sampling_probability: of each example in each step, independently (Poisson sampling).
        steps: how many were done.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sampling_probability: float
    steps: int

    def after(self, steps: int) -> float:
        """The epsilon after so many steps of the same kind."""
        return epsilon_of(self.noise_multiplier, self.sampling_probability, steps, self.delta)


@functools.lru_cache(maxsize=256)
def noise_multiplier(epsilon: float, delta: float, probability: float, steps: int) -> float:
    """The least by which so many steps give away no more than (epsilon, delta); at least 0.3.

    Raises:
        ValueError: a million does not do it.
    """
    accounting = _accounting()

    def enough(noise: float) -> bool:
        return epsilon_of(noise, probability, steps, delta) <= epsilon

    low = high = 1.0  # from there, as the accountant takes the longer the less noise there is
    while not enough(high):
        low, high = high, 2 * high
        if high > _MOST:
            raise ValueError(f"no noise makes {steps} steps ({epsilon}, {delta})-private")
    while low == high or enough(low):
        if low == _TIGHT:
            return _TIGHT
        low, high = max(low / 2, _TIGHT), low
    return float(
        accounting.calibrate_dp_mechanism(
            accounting.pld.PLDAccountant,
            lambda noise: _event(noise, probability, steps),
            epsilon,
            delta,
            accounting.ExplicitBracketInterval(low, high),
            tol=1e-4,
        )
    )


def _accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError(
            "private training reckons its epsilon with dp_accounting: "
            "pip install 'jbackprop[private]'"
        ) from error
    return dp_accounting


def _event(multiplier: float, probability: float, steps: int) -> Any:
    accounting = _accounting()
    step = accounting.PoissonSampledDpEvent(probability, accounting.GaussianDpEvent(multiplier))
    return accounting.SelfComposedDpEvent(step, steps)


@functools.lru_cache(maxsize=256)
def epsilon_of(multiplier: float, probability: float, steps: int, delta: float) -> float:
    """By privacy loss distributions; for hardly any noise a bound by Renyi divergences."""
    accounting = _accounting()
    if steps == 0:
        return 0.0
    if multiplier == 0:
        return math.inf
    tight = multiplier >= _TIGHT
    accountant = accounting.pld.PLDAccountant() if tight else accounting.rdp.RdpAccountant()
    accountant.compose(_event(multiplier, probability, steps))
    return float(accountant.get_epsilon(delta))
