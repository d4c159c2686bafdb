"""Kinds of methods, so that figures of many methods stay readable."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from dst_t5x.analysis import setups

T = TypeVar('T')

MOST = 8  # Series of one panel; the style has as many.
# Drawn in every panel, to compare with.
REFERENCE = 'dst'
_ONCE, _LATE, _AGAIN = (
  'subset chosen once',
  'subset of a tuned model',
  'subset chosen repeatedly',
)
_SUBSETS, _LOW_RANK, _OTHERS = 'other subsets', 'low rank', 'other methods'
_ORDER = (_ONCE, _LATE, _AGAIN, _SUBSETS, _LOW_RANK, _OTHERS)
_KINDS = {
  **dict.fromkeys(
    (
      *('random', 'shira_random', 'shira_magnitude', 'super_tuning', 'pafi'),
      *('shira_snip', 'fish', 'child_tuning'),
    ),
    _ONCE,
  ),
  **dict.fromkeys(('lt_sft', 'prune_after'), _LATE),
  **dict.fromkeys(('spiel', 'id3', 'gasdu', 'nano_adam', 'lift'), _AGAIN),
  **dict.fromkeys(('lora', 'rslora', 'dora', 'pissa', 'vera'), _LOW_RANK),
}


def of(setup: setups.Setup) -> str:
  """Returns the kind of a setup's method; of an unknown one by its budget."""
  if setup.method in _KINDS:
    return _KINDS[setup.method]
  if setup.epsilon is not None:
    return _SUBSETS
  return _LOW_RANK if setup.knob_name == 'rank' else _OTHERS


def split(
  series: Mapping[str, T], setup_of: Mapping[str, setups.Setup]
) -> list[tuple[str, dict[str, T]]]:
  """Returns the series of each panel, at most `MOST`, with its title.

  If all fit into one panel, its title is empty. Otherwise there is a panel for
  each kind, or several, and DST is the first series of each.

  Args:
    series: method -> what is drawn.
    setup_of: method -> one of its setups.
  """
  if len(series) <= MOST:
    return [('', dict(series))]
  by_kind: dict[str, list[str]] = {}
  for method in series:
    if method != REFERENCE:
      by_kind.setdefault(of(setup_of[method]), []).append(method)
  first = [REFERENCE] if REFERENCE in series else []
  panels = []
  for kind in sorted(by_kind, key=_ORDER.index):
    found = _parts(by_kind[kind], MOST - len(first))
    for i, part in enumerate(found):
      title = f'{kind} ({i + 1} of {len(found)})' if len(found) > 1 else kind
      panels.append((title, {m: series[m] for m in (*first, *part)}))
  return panels


def _parts(methods: Sequence[str], most: int) -> list[Sequence[str]]:
  """Returns the methods in as few parts as possible, of nearly equal size."""
  count = -(-len(methods) // most)
  each = -(-len(methods) // count)
  return [methods[i : i + each] for i in range(0, len(methods), each)]
