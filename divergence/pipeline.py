"""The main job: reference and candidate to a `Comparison`, one stage after another."""

from __future__ import annotations

import contextlib
import gc
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from divergence.alignment import Alignment, Pair, align
from divergence.captures import Capture, CaptureWriter
from divergence.comparison import compare_tensors
from divergence.config import Config, Tolerance, load_config
from divergence.errors import ConfigurationError, InputError, one_line
from divergence.inputs import digest, load_inputs, token_masks
from divergence.noise import Floor, emulated, measure
from divergence.precision import check_precision
from divergence.probes import Probe, Progress, silent
from divergence.replay import Introduced, Replayer, ReplayResult
from divergence.result import Comparison, Policy, SiteResult
from divergence.sites import matches
from divergence.sources import open_source
from divergence.verdict import Judgement, conclusive, first_divergence, judge, overall

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from divergence.comparison.metrics import Metrics
    from divergence.probes.pytorch import PyTorchProbe
    from divergence.sites import Site

Inputs = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Options:
    """Choices of a comparison; see `compare`."""

    precision: str | None = None
    detail: bool = False
    replay: Literal["auto", "always", "never"] = "auto"
    floor: object = None
    memory: int = 512 << 20
    command: str = ""
    diagnose: bool = True
    repro: Path | None = None


