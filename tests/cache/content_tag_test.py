import random

from infinite_llm.cache.content_tag import content_tag, content_tags


def test_many_tags_are_those_of_each():
  rng = random.Random(0)
  logical_ids = [0, 1, 2**31, *(rng.randrange(2**20) for _ in range(200))]
  epochs = [1, 2**32 - 1, 0, *(rng.randrange(2**32) for _ in range(200))]

  for uid, filled in ((1, 8), (2**32 - 1, 64), (rng.randrange(2**32), 256)):
    tags = content_tags(
      uid=uid, logical_ids=logical_ids, epochs=epochs, filled=filled
    )
    assert tags == [
      content_tag(uid=uid, logical_id=number, epoch=epoch, filled=filled)
      for number, epoch in zip(logical_ids, epochs, strict=True)
    ]


def test_no_rblocks_have_no_tags():
  assert content_tags(uid=1, logical_ids=[], epochs=[], filled=8) == []
