"""The rooms of `dst_t5x/`: imports go one way, and there are no cycles."""

import ast
import pathlib
import re

import pytest

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent / 'dst_t5x'
# Room -> the rooms that it may import, besides those that these may import.
_MAY_IMPORT = {
  'core': (),
  'method': ('core',),
  'runtime': ('core',),
  'adapters': ('core',),
  'models': ('adapters',),
  'data': ('runtime',),
  'tasks': ('data',),
  'subsets': ('method',),
  'checkpoints': ('models', 'subsets'),
  'engine': ('method', 'tasks', 'checkpoints'),
  'config': ('runtime',),
  'runs': ('engine', 'config'),
  'planning': ('runs',),
  'serving': ('engine', 'config'),
  'analysis': ('runs', 'launch'),
  'launch': ('planning',),
  't5x': ('runs',),
}
# Modules that may import one module more than their room may: where PyTorch has
# the tensors of a subset, the families of models know.
_MAY_ALSO_IMPORT = {
  'dst_t5x.subsets.torch.folders': {'dst_t5x.models.hf_places'},
  'dst_t5x.subsets.torch.tensors': {'dst_t5x.models.hf_places'},
}
# What a network is made of is its own affair; outside of `models/` these words
# mean the search for the best answer, and the gin macro DECODER.
_SEARCH = {
  *('DECODER', 'Decoder', 'GreedyDecoder', 'check_decoder'),
  *('decoder', 'decoders', '_decoders'),
}
# Names of T5X's, whose own model of this kind ours derives from.
_T5X = {
  *('EncoderDecoderModel', 'DecoderParams', 'default_decoder_params'),
  'encoder',
}
_ALSO = {
  # Hugging Face's name of a method.
  'dst_t5x.data.tokenizers_vocabulary': {'get_added_tokens_decoder'},
  'dst_t5x.t5x.model': _T5X | {'decoder_only', 'DecoderOnlyModel'},
  'dst_t5x.t5x.decoder_only': {
    *('DecoderOnlyModel', 'decoder_params', '_decoder'),
    *('decoder_causal_attention', 'decoder_input_tokens'),
  },
}
# Modules without a room of their own: the commands, and `__version__`.
_TOP = 'commands'


def _modules():
  """Returns module -> file, links to the folders at the top included."""
  paths = [
    path
    for folder in (_PACKAGE, _PACKAGE / 'tasks', _PACKAGE / 'launch')
    for path in folder.rglob('*.py')
  ]
  names = {}
  for path in paths:
    parts = path.relative_to(_PACKAGE.parent).with_suffix('').parts
    names['.'.join(p for p in parts if p != '__init__')] = path
  return names


_MODULES = _modules()


