"""Arguments of forwards, as hosts name them, rename them, or do not name them."""

import pytest
from torch import nn

from tomesd.hosts.hooks import Argument


def module(forward):
    return type("Host", (nn.Module,), {"forward": forward})()


@pytest.mark.parametrize(
    ("forward", "name", "position", "args", "kwargs", "found"),
    [
        (lambda self, x, t: 0, "t", 1, (1, 2), {}, 2),
        (lambda self, x, t: 0, "t", 1, (1,), {"t": 2}, 2),
        (lambda self, t, x: 0, "t", 1, (1, 2), {}, 1),  # its own place counts, not the usual one
        (lambda self, *args, **kwargs: 0, "t", 1, (1, 2), {}, 2),
        (lambda self, *args, **kwargs: 0, "t", 1, (1,), {"t": 2}, 2),
        (lambda self, x, **kwargs: 0, "t", 1, (1, 2), {"t": 3}, 3),  # there is no second place
        (lambda self, x, *more, t: 0, "t", 1, (1, 2, 4), {"t": 3}, 3),
        (lambda self, image: 0, "x", 0, (1,), {}, 1),  # the first one, whatever its name
        (lambda self, image: 0, "x", 0, (), {"image": 1}, 1),
        (lambda self, x, t=None: 0, "t", 1, (1,), {}, None),
    ],
)
def test_an_argument_is_found_where_the_caller_put_it(forward, name, position, args, kwargs, found):
    argument = Argument(module(forward), name, position)
    assert argument.get(args, kwargs) == found
    args, kwargs = argument.put(args, kwargs, "new")
    assert argument.get(args, kwargs) == "new"


@pytest.mark.parametrize("position", [None, 1])
def test_a_parameter_that_is_not_there_is_named(position):
    host = module(lambda self, latent, when: 0)
    with pytest.raises(ValueError, match="Host has no parameter timestep, only latent, when"):
        Argument(host, "timestep", position)
