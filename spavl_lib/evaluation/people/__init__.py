"""Labels by people: the sample to label, the labels, the corrected rates, and the fitted judge.

Everything that people add to a run is in `RUN/evaluation/labels`; `answers.labels_folder` returns
this folder.
"""
