"""The recipe text of a Deformable DETR that trains in seconds; a test appends its own sections."""

DETR = """\
weights: none
detector:
  {name: deformable_detr, norm: bn, frozen_layers: 0, widths: [32, 32, 32, 32, 32], blocks: [1, 1, 1, 1], levels: 2,
   channels: 32, encoder_layers: 1, decoder_layers: 2, heads: 4, points: 2, feedforward: 32, queries: 12}
loss: focal
data: {resize: square, sizes: [64], workers: 0}
evaluation: {max_dets: 20, batch: 2}
"""
