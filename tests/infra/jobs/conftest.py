"""Fixtures of the tests of jobs."""

import pytest


@pytest.fixture
def ready(account, infra):
    """An account with a stack, an image and data."""
    infra("bootstrap")
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    account.put_object("data/pictures/validation/0.txt")
    return account
