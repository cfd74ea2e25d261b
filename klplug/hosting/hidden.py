"""vocab=exact on a host: hidden states as they enter an output layer, and the KL of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from klplug import ExactKL, exact_kl, top_log_probs, topk_kl
from klplug.hosting.memory import gigabytes
from klplug.spec import KLSpec, TermSpec

BYTES = "klplug/exact_bytes"
# Mean distance, in nats, of two ways to the same log-probs: rounding to bfloat16 gives 0.02.
APART = 0.1


@dataclass(frozen=True)
class Matrix:
    """A model's output layer: (V, H), its bias, and what its logits are bounded by."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> Matrix:
        """Of a model whose output layer is whole here; detached, and where the model is."""
        layer: Any = output_layer(model)
        bias = getattr(layer, "bias", None)
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        return cls(layer.weight.detach(), None if bias is None else bias.detach(), cap)

    def to(self, device: Any) -> Matrix:
        bias = None if self.bias is None else self.bias.to(device)
        return Matrix(self.weight.to(device), bias, self.softcap)

    def copied(self) -> Matrix:
        """A copy on the CPU."""
        bias = None if self.bias is None else self.bias.cpu().clone()
        return Matrix(self.weight.cpu().clone(), bias, self.softcap)


def output_layer(model: Any) -> nn.Module:
    """The layer that makes a model's logits of hidden states."""
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None:
        raise RuntimeError(
            f"{type(model).__name__} shows no output layer with a weight (get_output_embeddings), "
            "and a KL over the vocabulary needs its output matrix"
        )
    if any(hasattr(layer, name) for name in ("base_layer", "modules_to_save")):
        raise RuntimeError(
            f"the output layer of {type(model).__name__} has an adapter. A KL over the vocabulary "
            "needs a matrix that alone makes the logits. Leave that layer out of the adapter's "
            "modules"
        )
    return layer  # type: ignore[no-any-return]


def below(model: Any) -> nn.Module:
    """The layers that make the hidden states of which the output layer makes logits."""
    layers, layer = model.get_decoder(), output_layer(model)
    if layers is None or any(part is layer for part in layers.modules()):
        raise RuntimeError(
            f"{type(model).__name__} does not show the layers below its output layer "
            "(get_decoder). If a kernel makes the log-probs, a KL over the vocabulary has its "
            "hidden states there"
        )
    return layers  # type: ignore[no-any-return]


def entering(layer: nn.Module, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``keep`` with the hidden states that enter an output layer in each forward, until the
    ``with`` ends."""
    return layer.register_forward_pre_hook(lambda _, args: keep(args[0]))


def leaving(layers: nn.Module, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """``entering`` of a model whose output layer is never called: a kernel takes its matrix."""
    return layers.register_forward_hook(lambda _, args, output: keep(output[0]))


def exact_term(spec: KLSpec) -> TermSpec | None:
    """The term over the vocabulary, which a sum has one of at most."""
    return next((term for term in spec.terms if term.over_vocabulary), None)


def kind(term: TermSpec) -> str:
    """What the reference sends of each token, in words."""
    return "hidden states" if term.top is None else f"top {term.top} tokens"


def sent(term: TermSpec, model: Any, hidden: Tensor, temperature: float) -> Tensor:
    """What a reference sends of the tokens at ``hidden``, (N, H), while its output layer is whole.

    The states themselves, or of its top K tokens (N, 2 K), first the ids and then the log-probs.
    That is one tensor, as the states are. float32 has every whole number up to 2^24.
    """
    if term.top is None:
        return hidden
    own = Matrix.of(model)
    ids, log_probs = top_log_probs(
        hidden,
        own.weight,
        term.top,
        bias=own.bias,
        temperature=temperature,
        softcap=own.softcap,
    )
    return torch.cat([ids.to(log_probs.dtype), log_probs], -1)


def exact_of(
    term: TermSpec,
    model: Any,
    hidden: Tensor,
    sent: Tensor,
    reference: Matrix | None,
    targets: Tensor,
    temperature: float,
) -> ExactKL:
    """``klplug.exact_kl`` or ``topk_kl`` of some tokens, by a term's divergence and a model.

    ``reference`` is needed where hidden states were sent.
    """
    layer: Any = output_layer(model)
    options: dict[str, Any] = {
        "divergence": term.estimator,
        "alpha": term.alpha,
        "bias": getattr(layer, "bias", None),
        "temperature": temperature,
    }
    if term.top is not None:
        ids, log_probs = sent.chunk(2, -1)
        cap = Matrix.of(model).softcap
        return topk_kl(hidden, layer.weight, targets, ids.long(), log_probs, softcap=cap, **options)
    assert reference is not None
    return exact_kl(
        hidden,
        layer.weight,
        sent,
        reference.weight,
        targets,
        ref_bias=reference.bias,
        softcap=reference.softcap,
        **options,
    )


def placed(x: Tensor, mask: Tensor) -> Tensor:
    """A number of each token that a mask (B, T) counts, in its place; 0 elsewhere."""
    return x.new_zeros(mask.shape).index_put(mask.nonzero(as_tuple=True), x)


@dataclass
class Comparison:
    """Once for each model: do hidden states and matrix make the log-probs that the engine made?"""

    done: set[str] = field(default_factory=set)

    def check(
        self, term: TermSpec, log_probs: Tensor, ref_log_probs: Tensor, made: ExactKL
    ) -> None:
        """Stop where they are not what the engine makes its logits of; of each token a number."""
        self._check(term, "the policy", log_probs, made.log_probs)
        own = made.ref_log_probs
        if term.top is not None:  # of a token that was not sent there is nothing to compare
            ref_log_probs, own = ref_log_probs[~own.isnan()], own[~own.isnan()]
        self._check(term, "the reference", ref_log_probs, own)

    def _check(self, term: TermSpec, whose: str, engines: Tensor, own: Tensor) -> None:
        if whose in self.done or not len(own):
            return
        apart = float((engines.detach() - own.detach()).abs().mean())
        if not apart < APART:
            raise RuntimeError(
                f"vocab={term.vocab}: the log-probs of {whose} from its hidden states and matrix "
                f"are {apart:.3g} nats from the engine's own (allowed: {APART}). Its logits "
                "are scaled, or its answers placed, in a way that klplug does not know"
            )
        self.done.add(whose)


@functools.cache
def hidden_size(path: str, trust_remote_code: bool) -> int:
    """Dimensions of a model's last hidden states."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().hidden_size)


def bytes_per_token(term: TermSpec, path: str, trust_remote_code: bool, width: int) -> int:
    """Of what the reference sends; a hidden state has ``width`` bytes a dimension."""
    if term.top is not None:
        return 2 * 4 * term.top
    return width * hidden_size(path, trust_remote_code)


def foretold(term: TermSpec, each: int, answers: int, length: int) -> str:
    """What the reference sends will take, said before training; ``each`` is bytes per token."""
    return (
        f"klplug: vocab={term.vocab} keeps the reference's {kind(term)} of a step in memory, "
        f"{each} bytes a token. For {answers} answers of at most {length} tokens that is "
        f"{gigabytes(each * answers * length)} at most"
    )
