"""A demonstration in minutes: `python -m dst_t5x.demo --output=runs/demo`."""

from dst_t5x.runs import demo

if __name__ == '__main__':
  demo.main()
