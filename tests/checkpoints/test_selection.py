"""The choice of the best trial: one rule for sweeps and reports."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from dst_t5x.checkpoints import selection

Trial = selection.Trial


def _choose(*trials, metric='task/bleu'):
  return selection.choose(trials, metric).chosen


def test_a_loss_is_chosen_by_its_lowest_mean():
  trials = [Trial({0: 2.0}), Trial({0: 1.0}), Trial({0: 3.0})]
  assert _choose(*trials) == 2
  for metric in ('eval/loss', 'task/loss', 'task/dev_loss'):
    assert _choose(*trials, metric=metric) == 1


def test_a_lucky_random_seed_does_not_win():
  assert _choose(Trial({0: 9.0}), Trial({0: 5.0, 1: 1.0})) == 0
  assert _choose(Trial({1: 9.0}), Trial({0: 99.0, 1: 10.0})) == 1
  assert _choose(Trial({0: 99.0, 1: 1.0}), Trial({1: 2.0})) == 1


def test_what_failed_is_out_unless_all_failed():
  failed, sound = Trial({0: 9.0}, is_failed=True), Trial({0: 1.0, 1: 1.0})
  assert _choose(failed, sound) == 1
  # Nor does it take random seeds away from the others.
  assert _choose(failed, sound, Trial({0: 0.0, 1: 3.0})) == 2
  assert _choose(failed, Trial({0: 10.0}, is_failed=True)) == 1
  assert _choose(failed, Trial({}, is_failed=True)) == 0
  assert _choose(Trial({}, is_failed=True)) is None
  assert _choose() is None


def test_of_equal_ones_that_with_more_random_seeds_and_then_the_first():
  assert _choose(Trial({0: 1.0}), Trial({0: 1.0, 1: 1.0})) == 1
  assert _choose(Trial({0: 1.0}), Trial({0: 1.0})) == 0


@given(
  trials=st.lists(
    st.builds(
      Trial,
      st.dictionaries(
        st.integers(0, 3),
        st.none() | st.floats(-100, 100) | st.just(float('nan')),
        max_size=4,
      ),
      st.booleans(),
    ),
    max_size=5,
  )
)
def test_no_trial_that_might_have_been_chosen_is_better(trials):
  for metric, sign in (('task/accuracy', 1), ('task/loss', -1)):
    chosen, means = selection.choose(trials, metric)
    finished = [i for i, trial in enumerate(trials) if trial.scores]
    sound = [i for i in finished if not trials[i].is_failed]
    if chosen is None:
      assert not finished
      continue
    assert chosen in (sound or finished)
    values = [means[i] for i in sound or finished if not np.isnan(means[i])]
    if values:
      best = sign * max(sign * value for value in values)
      assert means[chosen] == pytest.approx(best)
