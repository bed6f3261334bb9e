"""Multi-scale deformable attention and the encoder layer around it: transformers' weights, a forward of our own.

Every query reads `points` places per head and level of the flattened feature maps, by bilinear interpolation, and sums
them with weights of its own. Projections run in the precision of autocast; places, weights and sums stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrEncoderLayer,
    DeformableDetrMultiscaleDeformableAttention,
)

from tailfin.models.detr_geometry import Shapes, exporting, sides_of
from tailfin.models.fused_attention import FusedSampling, kernel

DENSE_TOKENS = 512  # up to so many cells over all levels a CPU samples by a matrix product; where both take as long


class DeformableAttention(DeformableDetrMultiscaleDeformableAttention):
    """The module of transformers with float32 sampling and without the outputs that nobody reads.

    `reference_points` [B, Q, L, 2] are centres, or [B, Q, L, 4] boxes, in fractions of the padded maps.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Any = None,
        spatial_shapes_list: Shapes | None = None,
        level_start_index: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        assert encoder_hidden_states is not None and reference_points is not None and spatial_shapes_list is not None
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = value.masked_fill(~attention_mask[..., None], 0.0)
        value = value.float().unflatten(2, (self.n_heads, -1))
        offsets = self.sampling_offsets(hidden_states).float()
        offsets = offsets.unflatten(2, (self.n_heads, self.n_levels, self.n_points, 2))
        weights = self.attention_weights(hidden_states).float().unflatten(2, (self.n_heads, -1)).softmax(-1)
        weights = weights.unflatten(3, (self.n_levels, self.n_points))
        points = reference_points[:, :, None, :, None]
        if points.shape[-1] == 2:
            places = points + offsets / sides_of(spatial_shapes_list, offsets.device)[:, None]
        else:
            places = points[..., :2] + offsets * (points[..., 2:] * (0.5 / self.n_points))
        return self.output_proj(sample(value, spatial_shapes_list, places, weights)), None


class EncoderLayer(DeformableDetrEncoderLayer):
    """transformers' encoder layer without its check for infinite values, which waits for the device in every layer."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **keywords: Any
    ) -> Tensor:
        attended, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=hidden_states,
            position_embeddings=keywords.pop("spatial_position_embeddings"),
            **keywords,
        )
        attended = F.dropout(attended, p=self.dropout, training=self.training)
        hidden_states = self.self_attn_layer_norm(hidden_states + attended)
        return self.final_layer_norm(hidden_states + self.mlp(hidden_states))


def sample(value: Tensor, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples.

    Args:
        value: [B, S, H, D], the maps of all levels one after another, H heads.
        places: [B, Q, H, L, P, 2] (x, y) in fractions of a level's map; nothing lies outside of it.
        weights: [B, Q, H, L, P].

    Returns:
        [B, Q, H * D].
    """
    if exporting():
        return _sampled(value, places, weights, shapes)
    if (fused := kernel(value.device)) is not None:
        return FusedSampling.apply(value, places, weights, shapes, fused)  # type: ignore[no-any-return]
    if value.device.type == "cpu" and value.shape[1] <= DENSE_TOKENS:
        return _DenseSampling.apply(value, places, weights, shapes).transpose(1, 2).flatten(2)  # type: ignore[no-any-return]
    return _LeanSampling.apply(value, places, weights, shapes)  # type: ignore[no-any-return]


