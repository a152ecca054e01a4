"""Exact constrained beam search over the trie of live items: the pre-ranker's last step (METHOD 4).

    found = beam_search(model, sid_ids(tokenizer), trie, prompts, width=20, exclude=history_rows, pad=tokenizer.pad_token_id)
    found.items_BW, found.logprobs_BW  # rows of the codes_NL that the trie was built from, best first; -1 and -inf: no more

No beam leaves the trie. Scores are the model's own log-probabilities over its whole vocabulary, only masked to what the trie allows, so the
score of an item is log p(its tokens | prompt). Subtrees that hold only excluded items are closed from the start, so exclusion never
costs a result. No `generate`, so no default of a generation config can leak in.

All beams of a prompt stand side by side as queries over one key-value cache: a tree mask lets each see the prompt and its own ancestors.
So the prompt is stored once, not once per beam, and nothing is reordered.

Shapes: B prompts, T prompt tokens, W beams, L levels, K codes, V vocabulary, C cached places, N items.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gr2.errors import ModelError
from gr2.sids import Trie
from scoring.model import autocast, by_length, hidden_states, right_padded

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """Sparse rows `followers_BN`, one a prompt (`scoring.followers`), count `share`, the network the rest: (1 - share) p + share row.

    A row may sum to less than 1; what it leaves is nobody's, so the mixture's logarithms are scores that rank, not log-probabilities.
    """

    share: float
    followers_BN: Any


@dataclass(frozen=True)
class Found:
    """Items of each prompt, best first, their log p(tokens), and the model's state after the prompt (float32, on the CPU)."""

    items_BW: Ints
    logprobs_BW: NDArray[np.float32]
    states_BD: torch.Tensor


@dataclass(frozen=True)
class _Mass:
    """What counts say of the nodes of one depth: ascending keys (prompt * nodes of the depth + node), probability of all items below."""

    keys: Ints
    sums: NDArray[np.float64]
    share: float

    def of(self, wanted: Ints) -> NDArray[np.float64]:
        """The probability of each wanted key; 0 for a node below which nothing was counted."""
        if not len(self.keys):
            return np.zeros(len(wanted))
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[place] == wanted, self.sums[place], 0.0)


@dataclass(frozen=True)
class _Beams:
    """Living beams of a batch: trie node (-1: no beam), log-probability, and which cached places each may look at."""

    nodes_BW: Ints
    logps_BW: torch.Tensor
    sees_BWC: torch.Tensor


def beam_search(
    model: Any,
    sid_ids_LK: Ints,
    trie: Trie,
    prompts: Sequence[Sequence[int]],
    width: int,
    exclude: Sequence[Sequence[int]] | None = None,
    mixture: Mixture | None = None,
    *,
    pad: int = 0,
    batch: int = 64,
    bf16: bool = True,
) -> Found:
    """The `width` most likely items of each prompt (token ids), items of `exclude` (rows of codes_NL, per prompt) left out.

    Exact where `width` is at least the number of living nodes of every level; else the usual beam approximation. Raises ModelError for an
    empty prompt, a trie that the vocabulary does not cover, a prompt without an item left, log-probabilities that are not numbers.
    """
    if trie.levels != len(sid_ids_LK) or trie.largest_code >= sid_ids_LK.shape[1]:
        raise ModelError(f"the vocabulary has {sid_ids_LK.shape} SID tokens, the trie needs {trie.levels} levels and more codes")
    if not all(len(prompt) for prompt in prompts):
        raise ModelError("a prompt is empty: give at least its first token")
    items_BW = np.full((len(prompts), width), -1, dtype=np.int64)
    logprobs_BW = np.full((len(prompts), width), -np.inf, dtype=np.float32)
    states_BD = torch.zeros(len(prompts), model.config.hidden_size)
    model.eval()
    for places in by_length(prompts, batch):
        dead = _closed(trie, [exclude[i] for i in places] if exclude is not None else [[]] * len(places))
        mass = _masses(trie, mixture, places) if mixture else None
        with torch.inference_mode(), autocast(model, bf16):
            found = _search(model, sid_ids_LK, trie, [prompts[i] for i in places], width, dead, pad, mass)
        kept = found.items_BW.shape[1]
        items_BW[places, :kept], logprobs_BW[places, :kept], states_BD[places] = found.items_BW, found.logprobs_BW, found.states_BD
    return Found(items_BW, logprobs_BW, states_BD)


