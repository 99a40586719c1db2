"""Many δ are scaled at once as each would be alone."""

from __future__ import annotations

import torch
from torch import nn

from bypass_fx.rescaled import rescale, rescale_together


@torch.no_grad()
def test_together_gives_what_one_by_one_gives() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        deltas = [nn.Parameter(torch.randn(size, dtype=dtype)) for size in (3, 1, 8)]
        twins = [nn.Parameter(delta.clone()) for delta in deltas]
        before = [delta.data_ptr() for delta in deltas]
        factors = torch.rand(3).unbind()
        rescale_together(dict(zip(deltas, factors, strict=True)))
        rescale(dict(zip(twins, factors, strict=True)))
        assert all(torch.equal(delta, twin) for delta, twin in zip(deltas, twins, strict=True))
        assert [delta.data_ptr() for delta in deltas] == before


@torch.no_grad()
def test_of_several_types_each_is_scaled_in_its_own() -> None:
    wide, narrow = nn.Parameter(torch.ones(2, dtype=torch.double)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    rescale({wide: torch.tensor(0.5), narrow: torch.tensor(0.25)})
    rescale({})
    assert wide.tolist() == [0.5] * 2 and narrow.tolist() == [0.25] * 3 and narrow.dtype == torch.bfloat16
