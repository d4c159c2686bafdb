"""Converts checkpoints between T5X's format and Hugging Face's."""

import sys

from dst_t5x.checkpoints import conversion

if __name__ == '__main__':
  sys.exit(conversion.main(sys.argv[1:]))
