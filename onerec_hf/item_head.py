"""The item head: a vector per item, the cross-entropy of a softmax over the whole catalogue, and its memory."""

import math

import torch
from torch import nn

_LOSS_CHUNK = 512
_JOINED_CHUNK = 16_384  # rows

# Of a history the memory reads so many latest items, each of which weighs half of one that came so many later.
MEMORY_ITEMS = 16
MEMORY_HALF_LIFE = 2


class OneRecItemVectors(nn.Module):
    """What the encoder reads of an item beside its codes, and what the item head multiplies a state with.

    A vector is learned, and with a `content_size` the projection of the item's content embedding is added, so that
    items without a behaviour have a vector too.
    """

    def __init__(self, num_items: int, hidden_size: int, content_size: int = 0):
        super().__init__()
        self.learned = nn.Embedding(num_items, hidden_size)
        self.register_buffer("content", torch.zeros(num_items, content_size) if content_size else None)
        if content_size:
            self.content_proj = nn.Linear(content_size, hidden_size, bias=False)

    def forward(self, items: torch.LongTensor | None = None) -> torch.Tensor:
        """Vectors (..., hidden_size) of catalogue indices, 0 at -1; all of them, (N, hidden_size), where none are
        given."""
        if items is None:
            return self.rows(slice(None))
        known = items.clamp(min=0)
        vectors = self.learned(known)
        if self.content is not None:
            vectors = vectors + self.content_proj(self.content[known])
        return vectors * (items >= 0)[..., None]

    def rows(self, rows: slice) -> torch.Tensor:
        """Vectors (rows, hidden_size) of a range of the catalogue."""
        vectors = self.learned.weight[rows]
        return vectors if self.content is None else vectors + self.content_proj(self.content[rows])

    @torch.no_grad()
    def set_content(self, content: torch.Tensor) -> None:
        """Takes the items' content embeddings (N, item_content_size), each brought to length 1: so the projections
        begin as large as the learned vectors. Larger ones are learned faster than these, and rank worse."""
        self.content.copy_(nn.functional.normalize(content, dim=1))

    @torch.no_grad()
    def add(self, content: torch.Tensor) -> None:
        """Appends items without a behaviour: their learned part is the mean of all items' (0 beside content).

        Args:
            content: (items, content_size) content embeddings.
        """
        learned = self.learned.weight
        if self.content is None:
            new = learned.mean(0).expand(len(content), -1)
        else:
            new = learned.new_zeros(len(content), learned.shape[1])
            length = self.content.norm(dim=1).amax()  # checkpoints once had others than 1
            new_content = nn.functional.normalize(content.to(self.content), dim=1) * length
            self.content = torch.cat([self.content, new_content])
        self.learned = nn.Embedding.from_pretrained(torch.cat([learned, new]), freeze=False)


class OneRecItemMemory(nn.Module):
    """What was consumed together, remembered as it was: beside the softmax of vectors, which has to generalise.

    Every item has its nearest neighbours by co-consumption. To the logit of an item come `weight` times its
    similarities to the latest items of the history, the older the less:

        logit(j) = <state, vector(j)> + weight * sum_i .5 ** (later items / half-life) similarity(i, j)
    """

    def __init__(self, num_items: int, num_neighbours: int, weight: float):
        super().__init__()
        self.weight = weight
        self.register_buffer("neighbours", torch.full((num_items, num_neighbours), -1, dtype=torch.int32))
        self.register_buffer("similarities", torch.zeros(num_items, num_neighbours))

    @torch.no_grad()
    def set_neighbours(self, neighbours: torch.LongTensor, similarities: torch.Tensor) -> None:
        """Takes the items' neighbours and their similarities, both (N, neighbours), -1 and 0 where there are fewer."""
        self.neighbours.copy_(neighbours)
        self.similarities.copy_(similarities)

    @torch.no_grad()
    def add(self, count: int) -> None:
        """Appends items that nobody has consumed yet."""
        self.neighbours = nn.functional.pad(self.neighbours, (0, 0, 0, count), value=-1)
        self.similarities = nn.functional.pad(self.similarities, (0, 0, 0, count))

    def forward(self, items: torch.LongTensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """What histories bring to mind.

        Args:
            items: (batch, behaviours) catalogue indices, oldest first; -1 is passed over.

        Returns:
            (batch, memories) catalogue indices, among which an item may come several times, and for each what comes to
            the item's logit, float32: 0 where there is nothing.
        """
        places = torch.arange(items.shape[1], device=items.device).masked_fill(items < 0, -1)
        place, order = places.topk(min(items.shape[1], MEMORY_ITEMS), dim=1)
        latest = items.gather(1, order).clamp(min=0)
        recency = self.weight * 0.5 ** (torch.arange(place.shape[1], device=items.device) / MEMORY_HALF_LIFE)
        neighbours = self.neighbours[latest]
        known = (neighbours >= 0) & (place >= 0)[..., None]
        scores = self.similarities[latest].float() * recency[:, None] * known
        return neighbours.clamp(min=0).flatten(1).long(), scores.flatten(1)


class JoinedItemVectors(nn.Module):
    """The vectors of several heads side by side, joined once for as long as their weights stay the same.

    Weights are told apart by their place in memory and by the version that every change in place counts up. Nothing is
    kept with gradients, in training mode, or of weights that are quantized, adapted or offloaded. Only what is written
    to `weight.data` in place counts up no version: after that, outside of training, [`forget`].
    """

    def __init__(self):
        super().__init__()
        self._kept: tuple[list[torch.Tensor], list[int], torch.Tensor] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}  # a copy of a model has weights of its own

    def forget(self) -> None:
        """Gives the memory free."""
        self._kept = None

    def train(self, mode: bool = True) -> "JoinedItemVectors":
        if mode:
            self.forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "JoinedItemVectors":
        self.forget()  # the weights go to another device or precision
        return super()._apply(*args, **kwargs)

    def forward(self, heads: list[OneRecItemVectors]) -> torch.Tensor:
        """(N, heads * hidden_size)."""
        if torch.is_grad_enabled() or not all(map(_stands_for_itself, heads)):
            return torch.cat([head() for head in heads], dim=1)
        weights = [weight for head in heads for weight in (*head.parameters(), *head.buffers())]
        kept, versions = self._kept, [weight._version for weight in weights]
        if kept is not None and kept[1] == versions and all(map(_same_memory, kept[0], weights)):
            return kept[2]
        self.forget()  # before the new ones need their memory
        joined = _join(heads)
        # What is compared with holds on to its memory, in which no other weight can come to lie.
        self._kept = [weight.detach() for weight in weights], versions, joined
        return joined


