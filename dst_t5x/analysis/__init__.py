"""Figures and tables of finished and running runs.

`python -m dst_t5x.analysis.report` reads the folders of runs and sweeps and
writes a page. `python -m dst_t5x.analysis.watch` shows one run on a terminal.
Both read the folders of runs only.
"""
