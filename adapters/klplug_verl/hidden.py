"""vocab=exact: the reference's hidden states on their way to the policy, and the exact KL there.

The reference's engine adds to its log-probs the hidden states of the answers' tokens, one more
nested tensor of its output; with vocab=topk:K the top K tokens in their place. The trainer's queue
brings them to the policy with all other tensors of the batch. The KL is made where the policy's own
states enter its output layer, or verl's fused kernel in its place: there FSDP has the whole matrix,
in the forward and again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from klplug import ExactKL, KLSpec
from klplug.hosting import hidden as hosting
from klplug.hosting.hidden import Comparison, Matrix, below, output_layer
from klplug.hosting.memory import check_room
from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug.spec import TermSpec
from klplug_verl.keys import (
    ACTOR,
    ADAPTERS,
    LORA,
    MAX_ANSWER,
    MODEL,
    REF,
    REF_MODEL,
    TRAIN_BATCH,
    TRUST,
    Config,
    N,
)
from klplug_verl.notes import dtype

STATES = "klplug_ref_hidden"
"""Of the batch: what the reference sends of the answers' tokens."""


@dataclass
class Shared:
    """What the engines of one worker have in common.

    Attributes:
        term: the one over the vocabulary.
        is_base: the reference is the policy without its adapter, and has no engine of its own.
        matrix: the reference's, as its engine has it, on the CPU; ``None`` before its first
            forward, where it is the policy's own, and where top tokens are sent.
    """

    term: TermSpec
    is_base: bool
    matrix: Matrix | None = None
    comparison: Comparison = field(default_factory=Comparison)


def connect(spec: KLSpec, worker: Any) -> None:
    """Before the first forward: what the engines of a worker share; with LoRA it has one."""
    term = hosting.exact_term(spec)
    if term is None:
        return
    shared = Shared(term, is_base=worker.ref is None)
    for own in (worker.actor, worker.ref):
        if own is not None:
            # A model that shows none of them stops here, before any answer.
            output_layer(own.engine.module)
            if own.engine.model_config.use_fused_kernels:
                below(own.engine.module)
            own.engine.klplug_exact = shared


_BASE: ContextVar[bool] = ContextVar("klplug_base", default=False)


