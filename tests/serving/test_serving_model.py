"""Each row is decoded with its own subset, as by a dense model."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import serving
import subsets

from dst_t5x import subsets as subset_lib
from dst_t5x.core.errors import UserError
from dst_t5x.models import decoding
from dst_t5x.serving import corrections
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import slots as slots_lib
from dst_t5x.subsets import on_device

LOGITS = 'decoder/logits_dense/kernel'
BEAM = decoding.BeamSearch(num_beams=3)


def _row(number, share=None, length=5, changes=None):
  """Returns a row, and the parameters of its dense model."""
  changes = changes or {}
  tokens = serving.tokens(number, length)
  if share is None:
    return model_lib.Row(tokens), serving.seed(**changes)
  found, tuned = serving.subset(share, number, changes)
  return model_lib.Row(tokens, (number, share), lambda: found), tuned


def _assert_as_alone(served, rows, decoder=model_lib.GREEDY, net=None):
  answers = served.decode([row for row, _ in rows], decoder)
  for (row, tuned), answer in zip(rows, answers, strict=True):
    tokens, score = serving.alone(tuned, row.tokens, decoder, net)
    np.testing.assert_array_equal(answer.tokens, tokens)
    assert answer.score == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize('decoder', [model_lib.GREEDY, BEAM])
def test_one_after_the_other(decoder):
  served = serving.model()
  rows = [_row(0, 0.01), _row(1), _row(2, 0.3), _row(0, 0.01), _row(3, 1.0)]
  for row in rows:
    _assert_as_alone(served, [row], decoder)
  serving.assert_seed(served)


@pytest.mark.parametrize(
  ('decoder', 'share'),
  [(model_lib.GREEDY, 0.02), (BEAM, 0.02), (model_lib.GREEDY, 0.3)],
)
def test_mixed_batch(decoder, share):
  served = serving.model()
  rows = [_row(i, share, length=3 + 2 * i) for i in range(4)] + [_row(5)]
  rows.append((rows[0][0]._replace(tokens=serving.tokens(9)), rows[0][1]))
  _assert_as_alone(served, rows, decoder)
  assert served.counts['swaps'] == 0  # They really were mixed.
  serving.assert_seed(served)


@pytest.mark.parametrize('decoder', [model_lib.GREEDY, BEAM])
def test_another_network_is_mixed_too(decoder):
  changes = {'logits_via_embedding': True, 'mlp_activations': ('relu',)}
  served = serving.model(changes)
  rows = [_row(i, 0.05, changes=changes) for i in range(3)]
  _assert_as_alone(served, rows, decoder, serving.network(**changes))
  serving.assert_seed(served, serving.seed(**changes))


def test_logits_of_a_mixed_batch():
  """Within 1e-4 of a dense model's, at every position of every row."""
  net, seed = serving.network(), serving.seed()
  params = jax.tree.map(jnp.asarray, seed)
  layout = on_device.Layout(params, serving.fingerprint())
  found = [serving.subset(0.05, i) for i in range(4)]
  placed = [layout.place(subset, params) for subset, _ in found]
  rooms = layout.rooms(placed[0].capacity, max(p.slack for p in placed))
  batch = networks.random_batch(4, 7, 5)

  def mixed(params, arrays, slots):
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    own = corrections.own(layout.tensors, params, stacked, rooms, slots)
    by_example = corrections.Corrections(net, layout.tensors, rooms, own)
    with nn.intercept_methods(by_example.intercept):
      return net.apply({'params': params}, **batch, enable_dropout=False)

  arrays = [p.arrays for p in placed]
  logits = jax.jit(mixed)(params, arrays, slots_lib.slots_of(rooms))
  plain = networks.logits(net, seed, batch)
  for i, (_, tuned) in enumerate(found):
    row = {name: of[i : i + 1] for name, of in batch.items()}
    expected = networks.logits(net, tuned, row)[0]
    np.testing.assert_allclose(logits[i], expected, atol=1e-4)
    assert np.abs(plain[i] - expected).max() > 0.1


