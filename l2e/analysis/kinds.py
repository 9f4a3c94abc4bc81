"""Which activation of a passage an analysis is of."""

from typing import Any

from l2e.analysis.analysis import option

# The activation after (post) or before (pre) the non-linearity, its maximum or its mean over the
# passage's valid tokens.
KINDS = ("post_max", "post_mean", "pre_max", "pre_mean")
PROBED_KIND = "pre_mean"


def kind_option(default: str) -> Any:
    """The option that says which of KINDS an analysis is of."""
    told = "activation site and aggregation over a passage's tokens"
    return option(default, told, choices=KINDS)
