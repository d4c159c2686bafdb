"""SuperGLUE as T5 trains and scores it: `super_glue_v102_proportional`.

Wang et al. 2019, "SuperGLUE: A Stickier Benchmark for General-Purpose Language
Understanding Systems", arXiv 1905.00537. The text format is from Raffel et al.
2020, "Exploring the Limits of Transfer Learning", arXiv 1910.10683, App. D.

Texts, postprocessors, metrics and mixing rates are those of the `t5` package.
Two things differ: the vocabulary, and that training never downloads data. The
mixture `super_glue` has twelve tasks, each called `super_glue_…`:

  boolq cb copa multirc record rte wic   trained on and scored
  wsc_train dpr                          trained on: WSC's true referents, and
                                         Definite Pronoun Resolution
  wsc                                    scored
  axb axg                                diagnostics, test only, without a score

The benchmark's score is `super_glue/average`: each task's metrics are averaged,
then the eight tasks with a score on the validation split. The public test
splits have no labels, so scores on them mean nothing; `infer` decodes them.
"""

import dataclasses

import seqio
import t5.data.mixtures

from dst_t5x.data import task_vocabulary

NAME = 'super_glue'
T5_NAME = 'super_glue_v102_proportional'
_ALL = ('train', 'validation', 'test')
# t5's name of a task -> its name here after `super_glue_`, and its splits. The
# splits are listed because TFDS knows them only after the data is prepared.
TASKS = {
  'super_glue_boolq_v102': ('boolq', _ALL),
  'super_glue_cb_v102': ('cb', _ALL),
  'super_glue_copa_v102': ('copa', _ALL),
  'super_glue_multirc_v102': ('multirc', _ALL),
  'super_glue_record_v102': ('record', _ALL),
  'super_glue_rte_v102': ('rte', _ALL),
  'super_glue_wic_v102': ('wic', _ALL),
  'super_glue_wsc_v102_simple_train': ('wsc_train', ('train',)),
  'super_glue_wsc_v102_simple_eval': ('wsc', ('validation', 'test')),
  'dpr_v001_simple': ('dpr', ('train', 'test')),
  'super_glue_axb_v102': ('axb', ('test',)),
  'super_glue_axg_v102': ('axg', ('test',)),
}


def _add(task: seqio.Task) -> str:
  """Registers t5's task with our vocabulary and source; returns its name."""
  name, splits = TASKS[task.name]
  seqio.TaskRegistry.add(
    f'{NAME}_{name}',
    source=seqio.TfdsDataSource(
      task.source.tfds_dataset.name, splits=splits, read_only=True
    ),
    preprocessors=task.preprocessors,
    output_features={
      part: dataclasses.replace(
        feature, vocabulary=task_vocabulary.TaskVocabulary(part)
      )
      for part, feature in task.output_features.items()
    },
    postprocess_fn=task.postprocessor,
    metric_fns=task.metric_fns,
  )
  return f'{NAME}_{name}'


_MIXTURE = t5.data.mixtures.MixtureRegistry.get(T5_NAME)
seqio.MixtureRegistry.add(
  NAME, [(_add(task), _MIXTURE.get_rate(task)) for task in _MIXTURE.tasks]
)
