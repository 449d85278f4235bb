"""Aligned buffers."""

from __future__ import annotations

import mmap

import pytest

from flashinfer.io import AlignedBuffer


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 10_000, 1 << 20])
def test_page_aligned_zeroed_and_of_the_size_asked(nbytes: int) -> None:
    with AlignedBuffer(nbytes) as buffer:
        assert buffer.array.shape == (nbytes,)
        assert not buffer.array.any()
        assert nbytes == 0 or buffer.array.ctypes.data % mmap.PAGESIZE == 0
        buffer.array[:] = 3


def test_close_unmaps_and_may_be_repeated() -> None:
    buffer = AlignedBuffer(4096)
    memory = buffer._map
    assert memory is not None
    buffer.close()
    buffer.close()
    assert memory.closed
    assert buffer.array.size == 0


def test_a_view_that_outlives_the_buffer_stays_valid() -> None:
    buffer = AlignedBuffer(4096)
    view = buffer.array[100:200]
    buffer.close()
    view[:] = 9
    assert (view == 9).all()


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        AlignedBuffer(-1)
