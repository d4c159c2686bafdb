"""Repositories in a cache of the Hugging Face Hub, as downloads leave them."""

COMMIT = 'c0ffee' + '0' * 34


def repository(cache, name):
  """Returns the folder of a repository's files, of `main`, `v1` and `COMMIT`.

  Args:
    cache: HF_HUB_CACHE, or `hub` in HF_HOME.
    name: `organisation/name`.
  """
  folder = cache / f'models--{name.replace("/", "--")}'
  (folder / 'refs').mkdir(parents=True)
  for revision in ('main', 'v1'):
    (folder / 'refs' / revision).write_text(COMMIT)
  (folder / 'snapshots').mkdir()
  return folder / 'snapshots' / COMMIT
