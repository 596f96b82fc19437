"""The names of `tome.merge`: the functional API of `tomesd.merge`, for models of one's own."""

from ..merge import (
    bipartite_soft_matching,
    do_nothing,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    random_bipartite_soft_matching,
)

__all__ = [
    "bipartite_soft_matching",
    "do_nothing",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_wavg",
    "random_bipartite_soft_matching",
]
