"""Tests that tensors are moved like arrays; on the CPU, where only the kernels differ."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.transfer import arrays, scatter

CACHES = {  # row_bytes of KV caches, and other sizes
    "bfloat16, 8 heads of 128": 2048,
    "float32, 3 heads of 64": 768,
    "float16, 1 head of 12": 24,
    "float16, 1 head of 6": 12,
    "float16, 1 head of 5": 10,
    "odd": 7,
}


COLUMNS = st.sampled_from([0, 1, 2, 4, 8, 16, 32])


@st.composite
def runs(draw: Any) -> list[tuple[int, int]]:
    """Generate runs of a few rows, in any order, with gaps, without overlaps."""
    pieces = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=6))
    made, end = [], 0
    for gap, rows in pieces:
        made.append((end + gap, rows))
        end += gap + rows
    return list(draw(st.permutations(made)))


def content(*shape: int) -> Any:
    """Return random bytes; as numbers they include every kind of NaN."""
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("row_bytes", CACHES.values(), ids=CACHES)
@given(runs=runs(), left=COLUMNS, right=COLUMNS, planes=st.integers(1, 4))
@settings(max_examples=60)
def test_a_tensor_is_scattered_like_an_array(
    row_bytes: int, runs: list[tuple[int, int]], left: int, right: int, planes: int
) -> None:
    """Some heads are moved, with `left` and `right` bytes of others beside them in the pool."""
    tokens = sum(rows for _, rows in runs)
    limit = max(first + rows for first, rows in runs) + 1
    source = content(planes, tokens, row_bytes)
    pools = [content(planes, limit, left + row_bytes + right) for _ in range(2)]
    columns = slice(left, left + row_bytes)
    scatter.scatter(source, pools[0][:, :, columns], runs)
    arrays.scatter(torch.from_numpy(source), torch.from_numpy(pools[1])[:, :, columns], runs)
    assert (pools[0] == pools[1]).all()


@pytest.mark.parametrize(
    ("base", "offset", "width"),
    [(0, 0, 16), (0, 4, 4), (8, 0, 8), (8, 8, 8), (1, 0, 1), (1, 15, 1)],
)
def test_addresses_decide_how_wide_elements_are(base: int, offset: int, width: int) -> None:
    """A CUDA kernel that reads 16 bytes at an address that is no multiple of 16 fails."""
    memory = np.zeros(4096, np.uint8)
    start = -memory.ctypes.data % 16 + base
    tensor = torch.from_numpy(memory[start:])[offset : offset + 1024].view(2, 8, 64)
    (wide,) = arrays._widened(tensor)
    assert wide.element_size() == width
    assert wide.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("wrong", [[(0, 3)], [(0, 2), (7, 2)], [(-1, 4)], [(0, 5), (6, -1)]])
def test_runs_that_do_not_fit_are_refused_before_anything_is_written(
    wrong: list[tuple[int, int]],
) -> None:
    pool = torch.zeros(2, 8, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"do not have 4 rows|not inside the pool's 8 rows"):
        arrays.scatter(torch.ones(2, 4, 16, dtype=torch.uint8), pool, wrong)
    assert not pool.any()


def test_what_spans_are_made_of_is_the_same_for_both() -> None:
    array = content(2, 8, 48)[:, 2:, 16:32]
    tensor = torch.from_numpy(array)
    assert arrays.address(tensor) == arrays.address(array) == array.ctypes.data
    assert arrays.strides(tensor) == arrays.strides(array) == array.strides
    whole = content(4, 16)
    for memory in (arrays.memory(whole), arrays.memory(torch.from_numpy(whole))):
        assert (memory.address, memory.nbytes, memory.device) == (whole.ctypes.data, 64, None)
    assert arrays.seen(whole) is whole


def test_arrays_do_not_need_torch() -> None:
    script = (
        "import sys, numpy as np\n"
        "from pdserve.transfer import arrays\n"
        "pool = np.zeros((1, 4, 8), np.uint8)\n"
        "arrays.scatter(np.ones((1, 2, 8), np.uint8), pool, [(1, 2)])\n"
        "arrays.address(pool), arrays.strides(pool), arrays.memory(pool), arrays.seen(pool)\n"
        "sys.exit('torch' in sys.modules or 'cuda' in sys.modules or int(pool.sum()) != 16)\n"
    )
    env = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=30)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    source, pools = content(4, 96, 768), [content(4, 256, 768) for _ in range(2)]
    runs = [(100, 32), (0, 50), (240, 14)]
    scatter.scatter(source, pools[0], runs)
    pool, given = torch.from_numpy(pools[1]).cuda(), torch.from_numpy(source).cuda()
    torch.cuda.synchronize()
    arrays.scatter(arrays.seen(arrays.memory(given)).view(given.shape), pool, runs)
    assert (pool.cpu().numpy() == pools[0]).all()
