"""From what runs left behind to figures and tables.

`python -m dst_t5x.analysis.report` reads folders of runs and sweeps and writes
a page, `python -m dst_t5x.analysis.watch` follows one run on a terminal.
Nothing here trains; a run's folder is all that is read.
"""
