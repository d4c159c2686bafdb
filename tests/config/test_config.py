"""Gin configuration: what is bound, and every mistake that it must report."""

import importlib
import os
import subprocess
import sys
import textwrap

import commands
import config_toy
import pytest

from dst_t5x.config import binaries
from dst_t5x.config import gin_files
from dst_t5x.core.errors import UserError

_IMPORTS = 'from __gin__ import dynamic_registration\nimport config_toy\n'
_RUN = """
  MODEL_DIR = %gin.REQUIRED
  METHOD = @config_toy.ToyMethod()
  EPSILON = 0.5
  config_toy.ToyMethod.epsilon = %EPSILON
  config_toy.fit:
    model_dir = %MODEL_DIR
    method = %METHOD
"""


@pytest.fixture
def write(tmp_path):
  """Writes a gin file and returns the argument that reads it."""

  def write(text, name='user.gin', imports=_IMPORTS):
    path = tmp_path / name
    path.write_text(imports + textwrap.dedent(text))
    return f'--gin_file={path}'

  return write


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A folder that passes for the package: its gin files are the shipped."""
  (tmp_path / 'package' / 'gin').mkdir(parents=True)
  monkeypatch.setattr(gin_files, '_PACKAGE', tmp_path / 'package')
  return tmp_path / 'package'


def _error(*argv, binary=config_toy.fit):
  """The one line that the arguments end in."""
  with pytest.raises(UserError) as raised:
    binaries.parse(argv, binary)
  message = str(raised.value)
  assert '\n' not in message
  return message


def test_a_model_comes_before_what_overrides_it():
  model, task = 'gin/models/t5_1_1_tiny.gin', 'gin/tasks/wmt22_de_en.gin'
  message = _error(f'--gin_file={task}', f'--gin_file={model}')
  assert message.startswith(f'name {model} before {task}')


class TestWhatIsBound:
  def test_files_and_flags(self, write):
    binary = binaries.parse(
      [write(_RUN), '--gin.MODEL_DIR=/tmp/x', '--gin.fit.steps=7'],
      config_toy.fit,
    )
    assert binary() == {
      'model_dir': '/tmp/x',
      'steps': 7,
      'method': config_toy.ToyMethod(epsilon=0.5),
      'network': None,
      'extras': None,
    }

  def test_later_files_override_and_flags_override_all(self, write):
    files = [
      write(_RUN),
      write('EPSILON = 0.25\nconfig_toy.fit.steps = 3', 'second.gin'),
    ]
    flags = ['--gin.MODEL_DIR=x', '--gin.fit.steps=4']
    result = binaries.parse([*flags, *files], config_toy.fit)()
    assert result['method'].epsilon == 0.25
    assert result['steps'] == 4

  def test_a_second_parse_knows_nothing_of_the_first(self, write):
    argv = [write(_RUN), '--gin.MODEL_DIR=x']
    binaries.parse([*argv, '--gin.EPSILON=0.125'], config_toy.fit)()
    again = binaries.parse(argv, config_toy.fit)()
    assert again['method'].epsilon == 0.5

  @pytest.mark.parametrize(
    ('text', 'value'),
    [
      ('7', 7),
      ('1e-4', 1e-4),
      ('-2', -2),
      ('True', True),
      ('None', None),
      ("'text'", 'text'),
      ('"a b"', 'a b'),
      ('[1, (2, "x")]', [1, (2, 'x')]),
      ("{'a': 1}", {'a': 1}),
      ('/tmp/x', '/tmp/x'),
      ('gs://bucket/a-b/checkpoint_10', 'gs://bucket/a-b/checkpoint_10'),
      ('runs/2024', 'runs/2024'),
      ('2024-01/run', '2024-01/run'),
      ('./run', './run'),
      ('~/run', '~/run'),
      ("it's", "it's"),
      ('two words', 'two words'),
      ('word#1', 'word#1'),
      ('a=b', 'a=b'),
    ],
  )
  def test_values_of_flags(self, text, value):
    argv = ['--gin.fit.model_dir=x', f'--gin.fit.extras={text}']
    assert binaries.parse(argv, config_toy.fit)()['extras'] == value

  def test_a_flag_may_refer_to_what_no_file_has_named(self, write):
    argv = [
      write(_RUN),
      '--gin.MODEL_DIR=x',
      '--gin.fit.extras=[@config_toy.rate()]',
      '--gin.rate.base=3.0',
    ]
    assert binaries.parse(argv, config_toy.fit)()['extras'] == [3.0]
    # In whichever order.
    argv[-2:] = reversed(argv[-2:])
    assert binaries.parse(argv, config_toy.fit)()['extras'] == [3.0]

  def test_a_flag_means_what_is_in_use_if_a_name_is_shared(
    self, tmp_path, monkeypatch
  ):
    (tmp_path / 'toy_twin.py').write_text('def shared(steps=1): return steps')
    monkeypatch.syspath_prepend(tmp_path)
    twin = importlib.import_module('toy_twin')
    flag = '--gin.shared.steps=3'
    assert binaries.parse([flag], twin.shared)() == 3
    assert binaries.parse([flag], config_toy.shared)() == {'steps': 3}
    assert _error(flag) == (
      "--gin.shared.steps: 'shared' may be any of config_toy.shared, "
      'toy_twin.shared'
    )

  def test_scopes(self, write):
    file = write("""
      config_toy.fit:
        model_dir = 'x'
        network = @outer/config_toy.ToyNetwork()
        extras = {'rate': (@config_toy.rate(), @b/config_toy.rate())}
      config_toy.ToyNetwork.inner = @config_toy.rate()
      outer/config_toy.rate.base = 5.0
      b/config_toy.rate.base = 7.0
    """)
    flag = '--gin.outer/ToyNetwork.layers=9'
    result = binaries.parse([file, flag], config_toy.fit)()
    assert result['network'].layers == 9
    assert result['network'].inner == 5.0
    assert result['extras'] == {'rate': (1.0, 7.0)}

  def test_include(self, write, tmp_path):
    write(_RUN, 'base.gin')
    file = write(f"include '{tmp_path}/base.gin'\nEPSILON = 0.75")
    result = binaries.parse([file, '--gin.MODEL_DIR=x'], config_toy.fit)()
    assert result['method'].epsilon == 0.75

  def test_files_of_the_package_are_found_anywhere(
    self, package, write, tmp_path, monkeypatch
  ):
    (package / 'gin' / 'run.gin').write_text(
      _IMPORTS + "include 'gin/base.gin'\nUNUSED = 1\n"
    )
    (package / 'gin' / 'base.gin').write_text(
      _IMPORTS + 'config_toy.fit.model_dir = %MODEL_DIR\n'
    )
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    argv = ['--gin_file=gin/run.gin', '--gin.MODEL_DIR=x']
    assert binaries.parse(argv, config_toy.fit)()['model_dir'] == 'x'


class TestValues:
  """Tests the binding of values; tests/core/test_values.py tests fitting."""

  def _parse(self, *argv):
    return binaries.parse(argv, config_toy.typed)()

  @pytest.mark.parametrize(
    ('flags', 'line'),
    [
      (['churn=no'], "typed.churn must be True or False; it is 'no': write F"),
      (['churn=1'], 'typed.churn must be True or False; it is 1'),
      (['rate=-0.1'], 'typed.rate must be in [0, 1); it is -0.1'),
      (['rate=1e999'], 'typed.rate must be in [0, 1); it is inf'),
      (['folder=None'], 'typed.folder must be a path; it is None'),
      (
        ['folder=2024'],
        "typed.folder must be a path; it is 2024: write '2024'",
      ),
      (["folder=''"], "typed.folder must be a path; it is ''"),
      (["seed=''"], "typed.seed must be a path or None; it is ''"),
      (['names=bleu'], "typed.names must be a list (each item text); it is 'b"),
      (
        ['names=["a", 3]'],
        'typed.names must be a list (each item text); it is',
      ),
      (
        ['method=@config_toy.ToyNetwork()'],
        'typed.method must be a ToyMethod (@module.name()) or None; it is '
        '@config_toy.ToyNetwork()',
      ),
      (
        ['method=@config_toy.ToyMethod'],
        'typed.method must be a ToyMethod (@module.name()) or None; it is '
        '@config_toy.ToyMethod: write @config_toy.ToyMethod()',
      ),
      (
        ['ToyMethod.epsilon=x', 'method=@config_toy.ToyMethod()'],
        "ToyMethod.epsilon must be a finite number; it is 'x'",
      ),
    ],
  )
  def test_of_flags(self, flags, line):
    argv = [
      f'--gin.{"" if "." in flag.split("=")[0] else "typed."}{flag}'
      for flag in ['folder=x', *flags]
    ]
    message = _error(*argv, binary=config_toy.typed)
    assert message.startswith(line)

  def test_of_a_file_with_the_place(self, write, tmp_path):
    file = write('config_toy.typed.folder = "x"\nconfig_toy.typed.churn = 3')
    assert _error(file, binary=config_toy.typed) == (
      f'{tmp_path}/user.gin:4: typed.churn must be True or False; it is 3'
    )

  def test_of_a_macro_by_its_name(self, package, write, tmp_path):
    (package / 'gin' / 'run.gin').write_text(
      _IMPORTS + 'CHURN = True\nCHOSEN = %CHURN\nRATES = [%RATE]\nRATE = 0.5\n'
      'config_toy.typed:\n  folder = "x"\n  churn = %CHOSEN\n  names = %RATES\n'
    )
    argv = ['--gin_file=gin/run.gin', '--gin.RATE=a']
    assert self._parse(*argv)['names'] == ['a']
    assert (
      _error(*argv, '--gin.CHURN=yes', binary=config_toy.typed)
      == "CHURN must be True or False; it is 'yes': write True"
    )
    assert _error(argv[0], binary=config_toy.typed) == (
      'RATES must be a list (each item text); it is [0.5]'
    )
    file = write('CHURN = 5', imports='')
    assert _error(*argv, file, binary=config_toy.typed) == (
      f'{tmp_path}/user.gin:1: CHURN must be True or False; it is 5'
    )

  def test_in_a_scope(self, write):
    file = write("""
      config_toy.fit.model_dir = 'x'
      config_toy.fit.method = @a/config_toy.ToyMethod()
      a/config_toy.ToyMethod.epsilon = '1'
    """)
    message = _error(file)
    assert ': a/ToyMethod.epsilon must be a finite number; it is' in message

  def test_of_what_code_may_call_by_itself(self):
    flags = ['--gin.fit.model_dir=x', '--gin.registered.rate=fast']
    assert _error(*flags).startswith('registered.rate must be a finite number')

  def test_what_no_signature_names_may_be_anything(self):
    argv = ['--gin.typed.folder=x', '--gin.typed.more=[None]']
    assert self._parse(*argv)['others'] == {'more': [None]}

  @pytest.mark.parametrize('name', ['FOLDER', 'typed.folder'])
  def test_home_in_a_path(self, write, monkeypatch, tmp_path, name):
    monkeypatch.setenv('HOME', str(tmp_path))
    file = write('FOLDER = "~/a"\nconfig_toy.typed.folder = %FOLDER\n')
    argv = [file] if name == 'FOLDER' else []
    flag = f'--gin.{name}=~/x'
    more = ['--gin.typed.names=["~/x"]', '--gin.typed.seed=gs://b/~/x']
    found = self._parse(*argv, flag, *more)
    assert found['folder'] == str(tmp_path / 'x')
    assert found['names'] == ['~/x']
    assert found['seed'] == 'gs://b/~/x'
    assert binaries.bindings(config_toy.typed)[
      'config_toy.typed.folder'
    ] == repr(str(tmp_path / 'x'))


class TestBindings:
  def test_flat_sorted_and_resolved(self, write):
    argv = [
      write(_RUN),
      write('a/config_toy.rate.base = 2.0', 'second.gin'),
      '--gin.MODEL_DIR=x',
      '--gin.fit.extras={"k": [%EPSILON, @a/config_toy.rate]}',
    ]
    binaries.parse(argv, config_toy.fit)
    found = binaries.bindings(config_toy.fit)
    assert found == {
      'a/config_toy.rate.base': '2.0',
      'config_toy.ToyMethod.epsilon': '0.5',
      'config_toy.fit.extras': "{'k': [0.5, @a/config_toy.rate]}",
      'config_toy.fit.method': '@config_toy.ToyMethod()',
      'config_toy.fit.model_dir': "'x'",
    }
    assert list(found) == sorted(found)

  def test_what_is_out_of_reach_or_overridden_is_left_out(self, write):
    file = write("""
      config_toy.fit.model_dir = 'x'
      config_toy.fit.network = @a/config_toy.ToyNetwork()
      config_toy.ToyNetwork.layers = 1
      a/config_toy.ToyNetwork.layers = 2
      METHOD = @config_toy.ToyMethod()
      config_toy.ToyMethod.epsilon = 0.5
      config_toy.fit.extras = %METHOD
      config_toy.fit.extras = None
    """)
    with pytest.raises(UserError, match='METHOD is not used'):
      binaries.parse([file], config_toy.fit)
    assert binaries.bindings(config_toy.fit) == {
      'a/config_toy.ToyNetwork.layers': '2',
      'config_toy.fit.extras': 'None',
      'config_toy.fit.model_dir': "'x'",
      'config_toy.fit.network': '@a/config_toy.ToyNetwork()',
    }

  def test_operative_config_can_be_parsed_again(self, write, tmp_path):
    binaries.parse([write(_RUN), '--gin.MODEL_DIR=x'], config_toy.fit)()
    text = binaries.operative_config()
    assert 'config_toy.fit.steps = 10' in text
    assert 'EPSILON = 0.5' in text
    again = write(text, 'operative.gin', imports='')
    result = binaries.parse([again], config_toy.fit)()
    assert result['method'] == config_toy.ToyMethod(epsilon=0.5)


class TestUnknownNames:
  @pytest.mark.parametrize(
    ('line', 'expected'),
    [
      (
        'config_toi.fit.steps = 1',
        "'config_toi' of 'config_toi.fit' is not imported here; did you "
        "mean 'config_toy'?",
      ),
      (
        'config_toy.fti.steps = 1',
        "there is no 'config_toy.fti': no 'fti'; did you mean 'fit'?",
      ),
      (
        'config_toy.fit.stesp = 1',
        "config_toy.fit has no parameter 'stesp'; did you mean 'steps'?",
      ),
      (
        'config_toy.fit.network = @config_toy.ToyNetwrok()',
        "there is no 'config_toy.ToyNetwrok': no 'ToyNetwrok'; did you mean "
        "'ToyNetwork'?",
      ),
      (
        'config_toy.fit.extras = [1, {"a": @config_toy.ToyNetwrok}]',
        "there is no 'config_toy.ToyNetwrok': no 'ToyNetwrok'; did you mean "
        "'ToyNetwork'?",
      ),
      (
        'config_toy.fit.extras = @config_toy.LIMIT',
        "'config_toy.LIMIT' is neither a function nor a class",
      ),
      (
        'from dst_t5x import confg',
        "there is no module 'dst_t5x.confg'; did you mean 'config'?",
      ),
      ('import no_such_module', "there is no module 'no_such_module'"),
      (
        "include 'gin/modles/t5_1_1_tiny.gin'",
        "there is no gin file 'gin/modles/t5_1_1_tiny.gin'",
      ),
    ],
  )
  def test_in_a_file(self, write, tmp_path, line, expected):
    message = _error(write(f'\n# A comment.\n{line}\n'))
    assert message.startswith(f'{tmp_path}/user.gin:5: {expected}')

  def test_a_module_that_fails_is_not_the_users_mistake(
    self, write, tmp_path, monkeypatch
  ):
    (tmp_path / 'toy_with_bug.py').write_text('undefined_name')
    monkeypatch.syspath_prepend(tmp_path)
    file = write('import toy_with_bug')
    with pytest.raises(ImportError, match='toy_with_bug') as raised:
      binaries.parse([file], config_toy.fit)
    assert isinstance(raised.value.__cause__, NameError)

  def test_in_an_included_file(self, write, tmp_path):
    write('config_toy.fit.stesp = 1', 'inner.gin')
    message = _error(write(f"include '{tmp_path}/inner.gin'"))
    assert message.startswith(f'{tmp_path}/inner.gin:3: config_toy.fit ')
    assert 'user.gin' not in message

  @pytest.mark.parametrize(
    ('flag', 'expected'),
    [
      (
        '--gin.fit.stesp=1',
        "fit has no parameter 'stesp'; did you mean 'steps'?",
      ),
      ('--gin.fti.steps=1', "there is no 'fti'; did you mean 'fit'?"),
      (
        '--gin.METHOD=@config_toy.ToyMehtod()',
        "there is no 'config_toy.ToyMehtod': no 'ToyMehtod'; did you mean "
        "'ToyMethod'?",
      ),
    ],
  )
  def test_in_a_flag(self, write, flag, expected):
    name = flag.split('=')[0]
    message = _error(write(_RUN), '--gin.MODEL_DIR=x', flag)
    assert message == f'{name}: {expected}'

  def test_a_file(self, package):
    (package / 'gin' / 'finetune.gin').write_text('')
    assert _error('--gin_file=gin/fintune.gin') == (
      "there is no gin file 'gin/fintune.gin'; did you mean 'gin/finetune.gin'?"
    )

  @pytest.mark.parametrize(
    ('argument', 'expected'),
    [
      ('--ginfile=x', "unknown argument '--ginfile=x'; did you mean '--gin_f"),
      ('x.gin', "unknown argument 'x.gin'"),
      ('--gin_file', '--gin_file needs a value: --gin_file=…'),
      ('--gin.A', '--gin.A needs a value: --gin.A=…'),
    ],
  )
  def test_an_argument(self, argument, expected):
    assert _error(argument).startswith(expected)


class TestUnused:
  def test_misspelt_macro_on_the_command_line(self, write):
    message = _error(write(_RUN), '--gin.MODEL_DIR=x', '--gin.EPSILN=0.1')
    assert message == (
      "EPSILN is not used by this configuration; did you mean 'EPSILON'?"
    )

  def test_macro_on_the_command_line_that_is_for_another_binary(self, package):
    (package / 'gin' / 'run.gin').write_text(
      f'{_IMPORTS}{textwrap.dedent(_RUN)}config_toy.score.network = 1\n'
    )
    argv = ['--gin_file=gin/run.gin']
    assert binaries.parse(argv, config_toy.score)()['network'] == 1
    message = _error(*argv, '--gin.EPSILON=0.1', binary=config_toy.score)
    assert message == 'EPSILON is not used by this configuration'

  def test_misspelt_name_is_reported_before_the_missing_value(self, write):
    message = _error(write(_RUN), '--gin.MODEL_DRI=x')
    assert message == (
      "MODEL_DRI is not used by this configuration; did you mean 'MODEL_DIR'?"
    )

  def test_binding_in_a_file(self, write, tmp_path):
    file = write(_RUN + '  config_toy.ToyNetwork.layers = 3\n')
    assert _error(file, '--gin.MODEL_DIR=x') == (
      f'{tmp_path}/user.gin:11: nothing in this configuration refers to '
      'ToyNetwork, so layers would have no effect'
    )

  def test_binding_in_a_scope_that_nothing_enters(self, write):
    file = write(_RUN + '  other/config_toy.ToyMethod.distance = "relative"\n')
    message = _error(file, '--gin.MODEL_DIR=x')
    assert 'refers to other/ToyMethod, so distance' in message

  def test_binding_on_the_command_line(self, write):
    argv = [
      write(_RUN),
      '--gin.MODEL_DIR=x',
      '--gin.config_toy.ToyNetwork.layers=3',
    ]
    assert _error(*argv).startswith(
      '--gin.config_toy.ToyNetwork.layers: nothing'
    )

  def test_binding_that_only_an_unused_macro_reaches(self, package, write):
    shipped = package / 'gin' / 'method.gin'
    shipped.write_text(_IMPORTS + 'METHOD = @config_toy.ToyMethod()\n')
    argv = [
      f'--gin_file={shipped}',
      write('config_toy.ToyMethod.epsilon = 1.0\nconfig_toy.score.network = 1'),
    ]
    binaries.parse(argv, config_toy.score)
    with pytest.raises(UserError, match='refers to ToyMethod, so'):
      binaries.parse([*argv, '--gin.ToyMethod.epsilon=2.0'], config_toy.score)

  def test_macro_in_a_file(self, write, tmp_path):
    file = write(_RUN + '  EPSILN = 3\n')
    assert _error(file, '--gin.MODEL_DIR=x') == (
      f'{tmp_path}/user.gin:11: EPSILN is not used by this configuration; did '
      "you mean 'EPSILON'?"
    )

  def test_macro_and_binding_in_a_file_of_the_package(self, package):
    (package / 'gin' / 'run.gin').write_text(
      _IMPORTS + 'UNUSED = 1\nconfig_toy.ToyNetwork.layers = 1\n'
    )
    argv = ['--gin_file=gin/run.gin', '--gin.fit.model_dir=x']
    assert binaries.parse(argv, config_toy.fit)()['model_dir'] == 'x'


class TestMissing:
  @pytest.mark.parametrize(
    ('lines', 'flag'),
    [
      ('A = %gin.REQUIRED\nconfig_toy.fit.model_dir = %A', '--gin.A'),
      ('config_toy.fit.model_dir = %UNDEFINED', '--gin.UNDEFINED'),
      (
        'config_toy.fit.model_dir = "x"\n'
        'config_toy.fit.extras = [{"x": (%IN,)}]',
        '--gin.IN',
      ),
      (
        'config_toy.fit.model_dir = %gin.REQUIRED',
        '--gin.fit.model_dir',
      ),
      ('config_toy.fit.steps = 3', '--gin.fit.model_dir'),
      (
        'config_toy.fit.model_dir = "x"\n'
        'config_toy.fit.method = @a/config_toy.ToyMethod()',
        '--gin.a/ToyMethod.epsilon',
      ),
    ],
  )
  def test_reachable(self, write, lines, flag):
    file = write(lines)
    assert _error(file) == f'values are missing: set {flag}=…'
    value = "'x'" if 'epsilon' not in flag else '1.0'
    binaries.parse([file, f'{flag}={value}'], config_toy.fit)()

  def test_all_at_once(self, write):
    file = write(_RUN + '  config_toy.fit.extras = (%MORE, %MODEL_DIR)\n')
    assert _error(file) == (
      'values are missing: set --gin.MODEL_DIR=… --gin.MORE=…'
    )

  def test_out_of_reach(self, package):
    (package / 'gin' / 'method.gin').write_text(
      _IMPORTS
      + 'EPSILON = %gin.REQUIRED\nconfig_toy.ToyMethod.epsilon = %EPSILON\n'
    )
    argv = ['--gin_file=gin/method.gin', '--gin.fit.model_dir=x']
    binaries.parse(argv, config_toy.fit)()

  def test_a_reference_that_is_not_called_may_lack_arguments(self, write):
    file = write("""
      config_toy.fit.model_dir = 'x'
      config_toy.fit.method = @config_toy.ToyMethod
    """)
    method = binaries.parse([file], config_toy.fit)()['method']
    assert method(epsilon=1.0).epsilon == 1.0

  def test_macros_in_a_circle(self, write):
    file = write('A = %B\nB = [%A]\nconfig_toy.fit.model_dir = %A')
    assert _error(file) == 'the macro A refers to itself'


class TestSyntax:
  @pytest.mark.parametrize(
    ('text', 'line'),
    [
      ('A = 1 +', 3),
      ('A = bare', 3),
      ('\n\nA = [1, 2', None),
      ('A 1', 3),
      ('config_toy.fit:\nsteps = 3', None),
      ('config_toy.fit:\n  steps = 3\n    method = 4', None),
      ("A = 'unfinished", 3),
    ],
  )
  def test_in_a_file(self, write, tmp_path, text, line):
    message = _error(write(text))
    assert message.startswith(f'{tmp_path}/user.gin:')
    if line is not None:
      assert message.startswith(f'{tmp_path}/user.gin:{line}: ')

  @pytest.mark.parametrize(
    ('value', 'meant'),
    [
      ('true', 'True'),
      ('no', 'False'),
      ('null', 'None'),
      ('[1, yes]', 'True'),
      ('greedy', "'greedy'"),
    ],
  )
  def test_bare_words_in_a_file(self, write, tmp_path, value, meant):
    message = _error(write(f'config_toy.fit.extras = {value}'))
    word = value.strip('[1, ]')
    assert message == (
      f'{tmp_path}/user.gin:3: {word} is no value of gin: write {meant}'
    )

  @pytest.mark.parametrize(
    ('flag', 'expected'),
    [
      ('--gin.fit.extras=', '--gin.fit.extras has no value'),
      ('--gin.fit.extras=true', 'write True'),
      ('--gin.fit.extras=[1, 2', 'not a gin value'),
      ('--gin.fit.extras=1,000', 'not a gin value'),
      ('--gin.fit.extras=%', 'not a gin value'),
      ("--gin.fit.extras='x", 'not a gin value'),
      ('--gin.a b=1', '--gin.a b: '),
      ('--gin.=1', '--gin.: '),
    ],
  )
  def test_in_a_flag(self, flag, expected):
    assert expected in _error(flag)

  def test_a_file_that_includes_itself(self, write, tmp_path):
    message = _error(write(f"include '{tmp_path}/user.gin'"))
    assert 'user.gin includes' in message

  def test_a_file_that_is_not_text(self, tmp_path):
    (tmp_path / 'binary.gin').write_bytes(b'\xff\xfe\x00')
    message = _error(f'--gin_file={tmp_path}/binary.gin')
    assert 'binary.gin' in message
    assert 'cannot be read' in message


class TestRun:
  """`binaries.run` in a process of its own."""

  def _run(self, tmp_path, body, *argv, **options):
    (tmp_path / 'binary.py').write_text(
      'from absl import logging\n'
      'from dst_t5x.config import binaries as config\n'
      'from dst_t5x.core import errors\n'
      f'def main(steps=1):\n{textwrap.indent(body, "  ")}\n'
      "if __name__ == '__main__':\n  import binary\n  config.run(binary.main)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd(), *sys.path])
    return subprocess.run(
      [sys.executable, '-m', 'binary', *argv],
      cwd=tmp_path,
      env=os.environ | {'PYTHONPATH': path},
      text=True,
      timeout=commands.TIMEOUT,
      **({'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE} | options),
    )

  def test_success(self, tmp_path):
    done = self._run(tmp_path, 'print(steps)', '--gin.main.steps=3')
    assert (done.returncode, done.stdout, done.stderr) == (0, '3\n', '')

  def test_mistakes_before_and_after_the_start(self, tmp_path):
    body = "raise errors.UserError('no data in /x; set TFDS_DATA_DIR')"
    done = self._run(tmp_path, body)
    assert done.returncode == 1
    assert done.stderr == 'error: no data in /x; set TFDS_DATA_DIR\n'
    done = self._run(tmp_path, body, '--gin.main.stesp=3')
    assert done.returncode == 1
    assert done.stderr == (
      "error: --gin.main.stesp: main has no parameter 'stesp'; did you mean "
      "'steps'?\n"
    )

  def test_a_bug_keeps_its_traceback(self, tmp_path):
    done = self._run(tmp_path, '1 / 0')
    assert done.returncode == 1
    assert 'Traceback' in done.stderr
    assert 'ZeroDivisionError' in done.stderr

  def test_interrupt(self, tmp_path):
    done = self._run(tmp_path, 'raise KeyboardInterrupt')
    assert (done.returncode, done.stderr) == (130, 'interrupted\n')

  def test_closed_pipe(self, tmp_path):
    done = self._run(tmp_path, "print('x')\nraise BrokenPipeError")
    assert done.returncode != 0
    assert done.stderr == ''

  def test_help_into_a_closed_pipe(self, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = self._run(tmp_path, 'pass', '--help', stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, '')

  def test_log_lines_are_ours_or_errors(self, tmp_path):
    body = "logging.info('of another package')\nlogging.error('broken')"
    done = self._run(tmp_path, body)
    assert 'another' not in done.stderr
    assert done.stderr.endswith(' ERROR broken\n')
    assert len(done.stderr.splitlines()) == 1

  def test_help_names_files_and_macros(self, tmp_path):
    done = self._run(tmp_path, 'pass', '--help')
    assert done.returncode == 0
    assert 'usage: python -m binary --gin_file=FILE' in done.stdout
    for name in gin_files.shipped():
      assert f'  {name}\n' in done.stdout + '\n'


def test_what_its_own_module_registers_counts_as_used():
  argv = ['--gin.fit.model_dir=x', '--gin.registered.rate=2.0']
  binaries.parse(argv, config_toy.fit)()
  assert config_toy.registered() == 2.0
