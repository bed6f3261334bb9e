"""`tailfin train auto`: a recipe chosen by looking at the data, trained, calibrated, reported, exported.

`facts.py` what is looked at, `rules.py` the table from facts to choices (`docs/choosing.md` shows it), `plan.py` the
recipe that they make, `steps.py` what is done with it, and how an interrupted call goes on.
"""
