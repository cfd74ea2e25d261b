"""The core's: coefficient, weight, gradient, metrics, controllers, strings."""

from __future__ import annotations

from tests.mutants import Mutant


def of(file: str, *rows: tuple[str, str], tests: tuple[str, ...]) -> list[Mutant]:
    return [
        Mutant(f"klplug/{file}.py", old, new, tuple(f"tests/core/test_{t}.py" for t in tests))
        for old, new in rows
    ]


ESTIMATORS = of(
    "estimators",
    ("log_ratio.square().mul_(0.5)", "log_ratio.square()"),
    ("saturating_expm1(-log_ratio).neg_()", "saturating_expm1(log_ratio)"),
    ("masked_(near, close).add_(far)", "far"),
    ("masked_(near, close).add_(far)", "near"),
    ("close = square < 0.25", "close = square < 25"),
    ("1 / 12, -1 / 720", "1 / 12, 1 / 720"),
    ("finite(-log_ratio * root * root)", "finite(-log_ratio * root)"),
    ("near.where(log_ratio.abs() < 2, far)", "far"),
    ("log_ratio.clamp(max=0) - _log_mean", "log_ratio.clamp(min=0) - _log_mean"),
    ("finite(log_ratio + k3_derivative(log_ratio))", "finite(k3_derivative(log_ratio))"),
    ("finite(2 * saturating_expm1(log_ratio))", "finite(saturating_expm1(log_ratio))"),
    ("scaled_expm1(-log_ratio, 0.5).abs()", "scaled_expm1(-log_ratio, 0.5)"),
    ("return log_ratio.sign() / 2", "return log_ratio.sign()"),
    ("scaled_expm1(below * log_ratio, 1 / below)", "scaled_expm1(below * log_ratio, 1.0)"),
    ("later=None if of_answer else value", "later=value"),
    ("            later=k1,\n", "            later=k2,\n"),
    (
        "of_answer=k3_derivative,  # 1 - prod_{i<=t} exp(-lr_i)",
        "of_answer=forward,",
    ),
    tests=("estimators", "stability", "numbers", "exact_term", "oracle"),
)

NUMERICS = of(
    "numerics",
    (
        "x.exp().clamp_(max=min(at_most, largest(x)))",
        "x.exp().clamp_(max=at_most)",
    ),
    ("x.expm1().clamp_(max=largest(x))", "x.expm1()"),
    ("return x.clamp(-largest(x), largest(x))", "return x.clamp(max=largest(x))"),
    ("return _bits(x).mul(mask).view(x.dtype)", "return x.mul(mask)"),
    tests=("stability", "term", "numbers"),
)

