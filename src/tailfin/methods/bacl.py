"""BACL: balanced classification in two stages (Qi et al., "Balanced Classification: A Unified Framework for Long-Tailed
Object Detection", IEEE TMM 2023).

    III-B  representation: sigmoid classifier with an objectness column and prior bias, 2000 proposals, small weight
           decay, copy-paste; the whole detector trains                             the recipe's own sections
    III-C  indicators of how each class fares, long-term and of the moment          losses/fcbl.py
    III-D  foreground classification balance loss: margin and weight from them      losses/fcbl.py
    III-E  feature hallucination for the classes that the indicator finds weak      models/features/hallucination.py

The released code freezes the backbone, the pyramid and the two shared layers in the second stage; the RPN, the
classifier and the box layer go on from the first one (`second.trains`). That is decoupled training with a loss and a
feature module of its own, so there is nothing else to run.
"""

from __future__ import annotations

from tailfin.methods.decoupled import train

__all__ = ["train"]
