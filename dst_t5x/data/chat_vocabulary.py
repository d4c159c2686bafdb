"""A vocabulary that puts texts into a chat template.

This is the one place where prompts of tuned models are formed, for training,
evaluation, `infer` and servers:

    chat = vocabulary.chosen('/models/SmolLM2', chat_template=True)
    prompt = chat.encode('upper: plum')     # Ends where the answer begins.
    answer = chat.answers.encode('PLUM')    # Without the end of the turn.
    chat.decode([*answer, chat.eos_id])     # 'PLUM'

The ids are those of transformers' `apply_chat_template`. The token before every
text, which networks put there, is left out. A text ends with the token that
ends a turn of the assistant; what the template has behind it is never read.
"""

from collections.abc import Iterable, Sequence
import functools
from typing import Any, NamedTuple

from dst_t5x.core.errors import UserError
from dst_t5x.data import chat_template
from dst_t5x.data import conversations
from dst_t5x.data import python_vocabulary

# What an answer is put behind: how it looks does not depend on the question.
_QUESTION = {'role': 'user', 'content': 'question'}
_PROBE = 'answer-271828'


class _Turn(NamedTuple):
  """What a template has around an answer.

  Attributes:
    prompt: the text that asks for it.
    space: the blanks between the prompt and it.
    end: the text after it.
    end_ids: the ids at the end of the text, from the token that ends the turn
      on; none where no token does.
  """

  prompt: str
  space: str
  end: str
  end_ids: tuple[int, ...]


class ChatVocabulary(python_vocabulary.PythonVocabulary):
  """A tokenizer and its chat template; files are read on first use.

  Attributes:
    base: the vocabulary of plain texts.
  """

  def __init__(self, base: Any, encodes_answers: bool = False) -> None:
    """Takes what texts are.

    Args:
      base: the vocabulary of plain texts; the template is in its folder.
      encodes_answers: whether texts are answers of the assistant. Otherwise
        they are questions; see `conversations.of_text`.
    """
    super().__init__()
    self.base = base
    self._encodes_answers = encodes_answers

  @functools.cached_property
  def answers(self) -> 'ChatVocabulary':
    """The vocabulary of the assistant's answers."""
    return ChatVocabulary(self.base, encodes_answers=True)

  @functools.cached_property
  def template(self) -> chat_template.ChatTemplate:
    """The template.

    Raises:
      UserError: there is none, or it is damaged.
    """
    if not hasattr(self.base, 'folder'):
      raise UserError(
        'the VOCABULARY has no chat template: set CHAT_TEMPLATE = False, or'
        " VOCABULARY to the folder of the model's own tokenizer.json"
      )
    return chat_template.read(self.base.folder, self.base.special_tokens)

  @functools.cached_property
  def _turn(self) -> _Turn:
    prompt = self.template.render([_QUESTION], asks=True)
    space, _, end = self._after(prompt, _PROBE).partition(_PROBE)
    if space.strip():
      raise UserError(
        f'{self.template.where} has {space!r} between a prompt and its answer:'
        ' no task can be trained with it'
      )
    ids = self.base.encode_marked(end)
    control = set(self.base.control_tokens.values())
    first = next((i for i, number in enumerate(ids) if number in control), None)
    end_ids = () if first is None else tuple(ids[first:])
    return _Turn(prompt, space, end, end_ids)

  def _after(self, prompt: str, answer: str) -> str:
    """Returns the text of a conversation from the end of its prompt on."""
    said = {'role': 'assistant', 'content': answer}
    text = self.template.render([_QUESTION, said], asks=False)
    if not text.startswith(prompt):
      raise UserError(
        f'{self.template.where} does not begin a conversation as its prompt:'
        ' no task can be trained with it'
      )
    return text[len(prompt) :]

  def load(self) -> None:
    """Reads the template.

    Raises:
      UserError: there is none, or it cannot be used.
    """
    _ = self._turn

  def check_messages(self, text: str) -> None:
    """Raises UserError if the template refuses the messages of a text."""
    self.template.render(conversations.of_text(text), asks=True)

  @property
  def space(self) -> str:
    """The blanks between a prompt and its answer."""
    return self._turn.space

  @functools.cached_property
  def begin_id(self) -> int | None:
    """The token before every text; None for none."""
    begin = self.base.begin_id
    ids = self.base.encode_marked(self._turn.prompt)
    return begin if begin is not None and ids[0] == begin else None

  @property
  def bos_id(self) -> int | None:
    """Id of the begin of a sequence."""
    return self.base.bos_id

  @property
  def eos_id(self) -> int | None:
    """The token that ends a turn of the assistant."""
    end = self._turn.end_ids
    return end[0] if end else self.base.eos_id

  @property
  def unk_id(self) -> int | None:
    """Id of whatever the vocabulary does not know."""
    return self.base.unk_id

  @property
  def _base_vocab_size(self) -> int:
    return self.base.vocab_size

  def _encode(self, s: str) -> Sequence[int]:
    return self._encode_answer(s) if self._encodes_answers else self._prompt(s)

  def _prompt(self, text: str) -> Sequence[int]:
    prompt = self.template.render(conversations.of_text(text), asks=True)
    ids = self.base.encode_marked(prompt)
    return ids if self.begin_id is None else ids[1:]

  def _encode_answer(self, text: str) -> Sequence[int]:
    turn = self._turn
    after = self._after(turn.prompt, text)
    if turn.end_ids:
      return self.base.encode_marked(after)[: -len(turn.end_ids)]
    return self.base.encode_marked(after.removesuffix(turn.end))

  def _decode(self, ids: Iterable[int]) -> str:
    # To the base, the token that ends a turn may be one of the text.
    text = self.base.decode([i for i in ids if i != self.eos_id])
    return text.removeprefix(self._turn.space)

  def __eq__(self, other: Any) -> bool:
    return (
      isinstance(other, ChatVocabulary)
      and self.base == other.base
      and self._encodes_answers == other._encodes_answers
    )

  __hash__ = None  # type: ignore[assignment]
