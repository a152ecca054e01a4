"""RQ-VAE: an autoencoder whose code is a sum of codebook vectors, one a level (METHOD 2; arXiv 2203.01941, TIGER 2305.05065).

    loss = |x - dec(q)|^2 + commitment * sum_l |r_l - sg(c_l)|^2 [+ sum_l |sg(r_l) - c_l|^2 where codebooks learn by gradient]
           [+ diversity * sum_l K * sum_k p_lk^2] [+ contrastive * InfoNCE over co-engaged items]

r_l: what the levels before l leave of z = enc(x); c_l: the code nearest to r_l; q = sum_l c_l, passed straight through to enc; sg: no
gradient. First the autoencoder learns without codes, then a pass over all items starts the codebooks by k-means on the residuals,
level by level, then codes and autoencoder learn together; codebooks by usage-weighted moving averages with Laplace smoothing.

Shapes: B batch, V width of a vector, D width of the quantised space, L levels, K codes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gr2.config import Tokenizer
from training.codebooks import Codebooks, Curve, Floats, Layers, codes_in_use
from training.rqkmeans import POINTS, residual_kmeans

WARM_SHARE = 0.2  # of the steps, before there are codes
SMOOTHING = 1e-5
TEMPERATURE = 0.1  # of the contrastive loss and of soft assignments, relative to the mean squared distance
LOG_EVERY = 50


@dataclass
class Codes:
    """What residual quantisation of a batch gives."""

    codes_BL: Tensor
    quantised_BD: Tensor
    commitment: Tensor  # scalars, means over the batch
    codebook: Tensor
    diversity: Tensor


class ResidualQuantiser(nn.Module):
    """L codebooks over residuals. `ema` 0: the codebooks are parameters; else moving averages of what is assigned to them."""

    usage_LK: Tensor
    sums_LKD: Tensor
    idle_LK: Tensor  # batches since a code was last used

    def __init__(self, books_LKD: Tensor, ema: float) -> None:
        super().__init__()
        self.ema = ema
        self.books_LKD = nn.Parameter(books_LKD.clone(), requires_grad=ema == 0)
        self.register_buffer("usage_LK", torch.ones(books_LKD.shape[:2]))
        self.register_buffer("sums_LKD", books_LKD.clone())
        self.register_buffer("idle_LK", torch.zeros(books_LKD.shape[:2], dtype=torch.long))

    def forward(self, z_BD: Tensor, soft: bool = False) -> Codes:
        """Greedy quantisation. `soft`: also the diversity loss, lambda's factor of METHOD 2."""
        left_BD, codes, commitment, codebook, diversity = z_BD, [], z_BD.new_zeros(()), z_BD.new_zeros(()), z_BD.new_zeros(())
        books_LKD = self.books_LKD.clone()  # moving averages change the codebooks in place before the gradient is taken
        for book_KD in books_LKD:
            squared_BK = left_BD.pow(2).sum(dim=1, keepdim=True) - 2 * left_BD @ book_KD.T + book_KD.pow(2).sum(dim=1)
            code_B = squared_BK.argmin(dim=1)
            chosen_BD = book_KD[code_B]
            commitment = commitment + (left_BD - chosen_BD.detach()).pow(2).sum(dim=1).mean()
            codebook = codebook + (left_BD.detach() - chosen_BD).pow(2).sum(dim=1).mean()
            if soft:
                scale = TEMPERATURE * squared_BK.detach().mean()
                share_K = (-squared_BK / scale).softmax(dim=1).mean(dim=0)
                diversity = diversity + len(share_K) * share_K.pow(2).sum()
            codes.append(code_B)
            left_BD = left_BD - chosen_BD.detach()
        return Codes(torch.stack(codes, dim=1), z_BD - left_BD, commitment, codebook, diversity)

    @torch.no_grad()
    def learn(self, z_BD: Tensor, codes_BL: Tensor) -> None:
        """Moves the codebooks towards the means of what was assigned to them (VQ-VAE, arXiv 1711.00937, appendix A.1)."""
        left_BD = z_BD
        for level in range(codes_BL.shape[1]):
            one_hot_BK = F.one_hot(codes_BL[:, level], self.books_LKD.shape[1]).to(z_BD)
            chosen_BD = self.books_LKD[level][codes_BL[:, level]]
            self.usage_LK[level].lerp_(one_hot_BK.sum(dim=0), 1 - self.ema)
            self.sums_LKD[level].lerp_(one_hot_BK.T @ left_BD, 1 - self.ema)
            left_BD = left_BD - chosen_BD
            total = self.usage_LK[level].sum()
            smooth_K = (self.usage_LK[level] + SMOOTHING) / (total + self.usage_LK.shape[1] * SMOOTHING) * total
            self.books_LKD[level] = self.sums_LKD[level] / smooth_K[:, None]

    @torch.no_grad()
    def reset_idle(self, z_BD: Tensor, codes_BL: Tensor, error_B: Tensor, after: int) -> int:
        """Codes unused for `after` batches become residuals of the worst reconstructed samples. Returns how many were reset."""
        worst_B, left_BD, count = error_B.argsort(descending=True), z_BD.clone(), 0
        for level in range(codes_BL.shape[1]):
            used_K = torch.bincount(codes_BL[:, level], minlength=self.books_LKD.shape[1]) > 0
            self.idle_LK[level] = torch.where(used_K, 0, self.idle_LK[level] + 1)
            chosen_BD = self.books_LKD[level][codes_BL[:, level]].clone()
            idle = (self.idle_LK[level] >= after).nonzero()[:, 0][: len(worst_B)]
            fresh_BD = left_BD[worst_B[: len(idle)]]
            self.books_LKD[level, idle] = fresh_BD
            self.usage_LK[level, idle], self.sums_LKD[level, idle], self.idle_LK[level, idle] = 1.0, fresh_BD, 0
            left_BD = left_BD - chosen_BD
            count += len(idle)
        return count


