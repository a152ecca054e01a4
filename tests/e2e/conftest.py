"""What tests of trainers share."""

from typing import Any

import pytest

from scoring.model import build_vocabulary


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A vocabulary of a few words."""
    return build_vocabulary(["some words to learn"] * 3, 280, [], tmp_path_factory.mktemp("vocabulary"))