def _sampled(value: Tensor, places: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """`sample` level by level: of one level at a time the read values [B H, D, Q, P] exist."""
    summed = None
    for maps, grid, own in _levels(value, places, weights, shapes):
        read = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
        level = (read * own[:, None]).sum(-1)  # [B H, D, Q]
        summed = level if summed is None else summed + level
    assert summed is not None
    return summed.unflatten(0, (-1, value.shape[2])).flatten(1, 2).transpose(1, 2)


def _levels(value: Tensor, places: Tensor, weights: Tensor, shapes: Shapes) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per level its map [B H, D, h, w], where it is read [B H, Q, P, 2] in -1..1, and the weights [B H, Q, P]."""
    # rearranged for all levels at once, in a few launches
    every = value.permute(0, 2, 3, 1).flatten(0, 1)
    grids = (2 * places - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2).unbind()
    shares = weights.permute(3, 0, 2, 1, 4).flatten(1, 2).unbind()
    start = 0
    for (height, width), grid, share in zip(shapes, grids, shares, strict=True):
        yield every[:, :, start : start + height * width].unflatten(2, (height, width)), grid, share
        start = start + height * width


class _LeanSampling(torch.autograd.Function):
    """`_sampled`, which keeps its inputs alone for backward and reads the values there once more.

    Autograd would keep them for every level, [B H, D, Q, L P], twice: at 22,223 cells more than all else of a layer.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, places: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        ctx.save_for_backward(value, places, weights)
        ctx.shapes = shapes
        return _sampled(value, places, weights, shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        value, places, weights = ctx.saved_tensors
        heads = value.shape[2]
        above = upstream.unflatten(2, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)[..., None]  # [B H, D, Q, 1]
        to_maps, to_grids, to_shares = [], [], []
        for maps, grid, own in _levels(value, places, weights, ctx.shapes):
            read = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
            to_shares.append((read * above).sum(1))
            del read
            to_map, to_grid = torch.ops.aten.grid_sampler_2d_backward(
                above * own[:, None], maps, grid, 0, 0, False, [True, True]
            )  # bilinear, zeros outside
            to_maps.append(to_map.flatten(2))
            to_grids.append(to_grid)
        to_value = torch.cat(to_maps, dim=2).unflatten(0, (-1, heads)).permute(0, 3, 1, 2)
        to_places = 2 * torch.stack(to_grids).unflatten(1, (-1, heads)).permute(1, 3, 2, 0, 4, 5)
        to_weights = torch.stack(to_shares).unflatten(1, (-1, heads)).permute(1, 3, 2, 0, 4)
        return to_value, to_places, to_weights, None


class _DenseSampling(torch.autograd.Function):
    """The same sums as products with a matrix [Q, S] per head, whose rows hold the weights of a query's corners.

    On small maps the matrix is small, and filling it and multiplying by it costs a third of reading single places.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, places: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        sides = places.new_tensor([(width, height) for height, width in shapes])
        first = places.new_tensor([0, *(height * width for height, width in shapes[:-1])]).cumsum(0)[:, None]
        x, y = places.transpose(1, 2).unbind(-1)  # [B, H, Q, L, P]
        columns, across, inside_x = _neighbours(x, sides[:, 0, None])
        rows, down, inside_y = _neighbours(y, sides[:, 1, None])
        rows = (rows[0] * sides[:, 0, None] + first, rows[1] * sides[:, 0, None] + first)
        own = weights.transpose(1, 2)
        shape = (*x.shape[:3], 4, *x.shape[3:])
        index = torch.empty(shape, dtype=torch.int64, device=x.device)
        corner = torch.empty(shape, dtype=x.dtype, device=x.device)
        for vertical in (0, 1):
            share = down[vertical] * own
            for horizontal in (0, 1):
                index[:, :, :, 2 * vertical + horizontal] = rows[vertical] + columns[horizontal]
                torch.mul(share, across[horizontal], out=corner[:, :, :, 2 * vertical + horizontal])
        index = index.flatten(3)
        matrix = corner.new_zeros((*x.shape[:3], value.shape[1])).scatter_add_(3, index, corner.flatten(3))
        maps = value.transpose(1, 2).contiguous()
        ctx.save_for_backward(matrix, maps, index, own, sides, *across, *down, *inside_x, *inside_y)
        with torch.autocast(value.device.type, enabled=False):
            return matrix @ maps

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        matrix, maps, index, own, sides, left, right, up, low, in_left, in_right, in_up, in_low = ctx.saved_tensors
        with torch.autocast(upstream.device.type, enabled=False):
            to_value = (matrix.transpose(2, 3) @ upstream).transpose(1, 2)
            to_matrix = upstream @ maps.transpose(2, 3)
        corners = to_matrix.gather(3, index).unflatten(3, (4, *own.shape[3:]))
        up_left, up_right, low_left, low_right = corners.unbind(3)
        upper, lower = left * up_left + right * up_right, left * low_left + right * low_right
        to_x = (up * up_right + low * low_right) * in_right - (up * up_left + low * low_left) * in_left
        to_y = lower * in_low - upper * in_up
        to_places = torch.stack([to_x.mul_(own), to_y.mul_(own)], dim=-1) * sides[:, None]
        return to_value, to_places.transpose(1, 2), (up * upper + low * lower).transpose(1, 2), None


Two = tuple[Tensor, Tensor]


def _neighbours(place: Tensor, side: Tensor) -> tuple[Two, Two, Two]:
    """The two cells around a place in 0..1 along one axis of `side` cells: index, share, and whether they exist."""
    place = place * side - 0.5
    low = place.floor().nan_to_num_()  # a network that has diverged: no place, and a share that is no number
    part = place - low
    in_low, in_high = (low >= 0) & (low < side), (low >= -1) & (low < side - 1)
    cells = low.clamp(min=0).minimum(side - 1), (low + 1).clamp_(min=0).minimum(side - 1)
    return cells, ((1 - part) * in_low, part * in_high), (in_low, in_high)
