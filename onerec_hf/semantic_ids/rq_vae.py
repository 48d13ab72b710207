"""RQ-VAE: residual quantization in the latent space of an autoencoder that is trained with its codebooks.

The common alternative to residual K-means (TIGER, arXiv 2305.05065; RQ-VAE, arXiv 2203.01941), which the paper rejects
for its uneven codes. Trained with the usual remedies: k-means initialisation, revival of dead codes and the
straight-through gradient.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans, nearest_centroid
from onerec_hf.semantic_ids.quantizer import Quantizer
from onerec_hf.typed_arguments import typed_arguments

# Share of the steps that train the autoencoder alone, before the codebooks are fitted to its latents.
WARMUP_SHARE = 0.1
# A code that no item of this many batches has taken is dead.
REVIVAL_STEPS = 20
# Rows that the networks see at once outside of training, and rows that the codebooks are initialised on.
ROWS_AT_ONCE = 2**16


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class AutoEncoder(nn.Module):
    """Two mirrored MLPs on embeddings that are centred and scaled to unit variance, and scaled back after them."""

    def __init__(self, embedding_dim: int, hidden_sizes: Sequence[int], latent_dim: int):
        super().__init__()
        sizes = [embedding_dim, *hidden_sizes, latent_dim]
        self.encoder, self.decoder = _mlp(sizes), _mlp(sizes[::-1])
        self.register_buffer("center", torch.zeros(embedding_dim))
        self.register_buffer("scale", torch.ones(()))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents (N, latent_dim) of embeddings (N, embedding_dim)."""
        return self.encoder((x - self.center) / self.scale)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, embedding_dim) of latents (N, latent_dim)."""
        return self.decoder(latents) * self.scale + self.center


@typed_arguments
class RQVAE(Quantizer):
    """Residual quantization of latents, encoder, decoder and codebooks trained together; the quantizer type "rqvae".

    The loss is the reconstruction error, and for each level the squared distance of the residual and its code, which
    moves the code with weight 1 and the encoder with weight `commitment`; all are means over rows and dimensions.

    Args:
        latent_dim, hidden_sizes: of the encoder; the decoder is its mirror image.
        num_steps, batch_size, learning_rate: of AdamW. The first tenth of the steps trains the autoencoder alone.
        commitment: see above.

    The other arguments are those of [`Quantizer`]. Codes are the nearest ones.
    """

    quantizer_type = "rqvae"
    setting_names = (
        *Quantizer.setting_names,
        *("latent_dim", "hidden_sizes", "num_steps", "batch_size", "learning_rate", "commitment"),
    )

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        latent_dim: int = 32,
        hidden_sizes: Sequence[int] = (256, 128),
        num_steps: int = 3000,
        batch_size: int = 1024,
        learning_rate: float = 1e-3,
        commitment: float = 0.25,
        **settings,
    ):
        super().__init__(codebook_sizes, **settings)
        self.latent_dim, self.hidden_sizes = latent_dim, tuple(hidden_sizes)
        self.num_steps, self.batch_size = num_steps, batch_size
        self.learning_rate, self.commitment = learning_rate, commitment

    def _fit_codebooks(self, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = AutoEncoder(x.shape[1], self.hidden_sizes, self.latent_dim)
        self.network = network.to(x.device)
        network.center.copy_(x.mean(0))
        network.scale.copy_((x - network.center).square().mean().sqrt())
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=0.0)

        warmup = int(WARMUP_SHARE * self.num_steps)
        codebooks: list[nn.Parameter] = []
        order, used = torch.empty(0, dtype=torch.long), []
        for step in tqdm(range(self.num_steps), desc="RQ-VAE", disable=not self.show_progress):
            if len(order) < min(self.batch_size, len(x)):
                order = torch.cat([order, torch.randperm(len(x), generator=generator)])
            batch, order = x[order[: self.batch_size].to(x.device)], order[self.batch_size :]
            if step == warmup:
                sample = torch.randperm(len(x), generator=generator)[:ROWS_AT_ONCE].to(x.device)
                codebooks = [nn.Parameter(codebook) for codebook in self._initial_codebooks(x[sample])]
                used = [torch.zeros(len(codebook), dtype=torch.bool, device=x.device) for codebook in codebooks]
                optimizer.add_param_group({"params": codebooks})
            latents = network.encode(batch)
            quantized, loss, residuals = self._quantize(latents, codebooks, used)
            # The decoder sees the quantized latents, the encoder gets their gradient (straight through).
            decoded = network.decode(latents + (quantized - latents).detach() if codebooks else latents)
            loss = loss + F.mse_loss(decoded, batch) / network.scale**2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if codebooks and (step - warmup) % REVIVAL_STEPS == REVIVAL_STEPS - 1 and step < self.num_steps - 1:
                _revive_dead_codes(codebooks, used, residuals, generator)
        self.codebooks = [codebook.detach() for codebook in codebooks]
        network.requires_grad_(False)
        return self._nearest_codes(self._latents(x))

    def _initial_codebooks(self, x: torch.Tensor) -> list[torch.Tensor]:
        residual, codebooks = self._latents(x), []
        for level, size in enumerate(self.codebook_sizes):
            kmeans = BalancedKMeans(size, max_iterations=10, seed=self.seed + level).fit(residual)
            codebooks.append(kmeans.centroids.clone())
            residual = residual - kmeans.centroids[nearest_centroid(residual, kmeans.centroids)]
        return codebooks

    def _quantize(
        self, latents: torch.Tensor, codebooks: Sequence[torch.Tensor], used: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Sum of the codes' vectors, the loss of codes and commitment, and each level's residuals; marks `used`."""
        residual, quantized = latents, torch.zeros_like(latents)
        loss, residuals = latents.new_zeros(()), []
        for codebook, marks in zip(codebooks, used, strict=True):
            residuals.append(residual.detach())
            codes = nearest_centroid(residual.detach(), codebook.detach())
            marks[codes] = True
            chosen = codebook[codes]
            loss = loss + F.mse_loss(chosen, residual.detach())
            loss = loss + self.commitment * F.mse_loss(residual, chosen.detach())
            quantized = quantized + chosen
            residual = residual - chosen.detach()
        return quantized, loss, residuals

    def _latents(self, x: torch.Tensor) -> torch.Tensor:
        self.network.to(x.device)
        with torch.no_grad():
            return torch.cat([self.network.encode(rows) for rows in x.split(ROWS_AT_ONCE)])

    def _embeddings(self, latents: torch.Tensor) -> torch.Tensor:
        self.network.to(latents.device)
        with torch.no_grad():
            return torch.cat([self.network.decode(rows) for rows in latents.split(ROWS_AT_ONCE)])

    def _weights(self) -> dict[str, torch.Tensor]:
        return super()._weights() | {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}

    def _load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        super()._load_weights(weights)
        self.network = AutoEncoder(self.embedding_dim, self.hidden_sizes, self.latent_dim).requires_grad_(False)
        network = {name: tensor for name, tensor in weights.items() if name.startswith("network.")}
        self.network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in network.items()})


@torch.no_grad()
def _revive_dead_codes(codebooks, used, residuals, generator: torch.Generator) -> None:
    """Puts codes that nobody took on residuals of the latest batch; clears the marks."""
    for codebook, marks, residual in zip(codebooks, used, residuals, strict=True):
        drawn = torch.randint(len(residual), (len(codebook),), generator=generator).to(residual.device)
        codebook.copy_(torch.where(marks[:, None], codebook, residual[drawn]))
        marks.zero_()