def disable_adapter(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """The policy without its adapter, which is the reference where there is no other."""

    @contextmanager
    def disabled() -> Iterator[None]:
        token = _BASE.set(True)
        try:
            with original(*args, **kwargs):
                yield
        finally:
            _BASE.reset(token)

    return disabled()


def forward_step(original: Call, engine: Any, args: Args, kwargs: Kwargs) -> Any:
    """One micro-batch: of the reference with its hidden states, of the policy with the KL."""
    shared: Shared | None = getattr(engine, "klplug_exact", None)
    given = bound(original, args, kwargs)
    if shared is None:
        return original(*args, **kwargs)
    if given["loss_function"] is not None:
        micro = Micro(shared, engine, given["micro_batch"])
        token = _MICRO.set(micro)
        try:
            with states_of(engine, micro.enter):
                return original(*args, **kwargs)
        finally:
            _MICRO.reset(token)
    if _BASE.get() if shared.is_base else engine.engine_config.forward_only:
        return _with_states(original, engine, shared, given)
    return original(*args, **kwargs)


def states_of(engine: Any, keep: Callable[[Tensor], None]) -> Any:
    """Call ``keep`` with the hidden states that logits are made of, in each forward.

    verl's fused kernels make log-probs of them, past the output layer.
    """
    if engine.model_config.use_fused_kernels:
        return hosting.leaving(below(engine.module), keep)
    return hosting.entering(output_layer(engine.module), keep)


@dataclass(frozen=True)
class Places:
    """Where the answers' tokens of a micro-batch are, (N,) each, answer by answer.

    Attributes:
        packed: of the state that predicts a token, among all tokens of all sequences.
        padded: the same, where each sequence is padded to the longest.
        sequences, answers: their lengths, (B,).
    """

    packed: Tensor
    padded: Tensor
    sequences: Tensor
    answers: Tensor

    @classmethod
    def of(cls, data: Any) -> Places:
        sequences = data["input_ids"].offsets().diff()
        if data["responses"].is_nested:
            answers = data["responses"].offsets().diff()
        else:
            answers = data["attention_mask"][:, data["prompts"].shape[1] :].sum(-1)
        within = torch.arange(int(answers.sum()), device=answers.device)
        within = within - (answers.cumsum(0) - answers).repeat_interleave(answers)
        # A token's log-prob comes from the state before it.
        first = sequences - answers - 1
        packed = (sequences.cumsum(0) - sequences + first).repeat_interleave(answers)
        row = torch.arange(len(sequences), device=sequences.device) * sequences.max()
        padded = (row + first).repeat_interleave(answers)
        return cls(packed + within, padded + within, sequences, answers)

    def counted(self, data: Any) -> Tensor:
        """Which of the tokens count, (N,)."""
        mask: Tensor = data["response_mask"]
        if mask.is_nested:
            return mask.values() != 0
        columns = torch.arange(mask.shape[1], device=mask.device)
        return mask[columns < self.answers[:, None]] != 0

    def take(self, hidden: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """The states of these tokens, (N, H), of all that entered the output layer."""
        count, length = hidden.shape[:2]
        if count == 1 and length >= int(self.sequences.sum()):
            places = self.packed  # what was appended to round the length up is behind them
        elif (count, length) == (len(self.sequences), int(self.sequences.max())):
            places = self.padded
        else:
            raise RuntimeError(
                f"the output layer was given hidden states of shape "
                f"{tuple(hidden.shape)} for sequences of {self.sequences.tolist()} tokens"
            )
        return hidden.flatten(0, 1)[places[which].to(hidden.device)]


# ── The reference ───────────────────────────────────────────────────────────────────────────────


def _with_states(original: Call, engine: Any, shared: Shared, given: dict[str, Any]) -> Any:
    layer: Any = output_layer(engine.module)
    term, data = shared.term, given["micro_batch"]
    places, states = Places.of(data), list[Tensor]()
    temperature = _temperature(term, data)

    def keep(hidden: Tensor) -> None:
        # As the layer takes them. The device's memory is for the forwards to come.
        taken = places.take(hidden).to(layer.weight.dtype)
        states.append(hosting.sent(term, engine.module, taken, temperature).cpu())
        if term.top is None and not shared.is_base and shared.matrix is None:
            shared.matrix = Matrix.of(engine.module).copied()

    with states_of(engine, keep):
        loss, output = original(**given)
    _expect_one_call(len(states), "the reference")
    rows = list(torch.split(states[0], places.answers.tolist()))
    output["model_output"][STATES] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return loss, output


def _temperature(term: TermSpec, data: Any) -> float:
    temperature = data["temperature"]
    if isinstance(temperature, Tensor):
        raise RuntimeError(f"kl_type {term}: verl gave each sample a temperature of its own")
    return float(temperature)


def _expect_one_call(count: int, whose: str) -> None:
    if count != 1:
        raise RuntimeError(
            f"a forward of {whose} called its output layer {count} times, and a KL over the "
            "vocabulary expects one call"
        )


# ── The policy ──────────────────────────────────────────────────────────────────────────────────


@dataclass
class Micro:
    """One micro-batch of the policy's, while verl's engine trains on it."""

    shared: Shared
    engine: Any
    data: Any
    made: list[ExactKL] = field(default_factory=list)

    def enter(self, hidden: Tensor) -> None:
        """The exact KL of all tokens that count, where the output layer is about to be called."""
        term, data = self.shared.term, self.data
        if STATES not in data:
            raise RuntimeError(
                f"kl_type {term}: this batch has no {hosting.kind(term)} of the reference. klplug "
                "was not active in the process that made its log-probs"
            )
        places = Places.of(data)
        counted = places.counted(data)
        device = hidden.device
        exact = hosting.exact_of(
            term,
            self.engine.module,
            places.take(hidden, counted),
            torch.cat(data[STATES].unbind())[counted].to(device),
            self._reference(device) if term.top is None else None,
            data["input_ids"].values()[places.packed[counted] + 1].to(device),
            _temperature(term, data),
        )
        self.made.append(exact)

    def _reference(self, device: torch.device) -> Matrix:
        if self.shared.is_base:
            own = Matrix.of(self.engine.module)
            layer: Any = output_layer(self.engine.module)
            if layer.weight.requires_grad:
                raise RuntimeError(
                    f"kl_type {self.shared.term}: the reference is the policy without its adapter, "
                    "and its output matrix is trained"
                )
            return own
        if self.shared.matrix is None:
            raise RuntimeError(
                f"kl_type {self.shared.term}: the reference made no forward in this process, where "
                "the policy is trained. So its output matrix is not there"
            )
        return self.shared.matrix.to(device)


_MICRO: ContextVar[Micro | None] = ContextVar("klplug_micro", default=None)


def exact(spec: KLSpec, log_probs: Tensor, tensors: Any) -> Tensor | None:
    """The exact KL of the micro-batch, (B, T), with the policy's gradient; ``None`` for others."""
    term = hosting.exact_term(spec)
    if term is None:
        return None
    micro = _MICRO.get()
    if micro is None:
        raise RuntimeError(
            f"kl_type {spec} was asked of an engine that klplug gets no hidden states from"
        )
    _expect_one_call(len(micro.made), "the policy")
    (made,), mask = micro.made, tensors["response_mask"]
    comparison = micro.shared.comparison
    comparison.check(term, log_probs[mask], tensors["ref_log_prob"][mask], made)
    return hosting.placed(made.kl, mask)


# ── The trainer ─────────────────────────────────────────────────────────────────────────────────


def bytes_per_token(term: TermSpec, config: Any) -> int:
    """Of what the reference sends, its hidden states as its engine computes."""
    from verl.utils.fs import copy_to_local

    settings = Config(config)
    path = copy_to_local(settings.get(REF_MODEL) or settings.get(MODEL))
    side = ACTOR if any(settings.get(key) for key in (*LORA, *ADAPTERS)) else REF
    width = 4 if dtype(settings, side) == "fp32" else 2
    return hosting.bytes_per_token(term, path, bool(settings.get(TRUST)), width)


def foretell(term: TermSpec, config: Any) -> str:
    """What it will take, said before training."""
    settings = Config(config)
    answers = settings.get(TRAIN_BATCH) * settings.get(N)
    return hosting.foretold(term, bytes_per_token(term, config), answers, settings.get(MAX_ANSWER))


def room_for(term: TermSpec, config: Any, tokens: int) -> int:
    """Bytes that the reference sends of these tokens; raises if they have no room here."""
    each = bytes_per_token(term, config)
    check_room(f"the reference's {hosting.kind(term)}", tokens, each)
    return tokens * each


def compute_ref_log_prob(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """The v1 trainer's; its workers put the states where the log-probs go."""
    run = getattr(trainer, "klplug", None)
    term = None if run is None else hosting.exact_term(run.plan.spec)
    if run is None or term is None:
        return original(*args, **kwargs)
    from verl.trainer.ppo.v1.trainer_base import tq

    batch = bound(original, args, kwargs)["batch"]
    place = {"keys": batch.keys, "partition_id": batch.partition_id}
    mask = tq.kv_batch_get(**place, select_fields=["response_mask"])["response_mask"]
    run.states = room_for(term, trainer.config, len(mask.values()))
    return original(*args, **kwargs)


def compute_ref_log_prob_in_fit(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """``RayPPOTrainer``'s, which takes the log-probs alone out of what its workers return."""
    run = getattr(trainer, "klplug", None)
    term = None if run is None else hosting.exact_term(run.plan.spec)
    if run is None or term is None:
        return original(*args, **kwargs)
    batch = bound(original, args, kwargs)["batch"].batch
    answers = batch["attention_mask"][:, batch["prompts"].shape[1] :]
    run.states = room_for(term, trainer.config, int(answers.sum()))
    with listening(trainer) as listener:
        result = original(*args, **kwargs)
    states = listener.output.get(STATES, None)
    if states is None:
        raise RuntimeError(
            f"vocab={term.vocab}: the reference sent no {hosting.kind(term)}: is klplug active in "
            "its process?"
        )
    result.batch[STATES] = states
    return result


class Listener:
    """A group of workers, with the batch that it was given last and what it returned."""

    def __init__(self, workers: Any) -> None:
        self._workers, self.batch, self.output = workers, None, None

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._workers, name)

        def heard(batch: Any) -> Any:
            self.batch, self.output = batch, call(batch)
            return self.output

        return heard


@contextmanager
def listening(trainer: Any) -> Iterator[Any]:
    """While ``RayPPOTrainer`` asks its reference."""
    name = "actor_rollout_wg" if trainer.ref_in_actor else "ref_policy_wg"
    workers = getattr(trainer, name)
    listener = Listener(workers)
    setattr(trainer, name, listener)
    try:
        yield listener
    finally:
        setattr(trainer, name, workers)
