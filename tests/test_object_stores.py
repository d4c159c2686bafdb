"""Places that are no folders."""

import commands
import pytest

from dst_t5x.errors import UserError


def test_a_store_without_checkpoints_is_refused():
  with pytest.raises(UserError, match='MODEL_DIR s3://bucket/run: Orbax'):
    commands.call(
      'train', *commands.PRETRAIN, "--gin.MODEL_DIR='s3://bucket/run'"
    )
