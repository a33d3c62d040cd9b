"""A comparison as a table of pandas, a row a site in execution order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from divergence.result import Comparison

COLUMNS: Mapping[str, str] = {
    "site": "address; the index of the table",
    "stack": 'name of the layer stack, "" where there is one only',
    "layer": "index of the layer (Int64), missing for an output of the model",
    "tensor": "key, value, hidden, ..., or the name of an output",
    "call": "1 for the first call of the layer within the run",
    "verdict": "pass, fail or error",
    "reason": "why, where it is not pass; a remark otherwise",
    "mse": "mean squared error, in squared units of the tensor; lower is better",
    "max_abs": "largest absolute difference, in units of the tensor; lower is better",
    "mean_abs": "mean absolute difference, in units of the tensor; lower is better",
    "rel_l2": "L2 norm of the difference over that of the reference: the cumulative error; lower is better",
    "row_rel_l2": "median over valid tokens of the relative L2 error; lower is better",
    "cosine": "cosine of the angle between both tensors; higher is better",
    "ref_min": "least finite value of the reference at valid tokens",
    "ref_max": "largest finite value of the reference at valid tokens",
    "cand_min": "least finite value of the candidate at valid tokens",
    "cand_max": "largest finite value of the candidate at valid tokens",
    "ref_nonfinite": "number of NaN and Inf in the reference",
    "cand_nonfinite": "number of NaN and Inf in the candidate",
    "floor": "noise floor of the cumulative error, as relative L2 error",
    "ratio": "cumulative error over its floor; lower is better",
    "introduced": "relative L2 error that the layer adds (replay); lower is better",
    "introduced_floor": "noise floor of that layer",
    "introduced_ratio": "introduced error over that floor; lower is better",
    "bit_equal": "whether both tensors have the same bits",
    "padded_max_abs": "largest difference at padded tokens, which count for nothing else",
    "ref_dtype": "dtype of the reference's tensor",
    "cand_dtype": "dtype of the candidate's tensor",
    "shape": "shape of the reference's tensor, a tuple",
}
_TEXT = ("stack", "tensor", "verdict", "reason", "ref_dtype", "cand_dtype")
_WHOLE = ("layer", "call", "ref_nonfinite", "cand_nonfinite")
_OBJECTS = ("shape",)


def to_frame(comparison: Comparison) -> pd.DataFrame:
    """The sites of `comparison` as a `DataFrame` with the columns of `COLUMNS`, indexed by `site`.

    Figures that do not exist are missing values: NaN, or `<NA>` in the column `layer`.
    """
    import pandas as pd

    index = pd.Index([s.site for s in comparison.sites], name="site", dtype="object")
    columns = {}
    for name in list(COLUMNS)[1:]:
        values = [getattr(s, name) for s in comparison.sites]
        if name in _TEXT or name in _OBJECTS:
            kind = "object"
        elif name in _WHOLE:
            kind = "Int64"
        else:
            kind = "bool" if name == "bit_equal" else "float64"
        columns[name] = pd.Series(values, index=index, dtype=kind)
    return pd.DataFrame(columns, index=index)
