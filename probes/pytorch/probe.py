"""The PyTorch probe: runs a module and hands over key, value and hidden of every layer."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from divergence.captures import fingerprint, fingerprint_started
from divergence.errors import InputError, SourceError, nearest, one_line
from divergence.precision import coarsest, dtype_name
from divergence.probes import Description, Observation, Progress, RunFacts, Sink, SiteInfo, silent
from divergence.probes.pytorch.layer_call import LayerCall
from divergence.probes.pytorch.mixture import mixture
from divergence.probes.pytorch.modes import evaluating, training_note
from divergence.probes.pytorch.observer import LayerObserver
from divergence.probes.pytorch.own_keys import OwnKeys
from divergence.probes.pytorch.placement import device_of, devices_of, named_weights
from divergence.probes.pytorch.returned import REPEATED, keys_by_layer, leaves
from divergence.probes.pytorch.stacks import Stack, find_stacks
from divergence.sites import Site

T = TypeVar("T")


class PyTorchProbe:
    """Runs a PyTorch module.

    Args:
        model: any module with at least one layer stack.
        source: how reports name it.
        names: the model's own names of inputs by ours, where they differ.
        load: loads the same module again; with it the probe can let go of the module in between.

    Raises:
        SourceError: `model` is no module, or has no layer stack.
    """

    kind = "pytorch"

    def __init__(
        self,
        model: nn.Module,
        source: str = "pytorch",
        names: Mapping[str, str] | None = None,
        *,
        load: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.source = source
        self._names = names or {}
        self._load = load
        self._digest: str | None = None
        self.calls: list[LayerCall] = []
        self._autocast: set[torch.dtype] = set()
        self._floats: torch.dtype | None = None
        self._hidden: dict[tuple[str, int], str] = {}
        self._take(model)

    def _take(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise SourceError(
                f"{self.source}: returned {type(model).__name__}, not a torch.nn.Module; "
                "return the module itself"
            )
        if any(is_compiled(module) for module in model.modules()):
            raise SourceError(
                f"{self.source}: compiled by torch.compile, and cannot be looked into; give the module as it "
                "was before (of what torch.compile returned, `_orig_mod`)"
            )
        self._stacks = find_stacks(model)
        if not self._stacks:
            raise SourceError(
                f"{self.source}: {type(model).__name__} has no layer stack (no ModuleList, Sequential or "
                "numbered attributes of repeated layers), so there are no layers to compare"
            )
        self._model: nn.Module | None = model

    @property
    def model(self) -> nn.Module:
        """The module, loaded again where it was released.

        Raises:
            SourceError: it cannot be loaded, or another one is loaded than before.
        """
        if self._model is None:
            assert self._load is not None
            model = self._load()
            self._take(model)
            if self._digest is not None and fingerprint(named_weights(model)) != self._digest:
                raise SourceError(
                    f"{self.source}: gave other weights when it was loaded again, which it was because "
                    "reference and candidate do not fit into memory together; have it load the same each "
                    "time (a seed), or record it with `divergence capture` and compare the capture"
                )
            layers = {stack.name: stack.layers for stack in self._stacks}
            for call in self.calls:
                call.module = layers[call.stack][call.layer]
            return model
        return self._model

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The module's layer stacks."""
        _ = self.model
        return self._stacks

    @property
    def loaded(self) -> bool:
        """Whether the module is there."""
        return self._model is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the module's parameters, wherever they are."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the module's inputs belong."""
        return device_of(self.model)

    @property
    def on_cuda(self) -> bool:
        """Whether the module runs on a CUDA device."""
        return self.device.type == "cuda"

    def weights(self) -> dict[str, Tensor]:
        """The module's parameters by name; see `divergence.sources.Weighted`."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def release(self) -> bool:
        """Lets go of the module until it is asked for again. Returns whether it could."""
        if self._load is None:
            return False
        for call in self.calls:
            call.module = nn.Identity()
        self._model, self._stacks = None, ()
        return True

    def describe(self, inputs: Mapping[str, Tensor] | None = None) -> Description:
        """See `divergence.probes.Probe`; a module is understood by running it on `inputs`."""
        if inputs is None:
            raise InputError(f"{self.source}: a PyTorch model is inspected by running it; give --inputs FILE")
        sites: list[SiteInfo] = []

        def note(seen: Observation) -> None:
            sites.append(
                SiteInfo(seen.site, seen.found, dtype_name(seen.tensor.dtype), tuple(seen.tensor.shape))
            )

        facts = self.run(inputs, note)
        operators: dict[str, Counter[str]] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                operators.setdefault(type(module).__name__, Counter())[dtype_name(parameter.dtype)] += 1
                break
        return Description(
            self.source,
            self.kind,
            facts.precision,
            tuple(sites),
            {name: f"{dtype_name(t.dtype)}{list(t.shape)}" for name, t in inputs.items()},
            facts.notes,
            operators,
        )

    def run(
        self,
        inputs: Mapping[str, Tensor],
        sink: Sink,
        *,
        detail: bool = False,
        progress: Progress = silent,
        record: bool = False,
    ) -> RunFacts:
        """See `divergence.probes.Probe`. With `record`, `self.calls` holds every layer call
        afterwards, for replay; without, it keeps those of an earlier run."""
        known: dict[str, Any] = {}
        training: list[str] = []
        digests: list[Callable[[], str]] = []

        def ran() -> None:
            parameters = list(self.model.parameters())
            devices = dict.fromkeys(p.device for p in parameters if p.is_cuda)
            # Weights are read while the last tensors are written, rather than beside the model.
            done = [torch.cuda.current_stream(device).record_event() for device in devices]
            digests.append(fingerprint_started(named_weights(self.model), done))
            known.update(self._known(parameters))
            training.extend(training_note(self.source, self.model))

        order, outputs, notes = self.observe(
            inputs, sink, detail=detail, progress=progress, record=record, ran=ran
        )
        self._digest = digests[0]()
        return RunFacts(
            kind=self.kind,
            source=self.source,
            model_digest=self._digest,
            stacks=order,
            versions={"torch": str(torch.__version__)},
            notes=(*training, *notes),
            outputs=outputs,
            **known,
        )

    def _known(self, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
        """Facts that need no device."""
        kept = [dtype_name(p.dtype) for p in parameters]
        return {
            "precision": coarsest([*kept, *map(dtype_name, self._autocast)]),
            "mixed": {} if self._autocast else mixture(self.model, self.stacks, self._hidden),
            "details": {
                "model": type(self.model).__name__,
                "device": ", ".join(devices_of(self.model)) or "cpu",
                "parameters": sum(p.numel() for p in parameters),
                "layers": {stack.path: len(stack.layers) for stack in self.stacks},
            },
        }

    def observe(
        self,
        inputs: Mapping[str, Tensor],
        sink: Sink,
        *,
        detail: bool = False,
        progress: Progress = silent,
        record: bool = False,
        ran: Callable[[], None] = lambda: None,
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """`run` without its facts; `ran` is called when the model has returned and its outputs are on their
        way, which is before a device is done: whatever takes time and needs no device is best done there.

        Returns:
            Names of the stacks in execution order, names of the outputs, notes.
        """
        given, inputs = inputs, self.own(inputs)
        self._check_names(inputs)
        total = sum(len(stack.layers) for stack in self.stacks)
        own = OwnKeys(self.stacks, sink)
        done, seen_any = 0, False
        refused: list[Exception] = []

        def counted(seen: Observation) -> None:
            nonlocal done, seen_any
            seen_any = True
            own.saw(seen)
            try:
                sink(seen)
            except Exception as error:
                refused.append(error)
                raise
            if seen.site.tensor == "hidden":
                done += 1
                progress(f"running {self.source}", done, total)

        def watched(given: Mapping[str, Tensor]) -> tuple[LayerObserver, Any]:
            observer = LayerObserver(self.stacks, counted, detail=detail, record=record)
            with evaluating(self.model), observer:
                return observer, self._forward(given, refused)

        try:
            observer, outputs = watched(inputs)
        except SourceError as error:
            if seen_any:
                raise
            observer, outputs = self._in_its_floats(watched, given, error)
        # Not the observer itself, which holds the last hidden states.
        self._autocast, self._hidden = observer.autocast, observer.hidden
        plain = dict(output_leaves(outputs))
        for name, tensor in plain.items():
            sink(Observation(Site.output(name), tensor, (), "output of the model"))
        ran()
        if record:
            self.calls = observer.calls
        self._check_seen(observer.order, outputs)
        return tuple(observer.order), tuple(plain), (*self._conversions(given), *own.replace(outputs))

    def _check_seen(self, order: Sequence[str], outputs: Any) -> None:
        """Makes sure that there are outputs, and that every stack that ran (`order`) showed hidden states."""
        if not any(isinstance(leaf, Tensor) for _, leaf in leaves(outputs)) and not keys_by_layer(outputs):
            raise SourceError(
                f"{self.source}: the model returned {type(outputs).__name__}, in which there are no tensors, "
                "so that nobody can say whether what it gives is right; have it return tensors, alone or in "
                "a tuple, dict or dataclass"
            )
        if not order:
            lists = ", ".join(stack.path for stack in self.stacks)
            raise SourceError(
                f"{self.source}: the layers of {lists} were never called: the model does their work outside "
                "of their forward; wrap it in a module that calls its layers"
            )
        if unseen := [name for name in order if not any(stack == name for stack, _ in self._hidden)]:
            path = next(stack.path for stack in self.stacks if stack.name == unseen[0])
            raise SourceError(
                f"{self.source}: the layers of {path} return nothing in which a tensor was found; have them "
                "return their hidden state, alone or first in a tuple or dict"
            )

    def own(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`inputs` under the model's own names, and in the precision that it was found to take."""
        floats = self._floats
        return {
            self._names.get(name, name): tensor.to(floats)
            if floats and tensor.is_floating_point()
            else tensor
            for name, tensor in inputs.items()
        }

    def _in_its_floats(self, run: Callable[..., T], given: Mapping[str, Tensor], error: SourceError) -> T:
        """`run` on the inputs `given` in the one precision of the model's parameters, as a graph's are
        converted; further runs are on these. Raises `error` where that is no other one, or the model does not
        take it either."""
        kept = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        others = {tensor.dtype for tensor in given.values() if tensor.is_floating_point()} - kept
        if self._floats is not None or len(kept) != 1 or not others:
            raise error
        (self._floats,) = kept
        try:
            return run(self.own(given))
        except SourceError:
            self._floats = None
            raise error from None

    def _conversions(self, given: Mapping[str, Tensor]) -> Iterator[str]:
        """What to say of inputs that `own` converts."""
        for name, tensor in given.items():
            if self._floats not in (None, tensor.dtype) and tensor.is_floating_point():
                theirs = self._names.get(name, name)
                dtypes = f"{dtype_name(tensor.dtype)} to {dtype_name(self._floats)}"
                yield f"Input {theirs} was converted from {dtypes}, as the parameters are."

    def _forward(self, inputs: Mapping[str, Tensor], refused: list[Exception]) -> Any:
        """The model's outputs. What the receiver of its tensors raises, listed in `refused`, goes through
        the model's own frames and is no fault of the model."""
        device = device_of(self.model)
        # Copies: a model may write into its inputs, and others are run on them.
        moved = {name: tensor.to(device, copy=True) for name, tensor in inputs.items()}
        try:
            with torch.inference_mode():
                return self.model(**moved)
        except torch.OutOfMemoryError as error:
            raise SourceError(f"{self.source}: out of memory on {device} ({one_line(error)})") from error
        except (InputError, SourceError):
            raise
        except SystemExit as error:
            raise SourceError(
                f"{self.source}: the model's forward ended the program (exit status {error.code}); have it "
                "return its outputs"
            ) from error
        except Exception as error:
            if refused:
                raise refused[0] from None
            shapes = ", ".join(f"{n} {dtype_name(t.dtype)}{list(t.shape)}" for n, t in inputs.items())
            raise SourceError(
                f"{self.source}: the model raised {one_line(error)} on inputs {shapes}; "
                "check their dtypes and shapes, or the model"
            ) from error

    def _check_names(self, inputs: Mapping[str, Tensor]) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        known = [p.name for p in named]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in inputs:
            if name not in known and not takes_any:
                hint = f"it takes {', '.join(known)}" if known else "its forward names none"
                raise InputError(
                    f"{self.source}: the model has no input '{name}'{nearest(name, known)}; {hint}"
                )
        missing = [p.name for p in named if p.default is p.empty and p.name not in inputs]
        if missing:
            raise InputError(
                f"{self.source}: the model needs input '{missing[0]}', and the inputs have only "
                f"{', '.join(inputs) or 'nothing'}; add it to the inputs"
            )


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile`, or the module's own `compile`, has been at it."""
    return (
        "_orig_mod" in module.__dict__["_modules"] or module.__dict__.get("_compiled_call_impl") is not None
    )


def output_leaves(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's output by dotted name, without those that repeat the sites
    (caches, hidden states of every layer)."""
    for name, leaf in leaves(outputs):
        if isinstance(leaf, Tensor) and not REPEATED.match(f"{name}."):
            yield name, leaf
