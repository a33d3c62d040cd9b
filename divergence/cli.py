"""The command line. Exit status: 0 pass, 1 fail, 2 error."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from divergence import __version__
from divergence.cli_options import as_folder, common, comparison, engine, sample
from divergence.ending import Group
from divergence.errors import counted
from divergence.report_commands import diff, report, reports_into, shown_width
from divergence.working import check_writable

if TYPE_CHECKING:
    from divergence.chain_result import Chain
    from divergence.config import Config, Tolerance
    from divergence.pairs_result import Pairs
    from divergence.probes.tensorrt.options import EngineOptions
    from divergence.result import Comparison


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="divergence")
def main() -> None:
    """Find the layer, the tensor and the cause where a transformer in ONNX or TensorRT departs from
    the one in PyTorch."""


@main.command()
@comparison
@common
@engine
def compare(
    ref: str,
    cand: tuple[str, ...],
    inputs: tuple[str, ...],
    detail: bool,
    memory: int,
    config_file: Path | None,
    out: str | None,
    precision: str | None,
    tolerance: tuple[str, ...],
    exclude: tuple[str, ...],
    replay: Any,
    floor: str | None,
    ray: str | None,
    ray_gpus: float | None,
    keep_captures: bool,
    repro: Path | None,
    no_diagnosis: bool,
    **engine_options: Any,
) -> int:
    """Compare a candidate with a reference and give a verdict; several, and say which step is to blame;
    on several samples, all pairs of the two."""
    pairs = len(inputs) > 1 or ray is not None
    if keep_captures and out is None:
        raise click.UsageError("--keep-captures needs --out DIR to keep them in")
    if keep_captures and ray is not None:
        raise click.UsageError(
            "--keep-captures keeps what ran here; without --ray, or use divergence capture"
        )
    if repro is not None and (len(cand) > 1 or pairs):
        raise click.UsageError("--repro writes the first failing layer of one candidate; give one --cand")
    if ray_gpus is not None and ray is None:
        raise click.UsageError("--ray-gpus is what tasks on Ray ask for; give --ray too")
    config = _config(config_file)
    from divergence.chain import compare_chain
    from divergence.pairs import compare_pairs
    from divergence.pipeline import compare as compare_pair
    from divergence.reports.progress import progress

    options: dict[str, Any] = {
        "precision": precision,
        "tolerance": _tolerance(tolerance, config),
        "exclude": exclude,
        "detail": detail,
        "replay": replay,
        "floor": floor,
        "memory": memory << 20,
        "engine": _engine_options(engine_options, cand, config),
        "diagnose": not no_diagnosis,
        "config": config,
        "command": _command(),
    }
    if repro is not None:
        check_writable(repro)
    result: Comparison | Chain | Pairs
    only = inputs[0] if inputs else None
    with reports_into(out) as reports:
        reports.get_ready(several=pairs)
        options["keep"] = reports.folder if keep_captures else None
        with progress(sys.stderr, sys.stderr.isatty()) as shown:
            if pairs:
                result = compare_pairs(
                    ref, cand, inputs, **options, ray=ray, gpus=ray_gpus, done=reports.add, progress=shown
                )
            elif len(cand) == 1:
                result = compare_pair(ref, cand[0], only, **options, repro=repro, progress=shown)
            else:
                result = compare_chain(ref, cand, only, **options, progress=shown)
        reports.show(result)  # first: whatever comes of the reports, the verdict is known
        reports.write(result)
    return reports.finish(result)


@main.command()
@click.argument("folder", metavar="DIR")
def explain(folder: str) -> int:
    """Show how the causes in the report in DIR were found: every one tried, with its evidence."""
    from divergence.reports.explain import render_explanation
    from divergence.result import load_report

    result = load_report(folder)
    click.echo(render_explanation(result, width=shown_width(), color=sys.stdout.isatty()))
    return 0


@main.command()
@click.argument("source", metavar="SRC")
@sample
@common
@engine
@click.option("--out", required=True, metavar="DIR", help="Capture to make, a folder or its URL.")
@click.option(
    "--reference",
    metavar="CAPTURE",
    help="Capture of the reference, which helps to find the sites of an ONNX model.",
)
def capture(
    source: str,
    inputs: str | None,
    detail: bool,
    memory: int,
    config_file: Path | None,
    out: str,
    reference: str | None,
    **engine_options: Any,
) -> int:
    """Run SRC and record its sites, to compare elsewhere or later."""
    config = _config(config_file)
    if "://" not in out:
        check_writable(Path(out).parent)
    from divergence.captures import open_capture
    from divergence.pipeline import capture as run
    from divergence.reports.progress import progress

    with progress(sys.stderr, sys.stderr.isatty()) as shown:
        taken = run(
            source,
            inputs,
            out,
            detail=detail,
            reference=open_capture(reference) if reference else None,
            memory=memory << 20,
            engine=_engine_options(engine_options, [source], config),
            config=config,
            progress=shown,
        )
    click.echo(f"{out}: {counted(len(taken.sites), 'site')} of {taken.facts.source}")
    return 0


@main.command()
@click.argument("source", metavar="SRC")
@sample
@common
@engine
def inspect(
    source: str,
    inputs: str | None,
    detail: bool,  # noqa: ARG001 - shares the options of capture
    memory: int,
    config_file: Path | None,
    **engine_options: Any,
) -> int:
    """Show what sites SRC has, how they were found, and the precision of each operator."""
    config = _config(config_file)
    from divergence.inputs import load_inputs
    from divergence.reports.terminal import render_description
    from divergence.sources import open_source

    probe = open_source(
        source, config, memory=memory << 20, engine=_engine_options(engine_options, [source], config)
    )
    spec = inputs or config.inputs
    click.echo(render_description(probe.describe(load_inputs(spec, config.base) if spec else None)))
    return 0


@main.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.onnx")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="PLAN", help="Engine to write."
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    metavar="P",
    help="fp32 (without TF32), tf32, fp16, bf16, typed (the model's own types), fp8, int8.",
)
@click.option("--inputs", metavar="FILE", help="Build for the shapes of these inputs.")
@click.option(
    "--reference",
    metavar="CAPTURE",
    help="Capture of the reference on --inputs, which helps to find sites.",
)
@click.option(
    "--look",
    type=click.Choice(["outputs", "debug", "none"]),
    default="outputs",
    show_default=True,
    help="How sites are made visible: as outputs, keys and values as debug tensors (which spare fusions), "
    "or not.",
)
@click.option(
    "--plain/--no-plain", default=True, show_default=True, help="Also the engine without added outputs."
)
@click.option("--detail", is_flag=True, help="Also query, attention, norms and MLP of every layer.")
@click.option(
    "--shape", multiple=True, metavar="NAME=MIN,OPT,MAX", help="Shapes of an open input: x=1x1,1x128,1x512."
)
@click.option("--level", type=int, metavar="N", help="Builder optimization level, 0 to 5.")
@click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="Memory that tactics may use.")
@click.option("--timing-cache", type=click.Path(), metavar="FILE", help="Measured tactics, read and written.")
@click.option("--version-compatible", is_flag=True, help="Runs on later minor versions of TensorRT too.")
@click.option("--plugin", multiple=True, metavar="LIB", help="Plugin library to load first; several times.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="Configuration."
)
def build(
    model: Path,
    out: Path,
    precision: str,
    inputs: str | None,
    reference: str | None,
    look: Any,
    plain: bool,
    detail: bool,
    shape: tuple[str, ...],
    level: int | None,
    workspace: int | None,
    timing_cache: str | None,
    version_compatible: bool,
    plugin: tuple[str, ...],
    config_file: Path | None,
) -> int:
    """Build a TensorRT engine whose sites can be seen, and its map beside it."""
    config = _config(config_file)
    check_writable(out.parent)
    from divergence.captures import open_capture
    from divergence.inputs import load_inputs
    from divergence.probes.tensorrt.build import BuildOptions, build_engine, parse_shapes
    from divergence.reports.progress import progress

    options = BuildOptions(
        precision=precision,
        look=look,
        plain=plain,
        level=level,
        workspace_mib=workspace,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        profiles=parse_shapes(shape),
        plugins=plugin,
    )
    settings = config.sources.get(str(model))
    spec = inputs or config.inputs
    with progress(sys.stderr, sys.stderr.isatty()) as shown:
        sidecar = build_engine(
            Path(settings.path) if settings and settings.path else model,
            out,
            options,
            inputs=load_inputs(spec, config.base) if spec else None,
            reference=open_capture(reference) if reference else None,
            sites=settings.sites if settings else None,
            detail=detail,
            progress=shown,
        )
    for warning in sidecar.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(
        f"{out}: {sidecar.precision}, {counted(len(sidecar.outputs), 'site')} as {sidecar.look}, "
        f"built in {sidecar.seconds:.0f} s{f'; without them: {sidecar.plain}' if sidecar.plain else ''}"
    )
    return 0


@main.command()
@click.option("--out", callback=as_folder, metavar="DIR", help="Folder for the two reports.")
def demo(out: Path | None) -> int:
    """Run the main job on the bundled model: a clean ONNX export, and one with a planted fault."""
    from divergence.demo.run import run

    return run(out)


main.add_command(report)
main.add_command(diff)


def _engine_options(given: Mapping[str, Any], sources: Sequence[str], config: Config) -> EngineOptions:
    """How engines are run.

    Raises:
        click.UsageError: something is asked for, and none of the sources is an engine.
    """
    from divergence.probes.tensorrt.options import EngineOptions
    from divergence.sources import is_engine, settings_of

    options = EngineOptions(
        host=given["host"],
        context=given["context"],
        plugins=given["plugin"],
        profile=given["profile"],
        hazards=given["hazards"],
    )
    none = EngineOptions()
    asked = [f.name for f in dataclasses.fields(none) if getattr(options, f.name) != getattr(none, f.name)]
    known = [settings_of(source, config) for source in sources]
    if asked and all(settings is not None and not is_engine(settings) for settings in known):
        option = "--" + asked[0].removesuffix("s" if asked[0] == "plugins" else "")
        raise click.UsageError(f"{option} is for engines, and {', '.join(sources)} is none; leave it out")
    return options


def _config(path: Path | None) -> Config:
    from divergence.config import load_config

    return load_config(path)


def _tolerance(given: tuple[str, ...], config: Config) -> Tolerance:
    from divergence.config import parse_tolerance

    tolerance = config.tolerance
    for text in given:
        tolerance = parse_tolerance(text, tolerance)
    return tolerance


def _command() -> str:
    return shlex.join(["divergence", *sys.argv[1:]])
