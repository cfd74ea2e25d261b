"""vocab=exact: the reference's hidden states on their way to the policy, and the exact KL there.

The reference's actor keeps, beside its log-probs, the hidden states of the answers' tokens, and
lends its output matrix once. With vocab=topk:K it keeps its top K tokens alone. They travel in
``Experience.info``, the only field of OpenRLHF's that takes more than a number per token. The
policy's own states are taken as they enter its output layer, inside the engine. So their gradient
is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from klplug import KLSpec
from klplug.hosting import hidden as hosting
from klplug.hosting.hidden import Comparison, Matrix, output_layer
from klplug.hosting.memory import check_room
from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug.samples import weights_of
from klplug.spec import TermSpec
from klplug_openrlhf import samples, teacher
from klplug_openrlhf.keys import (
    MAX_LEN,
    MAX_NEW_TOKENS,
    PRETRAIN,
    REF_MODEL,
    ROLLOUT_BATCH,
    N,
    read,
)
from klplug_openrlhf.plan import Plan

INFO = "klplug/reference"


@dataclass(frozen=True)
class Reference:
    """Of one answer what the reference sends, a row for each token, and a Ray ref to its matrix."""

    sent: Tensor
    matrix: Any


@dataclass(frozen=True)
class Answers:
    """What the reference's actor returns of a micro-batch in place of its log-probs alone."""

    log_probs: Tensor
    references: list[Reference]


# ── Any model ───────────────────────────────────────────────────────────────────────────────────


def inside(actor: Any) -> Any:
    """The model of an actor, inside whatever engine it has."""
    return getattr(actor.model, "module", actor.model)


def entering(actor: Any, keep: Callable[[Tensor], None]) -> Any:
    """Call ``keep`` with the hidden states that enter the output layer in each forward."""
    return hosting.entering(output_layer(inside(actor)), keep)


def of_answers(hidden: Tensor, action_mask: Tensor, attention_mask: Tensor) -> Tensor:
    """The states that predict the answers' tokens, (N, H), in the order of ``action_mask``.

    ``hidden`` is (B, T, H), or of packed samples (1, tokens, H), without the padding.
    """
    row, column = action_mask.nonzero(as_tuple=True)
    length = attention_mask.shape[1]
    # A token's log-prob comes from the state before it; the mask covers the last columns.
    position = row * length + column + (length - 1 - action_mask.shape[1])
    if hidden.shape[:2] != attention_mask.shape:
        kept = attention_mask.flatten().cumsum(0)
        if hidden.shape[:2] != (1, int(kept[-1])):
            raise RuntimeError(
                "a KL over the vocabulary: the output layer was given hidden states of shape "
                f"{tuple(hidden.shape)}. The token ids have shape {tuple(attention_mask.shape)}"
            )
        position = kept[position] - 1
    return hidden.flatten(0, 1)[position]


