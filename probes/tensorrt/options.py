"""How engines are run: what the command line and the configuration can say about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """How engines are run.

    Attributes:
        host: `torch`, `pycuda`, `FILE.py:CLASS` (a class derived from one of `hosts`), or `both`: the
            first two, compared bit by bit.
        context: CUDA context of the pycuda host: `primary`, or `own`.
        plugins: libraries to load first.
        profile: optimization profile to run in.
        runs: number of runs, at least two, which are compared bit by bit.
        hazards: look for what the host forgets to wait for; always done where `host` is not `torch`.
    """

    host: str = "torch"
    context: str = "primary"
    plugins: tuple[str, ...] = ()
    profile: int = 0
    runs: int = 2
    hazards: bool = False
