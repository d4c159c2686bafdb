"""Serves many subsets on one seed: `python -m dst_t5x.serve --help`.

`model.MultiSubsetModel` holds the seed on the device and decodes each row with
its own subset. Small subsets are mixed in one batch, large ones run one after
the other. `library` stores the files, `scheduler` forms batches, and `app` is
the HTTP interface.
"""
