"""The shared layers are torchvision's, whichever way the first one is computed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from tailfin.models.heads import shared_layers
from tailfin.models.heads.shared_layers import SharedLayers


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("rows", [0, 7, shared_layers.MANY])
def test_equals_torchvision(rows, channels_last, monkeypatch):
    torch.manual_seed(0)
    own = SharedLayers(256 * 9, 16)
    theirs = TwoMLPHead(256 * 9, 16)
    theirs.load_state_dict(own.state_dict())
    pooled = torch.randn(rows, 256, 3, 3)
    if channels_last:
        pooled = pooled.contiguous(memory_format=torch.channels_last)
    calls = []
    convolution = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: calls.append(1) or convolution(*args))
    with torch.no_grad():
        torch.testing.assert_close(own(pooled), theirs(pooled), rtol=1e-4, atol=1e-5)
    assert len(calls) == (rows >= shared_layers.MANY and channels_last)
    assert own(pooled).requires_grad and len(calls) <= 1, "with gradients as ever"
