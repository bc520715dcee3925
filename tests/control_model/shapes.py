"""Loads over time, as tests of controllers have them."""

from __future__ import annotations

import math

from tests.control_model.requests import Load, Mix, mix

LOAD = 0.75
"""Part of what the best ratio can serve."""
DAY_S = 4 * 3600.0
"""A day is shortened to four hours."""


def constant(weight: float, seconds: float, instances: int = 12, **more: float) -> Load:
    return Load(lambda _: mix(weight), lambda _: LOAD, seconds, instances, **more)


def step(seconds: float, at: float, before: float, after: float, instances: int = 12) -> Load:
    def weight(t: float) -> Mix:
        return mix(after if t >= at else before)

    return Load(weight, lambda _: LOAD, seconds, instances)


def ramp(length_s: float, instances: int = 12) -> Load:
    """From mix A to mix B, with five minutes of rest before and after."""

    def weight(t: float) -> Mix:
        return mix(min(1.0, max(0.0, (t - 300) / length_s)))

    return Load(weight, lambda _: LOAD, length_s + 600, instances)


def tide(period_s: float, seconds: float, instances: int = 12) -> Load:
    """From mix A to mix B and back, as a sine."""
    return Load(lambda t: mix(_sine(t, period_s)), lambda _: LOAD, seconds, instances)


def square(period_s: float, seconds: float, low: float, high: float, instances: int = 12) -> Load:
    def weight(t: float) -> Mix:
        return mix(high if t % period_s >= period_s / 2 else low)

    return Load(weight, lambda _: LOAD, seconds, instances)


def day(instances: int = 12) -> Load:
    """Both the mix and the rate follow the sun: at night a third of the requests."""

    def part(t: float) -> float:
        return LOAD * (1 / 3 + 2 / 3 * _sine(t, DAY_S))

    return Load(lambda t: mix(_sine(t, DAY_S)), part, DAY_S, instances)


def bursts(seconds: float, length_s: float, instances: int = 12) -> Load:
    """Half as many requests again for some seconds, every five minutes."""

    def part(t: float) -> float:
        return LOAD * (1.5 if t % 300 < length_s and t > 200 else 1.0)

    return Load(lambda _: mix(0.5), part, seconds, instances)


def longer_answers(seconds: float, at: float, instances: int = 12) -> Load:
    """Figure 12c of the paper: the same rate, and answers that are half as long again."""
    usual = mix(0.5)

    def mixed(t: float) -> Mix:
        return Mix(usual.prompt_s, usual.tokens * (1.5 if t >= at else 1.0))

    rate = 0.65 * usual.throughput(usual.best(instances), instances)
    return Load(mixed, lambda _: LOAD, seconds, instances, rate=rate)


def papers(instances: int, seconds: float) -> Load:
    """Figure 12a: prefills that serve .6 and decodes that serve .7 requests, here 3 times that."""
    rate = Mix(1 / 1.8, 16 / (2.1 * 0.036))
    assert math.isclose(rate.decode_rate, 2.1)
    return Load(lambda _: rate, lambda _: LOAD, seconds, instances)


def _sine(t: float, period_s: float) -> float:
    return 0.5 - 0.5 * math.cos(2 * math.pi * t / period_s)