def compare(
    ref: object,
    cand: object,
    inputs: Inputs | str | None = None,
    *,
    precision: str | None = None,
    tolerance: Tolerance | None = None,
    exclude: Sequence[str] = (),
    detail: bool = False,
    replay: Literal["auto", "always", "never"] = "auto",
    floor: object = None,
    memory: int = 512 << 20,
    keep: Path | None = None,
    config: Config | None = None,
    command: str = "",
    diagnose: bool = True,
    repro: Path | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compares a candidate with a reference, layer by layer.

    Args:
        ref: the reference: a source (see `divergence.sources.open_source`).
        cand: the candidate: a source.
        inputs: tensors by input name, or where to load them from; by default the configuration's.
        precision: what the candidate is meant to run in, where it does not show it itself.
        tolerance: what to judge by; by default the configuration's.
        exclude: patterns of sites not to compare, beside the configuration's.
        detail: also compare query, attention, norms and MLP of every layer.
        replay: `auto` replays the reference's layers on the candidate's inputs unless the cumulative
            errors alone settle that the candidate passes.
        floor: a source whose error against the reference is the noise floor, where the reference is no
            PyTorch module that could be run in the candidate's precision.
        memory: bytes of an ONNX model's tensors to hold at a time.
        keep: folder to keep both captures in.
        config: the configuration; by default the one found in the current folder.
        command: what the user ran, for the report.
        diagnose: look for the cause when the candidate fails.
        repro: folder to write the first failing layer to, so that it can be replayed alone.
        progress: told about long work.

    Raises:
        DivergenceError: the question cannot be asked; the message says why and how to mend it.
    """
    started = time.monotonic()
    config = load_config() if config is None else config
    options = Options(
        check_precision(precision) if precision else None,
        detail,
        replay,
        floor,
        memory,
        command,
        diagnose,
        repro,
    )
    tensors = _inputs(inputs, config)
    with _folder(keep) as folder, _quiet_collector():
        job = _Job(config, options, tensors, tolerance or config.tolerance, folder, progress)
        result = job.run(ref, cand, (*config.exclude, *exclude))
    environment = {**result.environment, "seconds": round(time.monotonic() - started, 3)}
    return replace(result, environment=environment)


def capture(
    source: object,
    inputs: Inputs | str | None,
    path: str | Path,
    *,
    detail: bool = False,
    reference: Capture | None = None,
    memory: int = 512 << 20,
    config: Config | None = None,
    progress: Progress = silent,
) -> Capture:
    """Runs `source` on `inputs` and records all its sites in the folder `path`.

    Args:
        source, inputs, detail, memory, config, progress: as for `compare`.
        path: folder to make; an existing capture there is replaced when the new one is complete.
        reference: capture of the reference, which helps to find the sites of an ONNX model.

    Raises:
        DivergenceError: the source cannot be run, or the capture cannot be written.
    """
    config = load_config() if config is None else config
    tensors = _inputs(inputs, config)
    probe = open_source(source, config, reference=reference, memory=memory)
    return record(probe, tensors, Path(path), detail=detail, progress=progress)


def record(
    probe: Probe, inputs: Inputs, path: Path, *, detail: bool, progress: Progress, **run: Any
) -> Capture:
    """Runs `probe` into a capture at `path`."""
    with CaptureWriter(path) as writer:
        facts = probe.run(inputs, writer, detail=detail, progress=progress, **run)
        for stack, mask in token_masks(inputs, facts.stacks).items():
            writer.add_mask(stack, mask)
        return writer.close(facts, digest(inputs))


def _inputs(inputs: Inputs | str | None, config: Config) -> Inputs:
    if inputs is None:
        if config.inputs is None:
            raise InputError(
                "no inputs: give --inputs FILE (.safetensors, .npz, FILE.py:FUNC), "
                "or set inputs in divergence.toml"
            )
        inputs = config.inputs
    return load_inputs(inputs, config.base) if isinstance(inputs, str) else dict(inputs)


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="divergence-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keeps the garbage collector from walking what was there before: with a large model and its
    libraries loaded, a full collection takes half a second and finds nothing."""
    if gc.get_freeze_count():  # someone else's choice, which unfreezing would undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Job:
    """One comparison under way."""

    def __init__(
        self,
        config: Config,
        options: Options,
        inputs: Inputs,
        tolerance: Tolerance,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.config = config
        self.options = options
        self.inputs = inputs
        self.tolerance = tolerance
        self.folder = folder
        self.progress = progress
        self.notes: list[str] = []

    def run(self, ref: object, cand: object, exclude: Sequence[str]) -> Comparison:
        probe = open_source(ref, self.config)
        pytorch = _as_pytorch(probe)
        self.reference = self._record(probe, "reference", **({"record": True} if pytorch else {}))
        candidate_probe = open_source(cand, self.config, reference=self.reference, memory=self.options.memory)
        self.candidate = self._record(candidate_probe, "candidate")
        settings = self.config.sources.get(str(cand)) if isinstance(cand, str | Path) else None
        self.alignment: Alignment = align(
            self.reference.entries,
            self.candidate.entries,
            exclude=exclude,
            axes=settings.axes if settings else None,
        )
        known = (*self.reference.entries, *self.candidate.entries)
        self.notes += [
            f"the pattern '{pattern}' excludes nothing: no site matches it"
            for pattern in exclude
            if not any(matches(site, pattern) for site in known)
        ]
        self.pairs = {pair.reference: pair for pair in self.alignment.pairs}
        metrics = {site: self._metrics(pair) for site, pair in self.pairs.items()}
        precision, precision_from = self._precision()
        floors: Mapping[Site, Floor] = {}
        floor_from = ""
        replayed = ReplayResult({})
        if not all(m.bit_equal for m in metrics.values()):
            if any(self.tolerance.judges_by_floor(site) for site in metrics):
                floors, floor_from = self._floors(pytorch, precision)
            replayed = self._replay(pytorch, precision, metrics, floors)
        self.notes += replayed.notes
        result = self._result(metrics, floors, replayed.introduced, precision, precision_from, floor_from)
        wanted = self.options.diagnose or self.options.repro is not None
        if result.verdict != "fail" or pytorch is None or not wanted:
            return result
        return self._diagnosed(result, pytorch, precision)

    def _record(self, probe: Probe, name: str, **run: Any) -> Capture:
        path = self.folder / f"{name}.capture"
        return record(probe, self.inputs, path, detail=self.options.detail, progress=self.progress, **run)

    def _candidate_tensor(self, site: Site) -> Tensor | None:
        pair = self.pairs.get(site)
        return None if pair is None else pair.layout.apply(self.candidate.tensor(pair.candidate))

    def _reference_tensor(self, site: Site) -> Tensor | None:
        return self.reference.tensor(site) if site in self.reference.entries else None

    def _axes(self, site: Site) -> tuple[str, ...]:
        return self.reference.entries[site].axes

    def _mask(self, site: Site, tensor: Tensor) -> Tensor | None:
        return valid_tokens(self.reference, site, tensor)

    def _metrics(self, pair: Pair, taken: Capture | None = None) -> Metrics:
        """The pair's tensor in `taken` (the candidate's capture by default) against the reference's."""
        ref = self.reference.tensor(pair.reference)
        cand = pair.layout.apply((taken or self.candidate).tensor(pair.candidate))
        return compare_tensors(
            ref, cand, axes=self._axes(pair.reference), mask=self._mask(pair.reference, ref)
        )

    def _precision(self) -> tuple[str, str]:
        if self.options.precision:
            return self.options.precision, "--precision"
        if self.candidate.facts.precision:
            return self.candidate.facts.precision, "read from the candidate"
        raise ConfigurationError(
            f"{self.candidate.facts.source}: does not show which precision it runs in; give --precision"
        )

    def _floors(self, pytorch: PyTorchProbe | None, precision: str) -> tuple[Mapping[Site, Floor], str]:
        if self.options.floor is not None:
            return self._floors_from(self.options.floor, precision)
        if pytorch is None:
            raise ConfigurationError(
                f"{self.reference.facts.source}: only a PyTorch reference can be run in {precision} for the "
                "noise floor; give --floor SRC, or judge by absolute limits (--tolerance rel_l2=1e-2)"
            )
        run_in = emulated(self.reference.facts.precision, precision)
        floors = measure(
            pytorch,
            self.inputs,
            self.reference,
            precision,
            self._mask,
            detail=self.options.detail,
            progress=self.progress,
        )
        return floors, f"the reference run in {run_in}"

    def _floors_from(self, source: object, precision: str) -> tuple[Mapping[Site, Floor], str]:
        probe = open_source(source, self.config, reference=self.reference, memory=self.options.memory)
        taken = self._record(probe, "floor")
        floors = {
            pair.reference: Floor.of(self._metrics(pair, taken), precision)
            for pair in align(self.reference.entries, taken.entries).pairs
        }
        return floors, f"given: {taken.facts.source}"

    def _judge(
        self,
        metrics: Mapping[Site, Metrics],
        floors: Mapping[Site, Floor],
        introduced: Mapping[Site, Introduced],
    ) -> dict[Site, Judgement]:
        unseen = self.candidate.facts.unseen_inf
        return {
            site: judge(
                site,
                m,
                floors.get(site),
                introduced.get(site),
                self.tolerance,
                unseen.get(str(self.pairs[site].candidate), ""),
            )
            for site, m in metrics.items()
        }

    def _replay(
        self,
        pytorch: PyTorchProbe | None,
        precision: str,
        metrics: Mapping[Site, Metrics],
        floors: Mapping[Site, Floor],
    ) -> ReplayResult:
        if self.options.replay == "never":
            return ReplayResult({}, ("replay was switched off: errors are judged cumulatively",))
        judged = self._judge(metrics, floors, {})
        settled = conclusive([(judged[s], floors.get(s)) for s in judged], self.tolerance.ratio)
        if self.options.replay == "auto" and settled:
            return ReplayResult({})
        if pytorch is None:
            return ReplayResult(
                {}, ("the reference is no PyTorch module, so nothing was replayed: errors are cumulative",)
            )
        if not any(site.tensor == "hidden" for site in metrics):
            return ReplayResult(
                {}, ("the candidate gives no hidden states, so nothing was replayed: errors are cumulative",)
            )
        return self._replayer(pytorch, precision).run(self.progress)

    def _replayer(self, pytorch: PyTorchProbe, precision: str) -> Replayer:
        return Replayer(
            pytorch,
            self.inputs,
            self._reference_tensor,
            self._candidate_tensor,
            precision,
            self._axes,
            self._mask,
        )

    def _diagnosed(self, result: Comparison, pytorch: PyTorchProbe, precision: str) -> Comparison:
        """`result` with the causes of its failing sites."""
        from divergence.diagnosis import Given, Search

        given = Given(
            pytorch.model,
            {site.site: site for site in result.sites},
            self._reference_tensor,
            self._candidate_tensor,
            self._mask,
            self._axes,
            precision,
            self.tolerance.ratio,
            self.candidate.facts,
            self.inputs,
        )
        replayer = self._replayer(pytorch, precision)
        introduced = result.policy.judged == "introduced"
        search = Search(given, pytorch, replayer, introduced=introduced)
        if self.options.repro is not None:
            result = replace(result, notes=(*result.notes, *search.write_first(self.options.repro)))
        if not self.options.diagnose:
            return result
        try:
            found = search.run(self.progress)
        except Exception as error:
            # The verdict stands, whatever an emulation meets in a model's code.
            note = f"the cause could not be looked for ({one_line(error)}); the verdict does not depend on it"
            return replace(result, notes=(*result.notes, note))
        return replace(
            result,
            causes=tuple(found.causes),
            diagnosis=tuple(found.hypotheses),
            notes=(*result.notes, *found.notes),
        )

    def _result(
        self,
        metrics: Mapping[Site, Metrics],
        floors: Mapping[Site, Floor],
        introduced: Mapping[Site, Introduced],
        precision: str,
        precision_from: str,
        floor_from: str,
    ) -> Comparison:
        judged = self._judge(metrics, floors, introduced)
        sites = tuple(
            self._site(site, m, floors.get(site), introduced.get(site), judged[site])
            for site, m in metrics.items()
        )
        verdict, reason = overall(sites, self.alignment.unmatched)
        policy = Policy(
            self.tolerance.policy,
            self.tolerance.ratio,
            precision,
            precision_from,
            floor_from,
            "introduced" if introduced else "cumulative",
            {pattern: dict(limits) for pattern, limits in self.tolerance.sites.items()},
        )
        ref, cand = self.reference.facts, self.candidate.facts
        return Comparison(
            verdict=verdict,
            reason=reason,
            first_divergence=first_divergence(sites),
            reference=ref.source,
            candidate=cand.source,
            policy=policy,
            sites=sites,
            unmatched=self.alignment.unmatched,
            notes=tuple(dict.fromkeys((*ref.notes, *cand.notes, *self.notes))),
            environment=self._environment(),
            command=self.options.command,
        )

    def _site(
        self,
        site: Site,
        m: Metrics,
        floor: Floor | None,
        introduced: Introduced | None,
        judged: Judgement,
    ) -> SiteResult:
        pair = self.pairs[site]
        ref, cand = self.reference.entries[site], self.candidate.entries[pair.candidate]
        return SiteResult(
            site=str(site),
            stack=site.stack,
            layer=site.layer,
            tensor=site.tensor,
            call=site.call,
            verdict=judged.verdict,
            reason=judged.reason,
            mse=m.mse,
            max_abs=m.max_abs,
            max_abs_at=m.max_abs_at,
            mean_abs=m.mean_abs,
            rel_l2=m.rel_l2,
            row_rel_l2=m.row_rel_l2,
            cosine=m.cosine,
            ref_min=m.ref_min,
            ref_max=m.ref_max,
            cand_min=m.cand_min,
            cand_max=m.cand_max,
            ref_nonfinite=m.ref_nonfinite,
            cand_nonfinite=m.cand_nonfinite,
            floor=floor.rel_l2 if floor else None,
            ratio=floor.ratio(m) if floor else None,
            introduced=introduced.metrics.rel_l2 if introduced else None,
            introduced_floor=introduced.floor.rel_l2 if introduced else None,
            introduced_ratio=introduced.ratio if introduced else None,
            bit_equal=m.bit_equal,
            padded_max_abs=m.padded_max_abs,
            ref_dtype=ref.dtype,
            cand_dtype=cand.dtype,
            shape=ref.shape,
            layout=str(pair.layout),
            found_ref=ref.found,
            found_cand=cand.found,
            profile=m.profile(),
        )

    def _environment(self) -> dict[str, Any]:
        import torch

        from divergence import __version__

        ref, cand = self.reference.facts, self.candidate.facts
        return {
            "divergence": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "inputs_digest": self.reference.inputs_digest,
            "inputs": {name: f"{t.dtype}{list(t.shape)}" for name, t in self.inputs.items()},
            "reference": {"model_digest": ref.model_digest, "versions": dict(ref.versions), **ref.details},
            "candidate": {"model_digest": cand.model_digest, "versions": dict(cand.versions), **cand.details},
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def valid_tokens(capture: Capture, site: Site, tensor: Tensor) -> Tensor | None:
    """The mask `[batch, token]` of valid tokens for `tensor` at `site`, or None where all count.

    A mask that covers cached tokens too ends with the tensor's own; one of another length belongs to
    something else and does not apply.
    """
    entry = capture.entries.get(site)
    if entry is None or "token" not in entry.axes:
        # Model outputs: [batch, token, channel] by convention, if the mask fits.
        axis = 1 if site.layer is None and tensor.dim() == 3 else None
    else:
        axis = entry.axes.index("token")
    if axis is None:
        return None
    stack = site.stack
    if site.tensor.startswith("cross_"):
        stack = next((name for name in capture.masks if "encoder" in name), "")
    mask = capture.mask(stack)
    tokens = tensor.shape[axis]
    if mask is None or mask.shape[0] != tensor.shape[0] or mask.shape[1] < tokens:
        return None
    return mask[:, mask.shape[1] - tokens :]


def _as_pytorch(probe: Probe) -> PyTorchProbe | None:
    from divergence.probes.pytorch import PyTorchProbe

    inner = getattr(probe, "probe", probe)
    return inner if isinstance(inner, PyTorchProbe) else None
