"""`tailfin predict`: a detector over any number of pictures.

`run.py` is the straight line; `inputs.py` what the pictures are, `views.py` tiles, flips and suppression over them,
`shards.py` what survives a kill, `writers.py` the files that come out.
"""
