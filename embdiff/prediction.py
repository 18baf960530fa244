"""One guided prediction of x0, from noisy latents to the posterior mean that a solver is given.

    B samples   L positions   D embedding dim   K length tokens   C classes of words

The order of work is the one of `Predictor.__call__`: the denoiser under all branches in one batch; branches combined as
features; the token posterior, with tilts; branches combined as means; constraints; lengths; gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embdiff import ops
from embdiff.compilation import versions
from embdiff.denoiser import Context, Denoiser
from embdiff.errors import UserError
from embdiff.forward import Forward
from embdiff.guidance.automaton import Automaton, Shares, aligned
from embdiff.guidance.base import (
    Ban,
    Branch,
    Combine,
    Constraint,
    Gradient,
    Guidance,
    Part,
    Run,
    Tilt,
    Veto,
    Words,
    check_differentiable,
)
from embdiff.shortlist import Shortlists
from embdiff.transitions import Transitions

FELT = 6.0  # times that words feel a gradient more than x0, which near the end moves less than words lie apart
FARTHEST = 1.0  # of an embedding's length: gradients of constraints, which are of first order, move x0 no farther
BARRED = 1e9  # nats: no mass is left beside any other word, and a constraint may ask for it all the same


class Output(NamedTuple):
    """How a denoiser's features become words, see `output_of`.

    weight: [V, W + D], in the denoiser's precision; table: E [V, D], fp32; rounded: E in the denoiser's precision.
    """

    weight: Tensor
    table: Tensor
    rounded: Tensor


class Changes(NamedTuple):
    """What becomes of logits in a step, see `ops.expectation`."""

    tilts: Sequence[ops.Tilting] = ()
    bans: Sequence[ops.Tilting] = ()


UNCHANGED = Changes()


class Plan(NamedTuple):
    """What a step does while the same modules are active."""

    branches: list[Branch]
    context: Context | None  # of what runs in one batch, see `Predictor._features`
    tilts: list[Tilt]
    banned: Tensor | None  # [V], 0, or -inf for words that are banned everywhere
    classes: ops.Classes | None  # of the words that are not; None = all words are alike, and none is banned
    vetoes: list[Veto]
    demands: list[tuple[Automaton, float]]  # over the same classes, with their strengths, the weakest first
    gradients: list[Gradient]
    follow: float  # of the demands' own gradient; 0 = none

    @property
    def automaton(self) -> Automaton | None:
        """That of the strongest demands."""
        return self.demands[-1][0] if self.demands else None

    def whole(self, changes: Changes) -> Changes:
        """With what is banned everywhere."""
        always = [] if self.banned is None else [partial(barring, self.banned)]
        return Changes(changes.tilts, [*always, *changes.bans])


class Looked(NamedTuple):
    """What a prediction is made of, before there are means.

    main: features [B, L, H], or [R, H] of the positions that are looked at, of all branches on logits; others: branches
    that combine means, with their features; pulls: [B, L, D] of each gradient.
    """

    main: Tensor
    others: list[tuple[Branch, Tensor]]
    changes: Changes
    pulls: list[Tensor]


class Seen(NamedTuple):
    """What the last prediction was made of, from which a text is rounded as a chain.

    features: [B, L, H], or [R, H] of the positions `rows`; see `Predictor.rows`. others: of branches that combine
    means, which do so with features here: of means there are no probabilities of words. pull: [B, L, D], what
    demands' gradients add to a token's logit for each unit of its embedding.
    """

    transitions: Transitions
    features: Tensor
    rows: Tensor | None
    changes: Changes
    others: Sequence[tuple[Combine, Tensor]]
    pull: Tensor | None

    def whole(self) -> Tensor:
        """[R, H]: of branches and gradients too."""
        return pulled(combined(self.features, self.others), self.pull, self.rows).flatten(0, -2)


class Predictor:
    """Predicts x0 in every step of one run.

    Args:
        run: what is sampled. guidance: modules. gammas: the noise levels of the steps, for whatever is built before
            the first of them.
        temperature: of words. kept: ids of padding and the end of text, in this order; () = no tokens are kept apart.
        quantile: [B] in (0, 1), with which lengths are drawn above the noise level draw_above; None = never.
        length_bias: nats against padding and the end of text, below it.
        network: the denoiser's forward pass, compiled or as it is.
        skip_padding: whether positions behind the text, once they are surely padding, are looked at no more: what lies
            there is unseen then, as beyond a window of training.
        shortlist: words of each text that posteriors are taken over in most steps, see `embdiff.shortlist`; None = all
            words. uniform: gives [B, count] numbers in [0, 1) to draw them by.
    """

    def __init__(
        self,
        run: Run,
        guidance: Sequence[Guidance] = (),
        *,
        gammas: Sequence[float] = (),
        temperature: float = 1.0,
        kept: tuple[int, ...] = (),
        quantile: Tensor | None = None,
        draw_above: float = -math.inf,
        length_bias: float = 0.0,
        network: Forward | None = None,
        skip_padding: bool = False,
        shortlist: int | None = None,
        uniform: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.run, self.denoiser = run, run.denoiser
        self.network = network or Forward(run.denoiser, wanted=False)
        pairs = [(module, part) for module in guidance for part in module.parts(run)]
        self.modules: list[Guidance] = [module for module, _ in pairs]
        self.parts: list[Part] = [part for _, part in pairs]
        self.temperature = temperature
        shaped = any(isinstance(part, Tilt | Ban | Constraint | Veto) for part in self.parts)
        self.kept = kept if temperature != 1.0 or quantile is not None or length_bias or shaped else ()
        self.skip_padding = skip_padding and bool(self.kept)
        self.seen: Seen | None = None  # where texts are rounded with transitions
        self.rows: Tensor | None = None  # [R], b L + l of the positions that are looked at; None = all
        self.draw_above = draw_above
        self.length_bias = length_bias
        # Here, so that nothing is copied to the device in the loop.
        self.kept_ids = torch.tensor(self.kept, dtype=torch.long, device=run.device)
        self.quantile = None if quantile is None else quantile[:, None, None]
        makers = {self.denoiser, *(part.denoiser for part in self.parts if isinstance(part, Branch) and part.denoiser)}
        self.outputs = {denoiser: output_of(denoiser) for denoiser in makers}
        self.table = self.outputs[self.denoiser].table
        self.shortlists: Shortlists | None = None
        if shortlist is not None and uniform is not None and shortlist < run.vocabulary - len(self.kept):
            weight, _, rounded = self.outputs[self.denoiser]
            turns, shape = {1, len(gammas) // 2 + 1}, (run.samples, run.length)
            self.shortlists = Shortlists(
                shortlist, turns, uniform, shape, self.network, weight, rounded, temperature, self.kept
            )
        self.kept_embeddings = self.table[self.kept_ids]
        self.automata: dict[tuple[int, ...], Automaton] = {}
        constraints = [part for part in self.parts if isinstance(part, Constraint)]
        self.automaton = self._automaton(constraints) if constraints else None
        self.vetoes = [part for part in self.parts if isinstance(part, Veto)]
        if self.vetoes and self.automaton is not None:
            self._check(self.automaton)
        self.turn = 0  # predictions so far
        self.held: dict[int, tuple[int, Tensor]] = {}  # by branch: the turn, and main - other then, [B L, H]
        self.stacks: dict[tuple[int, ...], Context | None] = {}  # by what runs in one batch, see `_stack`
        self.plans: dict[tuple[bool, ...], Plan] = {}
        for gamma in gammas:
            self.plan(gamma)

    def _check(self, automaton: Automaton) -> None:
        """Refuses what contradicts itself before the first step. Samples that are asked alike are one here."""
        self.automaton = replace(automaton, accepts=torch.unique(automaton.accepts, dim=0))
        samples = len(self.automaton.accepts)
        self.round(torch.zeros(samples, self.run.length, self.denoiser.dim, device=self.run.device))
        self.automaton = automaton

    def __call__(self, z: Tensor, gamma: float, self_cond: Tensor | None) -> Tensor:
        """x0 [B, L, D], fp32, for latents z [B, L, D] at noise level gamma, given the previous x0; None = no step was
        taken yet."""
        plan, looked_at = self.plan(gamma), self.rows
        traced = self._traced(z, gamma, self_cond) if plan.follow else None
        main, by_means, changes, pulls = self._looked(z, gamma, self_cond, plan, traced)
        posterior = self._posterior(main, plan, changes)
        means = [(branch, self._posterior(h, plan, changes, branch.denoiser)) for branch, h in by_means]
        alone, posterior = posterior, guided(posterior, means) if means else posterior
        if self.rows is not None:
            posterior = spread(posterior, self.rows, z.shape[:2])
        for automaton, strength in plan.demands:
            posterior = constrained(posterior, automaton, strength)
        if self.skip_padding and gamma <= self.draw_above:
            # What constraints ask for is seen in the posterior only where all of them act in full.
            seen = self.automaton is None or [(id(a), s) for a, s in plan.demands] == [(id(self.automaton), 1.0)]
            self.rows = live(posterior.kept[..., 0]) if seen else None
        asked = None
        if traced is not None:
            slope = self._slope(traced, looked_at, plan, changes)
            farthest = FARTHEST * math.sqrt(z.shape[-1]) * math.exp(-gamma)
            asked = ops.limited(alpha_of(gamma) * plan.follow * slope, farthest)
            pulls.append(asked)
        x0 = self._x0(posterior, gamma)
        if pulls:
            x0 = x0 + math.exp(gamma) * torch.stack(pulls).sum(0)
        shared = [
            (as_means(branch, alone.mean, other.mean), h)
            for (branch, other), (_, h) in zip(means, by_means, strict=True)
            if branch.denoiser is None
        ]
        self.see(gamma, main, looked_at, plan.whole(changes), shared, asked)
        return x0

    def ends(self, z: Tensor, gamma: float, self_cond: Tensor | None) -> bool:
        """Looks at the last latents of a run, where `round` asks for no more: a chain is made of features, and no mean
        is needed. False = one is, and nothing was done."""
        plan = self.plan(gamma)
        along = all(branch.linear for branch in plan.branches if branch.denoiser is None and branch.space == "x0")
        if self.denoiser.transitions is None or self.draws(gamma) or self.automaton is not None or not along:
            return False
        main, others, changes, _ = self._looked(z, gamma, self_cond, plan)
        shared = [(branch.combine, h) for branch, h in others if branch.denoiser is None]
        self.see(gamma, main, self.rows, plan.whole(changes), shared)
        return True

    def draws(self, gamma: float) -> bool:
        """Whether lengths are drawn at this noise level."""
        return self.quantile is not None and gamma > self.draw_above

    def see(
        self,
        gamma: float,
        features: Tensor,
        rows: Tensor | None = None,
        changes: Changes = UNCHANGED,
        others: Sequence[tuple[Combine, Tensor]] = (),
        pull: Tensor | None = None,
    ) -> None:
        """What the last prediction was made of, as in `Seen`, where it is to be rounded by transitions."""
        transitions = self.denoiser.transitions
        if transitions is None or self.draws(gamma):
            self.seen = None
        else:
            self.seen = Seen(transitions, features, rows, changes, others, pull)

    def forget(self) -> None:
        """What was seen in the last steps, where latents were changed from outside: anything may be there."""
        self.rows, self.seen = None, None
        self.held.clear()
        if self.shortlists is not None:
            self.shortlists.forget()

    def round(self, z: Tensor) -> Tensor:
        """The nearest tokens [B, L] to clean latents z [B, L, D] that fulfil all constraints, and that no veto marks.

        All embeddings are equally long, so the nearest text has the largest sum of products; with `Transitions` it is
        the most probable one that is looked for. A token that a veto marks costs more than all else from then on, and
        the text is looked for again. Where constraints want it all the same, the match's other tokens cost as much, one
        after the other.
        """
        ids = self._nearest(z.float())
        rows = torch.arange(len(ids), device=ids.device)
        turns = torch.zeros_like(rows)
        scores = price = z.new_zeros(0)
        while self.vetoes:
            marked = found(self.vetoes, ids[rows])
            bad = marked.any(1)
            if not bool(bad.any()):
                break
            if len(scores):
                scores, price = scores[bad], price[bad]
            else:
                scores = self._scores(z.float(), rows[bad])
                price = 1 + 2 * self.run.length * self._highest(scores)
            rows, marked, tokens = rows[bad], marked[bad], ids[rows[bad], :, None]
            free = scores.gather(-1, tokens)[..., 0] > -price[..., 0] / 2
            stuck = ~(marked & free).any(1, keepdim=True)
            if bool(stuck.any()):
                turns[rows] += stuck[:, 0]
                marked = torch.where(stuck, last(members(self.vetoes, tokens[..., 0]) & free), marked)
                if bool((turns > 2 * self.run.length).any() | ~(marked & free).any(1).all()):
                    raise UserError(self._impossible())
            scores.scatter_add_(-1, tokens, -price * (marked & free)[..., None])
            ids[rows] = self._nearest_by(scores, rows)
        return ids

    def _nearest(self, z: Tensor) -> Tensor:
        """Of all texts that fulfil the constraints."""
        if self.automaton is None:  # see `EmbeddingSpace.round`
            return ops.argmax(z, self.table) if self.seen is None else self._most_probable(self.seen)
        best = ops.class_max(z, self.table, self.automaton.classes)
        choice, ids = self._best(self.automaton, *best, z @ self.kept_embeddings.T)
        return ids if self.seen is None else self._most_probable(self.seen, choice, ids)

    def _most_probable(self, seen: Seen, choice: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """The most probable text [B, L] under the chain.

        choice: the class of each position [B, L] in a text `ids` that fulfils the constraints, for then every text of
        these classes does.
        """
        weight, _, rounded = self.outputs[self.denoiser]
        L, K = self.run.length, seen.transitions.candidates
        among = None
        if self.automaton is not None and choice is not None:
            wanted = choice.flatten() if seen.rows is None else choice.flatten()[seen.rows]
            among = self._class_of_tokens(self.automaton), wanted
        h, listed = seen.whole(), None
        if self.shortlists is not None and among is None and not any(seen.changes):
            listed = self.shortlists.most_probable(h, seen.rows, K)
        if listed is None and among is None and not any(seen.changes):
            listed = self.network.most_probable(h, weight, rounded, K)
        scores, tokens = listed or ops.most_probable(
            h, weight, K, self.kept_ids, *seen.changes, among, self.temperature
        )
        if seen.rows is not None:  # the others are padding, or what constraints made of it
            elsewhere = scores.new_full((self.run.samples * L, K), ops.FAINTEST)
            elsewhere[:, 0] = 0.0
            scores = elsewhere.index_copy(0, seen.rows, scores)
            others = tokens.new_full((len(elsewhere),), self.kept[0]) if ids is None else ids.flatten()
            tokens = others[:, None].repeat(1, K).index_copy(0, seen.rows, tokens)
        return seen.transitions.best(scores.view(-1, L, K), tokens.view(-1, L, K))

    def _scores(self, z: Tensor, samples: Tensor) -> Tensor:
        """[R, L, V]: what texts of some samples are looked for by."""
        if self.seen is None:
            return z[samples] @ self.table.T
        h, weight, L = self.seen.whole().float(), self.outputs[self.denoiser].weight.float(), self.run.length
        rows = torch.arange(len(h), device=h.device) if self.seen.rows is None else self.seen.rows
        scores = h.new_full((len(samples), L, len(weight)), ops.FAINTEST)
        scores[..., self.kept[0]] = 0.0
        for found, sample in zip(scores, samples.tolist(), strict=True):
            here = (rows // L == sample).nonzero()[:, 0]
            # Without tilts: where those leave few words and a veto all of them, the text would end.
            bans = self.seen.changes.bans
            allowed, _ = ops.changed(F.linear(h[here], weight), int(here[0]), self.kept_ids, bans=bans)
            found[rows[here] % L] = allowed.clamp(min=ops.FAINTEST)
        return scores

    def _highest(self, scores: Tensor) -> Tensor:
        """[R, 1, 1]: no position adds more to the sum of a text, nor takes more from it."""
        found = scores.abs().amax((1, 2), keepdim=True)
        return found if self.seen is None else found + self.seen.transitions.most()

    def _nearest_by(self, scores: Tensor, rows: Tensor) -> Tensor:
        """`_nearest` for some samples, by their scores [R, L, V]."""
        if self.automaton is not None:
            highest = ops.highest(scores, self.automaton.classes)
            choice, ids = self._best(self.automaton.rows(rows), *highest, scores[..., self.kept_ids])
            if self.seen is None:
                return ids
            outside = self._class_of_tokens(self.automaton) != choice[..., None]
            scores = scores.masked_fill(outside, -torch.inf)
        if self.seen is None:
            return scores.argmax(-1)
        return self.seen.transitions.best(*scores.topk(self.seen.transitions.candidates, -1))

    def _best(self, automaton: Automaton, highest: Tensor, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The class of each position and the token [B, L] of the text with the largest sum."""
        padding, end = kept.unbind(-1)
        choice, score = automaton.best(Shares(highest, end, padding))
        if not bool(score.isfinite().all()):
            raise UserError(self._impossible())
        ends = self.kept_ids.flip(0).expand(*choice.shape, 2)
        return choice, torch.cat([tokens, ends], -1).gather(-1, choice[..., None])[..., 0]

    def _class_of_tokens(self, automaton: Automaton) -> Tensor:
        """[V], as `_best` numbers classes."""
        return automaton.class_of_tokens(len(self.table), self.kept_ids.flip(0))

    def _impossible(self) -> str:
        causes = [part.cause for part in self.parts if isinstance(part, Constraint | Veto)]
        return f"no text of {self.run.length} tokens can have all of: {', '.join(causes)}"

    # ------------------------------------------------------------------------------------------------ the plan

    def plan(self, gamma: float) -> Plan:
        """What a step at this noise level does."""
        key = tuple(module.active(gamma) for module in self.modules)
        if key not in self.plans:
            self.plans[key] = self._new_plan([part for part, active in zip(self.parts, key, strict=True) if active])
        return self.plans[key]

    def _new_plan(self, parts: list[Part]) -> Plan:
        branches = [part for part in parts if isinstance(part, Branch)]
        constraints = [part for part in parts if isinstance(part, Constraint) and part.strength > 0]
        follow = max((constraint.gradient for constraint in constraints), default=0.0)
        if follow:
            check_differentiable(self.denoiser, "the denoiser")
        banned = self._banned([part for part in parts if isinstance(part, Ban)])
        demands = self._demands(constraints)
        return Plan(
            branches,
            self._stack([branch for branch in branches if branch.denoiser is None], not follow),
            [part for part in parts if isinstance(part, Tilt)],
            banned,
            self._classes(demands[-1][0].classes if demands else None, banned),
            [part for part in parts if isinstance(part, Veto) and part.drafts],
            demands,
            [part for part in parts if isinstance(part, Gradient) and part.strength],
            follow,
        )

    def _banned(self, bans: Sequence[Ban]) -> Tensor | None:
        """[V], as in `Plan`."""
        tokens = sorted({token for ban in bans for token in ban.tokens} - set(self.kept))
        if not tokens:
            return None
        nothing = torch.zeros(self.run.vocabulary, device=self.run.device)
        return nothing.index_fill(0, torch.tensor(tokens, device=self.run.device), -torch.inf)

    def _classes(self, classes: ops.Classes | None, banned: Tensor | None) -> ops.Classes | None:
        """As in `Plan`."""
        if banned is None:
            return classes
        free = banned == 0
        if classes is None:
            words = free.index_fill(0, self.kept_ids, False).nonzero()[:, 0]
            return ops.Classes(words, [len(words)])
        groups = [group[free[group]] for group in torch.split(classes.order, list(classes.sizes))]
        return ops.Classes(torch.cat(groups), [len(group) for group in groups])

    def _demands(self, constraints: list[Constraint]) -> list[tuple[Automaton, float]]:
        """What is asked for with each strength. The strongest comes last: what is certain is not mixed with what was
        before it."""
        strengths = sorted({constraint.strength for constraint in constraints})
        automata = [self._automaton([c for c in constraints if c.strength == strength]) for strength in strengths]
        return list(zip(aligned(automata), strengths, strict=True))

    def _automaton(self, constraints: list[Constraint]) -> Automaton:
        """What the constraints ask together; built once, since most often all are active at the same time."""
        key, run = tuple(map(id, constraints)), self.run
        if key not in self.automata:
            cause = ", ".join(constraint.cause for constraint in constraints)
            languages = [constraint.language for constraint in constraints]
            found = Automaton.of(languages, run.pieces, run.samples, run.length, cause)
            self.automata[key] = found.to(run.device)
        return self.automata[key]

    # -------------------------------------------------------------------------------------------- its steps

    def _looked(
        self, z: Tensor, gamma: float, self_cond: Tensor | None, plan: Plan, traced: tuple[Tensor, Tensor] | None = None
    ) -> Looked:
        """Everything up to the vocabulary."""
        main, others = self._features(z, gamma, self_cond, plan, traced)
        self.turn += 1
        # E[x0 | z, y] = E[x0 | z] + (sigma^2 / alpha) grad log p(y | z), by Tweedie's formula under both. A token makes
        # y likelier by exp(alpha <grad log p(y | z), its embedding>), to first order.
        # With alpha^2 = 1 / (1 + e^g): sigma^2 / alpha^2 = e^g.
        pulls = [alpha_of(gamma) * gradient.strength * gradient.of(z, gamma) for gradient in plan.gradients]
        felt = FELT * torch.stack(pulls).sum(0) if pulls else None
        by_logits, by_means = (
            [(branch, h) for branch, h in zip(plan.branches, others, strict=True) if branch.space == space]
            for space in ("logits", "x0")
        )
        main = pulled(combined(main, [(branch.combine, h) for branch, h in by_logits]), felt, self.rows)
        by_means = [(branch, pulled(h, felt, self.rows)) for branch, h in by_means]
        return Looked(main, by_means, self._changes(plan, self_cond), pulls)

    def _features(
        self, z: Tensor, gamma: float, self_cond: Tensor | None, plan: Plan, traced: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Features of the main prediction, unless `_traced` has them, and of each branch: in one batch, apart from
        those of other denoisers, and those that change little since a step before."""
        nothing = torch.zeros_like(z)
        last = nothing if self_cond is None else self_cond
        due = [branch for branch in plan.branches if branch.denoiser is None and self._due(branch)]
        new = set(map(id, due))
        given = [last if branch.self_conditioned else nothing for branch in due]
        if traced is None:
            given.insert(0, last)
        ready = iter(self._together(z, gamma, self._stack(due, traced is None), given) if given else ())
        main = next(ready) if traced is None else traced[1].detach()

        def features(branch: Branch) -> Tensor:
            if branch.denoiser is not None:
                return predicted(branch.denoiser, z, gamma, branch.context, last, self.rows)
            return next(ready) if id(branch) in new else self._as_before(branch, main)

        others = list(map(features, plan.branches))
        for branch, h in zip(plan.branches, others, strict=True):
            if id(branch) in new and branch.held(first=self_cond is None):
                self._hold(branch, main - h)
        return main, others

    def _due(self, branch: Branch) -> bool:
        """Whether it is time for a new prediction."""
        return branch.due(self.held.get(id(branch), (None,))[0], self.turn)

    def _hold(self, branch: Branch, change: Tensor) -> None:
        """Keeps main - other, [B, L, H] or [R, H] of the positions that are looked at, for the next steps."""
        if self.rows is not None:
            whole = change.new_zeros(self.run.samples * self.run.length, change.shape[-1])
            change = whole.index_copy(0, self.rows, change)
        self.held[id(branch)] = self.turn, change.view(-1, change.shape[-1])

    def _as_before(self, branch: Branch, main: Tensor) -> Tensor:
        """A branch's features, from the main ones and what was held."""
        change = self.held[id(branch)][1]
        return main - (change if self.rows is None else change[self.rows]).view_as(main)

    def _stack(self, branches: Sequence[Branch], main: bool) -> Context | None:
        """Contexts of some branches, and of the main prediction where it is wanted."""
        key = (int(main), *map(id, branches))
        if key not in self.stacks:
            self.stacks[key] = stacked([*[self.run.context] * main, *(branch.context for branch in branches)])
        return self.stacks[key]

    def _together(self, z: Tensor, gamma: float, context: Context | None, given: list[Tensor]) -> Sequence[Tensor]:
        """Features of each x0 that is given, in one batch."""
        rows = self.rows
        if rows is not None:
            rows = torch.cat([rows + k * z.shape[0] * z.shape[1] for k in range(len(given))])
        found = predicted(self.network, torch.cat([z] * len(given)), gamma, context, torch.cat(given), rows)
        return found.chunk(len(given))

    def _traced(self, z: Tensor, gamma: float, self_cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """z and features of the main prediction, with all that leads from one to the other."""
        rows, context = self.rows, self.run.context
        # Cloned, for what is made in inference mode has no gradient.
        with torch.inference_mode(False), torch.enable_grad(), evaluating(self.denoiser):
            z = z.detach().clone().requires_grad_()
            last = torch.zeros_like(z) if self_cond is None else self_cond.detach().clone()
            context = None if context is None else Context(*(t.clone() for t in context))
            return z, predicted(self.denoiser, z, gamma, context, last, None if rows is None else rows.clone())

    def _changes(self, plan: Plan, self_cond: Tensor | None) -> Changes:
        """The changes of logits in this step, beside words that are banned everywhere."""
        if not (plan.tilts or plan.vetoes):
            return UNCHANGED
        draft = None
        if self_cond is not None and (plan.vetoes or any(tilt.looks_around for tilt in plan.tilts)):
            draft = ops.argmax(self_cond, self.table)

        rows = self.rows
        if rows is None:
            rows = torch.arange(self.run.samples * self.run.length, device=self.run.device)

        def tilting(tilt: Tilt) -> ops.Tilting:
            return lambda logits, start: tilt.apply(Words(logits, rows[start : start + len(logits)], draft))

        tilts = [tilting(tilt) for tilt in plan.tilts]
        if draft is None or not plan.vetoes:
            return Changes(tilts)
        marked, tokens = found(plan.vetoes, draft).flatten(), draft.flatten()
        if plan.banned is not None:  # the word nearest to a mean may be one without a share in it
            marked &= plan.banned[tokens] == 0
        if not bool(marked.any()):
            return Changes(tilts)

        def bar(logits: Tensor, start: int) -> Tensor:
            here = rows[start : start + len(logits)]
            return logits.scatter_add(-1, tokens[here, None], -BARRED * marked[here, None].to(logits))

        return Changes(tilts, [bar])

    def _posterior(self, h: Tensor, plan: Plan, changes: Changes, denoiser: Denoiser | None = None) -> ops.Posterior:
        """By the head of the denoiser that made the features, in the embeddings of the run's."""
        weight, table = self.outputs[denoiser or self.denoiser].weight, self.outputs[self.denoiser].rounded
        posterior = None
        if denoiser is None and plan.classes is None and not (changes.tilts or changes.bans):
            if self.shortlists is not None:
                posterior = self.shortlists.posterior(h, self.rows, self.turn)
            posterior = posterior or self.network.posterior(h, weight, table, self.temperature, self.kept)
        return posterior or self._by_class(h, weight, table, self.temperature, plan, changes)

    def _by_class(
        self, h: Tensor, weight: Tensor, table: Tensor, temperature: float, plan: Plan, changes: Changes
    ) -> ops.Posterior:
        """`ops.expectation`, by class where there are demands."""
        classes = plan.classes
        if changes.tilts or changes.bans:
            classes = None if plan.automaton is None else plan.automaton.classes
            changes = plan.whole(changes)
        posterior = ops.expectation(h, weight, table, temperature, self.kept_ids, classes, *changes)
        return posterior if plan.demands else ops.Posterior(posterior.mean, posterior.kept)

    def _slope(self, traced: tuple[Tensor, Tensor], rows: Tensor | None, plan: Plan, changes: Changes) -> Tensor:
        """The gradient [B, L, D] in z of log p(demands | z) through the denoiser's hidden states: what a demand that
        one position may fulfil says of the others.

        With positions independent given z, it is the mean of sum_l grad log q_l(x_l) over the texts that fulfil the
        demands (Fisher's identity). For logits h W^T that is the Jacobian of h, transposed, times what the demands
        change of each position's mean row of W. The matched filter's share of h is left out: a position's own evidence
        is what `constrained` weighs, exactly.
        """
        assert plan.automaton is not None
        (z, h), weight = traced, self.outputs[self.denoiser].weight
        with torch.no_grad():
            # Without tilts, which are of the sampler and not of the model.
            before = self._by_class(h.detach(), weight, weight, 1.0, plan, changes._replace(tilts=()))
            before = before if rows is None else spread(before, rows, z.shape[:2])
            after = before
            for automaton, strength in plan.demands:
                after = constrained(after, automaton, strength)
            ends = weight[self.kept_ids].float()
            change = overall(after, ends) - overall(before, ends)
            change[..., -z.shape[-1] :] = 0.0
            change = change if rows is None else change.flatten(0, 1)[rows]
        (gradient,) = torch.autograd.grad(h, z, change.to(h.dtype))
        return gradient.float()

    def _x0(self, posterior: ops.Posterior, gamma: float) -> Tensor:
        """The mean embedding, with the length tokens drawn at high noise and held back below."""
        mean, kept = posterior.mean, posterior.kept
        if self.draws(gamma):
            assert self.quantile is not None
            upper = kept.cumsum(-1)
            kept = ((upper - kept < self.quantile) & (self.quantile <= upper)).to(kept.dtype)
        elif self.length_bias:
            # q = p e^-b / (p e^-b + 1 - p): the odds of p divided by e^b, shared out as before.
            p = kept.sum(-1, keepdim=True)
            kept = kept / (p + (1 - p) * math.exp(self.length_bias)).clamp(min=1e-12)
        return overall(ops.Posterior(mean, kept), self.kept_embeddings)


# By denoiser: versions of its two weights, the weights, so that no others get their memory, and what was made of them.
OUTPUTS: WeakKeyDictionary[Denoiser, tuple[object, list[Tensor], Output]] = WeakKeyDictionary()


def output_of(denoiser: Denoiser) -> Output:
    """The tables of a denoiser, kept from run to run until a weight changes; made anew of weights that can't tell."""
    weights = [denoiser.head.weight.detach(), denoiser.space.weight.detach()]
    now, known = versions(denoiser.head) + versions(denoiser.space), OUTPUTS.get(denoiser)
    if known is not None and known[0] == now and not any(weight.is_inference() for weight in weights):
        return known[-1]
    with torch.inference_mode(False), torch.no_grad():  # who finds them later may take gradients
        weight, table = denoiser.output_weight(), denoiser.space.table()
        output = Output(weight.to(denoiser.dtype), table, table.to(denoiser.dtype))
    OUTPUTS[denoiser] = now, weights, output
    return output


def alpha_of(gamma: float) -> float:
    """The signal's share of latents at a noise level."""
    return 1 / math.sqrt(1 + math.exp(gamma))


def predicted(
    network: Callable[..., Tensor],
    z: Tensor,
    gamma: float,
    context: Context | None,
    self_cond: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """Features at one noise level, [B, L, ..] or of some rows [R, ..]."""
    level = torch.full((1 if rows is not None else len(z),), gamma, dtype=torch.float32, device=z.device)
    return network(z, level, context, self_cond, rows=rows)


SURE, MARGIN = 0.99, 2


def live(padding: Tensor) -> Tensor | None:
    """The positions [R], b L + l, up to MARGIN behind the last that may be no padding; None = all.

    padding: [B, L], the probability of padding at each.
    """
    L = padding.shape[1]
    behind = (padding > SURE).flip(1).long().cumprod(1).sum(1, keepdim=True)
    kept = torch.arange(L, device=padding.device) < (L - behind + MARGIN)
    return None if bool(kept.all()) else kept.flatten().nonzero()[:, 0]


def spread(posterior: ops.Posterior, rows: Tensor, shape: Sequence[int]) -> ops.Posterior:
    """A posterior of some rows as one of all positions [B, L]; the others are padding."""

    def whole(values: Tensor, elsewhere: float) -> Tensor:
        everywhere = values.new_full((math.prod(shape), *values.shape[1:]), elsewhere)
        return everywhere.index_copy(0, rows, values).view(*shape, *values.shape[1:])

    kept = whole(posterior.kept, 0.0)
    kept[..., 0] += 1 - whole(torch.ones_like(posterior.kept[..., 0]), 0.0)
    if posterior.share is None or posterior.each is None:
        return ops.Posterior(whole(posterior.mean, 0.0), kept)
    share = whole(posterior.share, 1 / posterior.share.shape[-1])
    return ops.Posterior(whole(posterior.mean, 0.0), kept, share, whole(posterior.each, 0.0))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Here it is in evaluation mode: where gradients are taken, dropout would act."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def stacked(contexts: Sequence[Context | None]) -> Context | None:
    """Contexts side by side in the batch; without a context nothing is seen of another's."""
    some = next((context for context in contexts if context is not None), None)
    if some is None:
        return None
    return Context.stack([some.hidden() if context is None else context for context in contexts])


def barring(banned: Tensor, logits: Tensor, start: int) -> Tensor:
    """Logits [R, V] without the words that are banned everywhere, as an `ops.Tilting`."""
    return logits + banned


def found(vetoes: Sequence[Veto], tokens: Tensor) -> Tensor:
    """[B, L] bool: which of the tokens [B, L] any veto marks."""
    return torch.stack([veto.find(tokens) for veto in vetoes]).any(0)


def members(vetoes: Sequence[Veto], tokens: Tensor) -> Tensor:
    """[B, L] bool: all tokens of what any veto marks in the tokens [B, L]."""
    return torch.stack([(veto.members or veto.find)(tokens) for veto in vetoes]).any(0)


def last(marked: Tensor) -> Tensor:
    """[B, L] bool: the last one of each row."""
    return marked & (marked.flip(1).cumsum(1).flip(1) == 1)


def pulled(h: Tensor, pull: Tensor | None, rows: Tensor | None) -> Tensor:
    """Features h [B, L, H], or [R, H] of the positions `rows`, after a pull [B, L, D] on the logits of words: the last
    features are those that embeddings are multiplied by."""
    if pull is None:
        return h
    here = pull.flatten(0, 1) if rows is None else pull.flatten(0, 1)[rows]
    return h + F.pad(here, (h.shape[-1] - here.shape[-1], 0)).to(h.dtype).view_as(h)


def combined(main: Tensor, others: Sequence[tuple[Combine, Tensor]]) -> Tensor:
    """What all branches make of the main value: each adds what it changes by itself, so their order doesn't matter."""
    values = [combine(main, other) for combine, other in others]
    if len(values) < 2:
        return values[0] if values else main
    return main + (torch.stack(values) - main).sum(0)


def as_means(branch: Branch, main: Tensor, other: Tensor) -> Combine:
    """How features are combined by a branch that combines means [.., D]: as it does where that is linear, else along
    their difference, as far as the means moved along theirs."""
    if branch.means is None or branch.linear:
        return branch.combine
    change = main - other
    moved = ((branch.means(main, other) - main) * change).sum(-1, keepdim=True)
    share = moved / change.square().sum(-1, keepdim=True).clamp(min=1e-12)
    return lambda h, less: h + (share * (h - less)).to(h.dtype)


def guided(main: ops.Posterior, others: Sequence[tuple[Branch, ops.Posterior]]) -> ops.Posterior:
    """A posterior after branches that combine means; probabilities are combined likewise, and made ones again."""

    def probability(name: str) -> Tensor:
        return combined(getattr(main, name), [(branch.combine, getattr(other, name)) for branch, other in others])

    def mean(name: str) -> Tensor:
        ways = [branch.means or branch.combine for branch, _ in others]
        values = [getattr(other, name) for _, other in others]
        return combined(getattr(main, name), list(zip(ways, values, strict=True)))

    kept = probability("kept").clamp(0.0, 1.0)
    kept = kept / kept.sum(-1, keepdim=True).clamp(min=1.0)
    if main.share is None:
        return ops.Posterior(mean("mean"), kept)
    share = probability("share").clamp(min=0.0)
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-12)
    return ops.Posterior(mean("mean"), kept, share, mean("each"))


def overall(posterior: ops.Posterior, ends: Tensor) -> Tensor:
    """The mean [.., D] of all tokens, from that of words and the rows [K, D] of those that are kept apart."""
    mean, kept = posterior.mean, posterior.kept
    return kept @ ends + mean * (1 - kept.sum(-1, keepdim=True))


def constrained(posterior: ops.Posterior, automaton: Automaton, strength: float) -> ops.Posterior:
    """The posterior given that the text is in the automaton's languages, or between both, geometrically."""
    mean, kept, share, each = posterior
    assert share is not None
    assert each is not None
    before = torch.cat([(1 - kept.sum(-1, keepdim=True)).clamp(min=0.0) * share, kept], -1)
    padding, end = kept.unbind(-1)
    found = automaton.marginals(Shares(before[..., :-2], end, padding))
    after = torch.cat([found.classes, found.padding[..., None], found.end[..., None]], -1)
    if strength != 1.0:
        after = before.clamp(min=1e-12) ** (1 - strength) * after.clamp(min=1e-12) ** strength
        after = after / after.sum(-1, keepdim=True)
    words = after[..., :-2]
    changed = words / words.sum(-1, keepdim=True).clamp(min=1e-12)
    # From the mean on, which branches may have moved by more than their classes tell.
    mean = mean + ((changed - share)[..., None] * each).sum(-2)
    return ops.Posterior(mean, after[..., -2:], changed, each)
