"""What a host forgets to wait for: runs it as it is, and with everything that it could race made late.

A correct host gives the same bits whether its copies are fast or slow. So its run is compared with
one that waits for the device after every step, with one whose input copies start some 50 ms late,
with one whose engine starts some 50 ms late, and with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from divergence.probes.tensorrt.hosts import Host, Stage
from divergence.probes.tensorrt.poison import NAN_BYTE, differences

if TYPE_CHECKING:
    import torch

_CLAIMS = {
    "synchronised": "results change when the host waits for the device after every step",
    "late inputs": "results change when the copy of the inputs is late: the engine does not wait for it",
    "late engine": "results change when the engine is late: the host reads outputs before they are written",
    "repeated": "results change from run to run",
}


@dataclass(frozen=True)
class Hazard:
    """A way of running that gave other bits.

    Attributes:
        trial: `synchronised`, `late inputs`, `late engine` or `repeated`.
        outputs: outputs that differed, with the number of elements that did.
        claim: what follows, in words.
    """

    trial: str
    outputs: Mapping[str, int]
    claim: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def cycle(
    host: Host, byte: int, *, settled: bool = False, late: Stage | None = None
) -> dict[str, torch.Tensor]:
    """One run on poisoned buffers; returns the outputs as the host reads them.

    Args:
        host: a host that has its buffers.
        byte: to poison with.
        settled: wait for the device after every step.
        late: which step to delay.
    """
    host.poison(byte)
    if late == "upload":
        host.delay("upload")
    host.upload()
    if settled:
        host.synchronize()
    if late == "execute":
        host.delay("execute")
    host.execute()
    if settled:
        host.synchronize()
    host.download()
    host.finish()
    outputs = host.outputs()
    host.synchronize()
    return outputs


def find_hazards(host: Host, runs: int = 2) -> list[Hazard]:
    """Runs `host` in every way that must not change its results, `runs` times each."""
    truth = cycle(host, NAN_BYTE, settled=True)
    trials: list[tuple[str, dict[str, Any]]] = [
        ("repeated", {"settled": True}),
        ("synchronised", {}),
        ("late inputs", {"late": "upload"}),
        ("late engine", {"late": "execute"}),
    ]
    found = []
    for name, how in trials:
        differing: dict[str, int] = {}
        for _ in range(runs):
            for output, count in differences(truth, cycle(host, NAN_BYTE, **how)).items():
                differing[output] = max(count, differing.get(output, 0))
        if differing:
            found.append(Hazard(name, differing, _CLAIMS[name]))
    return found