GRADIENTS = of(
    "gradients",
    (
        "gradient = estimate.own if importance is None else _weighed(estimate, importance)",
        "gradient = estimate.own",
    ),
    ("product = below.where(y < 0, product)", "pass"),
    ("zeros_like(own), falling=falling)", "zeros_like(own))"),
    ("weight is None else weight * compared)", "weight is None else compared)"),
    ("divisor = weight.where(weight > 0, 1.0)", "divisor = weight"),
    ("weight.where(gradient == 0, divisor)", "divisor"),
    ("finite(a.weight_or_one * a.coefficient)", "a.weight_or_one * a.coefficient"),
    ("together = coefficient if inside is None else inside", "together = coefficient"),
    ("finite_(coefficient - credited)", "finite_(coefficient - compared)"),
    ("finite_(batch.answers.to_go(coefficient))", "finite_(coefficient.clone())"),
    (
        "return masked_(returns(estimate, batch), estimate.mask)",
        "return returns(estimate, batch)",
    ),
    (
        "slope = batch.given.kl_coef * together - batch.masked",
        "slope = together - batch.masked",
    ),
    (
        "batch.given.kl_coef * together - batch.masked",
        "batch.given.kl_coef * together + batch.masked",
    ),
    (
        "added = estimate.later if before is None else finite_(before * estimate.later)",
        "added = estimate.later",
    ),
    ("batch.answers.after(batch.answers.to_go(added))", "batch.answers.to_go(added)"),
    (
        "(own - own.detach()) * (1.0 if before is None else before)",
        "own - own.detach()",
    ),
    ("own = own, own.clamp(-spec.bound, spec.bound)", "own = own, own.clamp(max=spec.bound)"),
    ("numbers | (held < HUGE)", "numbers"),
    ("own = masked_(own, mask)  # the one", "own = own  # the one"),
    ("if own is not later:", "if False:"),
    (
        "added = later if importance is None else finite_(importance.weight * later)",
        "added = later",
    ),
    ('if "return_baseline" in batch.others:', "if False:"),
    ('groups = None if spec.baseline == "batch" else', "groups = None if spec.baseline else"),
    ("estimate.mask.any(-1))", "None)"),
    ("torch.where(mask, to_go - after, 0.0)", "torch.where(mask, to_go, 0.0)"),
    ("own=not spec.over_vocabulary", "own=True"),
    (
        "value=finite(sum((a.value for a in parts), zero))",
        "value=parts[0].value if parts else zero",
    ),
    ("finite(a.weight_or_one * a.coefficient)", "a.coefficient"),
    ("torch.stack(paths).sum(0)", "torch.stack(paths).mean(0)"),
    tests=("step", "exact_term", "oracle", "term", "numbers", "stored"),
)

BATCH = of(
    "batch",
    ("numbers = self.mask & (log_ratio.abs() < math.inf)", "numbers = self.mask"),
    ("dtype = torch.promote_types(dtype, tensor.dtype)", "pass"),
    ("counted = given.response_mask != 0", "counted = given.response_mask > 0.5"),
    ("usable & (together.abs() < math.inf)", "usable"),
    ('usable & ~self.others["ref_log_probs"].isnan()', "usable"),
    ("if len(references) > 1 else policies", "if False else policies"),
    ("instead = self.return_baseline", "instead = None"),
    ('return (*needed, "kl_coef") if "combined" in heads else needed', "return needed"),
    ("for x in numbers):\n", "for x in numbers[:1]):\n"),
    ("    return low, high", "    return high, low"),
    ("if self.segment_ids is not None and compared", "if False and compared"),
    ("if self.log_probs.requires_grad and not self.exact_kl", "if False and not self.exact_kl"),
    tests=("term", "numbers", "exact_term", "step", "oracle"),
)

TERM = of(
    "term",
    ("        with torch.enable_grad():\n            loss", "        if True:\n            loss"),
    ("torch.is_grad_enabled() and given.log_probs", "given.log_probs"),
    ("self.spec.terms and not self._log_probs", "False and not self._log_probs"),
    ("lambda: self._acting.coefficient.clone()", "lambda: self._acting.coefficient"),
    ("return loss if pathwise is None else loss + pathwise", "return loss"),
    ("(scored or pathwise is None)", "(pathwise is None)"),
    ("gradient = gradient.clamp(-limit, limit).to(ctx.dtype)", "gradient = gradient.to(ctx.dtype)"),
    ('("group_ids",) if term.baseline == "group"', '() if term.baseline == "group"'),
    tests=("term", "numbers", "exact_term", "technique"),
)

STEP = of(
    "step",
    ("torch.minimum(rho * advantages", "torch.maximum(rho * advantages"),
    ("value + finite(kl_coef * part.value)", "value"),
    ("gradient + finite(kl_coef * part.gradient)", "gradient + part.gradient"),
    ("gradient + finite(kl_coef * part.gradient)", "gradient + kl_coef * part.gradient"),
    ("rho.clamp(1 - low, 1 + high)", "rho.clamp(1 - high, 1 + low)"),
    ("step.advantages(masked(advantages, mask), kl_coef)", "step.advantages(advantages, kl_coef)"),
    ("advantages - finite(kl_coef * part", "advantages + finite(kl_coef * part"),
    ("with_gradient(self.term.value, self._gradient)", "with_gradient(self.value, self._gradient)"),
    ("loss + kl_coef * term.pathwise", "loss + term.pathwise"),
    ("clipped_weight(ratio, -advantages, clip)", "clipped_weight(ratio, advantages, clip)"),
    tests=("step", "term", "exact_term", "numbers", "oracle"),
)

