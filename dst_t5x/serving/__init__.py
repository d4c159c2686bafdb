"""Many subsets on one seed.

`model.MultiSubsetModel` holds the seed on the device and decodes each row with
its own subset: mixed in one batch, or one subset after the other. `library`
keeps the files, `scheduler` decides which requests go together, `app` is the
HTTP interface. `python -m dst_t5x.serve --help` starts it.
"""