def _stands_for_itself(head: nn.Module) -> bool:
    """Whether a head's vectors follow from its weights alone, and these can be compared."""
    if type(head) is not OneRecItemVectors or head.training:
        return False
    parts = [head.learned, *([] if head.content is None else [head.content_proj])]
    weights = (*head.parameters(), *head.buffers())
    return all(type(part) in (nn.Embedding, nn.Linear) for part in parts) and all(
        type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta and not weight.is_inference()
        for weight in weights
    )


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype


def _join(heads: list[OneRecItemVectors]) -> torch.Tensor:
    """Side by side, chunk by chunk, so that nothing beside the result is as large as it."""
    learned = [head.learned.weight for head in heads]
    joined = learned[0].new_empty(len(learned[0]), sum(weight.shape[1] for weight in learned))
    for start in range(0, len(joined), _JOINED_CHUNK):
        rows = slice(start, start + _JOINED_CHUNK)
        torch.cat([head.rows(rows) for head in heads], dim=1, out=joined[rows])
    return joined


class FullSoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy of `states @ vectors.T` in chunks that stay in the processor's cache.

    The gradient is taken while a chunk's probabilities are at hand, so that the (T, N) logits never exist as a whole.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        count = len(states)
        states_gradient = torch.empty_like(states)
        vectors_gradient = torch.zeros_like(vectors)
        buffer = states.new_empty(min(_LOSS_CHUNK, count), len(vectors))
        total = states.new_zeros(())
        for start in range(0, count, _LOSS_CHUNK):
            chunk = states[start : start + _LOSS_CHUNK]
            target = targets[start : start + _LOSS_CHUNK, None]
            logits = torch.mm(chunk, vectors.T, out=buffer[: len(chunk)])
            logits -= logits.amax(dim=1, keepdim=True)
            target_logit = logits.gather(1, target)
            exponentials = logits.exp_()
            normaliser = exponentials.sum(dim=1, keepdim=True)
            total += (normaliser.log() - target_logit).sum()
            residual = exponentials.div_(normaliser * count)
            residual.scatter_add_(1, target, torch.full_like(target_logit, -1.0 / count))
            torch.mm(residual, vectors, out=states_gradient[start : start + len(chunk)])
            vectors_gradient.addmm_(residual.T, chunk)
        ctx.save_for_backward(states_gradient, vectors_gradient)
        return total / count

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        states_gradient, vectors_gradient = ctx.saved_tensors
        return states_gradient * gradient, vectors_gradient * gradient, None


def sampled_softmax_loss(
    states: torch.Tensor, vectors: OneRecItemVectors, targets: torch.Tensor, num_negatives: int
) -> torch.Tensor:
    """Mean cross-entropy with the softmax's denominator estimated, without bias, from items drawn uniformly.

    Args:
        states: (targets, hidden_size).
        vectors: The items' vectors, of which those of targets and drawn items are read.
        targets: (targets,) catalogue indices.
        num_negatives: Items drawn, with replacement, for all states together.
    """
    num_items = vectors.learned.num_embeddings
    drawn = torch.randint(num_items, (num_negatives,), device=states.device)
    # A drawn item stands for num_items / num_negatives of them, the target for itself alone.
    logits = states @ vectors(drawn).T + math.log(num_items / num_negatives)
    logits = logits.masked_fill(drawn == targets[:, None], -torch.inf)
    target_logits = (states * vectors(targets)).sum(-1, keepdim=True)
    return (torch.cat([target_logits, logits], 1).float().logsumexp(1) - target_logits[:, 0]).mean()
