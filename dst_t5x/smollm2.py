"""Tunes a real language model on a CPU: `python -m dst_t5x.smollm2 --help`."""

from dst_t5x.core import extras

if __name__ == '__main__':
  with extras.explained():
    from dst_t5x.runs import smollm2
  smollm2.main()
