"""Memory in large pages."""

import mmap

import pytest
import torch

from space_cli.core import pages as module
from space_cli.core.pages import LargePages

SHAPES = [(3,), (5, 7, 2), (1000, 1000), (0,)]


@pytest.fixture(params=["large", "ordinary"])
def pages(request, monkeypatch):
    if request.param == "ordinary":  # as on macOS and Windows
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(module, "_BLOCK", 1_000_000)
    return LargePages()


def test_tensors_lie_apart_and_outlive_what_made_them(pages):
    made = [
        pages.empty(shape, dtype).fill_(value)
        for value, (shape, dtype) in enumerate(
            (shape, dtype) for shape in SHAPES for dtype in (torch.uint8, torch.bfloat16, torch.float32)
        )
    ]
    del pages

    for value, tensor in enumerate(made):
        assert tensor.eq(value).all(), tensor.shape
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="there are no large pages")
def test_large_blocks_begin_where_a_large_page_begins():
    assert LargePages().empty((3,), torch.uint8).data_ptr() % (2 * 2**20) == 0


def test_more_than_there_is_is_a_memory_error():
    with pytest.raises(MemoryError):
        LargePages().empty((2**61,), torch.uint8)
