"""Which prompts a prefill computes together, for any that wait and any that are cached."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from pdserve.engines.protocol import PrefillJob
from pdserve.instances.prefill_batch import next_batch
from pdserve.kvcache.prefix_index import PrefixIndex
from pdserve.sampling import Sampling

BLOCK = 4


@dataclass(eq=False)
class Prompt:
    job: PrefillJob
    salt: str = ""

    @property
    def opening(self) -> tuple[str, bytes]:
        return self.salt, self.job.tokens[:BLOCK].tobytes()


def prompt(*tokens: int, alone: bool = False, salt: str = "") -> Prompt:
    sampling = Sampling(temperature=1.0, seed=1) if alone else Sampling()
    return Prompt(PrefillJob(np.array(tokens, np.int32), np.empty(0, np.uint8), sampling), salt)


def chosen(pending: list[Prompt], prefixes: PrefixIndex[str], batch_tokens: int) -> list[Prompt]:
    return [one for one, _ in next_batch(pending, prefixes, batch_tokens)]


def test_in_order_of_arrival_as_far_as_they_fit() -> None:
    a, b, c = prompt(1, 1, 1), prompt(2, 2, 2), prompt(3)
    nothing = PrefixIndex[str](BLOCK)
    assert chosen([a, b, c], nothing, 7) == [a, b, c]
    assert chosen([a, b, c], nothing, 5) == [a, c], "what does not fit waits, and others go on"
    assert chosen([a, b, c], nothing, 1) == [a], "the first is computed however long it is"


def test_a_cached_prefix_costs_nothing() -> None:
    prefixes = PrefixIndex[str](BLOCK)
    prefixes.add("range", np.array([1, 2, 3, 4], np.int32), "")
    a, b = prompt(9, 9, 9), prompt(1, 2, 3, 4, 5)
    assert next_batch([a, b], prefixes, 4) == [(a, None), (b, ("range", 4))]
    other = prompt(1, 2, 3, 4, 5, salt="other tenant")
    assert chosen([a, other], prefixes, 4) == [a]


def test_the_second_of_two_that_begin_alike_waits_for_the_first() -> None:
    a, b = prompt(1, 2, 3, 4, 5), prompt(1, 2, 3, 4, 6)
    nothing = PrefixIndex[str](BLOCK)
    assert chosen([a, b], nothing, 100) == [a]
    assert chosen([a, prompt(1, 2, 3, 4, 6, salt="other")], nothing, 100) != [a]
    short = prompt(1, 2, 3, 4)
    assert chosen([a, short], nothing, 100) == [a, short], "it could not reuse a block"


def test_a_reproducible_prompt_is_computed_alone_and_whole() -> None:
    prefixes = PrefixIndex[str](BLOCK)
    prefixes.add("range", np.array([1, 2, 3, 4], np.int32), "")
    seeded, other = prompt(1, 2, 3, 4, 5, alone=True), prompt(7)
    assert next_batch([seeded, other], prefixes, 100) == [(seeded, None)]
    assert chosen([other, seeded], prefixes, 100) == [other]


def test_any_prompts() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        prefixes = PrefixIndex[str](BLOCK)
        pending = [
            prompt(
                *(rng.choice((1, 1, 2)) for _ in range(rng.randint(1, 3 * BLOCK))),
                alone=rng.random() < 0.1,
                salt=rng.choice(("", "", "tenant")),
            )
            for _ in range(rng.randint(1, 8))
        ]
        for number in range(rng.randint(0, 3)):
            cached = rng.choice(pending)
            prefixes.add(f"range {number}", cached.job.tokens, cached.salt)
        limit = rng.randint(1, 30)
        batch = next_batch(pending, prefixes, limit)
        taken = [one for one, _ in batch]
        assert taken == [one for one in pending if one in taken]
        assert taken[0] is pending[0]
        costs = {one: len(one.job.tokens) - (found[1] if found else 0) for one, found in batch}
        assert len(batch) == 1 or sum(costs.values()) <= limit
        alone = [one for one in taken if one.job.sampling.reproducible]
        assert not alone or batch == [(alone[0], None)]
        for one, found in batch:
            assert alone or found == prefixes.find(one.job.tokens, one.salt)
        if alone:
            continue
        for number, one in enumerate(pending):  # whoever was passed over had to be
            found = prefixes.find(one.job.tokens, one.salt)
            before = [other for other in pending[:number] if other in taken]
            alike = any(other.opening == one.opening for other in before)
            waits = found is None and len(one.job.tokens) > BLOCK and alike
            if one in taken:
                assert not waits
                continue
            cost = len(one.job.tokens) - (found[1] if found else 0)
            full = sum(costs[other] for other in before) + cost > limit
            assert one.job.sampling.reproducible or waits or full
