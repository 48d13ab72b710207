"""The searches: which of the candidates of a step become the new beams."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..typed_arguments import typed_arguments
from .code_scores import log_softmax_over


class Candidates(NamedTuple):
    """What may follow the beams at one step, of shape (batch, beams, fan-out) but for the logits."""

    scores: torch.Tensor  # log-probability of a beam with the candidate, -inf where it is not available
    logits: torch.Tensor  # (batch, beams, K), of all the level's codes
    available: torch.BoolTensor  # whether an item that may be given follows
    codes: torch.LongTensor
    nodes: torch.LongTensor  # in the trie
    # With an item head, log-probabilities of the item's codes alone, and of the items below each under the mixture.
    code_log_probs: torch.Tensor | None = None
    item_log_probs: torch.Tensor | None = None

    def proposal(self, temperature: float) -> torch.Tensor:
        """Log-probabilities to draw from, normalised over what is available."""
        logits = self.logits.gather(-1, self.codes) if self.item_log_probs is None else self.item_log_probs
        return log_softmax_over(logits / temperature, self.available)


class SessionGuide(Protocol):
    """What values sessions while they are searched for, such as a reward model."""

    def __call__(self, sessions: torch.LongTensor, candidates: torch.LongTensor) -> torch.Tensor:
        """Values (batch, sessions, K), each the mean over a session's items, of sessions (batch, sessions, items so
        far) each with one of the candidates (batch, sessions, K) after it; catalogue indices, -1 for nothing; NaN of
        an empty one."""

    def of_users(self, users: slice) -> "SessionGuide":
        """The guide of a part of the batch."""


class BeamSearch:
    """The best candidates of all beams. A search is made for one batch, of so many items of so many levels, is called
    once per level and gives the chosen candidates as indices (batch, new beams) into beams and fan-out taken together.
    """

    reads: tuple[str, ...] = ()  # the options that serve it

    def __init__(self, options: "SearchOptions", num_items: int, num_levels: int):
        self.options = options

    def __call__(self, candidates: Candidates) -> torch.LongTensor:
        return self.best(candidates, self.options.num_beams)

    @staticmethod
    def best(candidates: Candidates, count: int) -> torch.LongTensor:
        scores = candidates.scores.flatten(1)
        return scores.topk(min(count, scores.shape[1])).indices


class WideningBeamSearch(BeamSearch):
    """Of m items the i-th has i/m of the beams, and half of these go on to the next item: what is likeliest in the end
    is close to the front at first, and at an item's last code more so than at its first."""

    def __init__(self, options: "SearchOptions", num_items: int, num_levels: int):
        super().__init__(options, num_items, num_levels)
        beams = [math.ceil(options.num_beams * item / num_items) for item in range(1, num_items + 1)]
        going_on = [math.ceil(count / 2) for count in beams[:-1]] + beams[-1:]
        self.counts = iter(
            count if level < num_levels - 1 else kept
            for count, kept in zip(beams, going_on, strict=True)
            for level in range(num_levels)
        )

    def __call__(self, candidates: Candidates) -> torch.LongTensor:
        return self.best(candidates, next(self.counts))


