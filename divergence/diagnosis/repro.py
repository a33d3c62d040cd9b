"""A folder that replays the first layer that fails, alone: the layer, its input, both outputs, a script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from divergence.diagnosis.emulate import LayerUnit
from divergence.errors import SourceError, one_line
from divergence.probes.pytorch.layer_call import replaced, snapshot
from divergence.probes.pytorch.placement import unhooked

if TYPE_CHECKING:
    from divergence.diagnosis.case import Case

_SCRIPT = '''"""Replays {site} alone: the reference's layer on the candidate's own input to it.

    python replay.py
"""

from pathlib import Path

import torch

HERE = Path(__file__).parent
layer = torch.load(HERE / "layer.pt", weights_only=False).eval()  # pickled: run only what you trust
given = torch.load(HERE / "inputs.pt", weights_only=False)
tensors = torch.load(HERE / "tensors.pt")

with torch.inference_mode():
    output = layer(*given["args"], **given["kwargs"])
hidden = output if isinstance(output, torch.Tensor) else output[0]
again = float((hidden - tensors["reference"]["hidden"]).abs().max())
print(f"replayed hidden against the recorded reference: max difference {{again:.3g}}")
for name, seen in tensors["candidate"].items():
    clean = tensors["reference"][name].double()
    error = float((seen.double() - clean).norm() / clean.norm())
    print(f"{{name}}: the candidate is off by {{error:.3g}} (relative L2)")
'''


def write(folder: Path, case: Case) -> str:
    """Writes the folder for a case and returns a remark for the report.

    Args:
        folder: to make; files of the same names in it are replaced.
        case: of the first layer that fails.

    Raises:
        SourceError: the layer cannot be pickled (its class is not importable), or the folder not written.
    """
    unit = case.unit
    if not isinstance(unit, LayerUnit):
        return f"{case.at} lies outside the layers: there is no layer to replay alone"
    call = unit.call
    assert call.hidden_at is not None
    args, kwargs = replaced(call.args, call.kwargs, call.hidden_at, unit.hidden.clone())
    given = {
        "args": tuple(snapshot(value) for value in args),
        "kwargs": {name: snapshot(value) for name, value in kwargs.items()},
    }
    tensors = {
        "reference": {name: tensor.clone() for name, tensor in case.clean.items()},
        "candidate": {name: tensor.clone() for name, tensor in case.candidate.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unhooked(call.module):
            torch.save(call.module, folder / "layer.pt")
        for name, value in (("inputs", given), ("tensors", tensors)):
            torch.save(value, folder / f"{name}.pt")
        (folder / "replay.py").write_text(_SCRIPT.format(site=case.at), encoding="utf-8")
    except Exception as error:
        raise SourceError(
            f"{folder}: {case.at} cannot be written for replay ({one_line(error)}); define the layer's "
            "class at "
            "the top level of a module that can be imported, or leave out --repro"
        ) from error
    return f"{case.at} can be replayed alone: python {folder / 'replay.py'}"
