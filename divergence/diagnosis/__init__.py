"""Diagnosis: names the cause of the first divergence, and proves it by emulation.

`causes/` holds one file a cause. Each offers faults to put into the reference's layer; how much of
the candidate's error such a fault explains decides between them.
"""

from __future__ import annotations

from divergence.diagnosis.case import Given
from divergence.diagnosis.own import OwnWeights
from divergence.diagnosis.search import Found, Search

__all__ = ["Found", "Given", "OwnWeights", "Search"]