def fit(
    vectors_NV: Floats, settings: Tokenizer, seed: int, curve: Curve | None = None, pairs_P2: NDArray[np.integer] | None = None
) -> Codebooks:
    """Trains on all rows, on one thread: equal arguments give equal weights whatever the number of cores.

    `pairs_P2`: rows of co-engaged items (for the contrastive loss). `curve` gets a row every LOG_EVERY steps.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    try:
        return _train(vectors_NV, settings, seed, curve, pairs_P2)
    finally:
        torch.set_num_threads(threads)


def _train(vectors_NV: Floats, settings: Tokenizer, seed: int, curve: Curve | None, pairs_P2: NDArray[np.integer] | None) -> Codebooks:
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_NV = torch.from_numpy(np.ascontiguousarray(vectors_NV, dtype=np.float32)).to(device)
    width, codes = x_NV.shape[1], codes_in_use(len(x_NV), settings.levels, settings.codes)
    encoder, decoder = mlp(width, settings.hidden, settings.dim), mlp(settings.dim, settings.hidden, width)
    partner = _partners(pairs_P2, len(x_NV), seed).to(device) if settings.contrastive and pairs_P2 is not None and len(pairs_P2) else None
    warm = int(settings.steps * WARM_SHARE)
    net = nn.ModuleList([encoder, decoder]).to(device)
    optimizer, quantiser = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=1e-4), None
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps, eta_min=settings.lr * 0.02)
    started = time.monotonic()
    for step, rows_B in enumerate(_batches(len(x_NV), settings.batch, settings.steps, seed)):
        if step == warm:
            quantiser = _start(encoder, x_NV, settings, codes, seed)
            if settings.ema == 0:
                optimizer.add_param_group({"params": list(quantiser.parameters()), "weight_decay": 0.0})
                schedule.base_lrs.append(settings.lr)
        loss, parts = _step(x_NV, rows_B.to(device), encoder, decoder, quantiser, settings, partner)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if curve and (step % LOG_EVERY == 0 or step == settings.steps - 1):
            done = {"step": step + 1, "tokens": (step + 1) * len(rows_B), "seconds": time.monotonic() - started}
            curve({**done, "loss": float(loss.detach()), **parts})
    quantiser = quantiser or _start(encoder, x_NV, settings, codes, seed)
    return Codebooks("rqvae", quantiser.books_LKD.detach().cpu().numpy().copy(), _layers(encoder), _layers(decoder))


def mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out))


def info_nce(one_PD: Tensor, other_PD: Tensor) -> Tensor:
    """Cross-entropy of finding each row's partner among all rows by cosine (arXiv 1807.03748, eq. 4)."""
    scores_PP = F.normalize(one_PD, dim=1) @ F.normalize(other_PD, dim=1).T / TEMPERATURE
    return F.cross_entropy(scores_PP, torch.arange(len(one_PD), device=one_PD.device))


