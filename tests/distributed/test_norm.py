"""The norm over every rank's data, with real processes."""

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import Job

pytestmark = pytest.mark.slow


def test_two_ranks_normalise_by_the_data_of_both(tmp_path: Path) -> None:
    one, other = Job("norm_job.py", tmp_path, 2).results()
    assert "needs process_group: a run of several ranks" in one["refused"]
    assert torch.equal(one["moments"], other["moments"])
    torch.testing.assert_close(one["moments"], torch.tensor([[1.0] * 4, [10.0] * 4]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one["normed"], torch.full((6, 4), -1.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other["normed"], torch.full((6, 4), 1.0), rtol=1e-3, atol=1e-3)
