"""The decoder's keys and values of all beams, each state stored once however many beams go through it."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache


class BeamPaths:
    """Where the states that each beam has passed through lie in an append-only store.

    A step of beam search gives every beam a new past. Only the pointers to it move: the keys and values stay where
    they were written once, what beams have in common is there once, and the store never grows.
    """

    def __init__(self, batch_size: int, num_beams: int, num_tokens: int, device: torch.device):
        # At the first token the beams of a user are still one.
        self.capacity = batch_size * (1 + num_beams * (num_tokens - 1))
        self.most_beams, self.num_tokens = batch_size * num_beams, num_tokens
        self.rows = torch.empty(0, batch_size, dtype=torch.long, device=device)  # (tokens, beams of all users)
        self.stored = 0

    def extend(self, num_tokens: int):
        """Makes room for the states of each beam's next tokens."""
        beams = self.rows.shape[1]
        new = torch.arange(num_tokens * beams, device=self.rows.device).view(num_tokens, beams) + self.stored
        self.rows = torch.cat([self.rows, new])
        self.stored += num_tokens * beams

    def follow(self, parents: torch.LongTensor):
        """Beam i goes on from beam `parents[i]`."""
        self.rows = self.rows.index_select(1, parents)


class BeamCacheLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, read along [`BeamPaths`]."""

    is_sliding = False

    def __init__(self, paths: BeamPaths, scratch: dict[torch.device, torch.Tensor]):
        super().__init__()
        self.paths, self.scratch = paths, scratch
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        width = 2 * key_states.shape[1] * key_states.shape[3]
        self.store = key_states.new_empty(self.paths.capacity, width)
        # One buffer serves all layers in turn: each is done with it when the next one begins.
        if self.store.device not in self.scratch:
            self.scratch[self.store.device] = self.store.new_empty(
                self.paths.most_beams * self.paths.num_tokens, width
            )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Takes (beams, heads, new tokens, head_dim) and gives (beams, heads, all tokens, head_dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        beams, heads, new_tokens, head_dim = key_states.shape
        rows = self.paths.rows
        new = self.store[self.paths.stored - new_tokens * beams : self.paths.stored]
        new = new.view(new_tokens, beams, 2, heads, head_dim)
        new[:, :, 0], new[:, :, 1] = key_states.permute(2, 0, 1, 3), value_states.permute(2, 0, 1, 3)
        self.length = rows.shape[0]
        past = self.scratch[self.store.device][: rows.numel()]
        torch.index_select(self.store, 0, rows.flatten().to(past.device), out=past)
        past = past.view(self.length, beams, 2, heads, head_dim).permute(2, 1, 3, 0, 4)
        return past[0], past[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.paths.num_tokens


def beam_cache(paths: BeamPaths, num_layers: int) -> EncoderDecoderCache:
    """The cache of a decoder whose beams take `paths`; the history's keys and values are kept once per user."""
    scratch: dict[torch.device, torch.Tensor] = {}
    layers = [BeamCacheLayer(paths, scratch) for _ in range(num_layers)]
    return EncoderDecoderCache(Cache(layers=layers), DynamicCache())
