"""The server's page, in a real browser."""

import contextlib
import re
import shutil
import threading

import numpy as np
import pytest
import serving
import subsets

from dst_t5x import subsets as subset_lib
from dst_t5x.serving import app as app_lib
from dst_t5x.tasks import gsm8k
from dst_t5x.tasks import trivia_qa
from dst_t5x.tasks import wmt

# By name: what the file says of itself. Anybody may have written it.
_FILES = {
  'a': {
    'task': 'demo_finetune',
    'epsilon': 1e-6,
    'step': 60,
    'scores': {'step': 60, 'eval/loss': 1.2345, 'demo_finetune/bleu': 12.3},
  },
  'b': {'task': 'gsm8k', 'epsilon': 0.02, 'scores': {}},
  'c' * 99: {'task': '<b>' * 40, 'epsilon': 'x', 'scores': 'much'},
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Three subset files and a damaged one."""
  folder = tmp_path_factory.mktemp('subsets')
  for i, (name, about) in enumerate(_FILES.items()):
    random = np.random.default_rng(i)
    seed = serving.seed(**serving.BYTES)
    found, _ = subsets.random_subset(seed, 0.01, random)
    subset_lib.save(folder / f'{name}.dst', found, about)
  (folder / 'broken.dst').write_bytes(b'nothing')
  return folder


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  """A real browser."""
  webdriver = pytest.importorskip('selenium.webdriver')
  driver = shutil.which('chromedriver')
  program = shutil.which('chromium') or shutil.which('google-chrome')
  if not driver or not program:
    pytest.skip('no chromium and chromedriver')
  options = webdriver.ChromeOptions()
  options.binary_location = program
  for option in (
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-dev-shm-usage',  # Which is small in a container.
    f'--user-data-dir={tmp_path_factory.mktemp("browser")}',
  ):
    options.add_argument(option)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  started = _started(webdriver, options, driver)
  yield started
  started.quit()


def _started(webdriver, options, driver, attempts=3):
  """Returns a browser.

  Selenium gives a driver half a minute to listen. A busy machine that reads
  the browser from its disk for the first time needs longer, once.
  """
  from selenium.common import exceptions

  for attempt in range(attempts):
    service = webdriver.ChromeService(executable_path=driver)
    try:
      return webdriver.Chrome(options=options, service=service)
    except exceptions.WebDriverException:
      service.stop()
      if attempt == attempts - 1:
        raise


class _Page:
  """The page of a service, as a user sees it."""

  def __init__(self, browser, service, port):
    from selenium.webdriver.support import ui

    self.browser, self.service, self._ui = browser, service, ui
    browser.get(f'http://127.0.0.1:{port}/')

  def find(self, id_):
    return self.browser.find_element('id', id_)

  def text(self, id_):
    return self.find(id_).get_property('textContent')

  def until(self, condition):
    self._ui.WebDriverWait(self.browser, 60, 0.05).until(lambda _: condition())

  def choose(self, number, name):
    self._ui.Select(self.find(f'subset-{number}')).select_by_value(name)

  def chosen(self):
    return [self.find(f'subset-{i}').get_property('value') for i in range(2)]

  def decode(self, text):
    self.find('prompt').clear()
    self.find('prompt').send_keys(text)
    self.find('go').click()

  def problems(self):
    """Returns the browser's messages about the page since the last call."""
    log = self.browser.get_log('browser')
    return [entry['message'] for entry in log if entry['level'] == 'SEVERE']


@pytest.fixture
def visit(browser, folder):
  """Returns a function that starts a server and opens its page."""
  with contextlib.ExitStack() as stack:

    def start(token=None):
      service = serving.service(folder)
      app = app_lib.create_app(service, token)
      port = stack.enter_context(serving.listening(app))
      page = _Page(browser, service, port)
      page.problems()
      return page

    yield start


def test_two_subsets_side_by_side(visit):
  page = visit()
  page.until(lambda: page.chosen() == ['a', 'b'])
  page.choose(0, '')  # The seed alone.
  page.decode('a <b>')
  for i, name in enumerate((None, 'b')):
    page.until(lambda i=i: 'tokens' in page.text(f'about-{i}'))
    tuned = serving.seed(**serving.BYTES)
    if name:
      tuned = subsets.random_subset(tuned, 0.01, np.random.default_rng(1))[1]
    assert page.text(f'answer-{i}') == serving.answer('a <b>', tuned)
  page.decode('x' * 60)
  page.until(lambda: 'pieces' in page.text('answer-1'))
  assert 'failed' in page.find('answer-1').get_attribute('class')
  # The refused input, which is no error of the page.
  assert all('422' in problem for problem in page.problems())


def test_what_the_files_say(visit):
  page = visit()
  page.until(lambda: page.chosen() == ['a', 'b'])
  names = [page.find(f'subset-{i}').accessible_name for i in range(2)]
  assert names == ['First subset', 'Second subset']
  share = re.escape(' % of the parameters')
  assert re.fullmatch(
    'task demo_finetune · ε = 1e-6 · step 60 · bleu 12.3 · eval/loss 1.23 · '
    rf'[\d.]+{share}',
    page.text('facts-0'),
  )
  assert page.text('facts-1').startswith('task gsm8k · ε = 0.02 · ')
  page.choose(1, 'c' * 99)
  assert page.text('facts-1').startswith(f'task {"<b>" * 40} · 0.99 % of')
  page.choose(1, '')
  assert page.text('facts-1') == 'the model before it was tuned'
  assert page.find('damaged').is_displayed()
  assert 'broken: it is no subset file' in page.text('damaged')
  assert not page.problems()


@pytest.mark.parametrize('width', [500, 1200])
def test_nothing_is_wider_than_the_window(visit, width):
  page = visit()
  page.until(lambda: page.chosen() == ['a', 'b'])
  page.browser.set_window_size(width, 800)
  page.choose(0, 'c' * 99)
  page.choose(1, 'c' * 99)
  page.decode('a' * 9)
  page.until(lambda: 'tokens' in page.text('about-1'))
  wide, window = page.browser.execute_script(
    'return [document.documentElement.scrollWidth, innerWidth]'
  )
  assert wide <= window
  answers = [page.find(f'answer-{i}').rect for i in range(2)]
  assert (answers[0]['y'] == answers[1]['y']) == (width > 1000)


def test_it_says_why_the_first_answer_takes_long(visit):
  page = visit()
  page.until(lambda: page.chosen() == ['a', 'b'])
  go_on = threading.Event()
  model = page.service.scheduler._model
  decode = model.decode
  model.decode = lambda *rows: go_on.wait(60) and decode(*rows)
  page.decode('a')
  for i in range(2):
    page.until(lambda i=i: 'compiled' in page.text(f'answer-{i}'))
    assert re.fullmatch(r'\d+ s', page.text(f'about-{i}'))
  assert not page.find('go').is_enabled()
  go_on.set()
  page.until(lambda: 'tokens' in page.text('about-0'))
  page.until(lambda: page.find('go').is_enabled())
  assert 'compiled' not in page.text('answer-0')


def test_an_example_of_the_task(visit):
  page = visit()
  page.until(lambda: page.chosen() == ['a', 'b'])
  for names, begins in (
    (('a', 'b'), 'cipher: '),
    (('b', 'a'), gsm8k.PREFIX),
    (('', 'a'), 'cipher: '),
    (('', ''), wmt.prefix('de-en')),
  ):
    for i, name in enumerate(names):
      page.choose(i, name)
    page.find('example').click()
    assert page.find('prompt').get_property('value').startswith(begins)


def test_examples_are_as_the_tasks_make_them():
  page = app_lib.PAGE.read_text(encoding='utf-8')
  for task, begins in (
    ('wmt22_de_en', wmt.prefix('de-en')),
    ('wmt21_en_de', wmt.prefix('en-de')),
    ('gsm8k', gsm8k.PREFIX),
    ('trivia_qa', trivia_qa.PREFIX),
  ):
    assert f"  {task}: '{begins}" in page


def test_the_token_is_asked_for(visit):
  page = visit(token='secret')
  page.until(lambda: page.find('problem').is_displayed())
  assert 'token' in page.text('problem')
  field = page.find('token')
  assert field.is_displayed()
  assert page.browser.switch_to.active_element == field
  page.problems()  # Refused, which the browser may have said before.
  field.send_keys('wrong\n')
  page.until(page.problems)  # Refused once more.
  assert page.chosen() == ['', '']
  field.clear()
  field.send_keys('secret\n')
  page.until(lambda: page.chosen() == ['a', 'b'])
  assert not page.find('problem').is_displayed()
