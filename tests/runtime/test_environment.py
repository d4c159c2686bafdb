"""What the environment says of other processes."""

import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.runtime import environment

_BY_HAND = {
  'COORDINATOR_ADDRESS': 'host0:1234',
  'NUM_PROCESSES': '4',
  'PROCESS_ID': '2',
}
_SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '0',
}


def test_alone():
  assert environment.find_group({}) is None
  assert environment.find_group({'PATH': '/bin', 'NUM_PROCESSES': ''}) is None
  assert environment.find_group(_BY_HAND | {'NUM_PROCESSES': '1', 'PROCESS_ID':
                                            '0'}) is None  # fmt: skip
  assert environment.find_group(_SLURM | {'SLURM_NTASKS': '1'}) is None
  # A batch script's own shell, or a notebook in a cluster: no step, no Job.
  assert environment.find_group({'SLURM_JOB_ID': '7'}) is None
  assert environment.find_group({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}) is None


def test_by_hand():
  found = environment.find_group(_BY_HAND)
  assert found == ('COORDINATOR_ADDRESS', 'host0:1234', 4, 2, 300)
  theirs = {f'JAX_{name}': value for name, value in _BY_HAND.items()}
  assert environment.find_group(theirs) == found
  slower = environment.find_group(_BY_HAND | {'JOIN_TIMEOUT': '900'})
  assert slower.timeout == 900


def test_where_jax_finds_the_others():
  assert environment.find_group(_SLURM).how == 'Slurm'
  assert environment.find_group({}, has_tpu=True).how == 'Cloud TPU'
  # What is set by hand goes before what is there anyway.
  found = environment.find_group(_SLURM | _BY_HAND, has_tpu=True)
  assert found.how == 'COORDINATOR_ADDRESS'
  assert environment.find_group(_SLURM).coordinator is None


def test_pods_of_a_job_need_a_package():
  pod = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'}
  try:
    import kubernetes  # noqa: F401
  except ImportError:
    with pytest.raises(UserError, match='pip install'):
      environment.find_group(pod)
  else:
    assert environment.find_group(pod).how == 'Kubernetes'


def test_no_tpu_where_jax_is_told_to_use_something_else():
  assert not environment.has_tpu({'JAX_PLATFORMS': 'cpu'})


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'PROCESS_ID': ''},
      'set PROCESS_ID too, or not COORD.* and NUM_PROCESSES: several',
    ),
    ({'COORDINATOR_ADDRESS': 'host0'}, "must be HOST:PORT .* it is 'host0'"),
    ({'NUM_PROCESSES': 'four'}, "NUM_PROCESSES must be .* it is 'four'"),
    ({'PROCESS_ID': '4'}, 'it is 4, and NUM_PROCESSES is 4'),
    ({'NUM_PROCESSES': '0'}, 'NUM_PROCESSES is 0'),
    ({'JOIN_TIMEOUT': 'long'}, 'JOIN_TIMEOUT must be a whole number'),
  ],
)
def test_what_makes_no_sense(changes, message):
  with pytest.raises(UserError, match=message):
    environment.find_group(_BY_HAND | changes)
