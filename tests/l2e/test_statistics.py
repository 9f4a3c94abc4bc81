"""The median without a wait, against torch's own."""

import pytest
import torch

from l2e import statistics

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "values",
    [[3.0], [2.0, 1.0], [NAN, 5.0, 1.0, 3.0], [NAN, 4.0, NAN, 1.0], [INF, 2.0, -INF], [NAN]],
)
def test_the_median_is_that_of_the_numbers(values):
    values = torch.tensor(values)
    torch.testing.assert_close(statistics.median(values), values.nanmedian(), equal_nan=True)