@contextmanager
def whole(layer: nn.Module) -> Iterator[None]:
    """The layer's parameters as they are, gathered where ZeRO-3 has cut them."""
    parameters = [p for p in layer.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


# ── The reference's actor ───────────────────────────────────────────────────────────────────────


def execute_batch(original: Call, actor: Any, args: Args, kwargs: Kwargs) -> Any:
    """OpenRLHF's forwards of some micro-batches; the reference's with their hidden states, and the
    policy's with their entropies."""
    plan = Plan.of(actor.strategy.args)
    given = bound(original, args, kwargs)
    roles = {c.__name__ for c in type(actor).__mro__}
    if given["method_name"] != "forward" or plan is None:
        return original(*args, **kwargs)
    if "PolicyModelActor" in roles and weights_of(plan.spec, "entropy"):
        return samples.with_entropy(original, actor, args, kwargs)
    term = hosting.exact_term(plan.spec)
    if "ReferenceModelActor" not in roles or term is None:
        return original(*args, **kwargs)
    here = slice(given["start_idx"], given["end_idx"])
    masks, attention = (given["all_data"][name][here] for name in ("action_mask", "attention_mask"))
    states: list[Tensor] = []

    def keep(hidden: Tensor) -> None:
        at = hidden.device
        i = len(states)
        taken = of_answers(hidden, masks[i].to(at), attention[i].to(at))
        # ZeRO-3 has gathered the layer for the call that comes.
        own, temperature = inside(actor.model), actor.model.temperature
        states.append(hosting.sent(term, own, taken, temperature).cpu())

    with entering(actor.model, keep):
        results = original(*args, **kwargs)
    if len(states) != len(results):
        raise RuntimeError(
            f"vocab={term.vocab}: {len(results)} forwards of the reference called its output layer "
            f"{len(states)} times"
        )
    lent = _lend(actor) if term.top is None else None
    return [
        Answers(log_probs, _by_answer(sent, mask, lent))
        for log_probs, sent, mask in zip(results, states, masks, strict=True)
    ]


def _lend(actor: Any) -> Any:
    """A Ray ref to the reference's matrix, one for the whole run."""
    if not hasattr(actor, "klplug_matrix"):
        import ray  # ours, where klplug is only asked about

        actor.klplug_matrix = ray.put(matrix(actor.model))
    return actor.klplug_matrix


def matrix(actor: Any) -> Matrix:
    """A copy of an actor's output layer, on the CPU."""
    model = inside(actor)
    with whole(output_layer(model)):
        return Matrix.of(model).copied()


def _by_answer(sent: Tensor, mask: Tensor, lent: Any) -> list[Reference]:
    # Cloned: a pickled view brings its whole storage along.
    parts = torch.split(sent, mask.sum(-1).tolist())
    return [Reference(part.clone(), lent) for part in parts]


# ── The trainer ─────────────────────────────────────────────────────────────────────────────────


def flatten_results(original: Call, maker: Any, args: Args, kwargs: Kwargs) -> Any:
    """What the models answered; the references are kept until the experience is made."""
    results = samples.flattened(maker, original(*args, **kwargs))
    results = teacher.flattened(maker, results)
    if not any(isinstance(result, Answers) for result in results):
        return results
    maker.klplug_references = [answers.references for answers in results]
    return [answers.log_probs for answers in results]


def attach(term: TermSpec, maker: Any, experiences: list[Any]) -> None:
    """Each answer's reference into its experience, in the order they were asked for in."""
    references = vars(maker).pop("klplug_references", None)
    if references is None:
        raise RuntimeError(
            f"vocab={term.vocab}: the reference sent no {hosting.kind(term)}: is klplug active in "
            "its process?"
        )
    for experience, own in zip(experiences, references, strict=True):
        experience.info[INFO] = own
    maker.klplug_bytes = sum(r.sent.nbytes for own in references for r in own)


def reference_path(args: Any) -> str:
    """Of the model whose hidden states travel."""
    return str(read(args, REF_MODEL) or read(args, PRETRAIN))


def bytes_per_token(term: TermSpec, args: Any) -> int:
    """Of what the reference sends, its hidden states in 16 bits."""
    return hosting.bytes_per_token(term, reference_path(args), True, 2)


def foretell(term: TermSpec, args: Any) -> str:
    """What it will take, said before training."""
    answers = read(args, ROLLOUT_BATCH) * read(args, N)
    length = read(args, MAX_NEW_TOKENS) or read(args, MAX_LEN)
    return hosting.foretold(term, bytes_per_token(term, args), answers, length)


def check_memory(term: TermSpec, samples: list[Any], args: Any) -> None:
    """Raise if what the reference sends of these samples has no room on this machine."""
    tokens = sum(int(sample.action_mask.sum()) for sample in samples)
    check_room(f"the reference's {hosting.kind(term)}", tokens, bytes_per_token(term, args))


# ── The policy's actors ─────────────────────────────────────────────────────────────────────────


@dataclass
class Micro:
    """One micro-batch's hidden states, of policy and reference."""

    trainer: Any
    experience: Any
    references: list[Reference]
    states: list[Tensor]

    def kl(self, spec: KLSpec, log_probs: Tensor) -> Tensor | None:
        """The exact KL of each token, (B, A), with the policy's gradient; 0 where masked."""
        term = hosting.exact_term(spec)
        if term is None:
            return None
        actor, given = self.trainer.actor, self.experience
        if len(self.states) != 1:
            raise RuntimeError(
                f"kl_type {term}: OpenRLHF's training step called the policy's output layer "
                f"{len(self.states)} times before its KL, and klplug expects one"
            )
        mask = given.action_mask != 0
        hidden = of_answers(self.states.pop(), mask, given.attention_mask)
        targets = given.sequences[:, -mask.shape[1] :][mask]
        device = hidden.device
        sent = torch.cat([own.sent for own in self.references]).to(device)
        lent = _lent(self.trainer, self.references, device) if term.top is None else None
        layer = output_layer(inside(actor))
        with whole(layer):
            exact = hosting.exact_of(
                term, inside(actor), hidden, sent, lent, targets, actor.temperature
            )
        compared: Comparison = vars(self.trainer).setdefault("klplug_compared", Comparison())
        compared.check(term, log_probs[mask], given.base_action_log_probs[mask], exact)
        kl = exact.kl
        if kl.requires_grad:
            # ZeRO-3 gathers the matrix for the backward of its own layer, which may come later.
            cut: list[Any] = [p for p in layer.parameters() if hasattr(p, "ds_id")]
            if cut:
                kl.register_hook(lambda _: cut[0].all_gather(cut))  # type: ignore[no-untyped-call]
        return hosting.placed(kl, mask)


def _lent(trainer: Any, references: list[Reference], device: torch.device) -> Matrix:
    """The reference's matrix, fetched once, and again once the reference has moved."""
    if not hasattr(trainer, "klplug_matrix"):
        import ray

        lent: Matrix = ray.get(references[0].matrix)
        trainer.klplug_matrix = lent.to(device)
    matrix: Matrix = trainer.klplug_matrix
    return matrix


@contextmanager
def micro(plan: Plan, trainer: Any, experience: Any) -> Iterator[Micro | None]:
    """While OpenRLHF trains on one micro-batch: its hidden states; ``None`` for other KLs."""
    term = hosting.exact_term(plan.spec)
    if term is None:
        yield None
        return
    if INFO not in experience.info:
        raise RuntimeError(
            f"kl_type {plan.spec}: this experience has no {hosting.kind(term)} of the reference: "
            "klplug was not active in the process that made it"
        )
    # OpenRLHF would log it, as it logs all of info.
    experience.info = dict(experience.info)
    made = Micro(trainer, experience, experience.info.pop(INFO), [])
    with entering(trainer.actor, made.states.append):
        yield made
