"""What ranks tell each other, with the wire replaced by a variable."""

import pickle

import pytest
import torch

from nexus_cli.core.distributed import World
from nexus_cli.errors import ResourceError

WIRE: list[bytes] = []


class Wired(World):
    """A rank of two whose broadcasts go through ``WIRE``."""

    def broadcast_object(self, value):
        if self.is_main:
            WIRE[:] = [pickle.dumps(value)]
        return pickle.loads(WIRE[0])


MAIN, OTHER = (Wired(rank, 2, torch.device("cpu")) for rank in range(2))


def never():
    raise AssertionError("only the main rank makes it")


def test_what_the_main_rank_makes_every_rank_has():
    assert MAIN.from_main(lambda: {"a": 1}) == {"a": 1}
    assert OTHER.from_main(never) == {"a": 1}


def test_what_the_main_rank_cannot_make_every_rank_says_alike():
    def fail():
        raise ResourceError("no text", hint="use --data")

    for rank, make in ((MAIN, fail), (OTHER, never)):
        with pytest.raises(ResourceError, match="no text") as caught:
            rank.from_main(make)
        assert caught.value.hint == "use --data"


def test_one_rank_alone_needs_no_wire():
    assert World(0, 1, torch.device("cpu")).from_main(lambda: 3) == 3