WEIGHTS = of(
    "weights",
    ("so_far if own else answers.before(so_far)", "so_far"),
    ("mask & ~(weight > cap)", "mask & ~(weight > 2 * cap)"),
    ("self.log_weight > math.log(self.cap)", "self.log_weight > self.cap"),
    ("self.log_weight.clamp(max=math.log(self.cap))", "self.log_weight"),
    ("self.mask & ((self.weight > 0) | (self.log_weight < 0))", "self.mask"),
    ("(self.weight > 0) | (self.log_weight < 0)", "self.weight > 0"),
    ("(slope > 0) & (rho < 1 - low)", "(slope > 0) & (rho > 1 - low)"),
    ("(slope < 0) & (rho > 1 + high)", "(slope < 0) & (rho > 1 + low)"),
    ("masked(answers.whole(log_weight), mask)", "masked(answers.so_far(log_weight), mask)"),
    ("            return self.dropped\n", "            return None\n"),
    tests=("oracle", "term", "numbers", "exact", "stored"),
)

ANSWERS = of(
    "answers",
    ("return x.flip(-1).cumsum(-1).flip(-1)", "return x.cumsum(-1)"),
    ("last = position.where(mask, 0).cummax(-1).values", "last = position"),
    ("self.so_far(x) + self.to_go(x) - x", "self.so_far(x) + self.to_go(x)"),
    ("same = number[:, step:] == number[:, :-step]", "same = number[:, step:] >= 0"),
    tests=("oracle", "term", "numbers", "exact"),
)

BASELINES = of(
    "baselines",
    ("(finite(totals) - returns) / others", "finite(totals) / (others + 1)"),
    ("alone = (counts - counted < 1)", "alone = (counts < 0)"),
    (
        "returns.new_ones(len(returns)) if present is None else present.to(returns.dtype)",
        "returns.new_ones(len(returns))",
    ),
    tests=("oracle", "term", "numbers", "exact"),
) + of(
    "baselines",
    (
        "torch.cat([torch.full((n,), k, dtype=torch.long, device=device) for k, n in runs])",
        "torch.tensor([k for k, n in runs for _ in range(n)], device=device)",
    ),
    tests=("cost",),
)

