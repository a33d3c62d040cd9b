"""`python -m divergence`, where the command is not on the path."""

from __future__ import annotations

from divergence.cli import main

if __name__ == "__main__":
    main()