def judged(
    found: Found, items_ND: torch.Tensor, weight: float, mixture: Mixture | None = None, known_N: NDArray[np.bool_] | None = None
) -> Found:
    """Orders what the beams found anew: beams propose, item vectors judge (LIGER, arXiv 2411.18814), and counts have their share.

    The network's score of an item is (log p(tokens) + weight * log p(item)) / (1 + weight). p(item) is the softmax over all items that
    mid-training learned with midtrain.item_weight: the state after the prompt against the items' vectors, of the same model
    (`scoring.own_vectors.item_vectors`). An item that training did not know (`known_N`) is scored by its tokens alone. With a mixture that
    score is mixed with the counts, as in the beams. The result's log-probabilities are these scores.
    """
    there_BW, items_BW = found.items_BW >= 0, np.maximum(found.items_BW, 0)
    scores_BW: NDArray[np.floating] = found.logprobs_BW
    if weight:
        with torch.inference_mode():
            logits_BN = (found.states_BD.to(items_ND) @ items_ND.T).float()
            if known_N is not None:
                logits_BN[:, torch.from_numpy(~known_N)] = -torch.inf
            item_BW = np.take_along_axis(logits_BN.log_softmax(dim=-1).cpu().numpy(), items_BW, axis=1)
        if known_N is not None:
            item_BW = np.where(known_N[items_BW], item_BW, scores_BW)
        scores_BW = (scores_BW + weight * item_BW) / (1 + weight)
    if mixture:
        own_BW = mixture.followers_BN[np.arange(len(items_BW))[:, None], items_BW].toarray()
        scores_BW = _mixed(torch.from_numpy(scores_BW), torch.from_numpy(own_BW), mixture.share).numpy()
    scores_BW = np.where(there_BW, scores_BW, -np.inf).astype(np.float32)
    order_BW = np.argsort(-scores_BW, axis=1, kind="stable")
    return Found(np.take_along_axis(found.items_BW, order_BW, axis=1), np.take_along_axis(scores_BW, order_BW, axis=1), found.states_BD)


def _mixed(logps: torch.Tensor, mass: torch.Tensor, share: float) -> torch.Tensor:
    """log((1 - share) * p + share * mass)."""
    return torch.logaddexp(logps + math.log1p(-share), mass.to(logps).log() + math.log(share))


