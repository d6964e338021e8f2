"""What tests of faults share."""

import pytest


@pytest.fixture
def folders(tmp_path):
    """Of a run that nothing happens to, and of one that must come to the same."""
    made = tmp_path / "whole", tmp_path / "other"
    for folder in made:
        folder.mkdir()
    return made