METRICS = (
    of(
        "seen",
        (
            "coefficient = part.acting.coefficient if own_token else gradient",
            "coefficient = gradient",
        ),
        (
            "coefficient = part.acting.coefficient if own_token else gradient",
            "coefficient = part.acting.coefficient",
        ),
        ("estimate.unbounded.abs() > spec", "estimate.unbounded > spec"),
        (
            "finite(sum((term.principled for term in terms), zero))",
            "terms[0].principled",
        ),
        ("estimate.own is log_ratio and spec.baseline", "True and spec.baseline"),
        ("product = importance.weight * log_ratio", "product = log_ratio"),
        ("to_go = to_go if weight is None else weight * to_go", "pass"),
        ("coefficient=None if over else coefficient", "coefficient=coefficient"),
        ("is_bound=spec.top is not None,", "is_bound=False,"),
        ("steep=_uncapped(importance) or", "steep=False and"),
        (
            "{id(term.in_the_kl): term.in_the_kl for term in terms}",
            "{id(term.numbers): term.numbers for term in terms}",
        ),
        ("if acting else numbers", "if False else numbers"),
        tests=("tally", "term", "numbers", "exact_term"),
    )
    + of(
        "tally",
        ("maxima[name] = torch.maximum(maxima", "maxima[name] = torch.add(maxima"),
        ("sums[name] = sums[name] + value", "sums[name] = value"),
        ("torch.stack(per).clamp(min=1e-30)", "torch.stack(per).clamp(min=1)"),
        ("largest(like), out=row", "largest(like) ** 0.5, out=row"),
        ("size[id(x)] if x is s.coefficient else x for", "x for"),
        (
            "numbers.append(growth[id(s.log_ratio)])",
            "numbers = numbers or [growth[id(s.log_ratio)]]",
        ),
        ("x for x in s.saturating]", "x for x in s.saturating[:0]]"),
        ("v[1:].amax(0, keepdim=True)", "v[1:2]"),
        ("v[1:].amin(0, keepdim=True)", "v[1:2]"),
        ("slope = variance > EVEN * square", "slope = variance > variance - 1"),
        ("growth > -4 *", "growth > -40 *"),
        ("torch.where(steady & whole & slope, fitted, k1)", "fitted"),
        ("torch.where(steady & whole & slope, fitted, k1)", "k3"),
        ("& (square < HUGE**2)", ""),
        ("tokens if key in _OF_RATIO else acting", "tokens"),
        (
            'minus = torch.div(tokens, -round(1 / TOP), rounding_mode="floor")',
            "minus = tokens / -round(1 / TOP)",
        ),
        ("(counted - tokens) / counted.clamp", "(counted - tokens) / tokens.clamp"),
        ("masked_(x, whole.counted)", "x"),
        ("out=squared).square_()", "out=squared)"),
        ("out=totals[:summed]).square_()", "out=totals[:summed])"),
        ("sums[summed:].nan_to_num_(0.0)", "sums[summed:]"),
        ("cosine, ratio = (ratios[:2] + nothing)", "cosine, ratio = ratios[:2]"),
        ('"weight_square": ("square", s.weight)', '"weight_square": ("sum", s.weight)'),
        (".mul_(size[of_forces][: len(apart)])", ".square_()"),
        ('"abs": ("size", x)', '"abs": ("sum", x)'),
        ("k3.mul_(growth)", "k3.square_()"),
        tests=("tally", "estimates", "term", "numbers"),
    )
    + of(
        "watch",
        ("if streak == patience:", "if streak >= patience - 1:"),
        (
            "if rule.broken(value) else 0",
            "if rule.broken(value) else self._streak.get(rule.metric, 0)",
        ),
        (
            "return value < self.threshold if self.below",
            "return value > self.threshold if self.below",
        ),
        tests=("tally",),
    )
)

EXACT = of(
    "exact",
    ("of_target.where(is_target.any(-1), torch.nan)", "of_target"),
    tests=("exact_top",),
)

PASS = (
    of(
        "vocabulary",
        ("value.clamp_(min=0)", "value"),
        ('{"maximum": HUGE, "ref_maximum": HUGE}', '{"maximum": HUGE}'),
        ('{"maximum": HUGE, "ref_maximum": HUGE}', '{"ref_maximum": HUGE}'),
        ("x is None or not x.is_inference()", "True"),
        ("of_bias = of_matrix.new_zeros", "of_bias = matrix.new_zeros"),
        ("torch.where(scale != 0, of_kl * scale, hidden, out=hidden)", "hidden += of_kl * scale"),
        ("no_kl & (of_entropy == 0) & (of_log_probs == 0)", "no_kl"),
        ("of_kl * kept.mean_slope + of_entropy", "of_kl * kept.mean_slope - of_entropy"),
        tests=("exact",),
    )
    + of(
        "tiles",
        ("(self.temperature / self.softcap)", "(1 / self.softcap)"),
        ("else gradient.div_(self.temperature)", "else gradient"),
        ("addcmul_(p, mean_slope, value=-1)", "sub(p)"),
        tests=("exact",),
    )
    + of(
        "divergences",
        ("(q, alpha) if alpha <= 0.5 else (p, alpha - 1)", "(q, alpha)"),
        ("log_ratio.clamp(max=largest)", "log_ratio"),
        ("powers.masked_fill_(log_ratio == math.inf, math.inf)", "powers"),
        ("clamp_(-largest, largest)", "clamp_(-1, 1)"),
        tests=("exact_top", "exact"),
    )
)

