"""Choosing how the scores of a trained detector are calibrated.

`model.py` for a detector of tailfin, `results.py` for any results file; `candidates.py` what is tried, `choice.py`
what is chosen, `pictures.py` on which pictures.
"""
