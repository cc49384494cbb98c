"""Optional packages: what is missing, and how to install it."""

import importlib.util
from collections.abc import Mapping


def require(needs: Mapping[str, str], what: str) -> None:
    """Looks whether packages are installed, all of them before anything is begun.

    Args:
        needs: what to import -> what to install, with pip's options before it.
        what: needs them.

    Raises:
        ModuleNotFoundError: one is missing; the message has the commands for all that are.
    """
    missing = [package for name, package in needs.items() if importlib.util.find_spec(name) is None]
    plain = [package for package in missing if not package.startswith("-")]
    commands = [f"pip install {' '.join(plain)}"] if plain else []
    commands += [f"pip install {package}" for package in missing if package.startswith("-")]
    if commands:
        raise ModuleNotFoundError(
            f"{what} needs packages that are not installed: {' && '.join(commands)}"
        )