TOP = of(
    "vocabulary",
    ("at.reference.minus(at.policy) - self.log_rest[at.rows]", "at.reference.minus(at.policy)"),
    (
        "own = log_p.gather(-1, index.clamp(max=log_p.shape[-1] - 1)) - log_ref",
        "own = -log_ref",
    ),
    ("rest.clamp(min=torch.finfo(sent.dtype).eps).log()", "rest.log()"),
    ("return cls(policy.local(ids), log_probs, log_rest)", "return cls(ids, log_probs, log_rest)"),
    tests=("exact_top",),
)

AGGREGATION = of(
    "aggregation",
    ("torch.where(mask, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0)", "x * mask"),
    ("(lengths > 0).sum().clamp(min=1)", "len(lengths)"),
    ("per_answer / lengths.clamp(min=1)", "per_answer / x.shape[-1]"),
    ("lengths.sum().clamp(min=1) if count is None else count", "lengths.sum().clamp(min=1)"),
    tests=("aggregation",),
)

CONTROLLERS = of(
    "controllers",
    ("max(kl / self.target - 1, -0.2)", "max(kl / self.target - 1, -0.1)"),
    ("if not math.isfinite(kl):  # a diverged", "if False:  # a diverged"),
    ("self.value = math.exp(log_value)", "self.value = 1 + log_value"),
    ("(lowest, log_value <= math.log(lowest)),", "(lowest, False),"),
    ("max(0.0, answers)", "answers"),
    ("if not abs(by) > 0:", "if not by:"),
    ("not 0 < number <= sys", "not number <= sys"),
    ("min(max(number, lowest), highest)", "number"),
    ("least = min(self._start, sys", "least = max(self._start, sys"),
    ('{"kl_horizon": 10_000}', '{"kl_horizon": 1_000}'),
    tests=("controllers",),
)

STRINGS = of(
    "spec",
    ("if len({part.alone for part in self.parts}) < len(self.parts):", "if False:"),
    ("(term.factor < 0, PLACEMENTS.index(term.placement), str(term.alone))", "0"),
    ("if term.placement == placement)", "if True)"),
    ('and self.horizon in (None, "sequence")', "and True"),
    tests=("spec", "numbers"),
)

POSTERIOR = of(
    "posterior",
    (" - math.log(others)", ""),
    ("masked_fill(own, -math.inf)", "clone()"),
    ("if present[row]:", "if True:"),
    ("rewards.double() / number", "rewards.double()"),
    ("numbers.sum(-1).clamp(min=1)", "mask.sum(-1).clamp(min=1)"),
    ("known = numbers.any(-1)", "known = mask.any(-1)"),
    ("masked_fill(~numbers, math.nan)", "clone()"),
    ("mask & (toward_ref < math.inf)", "mask & (toward_ref.abs() < math.inf)"),
    tests=("posterior", "oracle"),
)

STORED = of(
    "stored",
    ("mask, old_log_probs=ref_log_probs)", "mask, old_log_probs=log_probs.detach())"),
    (
        'kl_term("monitor", ref_log_probs, log_probs.detach()',
        'kl_term("monitor", log_probs, ref_log_probs',
    ),
    ("value * importance.times_exp(-log_ratio)", "value"),
    ('"k1" if spec.estimator == "forward" else spec.estimator', "spec.estimator"),
    ("sums |= {name: forward.sums[name] for name in _OF_SAMPLES}", "sums |= forward.sums"),
    ("elif own.rpartition", "if own.rpartition"),
    tests=("stored",),
)

CORE = (
    *ESTIMATORS,
    *NUMERICS,
    *GRADIENTS,
    *BATCH,
    *TERM,
    *STEP,
    *WEIGHTS,
    *ANSWERS,
    *BASELINES,
    *POSTERIOR,
    *STORED,
    *METRICS,
    *EXACT,
    *PASS,
    *TOP,
    *AGGREGATION,
    *CONTROLLERS,
    *STRINGS,
)