class GuidedBeamSearch(BeamSearch):
    """Beams of sessions, each extended by beams of its own for the next item, of which those sessions go on that have
    the highest log-probability together with the guide's value, weighted."""

    reads = ("guide", "guidance_weight", "num_item_beams")

    def __init__(self, options: "SearchOptions", num_items: int, num_levels: int):
        super().__init__(options, num_items, num_levels)
        self.sessions, self.between_items = 1, True

    def __call__(self, candidates: Candidates) -> torch.LongTensor:
        batch, parents, fan_out = candidates.scores.shape
        if self.between_items:
            self.sessions, self.between_items = parents, False
        own = candidates.scores.view(batch, self.sessions, -1)
        # The first items come from the one empty session, and are as many as those of all sessions later on.
        count = min(self.options.most_beams // self.sessions, own.shape[2])
        start = torch.arange(self.sessions, device=own.device)[:, None] * own.shape[2]
        return (own.topk(count).indices + start).flatten(1)

    def kept_sessions(self, scores: torch.Tensor, items: torch.LongTensor) -> torch.LongTensor:
        """Which of the beams go on after an item, (batch, sessions) places among them.

        Args:
            scores: (batch, beams) their log-probabilities, -inf of dead ones.
            items: (batch, beams, items so far) catalogue indices, -1 for nothing.
        """
        self.between_items = True
        # A value is a session's mean over its items: what counts is their sum, as of the log-probabilities.
        extended = items.unflatten(1, (self.sessions, -1))
        value = self.options.guide(extended[:, :, 0, :-1], extended[..., -1]).flatten(1)
        value = items.shape[-1] * value.to(scores).nan_to_num(0.0)
        total = scores + self.options.guidance_weight * value
        return total.topk(min(self.options.num_beams, scores.shape[1])).indices


class DiverseBeamSearch(BeamSearch):
    """Every group's best beams, a code dearer by the penalty for each beam of former groups that took it at this step
    (Vijayakumar et al. 2016, arXiv 1610.02424, Hamming diversity)."""

    reads = ("num_beam_groups", "diversity_penalty")
    started = False

    def __call__(self, candidates: Candidates) -> torch.LongTensor:
        groups = self.options.num_beam_groups
        batch, parents, fan_out = candidates.scores.shape
        # All groups start from the one common beam; from then on each has its own, side by side.
        own = parents // groups if self.started else 0
        self.started = True
        taken = candidates.scores.new_zeros(batch, candidates.logits.shape[-1])
        chosen = []
        for group in range(groups):
            beams = slice(group * own, (group + 1) * own) if own else slice(0, parents)
            codes = candidates.codes[:, beams].flatten(1)
            penalty = self.options.diversity_penalty * taken.gather(1, codes)
            penalized = candidates.scores[:, beams].flatten(1) - penalty
            best = penalized.topk(min(self.options.num_beams // groups, penalized.shape[1])).indices
            taken.scatter_add_(1, codes.gather(1, best), torch.ones_like(best, dtype=taken.dtype))
            chosen.append(best + beams.start * fan_out)
        return torch.cat(chosen, dim=1)


class Sampling(BeamSearch):
    """Every beam draws one code; from the common start there are drawn as many as beams are wanted."""

    reads = ("temperature", "top_k", "top_p")

    def __call__(self, candidates: Candidates) -> torch.LongTensor:
        options, proposal = self.options, candidates.proposal(self.options.temperature)
        fan_out = proposal.shape[-1]
        if options.top_k:
            smallest = proposal.topk(min(options.top_k, fan_out)).values[..., -1:]
            proposal = proposal.masked_fill(proposal < smallest, -torch.inf)
        if options.top_p is not None and options.top_p < 1:
            ordered, order = proposal.softmax(-1).sort(descending=True)
            # A code is dropped if those before it make up top_p already; the first one always stays.
            beyond = ordered.cumsum(-1) - ordered >= options.top_p
            beyond = torch.zeros_like(beyond).scatter(-1, order, beyond)
            proposal = proposal.masked_fill(beyond, -torch.inf)
        beam = torch.arange(proposal.shape[1], device=proposal.device)
        proposal = proposal.expand(-1, options.num_beams, -1)
        return (proposal + _gumbel(proposal, options.generator)).argmax(-1) + beam * fan_out


class StochasticBeamSearch(BeamSearch):
    """Gumbel-top-k: sessions drawn without replacement (Kool et al. 2019, arXiv 1903.06059, Algorithm 1)."""

    reads = ("temperature",)
    log_prob = perturbed = None

    def __call__(self, candidates: Candidates) -> torch.LongTensor:
        proposal = candidates.proposal(self.options.temperature)
        if self.log_prob is None:
            self.log_prob = self.perturbed = proposal.new_zeros(proposal.shape[:2])
        log_prob = self.log_prob[..., None] + proposal
        noisy = log_prob + _gumbel(log_prob, self.options.generator)
        # Noise whose maximum over the children is the parent's, in the stable form of appendix B.3.
        below = noisy - noisy.amax(-1, keepdim=True)
        gap = self.perturbed[..., None] - noisy + torch.log1p(-below.exp())
        perturbed = self.perturbed[..., None] - gap.relu() - torch.log1p(torch.exp(-gap.abs()))
        perturbed = perturbed.masked_fill(log_prob.isneginf() | perturbed.isnan(), -torch.inf).flatten(1)
        self.perturbed, chosen = perturbed.topk(min(self.options.num_beams, perturbed.shape[1]))
        self.log_prob = log_prob.flatten(1).gather(1, chosen)
        return chosen


def _gumbel(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return -torch.empty_like(like).exponential_(generator=generator).log()


SEARCHES = {
    "beam": BeamSearch,
    "widening_beam": WideningBeamSearch,
    "guided_beam": GuidedBeamSearch,
    "diverse_beam": DiverseBeamSearch,
    "sample": Sampling,
    "stochastic_beam": StochasticBeamSearch,
}


@typed_arguments
@dataclass(frozen=True)
class SearchOptions:
    """How sessions are searched for.

    Args:
        num_beams: Beams per user; with `"sample"` sessions drawn.
        search: `"beam"`; `"widening_beam"`, fewer beams for a session's first items, which finds the likeliest session
            of nearly every user in about half the time; `"diverse_beam"`, groups of beams that avoid each other's
            codes; `"sample"`, independent sessions; `"stochastic_beam"`, sessions drawn without replacement. The
            latter two draw from the codes that an available item follows. `"guided_beam"`, in which a value of the
            session so far takes part.
        temperature: Of the distribution that is drawn from.
        top_k, top_p: For `"sample"`: only the likeliest codes are drawn, so many of them (0 keeps all) or as many as
            make up this probability.
        num_beam_groups, diversity_penalty: For `"diverse_beam"`: into how many groups the beams are cut, and what a
            group's beams lose, in nats, for each beam of former groups with the same code at the same step.
        guide, guidance_weight, num_item_beams: For `"guided_beam"`: gives the values of sessions so far, see
            [`SessionGuide`]; what a value of 1 is worth for each item of a session, in nats; and the items with which
            each of the `num_beams` sessions is extended before those with the highest sum of both are kept.
        generator: Source of the draws, on the model's device.

    Raises:
        ValueError: For a value that is out of range or serves another search.
    """

    num_beams: int
    search: str = "beam"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    num_beam_groups: int = 4
    diversity_penalty: float = 0.5
    guide: "SessionGuide | None" = None
    guidance_weight: float = 8.0
    num_item_beams: int = 128
    generator: torch.Generator | None = None

    def __post_init__(self):
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}.")
        if self.search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {self.search!r}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if (self.top_k is not None and self.top_k < 0) or (self.top_p is not None and not 0 < self.top_p <= 1):
            raise ValueError(
                f"top_k must be positive (0 keeps all) and top_p in (0, 1], got {self.top_k} and {self.top_p}."
            )
        reads = SEARCHES[self.search].reads
        filtered = self.top_k or self.top_p is not None
        if self.temperature != 1 and "temperature" not in reads or filtered and "top_k" not in reads:
            raise ValueError(
                f"temperature serves 'sample' and 'stochastic_beam', top_k and top_p 'sample', not {self.search!r}."
            )
        groups, penalty = self.num_beam_groups, self.diversity_penalty
        if self.search == "diverse_beam" and (groups < 2 or self.num_beams % groups or penalty <= 0):
            raise ValueError(
                f"'diverse_beam' needs at least 2 num_beam_groups of equal size and a diversity_penalty above 0, got "
                f"{groups} groups of {self.num_beams} beams and {penalty}."
            )

        if (self.search == "guided_beam") != (self.guide is not None):
            raise ValueError("'guided_beam' needs a guide, and no other search reads one.")
        if self.guidance_weight < 0 or self.num_item_beams < 1:
            raise ValueError(
                f"guidance_weight must be at least 0 and num_item_beams at least 1, got {self.guidance_weight} and "
                f"{self.num_item_beams}."
            )

    @staticmethod
    def divided(beams: int, num_item_beams: int) -> dict[str, int]:
        """`num_beams` and `num_item_beams` of a `"guided_beam"` that has so many beams in all: `num_item_beams` for
        each session, of which there is one at least."""
        if num_item_beams < 1:
            raise ValueError(f"num_item_beams must be at least 1, got {num_item_beams}.")
        num_item_beams = min(num_item_beams, beams)
        return {"num_beams": beams // num_item_beams, "num_item_beams": num_item_beams}

    @property
    def most_beams(self) -> int:
        """Beams of a user at most, at any step."""
        return self.num_beams * (self.num_item_beams if self.search == "guided_beam" else 1)

    @classmethod
    def read_from(cls, settings: Any, search: str, num_beams: int, generator: torch.Generator | None = None):
        """The options that `search` reads, from those attributes of `settings` that are called so."""
        reads = SEARCHES[search].reads if search in SEARCHES else ()
        found = {name: getattr(settings, name) for name in reads if hasattr(settings, name)}
        return cls(num_beams, search, generator=generator, **found)
