"""Trained detectors for use without tailfin: `onnx_file.py` ONNX, checked with onnxruntime, `program.py` torch.export.

`graph.py` is what is exported, a detector as a function of a padded batch whose numbers and sizes may be any.
"""