def _imports(path):
  """Returns the modules of ours that a file imports, in functions too."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        found.add(full if full in _MODULES else node.module)
  return {name for name in found if name.split('.')[0] == 'dst_t5x'}


def _room(module):
  parts = module.split('.')
  is_package = _MODULES[module].name == '__init__.py'
  return parts[1] if len(parts) > 2 or (len(parts) > 1 and is_package) else _TOP


def _allowed(room):
  """Returns the rooms that a room may import, directly or not; and itself."""
  return {room}.union(*map(_allowed, _MAY_IMPORT[room]))


_GRAPH = {name: _imports(path) for name, path in _MODULES.items()}


def test_all_imports_are_of_modules():
  for module, imports in _GRAPH.items():
    assert imports <= _MODULES.keys(), module


@pytest.mark.parametrize('room', _MAY_IMPORT)
def test_rooms_import_what_they_may(room):
  allowed = _allowed(room)
  wrong = [
    f'{module} imports {imported}'
    for module, imports in sorted(_GRAPH.items())
    for imported in sorted(imports)
    # The package itself: its version.
    if _room(module) == room
    and imported != 'dst_t5x'
    and _room(imported) not in allowed
    and imported not in _MAY_ALSO_IMPORT.get(module, ())
  ]
  assert not wrong


def test_every_module_has_a_room():
  rooms = {_room(module) for module in _GRAPH} - {_TOP}
  assert rooms == _MAY_IMPORT.keys()


def test_nothing_imports_a_command():
  commands = {m for m in _GRAPH if _room(m) == _TOP} - {'dst_t5x'}
  for module, imports in _GRAPH.items():
    assert not imports & commands, module


def test_there_are_no_cycles():
  done: set[str] = set()

  def visit(module, above):
    assert module not in above, ' -> '.join([*above, module])
    if module not in done:
      for imported in sorted(_GRAPH[module] - {'dst_t5x'}):
        visit(imported, [*above, module])
      done.add(module)

  for module in _GRAPH:
    visit(module, [])


def test_commands_are_thin():
  for module in _GRAPH:
    if _room(module) == _TOP:
      tree = ast.parse(_MODULES[module].read_text(encoding='utf-8'))
      code = [n for n in tree.body if not isinstance(n, ast.Expr)]
      lines = sum(node.end_lineno - node.lineno + 1 for node in code)
      assert lines <= 60, module


def test_no_other_room_names_a_part_of_a_network():
  """Neither in code, nor in texts, docstrings and comments."""
  for module, path in _MODULES.items():
    if _room(module) == 'models':
      continue
    text = path.read_text(encoding='utf-8')
    # With the slashes of a parameter's path.
    names = re.findall(r'(?i)[\w/]*(?:encoder|decoder)[\w/]*', text)
    assert set(names) <= _SEARCH | _ALSO.get(module, set()), module


def test_no_other_room_imports_a_family_of_networks():
  families = {
    f'dst_t5x.models.{path.name}'
    for path in (_PACKAGE / 'models').iterdir()
    if (path / '__init__.py').exists()
  }
  assert 'dst_t5x.models.t5' in families
  for module, imports in _GRAPH.items():
    # T5X's model is made for one family of networks.
    if _room(module) != 'models' and module != 'dst_t5x.t5x.model':
      packages = {'.'.join(name.split('.')[:3]) for name in imports}
      assert not packages & families, module


# What a run from stored batches imports; and what else needs no task.
_WITHOUT_TENSORFLOW = (
  *('dst_t5x.runs.training', 'dst_t5x.runs.evaluating'),
  *('dst_t5x.engine.stored', 'dst_t5x.engine.live', 'dst_t5x.score'),
  *('dst_t5x.data.vocabulary', 'dst_t5x.planning.estimate'),
  *('dst_t5x.convert', 'dst_t5x.fingerprint', 'dst_t5x.subset'),
)
_OF_TASKS = {
  *('clu', 'seqio', 't5', 'tensorflow', 'tensorflow_datasets'),
  'tensorflow_text',
}


def _imported_at_once(path):
  """Returns what a file imports when it is imported itself."""
  found = set()
  statements = ast.parse(path.read_text(encoding='utf-8')).body
  for node in statements:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
      found.add(node.module)
    elif isinstance(node, ast.With | ast.Try | ast.For):
      statements.extend(node.body)
  return found


def test_runs_from_stored_batches_import_no_tensorflow():
  to_visit = {*_WITHOUT_TENSORFLOW} | {
    module
    for module in _MODULES
    if _room(module) in ('adapters', 'core', 'method', 'models', 'subsets')
    and not module.endswith('.converter')  # Imported in a function.
  }
  seen: set[str] = set()
  while to_visit:
    module = to_visit.pop()
    seen.add(module)
    imports = _imported_at_once(_MODULES[module])
    assert not {name.split('.')[0] for name in imports} & _OF_TASKS, module
    to_visit |= (imports & _MODULES.keys()) - seen
  assert 'dst_t5x.engine.evaluation' in seen
  assert 'dst_t5x.runtime.quiet_tensorflow' not in seen
