"""Entry of the command ``subgen``: says what to install where the command line's libraries are missing."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "subgen":
            raise
        sys.exit(f"the command line needs {error.name}: pip install 'subgen-attention[cli]'")
    app()


if __name__ == "__main__":
    main()
