"""The model that most tests of models look at."""

import importlib.util
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("tokenizers"):
    from mmkernels.models.multimodal import MultimodalModel
    from tests.models import small


@pytest.fixture(scope="session")
def shared_model() -> "MultimodalModel":
    return small.build()


@pytest.fixture(params=[True, False], ids=["kernels", "eager"])
def model(
    shared_model: "MultimodalModel", request: pytest.FixtureRequest
) -> Iterator["MultimodalModel"]:
    """A random model that has everything, with kernels and without; leave its weights alone."""
    shared_model.use_kernels(request.param)
    yield shared_model
    shared_model.zero_grad()
