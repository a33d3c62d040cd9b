"""The comparison of one candidate with the reference, one stage after another."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from divergence.alignment import Alignment, Pair, align
from divergence.assembly import environment, site_result
from divergence.comparing import Meanwhile, compare_pair, compare_pairs
from divergence.comparison import compare_tensors
from divergence.errors import ConfigurationError, one_line
from divergence.introduced import Introduced, ReplayResult, mixed_note
from divergence.masks import valid_tokens
from divergence.noise import Floor
from divergence.prepared import Reference, floors_of
from divergence.repeats import choose_repeats
from divergence.result import Comparison, Policy
from divergence.room import make_room
from divergence.setting import Setting
from divergence.sites import matches
from divergence.sources import weights_of
from divergence.taken_over import RETURNED, TAKEN_OVER
from divergence.verdict import Judgement, conclusive, first_divergence, judge, overall

if TYPE_CHECKING:
    from torch import Tensor

    from divergence.comparison.metrics import Metrics
    from divergence.probes import Probe
    from divergence.probes.pytorch import PyTorchProbe
    from divergence.replay import Replayer
    from divergence.sites import Site


class Job:
    """The comparison of one candidate with the reference.

    Args:
        setting: what it shares with others.
        reference: the reference after its run.
        name: of the candidate's capture.

    Attributes:
        pairs: what was compared, by site of the reference in execution order.
        metrics: candidate against reference by site.
        floors: noise floors by site; empty where all is equal to the bit or nothing is judged by them.
    """

    def __init__(self, setting: Setting, reference: Reference, name: str = "candidate") -> None:
        self.setting = setting
        self.config = setting.config
        self.options = setting.options
        self.inputs = setting.inputs
        self.tolerance = setting.tolerance
        self.progress = setting.progress
        self.prepared = reference
        self.reference = reference.capture
        self.name = name
        self.notes: list[str] = []
        self._made: Replayer | None = None
        self._weights: Mapping[str, Tensor] = {}

    def run(self, cand: object) -> Comparison:
        """Runs the candidate once and compares it.

        Raises:
            DivergenceError: the question cannot be answered.
        """
        pytorch, exclude = self.prepared.pytorch, self.setting.exclude
        released = pytorch is not None and make_room(pytorch, cand, self.config)
        if released:
            self.notes.append(
                "reference and candidate do not fit into memory together: the reference's weights were "
                "released for the candidate's run"
            )
        probe = self.setting.open(cand, self.reference)
        if not released:
            self._floors_meanwhile(pytorch, probe)
        with Meanwhile(self.reference, exclude) as meanwhile:
            self.candidate = self.setting.record(probe, self.name, meanwhile)
            if not released:
                self._weights = weights_of(probe)
            del probe  # with its weights: the reference's may be needed again
            if released:
                gc.collect()
            return self._compared(cand, pytorch, meanwhile)

    def _compared(self, cand: object, pytorch: PyTorchProbe | None, meanwhile: Meanwhile) -> Comparison:
        exclude = self.setting.exclude
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
        self.notes += [
            f"the tolerance of '{pattern}' applies to nothing: no site of the reference matches it"
            for pattern in self.tolerance.sites
            if not any(matches(site, pattern) for site in self.reference.entries)
        ]
        self.notes += [
            f"{pair.reference}: the candidate has it in another layout ({pair.layout}); whoever takes this "
            "output from it has to do the same"
            for pair in self.alignment.pairs
            if pair.reference.layer is None and pair.candidate.layer is None and pair.layout.steps
        ]
        pairs, unequal = choose_repeats(
            self.alignment.pairs, lambda pair: self.candidate.tensor(pair.candidate), self._metrics
        )
        self.notes += unequal
        self.pairs = {pair.reference: pair for pair in pairs}
        self._check_limits()
        self.metrics = metrics = compare_pairs(
            pairs, self.reference, self.candidate, memory=self.options.memory, meanwhile=meanwhile
        )
        precision, precision_from = self._precision()
        floors: Mapping[Site, Floor] = {}
        floor_from = ""
        replayed = ReplayResult({})
        if not all(m.bit_equal for m in metrics.values()):
            if any(self.tolerance.judges_by_floor(site) for site in metrics):
                floors, floor_from = self._least_floors(precision) or floors_of(
                    self.prepared, precision, self.setting
                )
            replayed = self._replay(pytorch, precision, metrics, floors)
            if mixed := self._mixed():
                self.notes.append(mixed_note(mixed, precision, by_part=bool(replayed.introduced)))
        self.floors = floors
        self.notes += replayed.notes
        result = self._result(metrics, floors, replayed.introduced, precision, precision_from, floor_from)
        wanted = self.options.diagnose or self.options.repro is not None
        if result.verdict != "fail" or pytorch is None or not wanted:
            return result
        return self._diagnosed(result, pytorch, precision)

    def _check_limits(self) -> None:
        """Raises where the policy is absolute and no limit applies to anything that is compared."""
        tolerance = self.tolerance
        if tolerance.policy == "absolute" and not any(tolerance.limits(site) for site in self.pairs):
            patterns = ", ".join(f"'{pattern}'" for pattern in tolerance.sites) or "none"
            raise ConfigurationError(
                f"the policy is absolute and no limit applies to any site that is compared (patterns: "
                f"{patterns}); give --tolerance METRIC=LIMIT for all, or a pattern that matches"
            )

    def tensor(self, site: Site) -> Tensor:
        """The candidate's tensor at `site`, one of `pairs`, in the reference's layout."""
        pair = self.pairs[site]
        return pair.layout.apply(self.candidate.tensor(pair.candidate))

    def difference(self, before: Job | None, site: Site) -> Metrics:
        """This candidate's tensor against that of the one `before` it (None for the reference).

        Args:
            before: another candidate of the same reference.
            site: one of the `pairs` of both.
        """
        if before is None:
            return self.metrics[site]
        theirs = before.tensor(site)
        return compare_tensors(
            theirs, self.tensor(site), axes=self._axes(site), mask=self._mask(site, theirs)
        )

    def _candidate_tensor(self, site: Site) -> Tensor | None:
        return self.tensor(site) if site in self.pairs else None

    def _reference_tensor(self, site: Site) -> Tensor | None:
        return self.reference.tensor(site) if site in self.reference.entries else None

    def _axes(self, site: Site) -> tuple[str, ...]:
        return self.reference.entries[site].axes

    def _mask(self, site: Site, tensor: Tensor) -> Tensor | None:
        return valid_tokens(self.reference, site, tensor)

    def _metrics(self, pair: Pair) -> Metrics:
        return compare_pair(pair, self.reference, self.candidate)

    def _precision(self) -> tuple[str, str]:
        if self.options.precision:
            return self.options.precision, "--precision"
        if self.candidate.facts.precision:
            return self.candidate.facts.precision, "read from the candidate"
        raise ConfigurationError(
            f"{self.candidate.facts.source}: does not show which precision it runs in; give --precision"
        )

    def _mixed(self) -> Mapping[str, str]:
        """Precisions of the candidate's parts, where they differ and no other was asked for: the coarsest
        lets errors pass that a layer in fp32 cannot have made."""
        return {} if self.options.precision else self.candidate.facts.mixed

    def _least_floors(self, precision: str) -> tuple[Mapping[Site, Floor], str] | None:
        """The least that floors can be, where the candidate passes by them: no measured one is lower, so
        measuring them would change no verdict. None where it does not pass, or where they are known."""
        if self.options.floor is not None or precision in self.prepared.floors:
            return None
        least = dict.fromkeys(self.metrics, Floor.least(precision))
        judged = self._judge(self.metrics, least, {})
        if any(j.verdict != "pass" for j in judged.values()):
            return None
        return least, f"no run was needed: the least that {precision} can have"

    def _floors_meanwhile(self, pytorch: PyTorchProbe | None, probe: Probe) -> None:
        """Measures the floor while an engine's worker loads, where the engine's precision is known."""
        precision = self.options.precision or getattr(probe, "expected_precision", None)
        if probe.kind == "tensorrt" and precision and pytorch and self.tolerance.policy == "noise-floor":
            floors_of(self.prepared, precision, self.setting)

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
        if self.options.replay == "auto" and settled and not self._mixed():
            return ReplayResult({})
        if pytorch is None:
            return ReplayResult(
                {}, ("the reference is no PyTorch module, so nothing was replayed: errors are cumulative",)
            )
        if not any(site.tensor == "hidden" for site in metrics):
            return ReplayResult(
                {}, ("the candidate gives no hidden states, so nothing was replayed: errors are cumulative",)
            )
        replayed = self._replayer(pytorch, precision).run(self.progress)
        follows = {s: x for s, x in replayed.introduced.items() if not self._beside_attention(s)}
        return replace(replayed, introduced=follows)

    def _beside_attention(self, site: Site) -> bool:
        """Whether both sides show at `site` what the model returns, and that is not what reaches attention,
        which is what a layer that is replayed gives."""
        if site not in self.pairs or not self.reference.entries[site].found.startswith(TAKEN_OVER):
            return False
        candidate = self.pairs[site].candidate
        return candidate.layer is None or self.candidate.entries[candidate].found.startswith(RETURNED)

    def _replayer(self, pytorch: PyTorchProbe, precision: str) -> Replayer:
        """What replays the reference on the candidate's hidden states, and knows what they make of the
        rest."""
        if self._made is None:
            from divergence.replay import Replayer

            self._made = Replayer(
                pytorch,
                self.inputs,
                self._reference_tensor,
                self._candidate_tensor,
                precision,
                self._axes,
                self._mask,
                mixed=self._mixed(),
            )
        return self._made

    def _diagnosed(self, result: Comparison, pytorch: PyTorchProbe, precision: str) -> Comparison:
        """`result` with the causes of its failing sites."""
        from divergence.diagnosis import Given, OwnWeights, Search

        own = OwnWeights(pytorch.model, self._weights)
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
            own.of,
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
            site_result(
                self.pairs[site],
                self.reference,
                self.candidate,
                m,
                floors.get(site),
                introduced.get(site),
                judged[site],
            )
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
            contract=cand.details.get("contract") or {},
            environment=environment(self.reference, self.candidate, self.inputs),
            command=self.options.command,
        )