def _step(
    x_NV: Tensor,
    rows_B: Tensor,
    encoder: nn.Module,
    decoder: nn.Module,
    quantiser: ResidualQuantiser | None,
    settings: Tokenizer,
    partner: Tensor | None,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch; moving averages and resets of the codebooks happen here."""
    x_BV = x_NV[rows_B]
    z_BD = encoder(x_BV)
    if quantiser is None:
        loss = (x_BV - decoder(z_BD)).pow(2).sum(dim=1).mean()
        return loss, {"reconstruction": float(loss.detach())}
    found = quantiser(z_BD, soft=settings.diversity > 0)
    passed_BD = z_BD + (found.quantised_BD - z_BD).detach()
    error_B = (x_BV - decoder(passed_BD)).pow(2).sum(dim=1)
    loss = error_B.mean() + settings.commitment * found.commitment + settings.diversity * found.diversity
    if settings.ema == 0:
        loss = loss + found.codebook
    else:
        quantiser.learn(z_BD.detach(), found.codes_BL)
    if partner is not None:
        loss = loss + settings.contrastive * _contrast(x_NV, rows_B, passed_BD, partner, encoder, quantiser)
    parts = {"reconstruction": float(error_B.detach().mean()), "commitment": float(found.commitment.detach())}
    if settings.reset_after:
        parts["resets"] = quantiser.reset_idle(z_BD.detach(), found.codes_BL, error_B.detach(), settings.reset_after)
    return loss, parts


def _contrast(
    x_NV: Tensor, rows_B: Tensor, passed_BD: Tensor, partner_N: Tensor, encoder: nn.Module, quantiser: ResidualQuantiser
) -> Tensor:
    """InfoNCE of the batch's quantised items against their partners'; items without one are left out."""
    has = partner_N[rows_B] >= 0
    if int(has.sum()) < 2:
        return passed_BD.new_zeros(())
    z_PD = encoder(x_NV[partner_N[rows_B[has]]])
    other_PD = z_PD + (quantiser(z_PD).quantised_BD - z_PD).detach()
    return info_nce(passed_BD[has], other_PD)


def _start(encoder: nn.Module, x_NV: Tensor, settings: Tokenizer, codes: int, seed: int) -> ResidualQuantiser:
    """Codebooks from a dedicated pass over the items (of very many a sample): k-means on residuals, or, switched off, some items' share."""
    generator, most = torch.Generator().manual_seed(seed), POINTS * codes
    with torch.no_grad():
        z_ND = encoder(x_NV if len(x_NV) <= most else x_NV[torch.randperm(len(x_NV), generator=generator)[:most].to(x_NV.device)])
    if settings.kmeans_init:
        books_LKD = torch.from_numpy(residual_kmeans(z_ND.cpu().numpy(), settings.levels, codes, seed))
    else:
        rows = torch.randint(len(z_ND), (settings.levels, codes), generator=generator)
        books_LKD = z_ND.cpu()[rows] / settings.levels
    return ResidualQuantiser(books_LKD, settings.ema).to(x_NV.device)


def _batches(items: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Seeded permutations of the items, cut into batches (the last, short one of an epoch is left out)."""
    generator, size, made = torch.Generator().manual_seed(seed), min(batch, items), 0
    while made < steps:
        order_N = torch.randperm(items, generator=generator)
        for start in range(0, items - size + 1, size):
            if made == steps:
                return
            yield order_N[start : start + size]
            made += 1


def _partners(pairs_P2: NDArray[np.integer], items: int, seed: int) -> Tensor:
    """(N,) one seeded co-engaged item for each item, -1 for none."""
    shuffled_P2 = np.random.default_rng(seed).permutation(pairs_P2)
    partner_N = torch.full((items,), -1)
    partner_N[shuffled_P2[:, 0]] = torch.from_numpy(shuffled_P2[:, 1].astype(np.int64))
    return partner_N


def _layers(net: nn.Sequential) -> Layers:
    return tuple((m.weight.detach().cpu().numpy().T.copy(), m.bias.detach().cpu().numpy().copy()) for m in net if isinstance(m, nn.Linear))