def test_every_kind_of_tensor_counts():
  """A subset in a single tensor is mixed with other subsets."""
  served = serving.model()
  whole, _ = serving.subset(1.0, 1)
  for path, values in whole.values.items():
    some = slice(None, None, -(-len(values) // 20))
    only = subset_lib.Subset(
      whole.tensors,
      {path: whole.positions[path][some]},
      {path: 3 * values[some]},
      whole.fingerprint,
    )
    params = subset_lib.apply(only, serving.seed(), serving.fingerprint())
    row = model_lib.Row(serving.tokens(3, 12), path, lambda only=only: only)
    _assert_as_alone(served, [(row, params), _row(2, 0.02), _row(4)])
  serving.assert_seed(served)


def test_concentrated_subsets_take_rounds():
  served = serving.model()
  path = 'decoder/decoder_norm/scale'
  whole, _ = serving.subset(1.0, 1)
  rest = serving.subset(0.02, 2)[0]
  skewed = subset_lib.Subset(
    whole.tensors,
    {**rest.positions, path: whole.positions[path]},
    {**rest.values, path: whole.values[path]},
    whole.fingerprint,
  )
  placed = served.layout.place(skewed, served.revert())
  assert placed.slack > 1 or placed.rounds > 1
  params = subset_lib.apply(skewed, serving.seed(), serving.fingerprint())
  row = model_lib.Row(serving.tokens(3), 'skewed', lambda: skewed)
  _assert_as_alone(served, [(row, params), _row(2, 0.02)])
  serving.assert_seed(served)


def test_many_rounds(monkeypatch):
  """Rooms are far too small; the answers still equal a dense model's."""
  monkeypatch.setattr(on_device, 'SLACKS', (1,))
  monkeypatch.setattr(on_device, 'LEAST_CAPACITY', 1)
  monkeypatch.setattr(
    on_device.Layout, 'rooms', lambda self, *_: tuple(3 for _ in self.sizes)
  )
  served = serving.model()
  row, tuned = _row(1, 0.1)
  placed = served.layout.place(row.load(), served.revert())
  assert placed.rounds > 5
  assert not served.mixes(placed)
  _assert_as_alone(served, [(row, tuned), _row(2, 0.1), _row(3)])
  serving.assert_seed(served)


def test_large_subsets_are_grouped():
  served = serving.model(mix_up_to=0.1)
  rows = [_row(1, 0.3), _row(2, 0.3), _row(3, 0.05), _row(4, 0.05), _row(5)]
  rows.append((rows[0][0]._replace(tokens=serving.tokens(9)), rows[0][1]))
  _assert_as_alone(served, rows)
  assert served.counts['swaps'] == 2
  serving.assert_seed(served)


def test_a_batch_larger_than_allowed_is_divided():
  served = serving.model(max_batch=2)
  _assert_as_alone(served, [_row(i, 0.02) for i in range(5)])


def test_nothing_compiles_for_a_new_subset_of_a_class():
  served = serving.model()
  jax.clear_caches()
  with serving.compilations() as found:
    for i in range(2):
      served.decode([_row(i, 0.02)[0]])
    served.decode([_row(i, 0.02)[0] for i in range(4)])
    assert found  # The listener hears something.
    found.clear()
    for i in range(4, 12):
      share = 0.005 + 0.002 * i
      served.decode([_row(i, share, length=i)[0]])
      served.decode([_row(i + 20 + j, share)[0] for j in range(4)])
    assert not found


def test_warming_up_compiles_for_all_batches():
  served = serving.model(max_batch=4)
  served.warm_up([_row(0, 0.02)[0], _row(1)[0]])
  with serving.compilations() as found:
    for number in (1, 2, 3, 4):
      served.decode([_row(i, 0.02)[0] for i in range(number)])
      served.decode([_row(5, 0.02)[0]] * number)
      served.decode([_row(i)[0] for i in range(number)])
  assert not found


def test_the_device_holds_what_was_used_last():
  served = serving.model(device_bytes=1)
  _assert_as_alone(served, [_row(1, 0.02), _row(2, 0.02)])
  assert len(served.placed) == 0  # Nothing fits; it works all the same.
  size = served.layout.place(_row(1, 0.02)[0].load(), served.revert()).nbytes
  served = serving.model(device_bytes=2 * size)
  for number in (1, 2, 1, 3):
    _assert_as_alone(served, [_row(number, 0.02)])
  assert set(served.placed) == {(1, 0.02), (3, 0.02)}
  assert served.placed.currsize <= 2 * size
  assert served.counts['device_hits'] == 1


def test_a_wrong_subset_changes_nothing():
  served = serving.model()
  good, _ = serving.subset(0.1, 1)
  size = serving.seed()['decoder']['logits_dense']['kernel'].size

  def with_entries(positions, values):
    return subset_lib.Subset(
      good.tensors,
      {LOGITS: np.int64(positions)},
      {LOGITS: np.float32(values)},
      good.fingerprint,
    )

  for bad, message in (
    (with_entries([3, size], [1, 2]), 'outside'),
    (with_entries([-1, 3], [1, 2]), 'outside'),
    (with_entries([3, 3], [1, 2]), 'not ascending'),
    (with_entries([3, 4], [1, np.inf]), 'not finite'),
    (with_entries([3, 4], [1]), 'one value'),
    (subset_lib.Subset(good.tensors, {}, {}, 'f' * 64), 'another|belongs'),
    (subset_lib.Subset({}, {}, {}, good.fingerprint), 'tensor'),
  ):
    with pytest.raises(UserError, match=message):
      served.decode(
        [
          _row(2, 0.1)[0],
          model_lib.Row(serving.tokens(1), 'bad', lambda bad=bad: bad),
        ]
      )
    assert 'bad' not in served.placed
    serving.assert_seed(served)
  _assert_as_alone(served, [_row(2, 0.1), _row(1)])


@pytest.mark.parametrize(
  'path', [LOGITS, 'encoder/layers_0/attention/value/kernel']
)
def test_enormous_values_spoil_nobody_elses_answer(path):
  served = serving.model()
  whole, _ = serving.subset(0.3, 1)
  huge = subset_lib.Subset(
    whole.tensors,
    {path: whole.positions[path]},
    {path: np.full_like(whole.values[path], 3e38)},
    whole.fingerprint,
  )
  rows = [_row(2, 0.3), _row(3), _row(4, 0.3)]
  bad = model_lib.Row(serving.tokens(1), 'huge', lambda: huge)
  # Last: what reads too far in a batch reads of later rows.
  answers = served.decode([*(row for row, _ in rows), bad])
  assert not np.isfinite(answers[-1].score)
  for (row, tuned), answer in zip(rows, answers[:-1], strict=True):
    tokens, score = serving.alone(tuned, row.tokens)
    np.testing.assert_array_equal(answer.tokens, tokens)
    assert answer.score == pytest.approx(score, abs=1e-4)
  served.decode([bad])  # Alone, it is swapped in.
  _assert_as_alone(served, rows)
  serving.assert_seed(served)


def test_stacked_layers_are_refused():
  with pytest.raises(UserError, match='scan_layers'):
    serving.model({'scan_layers': True})


def test_placed_memory():
  """1,000 subsets of ε = 1e-4 of T5 1.1 Small fit beside its parameters."""
  small = 76_961_152
  capacity = on_device.capacity_class(round(1e-4 * small))
  tensors = 190
  one = 12 * capacity + 4 * (tensors + 1)
  assert 1000 * one <= 4 * small
  served = serving.model()
  placed = served.layout.place(serving.subset(0.05, 1)[0], served.revert())
  assert placed.nbytes == 12 * placed.capacity + 4 * (
    len(served.layout.sizes) + 1
  )
  subsets.assert_same(served.revert(), serving.seed())


def test_a_slot_without_an_entry_points_to_its_own_row():
  """Otherwise it could read an infinite value of another example."""
  tensors = on_device.Tensors(('layer/kernel',), ((3, 4),))
  slots = slots_lib.slots_of((3,))
  spread = slots_lib.Spread(
    positions=jnp.array([[5, 11, 7]], jnp.uint32),
    values=jnp.array([[2.0, np.inf, np.nan]]),
    seeds=jnp.array([[0.5, 0.0, 0.0]]),
    own=jnp.array([[True, False, False]]),
  )
  entries = corrections._entries(tensors, spread, slots)
  np.testing.assert_array_equal(entries.rows, [[1, 0, 0]])
  np.testing.assert_array_equal(entries.columns, [[1, 0, 0]])
  np.testing.assert_array_equal(entries.differences(np.float32), [[1.5, 0, 0]])


def test_differences_are_rounded_as_the_matrix_that_is_multiplied():
  """T5's logits are float32, whatever the type of its other activations."""

  class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
      narrow = nn.Dense(1, dtype=jnp.bfloat16, use_bias=False, name='narrow')(x)
      return nn.Dense(1, use_bias=False, name='wide')(x), narrow

  seed = {name: {'kernel': jnp.ones((2, 1))} for name in ('narrow', 'wide')}
  tensors = on_device.Tensors(('narrow/kernel', 'wide/kernel'), ((2, 1),) * 2)
  tuned = np.float32([1.001, 1.01])  # bfloat16 has 1 and 1.0078125.
  arrays = on_device.Arrays(
    positions=jnp.array([[0, 1, 0, 1]], jnp.uint32),
    values=jnp.asarray(np.tile(tuned, 2).view(np.uint32)[None]),
    seeds=jnp.asarray(np.ones(4, np.float32).view(np.uint32)[None]),
    starts=jnp.array([[0, 2, 4]], jnp.int32),
  )
  slots = slots_lib.slots_of((2, 2))
  own = corrections.own(tensors, seed, arrays, (2, 2), slots)
  by_example = corrections.Corrections(serving.network(), tensors, (2, 2), own)
  with nn.intercept_methods(by_example.intercept):
    wide, narrow = Pair().apply({'params': seed}, jnp.eye(2)[None])
  np.testing.assert_array_equal(wide[0, :, 0], tuned)
  np.testing.assert_array_equal(np.float32(narrow[0, :, 0]), [1, 1.0078125])
