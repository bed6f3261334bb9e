"""Studies: arms x data sets x seeds, each cell a run (`tailfin study STUDY.yaml`); `spec.py` says what a study is."""
