"""For all tests in several processes: one of pytest-xdist's workers runs them, with its processes.

Each worker would start processes of its own, and a machine of few cores would wait for them.
"""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.xdist_group("several processes"))
