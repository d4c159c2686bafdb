"""A demonstration in minutes: `python -m dst_t5x.demo --output=runs/demo`."""

from dst_t5x.core import extras

if __name__ == '__main__':
  with extras.explained():
    from dst_t5x.runs import demo
  demo.main()