def _closed(trie: Trie, exclude: Sequence[Sequence[int]]) -> list[tuple[Ints, Ints]]:
    """For depth 1..L: `(prompt, node)` pairs that no beam may enter, since only excluded items lie below."""
    counts = [len(set(rows)) for rows in exclude]
    prompt_X = np.repeat(np.arange(len(exclude)), counts)
    leaf_X = trie.leaf_of[np.array([row for rows in exclude for row in sorted(set(rows))], dtype=np.int64)]
    closed = []
    for node_N, sizes in zip(trie.above, trie.below, strict=True):
        keys, hits = np.unique(prompt_X * len(sizes) + node_N[leaf_X], return_counts=True)
        full = hits == sizes[keys % len(sizes)]
        closed.append((keys[full] // len(sizes), keys[full] % len(sizes)))
    return closed


def _masses(trie: Trie, mixture: Mixture, places: list[int]) -> list[_Mass]:
    """For depth 1..L: the probability that counts give to the items below each node, for some prompts."""
    entries = mixture.followers_BN[places].tocoo()
    found = []
    for node_N, sizes in zip(trie.above, trie.below, strict=True):
        keys, place = np.unique(entries.row * len(sizes) + node_N[trie.leaf_of[entries.col]], return_inverse=True)
        sums = np.bincount(place, weights=entries.data, minlength=len(keys)).astype(np.float64)
        found.append(_Mass(keys.astype(np.int64), sums, mixture.share))
    return found


def _search(
    model: Any,
    sid_ids_LK: Ints,
    trie: Trie,
    prompts: list[Sequence[int]],
    width: int,
    dead: list[tuple[Ints, Ints]],
    pad: int,
    mass: list[_Mass] | None,
) -> Found:
    device, count = model.device, len(prompts)
    ids_BT, lengths_B = (tensor.to(device) for tensor in right_padded(prompts, pad))
    out = hidden_states(model, input_ids=ids_BT, use_cache=True)
    last_BD = out.last_hidden_state[torch.arange(count, device=device), lengths_B - 1]
    prompt_BT = torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]
    beams = _Beams(np.zeros((count, 1), dtype=np.int64), torch.zeros(count, 1, device=device), prompt_BT[:, None])
    hidden_BWD = last_BD[:, None]
    for depth in range(trie.levels):
        logits_BWV = model.get_output_embeddings()(hidden_BWD).float()
        logps_BWK = logits_BWV[:, :, torch.from_numpy(sid_ids_LK[depth]).to(device)] - logits_BWV.logsumexp(dim=-1, keepdim=True)
        codes_BW, beams = _extend(trie, depth, beams, logps_BWK, width, dead[depth], mass[depth] if mass else None)
        if depth == trie.levels - 1:
            break
        kept = beams.nodes_BW.shape[1]
        own_WC = torch.eye(kept, dtype=torch.bool, device=device).expand(count, kept, kept)
        beams = _Beams(beams.nodes_BW, beams.logps_BW, torch.cat([beams.sees_BWC, own_WC], dim=2))
        tokens_BW = torch.from_numpy(sid_ids_LK[depth][codes_BW]).to(device)
        positions_BW = (lengths_B[:, None] + depth).expand(count, kept)
        out = hidden_states(
            model,
            input_ids=tokens_BW,
            position_ids=positions_BW,
            attention_mask=beams.sees_BWC[:, None],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        hidden_BWD = out.last_hidden_state
    items_BW = np.where(beams.nodes_BW >= 0, trie.items[np.maximum(beams.nodes_BW, 0)], -1)
    return Found(items_BW, beams.logps_BW.cpu().numpy(), last_BD.float().cpu())


def _extend(
    trie: Trie, depth: int, beams: _Beams, logps_BWK: torch.Tensor, width: int, dead: tuple[Ints, Ints], mass: _Mass | None
) -> tuple[Ints, _Beams]:
    """The `width` best children of all beams of each prompt, best first. Returns their codes, and the new beams.

    Only children that are there cost anything: below the first level a beam has a few, of a thousand codes.
    """
    count, beam_count, codes = logps_BWK.shape
    alive_X = np.flatnonzero(beams.nodes_BW.reshape(-1) >= 0)
    rows, code, child_X = trie.children(depth, beams.nodes_BW.reshape(-1)[alive_X])
    source_X = alive_X[rows] * codes + code  # place in logps_BWK
    prompt_X, size = source_X // (beam_count * codes), len(trie.tokens[depth])
    if len(dead[0]):
        open_X = ~np.isin(prompt_X * size + child_X, dead[0] * size + dead[1])
        prompt_X, source_X, child_X = prompt_X[open_X], source_X[open_X], child_X[open_X]
    counts_B = np.bincount(prompt_X, minlength=count)
    if not counts_B.all():
        raise ModelError("a prompt has no item left: every item of the trie is excluded for it")
    place_X = np.arange(len(prompt_X)) - (np.cumsum(counts_B) - counts_B)[prompt_X]  # prompts ascend
    shape = (count, int(counts_B.max()))  # F: the open children of a prompt, side by side

    def side_by_side(values: Any, empty: float) -> torch.Tensor:
        values_X = torch.as_tensor(values, device=logps_BWK.device)
        spread_BF = torch.full(shape, empty, dtype=values_X.dtype, device=values_X.device)
        spread_BF[torch.from_numpy(prompt_X), torch.from_numpy(place_X)] = values_X
        return spread_BF

    places_X = torch.from_numpy(source_X).to(logps_BWK.device)
    scores_X = logps_BWK.reshape(-1)[places_X] + beams.logps_BW.reshape(-1)[places_X // codes]
    if not torch.isfinite(scores_X).all():
        raise ModelError("the model's log-probabilities are not numbers: its weights are broken")
    scores_BF = ranked_BF = side_by_side(scores_X, -torch.inf)
    if mass is not None:
        ranked_BF = side_by_side(_mixed(scores_X, torch.from_numpy(mass.of(prompt_X * size + child_X)), mass.share), -torch.inf)
    best_BW = ranked_BF.topk(min(width, shape[1]), dim=1).indices
    source_BW = side_by_side(source_X, 0).gather(1, best_BW)
    parents_BW = source_BW // codes % beam_count
    sees_BWC = torch.gather(beams.sees_BWC, 1, parents_BW[:, :, None].expand(-1, -1, beams.sees_BWC.shape[2]))
    nodes_BW = side_by_side(child_X, -1).gather(1, best_BW).cpu().numpy()
    return (source_BW % codes).cpu().numpy(), _Beams(nodes_BW, scores_BF.gather(1, best_BW), sees_BWC)
