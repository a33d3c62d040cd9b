"""What an engine does with the modules of the reference, as text.

Renders the `contract` of `report.json`, whose schema
`divergence.probes.tensorrt.contract.Contract.to_json` documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from divergence.probes.tensorrt.clauses import short
from divergence.probes.tensorrt.contract import Contract
from divergence.reports import counted
from divergence.reports.page import Page

_ROLES = {"attention_product": "attention product"}
# Roles that the name of a module mostly tells already.
_PLAIN = frozenset({"projection", "norm", "mlp"})
_NAMED = 4


def render_contract(
    contract: Contract | Mapping[str, Any],
    width: int = 100,
    *,
    color: bool = False,
    ascii: bool = False,  # noqa: A002 (the flag's name)
) -> str:
    """The contract as text, without a newline at its end.

    Args:
        contract: what to show, or its JSON values.
        width: widest line, in character cells; at least 40 are used.
        color: with ANSI colours.
        ascii: with ASCII characters only.
    """
    page = Page(width=width, color=color, ascii_only=ascii)
    write_contract(page, contract.to_json() if isinstance(contract, Contract) else contract)
    return str(page).lstrip("\n")


def write_contract(page: Page, contract: Mapping[str, Any]) -> None:
    """Writes the JSON values of a contract onto `page`: modules, ignored requests, reformats, remarks."""
    rows = contract.get("rows") or ()
    layers = counted(int(contract.get("engine_layers") or 0), "layer")
    requested = f", built for {contract['requested']}," if contract.get("requested") else ""
    page.section("Contract", f"what the engine of {layers}{requested} does with each module")
    asked = {(item.get("module"), item.get("role")) for item in contract.get("ignored") or ()}
    page.pairs(_merged([(row, _fate(row, told=(row["module"], row["role"]) in asked)) for row in rows]))
    if not rows:
        page.labelled("-", "no ONNX node could be traced to a layer of the engine")
    for title, remark, items in (
        (
            "Ignored requests",
            "types that the ONNX graph asks for and the engine did not use",
            _sentences(contract),
        ),
        ("Reformats", "layers that only cast or copy", _reformats(contract.get("reformats") or ())),
        ("What the engine shows", "", list(contract.get("remarks") or ())),
    ):
        if items:
            page.section(title, remark)
            for item in items:
                page.labelled("-", item)


def _sentences(contract: Mapping[str, Any]) -> list[str]:
    return [str(item["sentence"]) for item in contract.get("ignored") or ()]


def _merged(rows: Sequence[tuple[Mapping[str, Any], str]]) -> list[tuple[str, str]]:
    """Labels and texts; neighbours of one parent with the same text share a line:
    `layers.*.self_attn.q_proj, k_proj`. A label that would be repeated is left out."""
    pairs: list[tuple[str, str]] = []
    last: tuple[str, str, str] | None = None
    label = ""
    for row, text in rows:
        module, role = str(row["module"]), str(row["role"])
        parent, _, leaf = module.rpartition(".")
        key = (parent, role, text)
        name = " ".join(filter(None, (module, "" if module and role in _PLAIN else _ROLES.get(role, role))))
        if key == last and role in _PLAIN:
            pairs[-1] = (f"{pairs[-1][0]}, {leaf}", text)
        else:
            pairs.append(("" if name == label else name, text))
        last, label = key, name
    return pairs


def _fate(row: Mapping[str, Any], *, told: bool) -> str:
    """`layers 0-17: Half, sums in Float; _gemm_mha_v2`; with what was asked for where `told`."""
    where = f"layer{'' if str(row['layers']).isdigit() else 's'} {row['layers']}: " if row["layers"] else ""
    precision = str(row["precision"])
    if precision == "mixed" and len(row["precisions"]) > 1:
        precision = ", ".join(f"{kind} ({n})" for kind, n in row["precisions"].items())
    said = [precision or _unseen(row)]
    if told:
        said.append(f"asked {row['asked']}")
    if row["accumulator"]:
        unknown = row["accumulator"] == "unknown"
        said.append("accumulator unknown" if unknown else f"sums in {row['accumulator']}")
    kernels = list(row["kernels"])
    more = f" and {len(kernels) - 1} more" if len(kernels) > 1 else ""
    return f"{where}{', '.join(said)}{f'; {short(kernels[0])}{more}' if kernels else ''}"


def _unseen(row: Mapping[str, Any]) -> str:
    """Why a row has no precision."""
    if row["folded"] == row["nodes"]:
        return "constant-folded"
    return "in no layer" if row["absent"] == row["nodes"] else "no floats"


def _reformats(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each kind: `24 casts BFloat16 -> Float: key_0, value_0, ... `."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for item in found:
        binding = min(item["source"], item["target"], key=len)
        kinds.setdefault((item["what"], item["before"], item["after"]), []).append(str(binding))
    lines = []
    for (what, before, after), names in kinds.items():
        types = f"{before} -> {after}" if what == "cast" else f"of {before}"
        word = what if len(names) == 1 else "copies" if what == "copy" else f"{what}s"
        more = ", ..." if len(names) > _NAMED else ""
        lines.append(f"{len(names)} {word} {types}: {', '.join(names[:_NAMED])}{more}")
    return lines
