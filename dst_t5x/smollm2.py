"""Tunes a real language model on a CPU: `python -m dst_t5x.smollm2 --help`."""

from dst_t5x.runs import smollm2

if __name__ == '__main__':
  smollm2.main()
