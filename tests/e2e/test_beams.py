"""Constrained beams against the enumeration of every item, and against the beam search of transformers."""

from typing import Any

import numpy as np
import pytest
import torch

from gr2.config import Model
from gr2.errors import ModelError
from gr2.sids import Trie, sid_tokens
from scoring.beams import Mixture, beam_search, judged
from scoring.followers import Followers
from scoring.model import build_model, build_vocabulary, item_tokens, sid_ids
from scoring.own_vectors import item_vectors

pytestmark = pytest.mark.e2e
LEVELS, CODES, ITEMS = 3, 8, 60


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, np.ndarray, Trie, list[list[int]]]:
    """Model, tokenizer, codes_NL, trie and prompts of unlike lengths."""
    tokenizer = build_vocabulary(["history of items"] * 5, 300, sid_tokens(LEVELS, CODES), tmp_path_factory.mktemp("vocabulary"))
    model = build_model(Model(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, dropout=0.0), tokenizer, None, seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # sharper than a fresh model, so that orders are distinct
    rng = np.random.default_rng(0)
    codes_NL = np.stack(np.unravel_index(rng.choice(CODES**LEVELS, ITEMS, replace=False), [CODES] * LEVELS), axis=1)
    prompts = [rng.integers(3, len(tokenizer), size=n).tolist() for n in (1, 9, 4, 17, 9)]
    return model, tokenizer, codes_NL, Trie.build(codes_NL), prompts


@torch.inference_mode()
def enumerate_items(model: Any, prompt: list[int], tokens_NL: np.ndarray) -> np.ndarray:
    """log p(item | prompt) of every item, each in a pass of its own."""
    rows = torch.tensor([[*prompt, *row] for row in tokens_NL.tolist()])
    logps = model(rows).logits.float().log_softmax(-1)
    first = len(prompt) - 1
    return sum(logps[torch.arange(len(rows)), first + k, torch.from_numpy(tokens_NL[:, k])] for k in range(tokens_NL.shape[1])).numpy()


def tokens_of(tokenizer: Any, codes_NL: np.ndarray) -> np.ndarray:
    tokens_NL = np.stack([sid_ids(tokenizer)[level][codes_NL[:, level]] for level in range(codes_NL.shape[1])], axis=1)
    assert np.array_equal(item_tokens(sid_ids(tokenizer), codes_NL), tokens_NL)
    return tokens_NL


def test_wide_beams_are_the_enumeration_of_all_items(world: Any) -> None:
    model, tokenizer, codes_NL, trie, prompts = world
    found = beam_search(model, sid_ids(tokenizer), trie, prompts, ITEMS, pad=tokenizer.pad_token_id, bf16=False, batch=3)
    for row, prompt in enumerate(prompts):
        truth = enumerate_items(model, prompt, tokens_of(tokenizer, codes_NL))
        assert sorted(found.items_BW[row]) == list(range(ITEMS))
        np.testing.assert_allclose(found.logprobs_BW[row], truth[found.items_BW[row]], atol=2e-5)
        assert (np.diff(found.logprobs_BW[row]) <= 0).all()
        assert found.items_BW[row, 0] == truth.argmax()


def test_item_scores_are_the_softmax_over_items_averaged_with_the_beams(world: Any) -> None:
    model, tokenizer, codes_NL, trie, prompts = world
    tokens_NL, pad = tokens_of(tokenizer, codes_NL), tokenizer.pad_token_id
    found = beam_search(model, sid_ids(tokenizer), trie, prompts, 12, [[0], [1], [], [], []], pad=pad, bf16=False)
    items_ND = model.get_input_embeddings().weight.detach()[tokens_NL].sum(dim=1)
    both = judged(found, item_vectors(model, tokens_NL), 0.5)
    for row, prompt in enumerate(prompts):
        with torch.inference_mode():
            state_D = model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1]
        item_N = torch.log_softmax(state_D @ items_ND.T, dim=-1).numpy()
        truth = dict(zip(found.items_BW[row], (found.logprobs_BW[row] + 0.5 * item_N[found.items_BW[row]]) / 1.5, strict=True))
        assert both.items_BW[row].tolist() == sorted(truth, key=lambda item: -truth[item]), "the beams' items in another order, no other"
        np.testing.assert_allclose(both.logprobs_BW[row], sorted(truth.values(), reverse=True), atol=1e-4)


def test_an_item_that_training_did_not_know_is_scored_by_its_tokens(world: Any) -> None:
    model, tokenizer, codes_NL, trie, prompts = world
    found = beam_search(model, sid_ids(tokenizer), trie, prompts, 12, pad=tokenizer.pad_token_id, bf16=False)
    items_ND = item_vectors(model, tokens_of(tokenizer, codes_NL)).detach()
    new = int(found.items_BW[0, 3])
    known_N = np.arange(ITEMS) != new
    both = judged(found, items_ND, 2.0, known_N=known_N)
    item_N = torch.log_softmax(found.states_BD[0] @ items_ND[torch.from_numpy(known_N)].T, dim=-1).numpy()
    logp_of = dict(zip(np.flatnonzero(known_N), item_N, strict=True))
    for item, logp in zip(found.items_BW[0], found.logprobs_BW[0], strict=True):
        expected = logp if item == new else (logp + 2 * logp_of[item]) / 3
        np.testing.assert_allclose(both.logprobs_BW[0][both.items_BW[0] == item], expected, atol=1e-4)


def test_rows_without_enough_items_keep_their_gaps_last(world: Any) -> None:
    model, tokenizer, codes_NL, trie, prompts = world
    exclude = [list(range(5, ITEMS))]
    found = beam_search(model, sid_ids(tokenizer), trie, prompts[:1], 9, exclude, pad=tokenizer.pad_token_id, bf16=False)
    both = judged(found, item_vectors(model, tokens_of(tokenizer, codes_NL)), 1.0)
    assert sorted(both.items_BW[0, :5].tolist()) == [0, 1, 2, 3, 4]
    assert (both.items_BW[0, 5:] == -1).all()
    assert np.isneginf(both.logprobs_BW[0, 5:]).all()


@pytest.fixture(scope="module")
def counted() -> Followers:
    """Counts under which some items often follow others."""
    rng = np.random.default_rng(5)
    pairs = {(int(a), int(b)) for a, b in rng.integers(0, ITEMS, size=(300, 2)) if a != b}
    earlier_P, later_P = np.array(sorted(pairs)).T
    return Followers(ITEMS, earlier_P, later_P, rng.integers(1, 9, size=len(pairs)), back=0.3, decay=0.5)


def test_a_mixture_is_searched_exactly(world: Any, counted: Followers) -> None:
    model, tokenizer, codes_NL, trie, prompts = world
    histories, exclude = [[1, 2], [3], [4, 5, 6], [], [7, 8]], [[1, 2], [3], [4, 5, 6], [], [7, 8, 9, 10]]
    mixture = Mixture(0.4, counted.after(histories, exclude))
    search = {"pad": tokenizer.pad_token_id, "bf16": False, "batch": 3}
    found = beam_search(model, sid_ids(tokenizer), trie, prompts, ITEMS, exclude, mixture, **search)
    both = judged(found, item_vectors(model, tokens_of(tokenizer, codes_NL)), 0.0, mixture)
    for row, prompt in enumerate(prompts):
        own_N = np.exp(enumerate_items(model, prompt, tokens_of(tokenizer, codes_NL)).astype(np.float64))
        truth_N = 0.6 * own_N + 0.4 * mixture.followers_BN.toarray()[row]
        truth_N[exclude[row]] = 0
        order = np.argsort(-truth_N, kind="stable")[: ITEMS - len(exclude[row])]
        np.testing.assert_allclose(np.exp(both.logprobs_BW[row, : len(order)]), truth_N[order], rtol=2e-3, atol=1e-9)
        assert np.array_equal(both.items_BW[row], found.items_BW[row]), "beams are already in the order of the mixture"
        np.testing.assert_allclose(found.logprobs_BW[row, 0], np.log(own_N[found.items_BW[row, 0]]), atol=2e-4)


def test_narrow_beams_reach_what_only_the_counts_know(world: Any, counted: Followers) -> None:
    """An item whose first code the network finds unlikely is found, where counts are sure of it."""
    model, tokenizer, codes_NL, trie, prompts = world
    probs_N = enumerate_items(model, prompts[1], tokens_of(tokenizer, codes_NL))
    first_K = [probs_N[codes_NL[:, 0] == code].max(initial=-np.inf) for code in range(CODES)]
    hidden = int(np.flatnonzero(codes_NL[:, 0] == np.argmin(np.where(np.isfinite(first_K), first_K, np.inf)))[0])
    sure = Followers(ITEMS, np.array([0]), np.array([hidden]), np.array([50.0]), back=0.0, decay=0.5).after([[0]], [[0]])
    search = {"pad": tokenizer.pad_token_id, "bf16": False}
    alone = beam_search(model, sid_ids(tokenizer), trie, prompts[1:2], 3, [[0]], **search)
    mixed = beam_search(model, sid_ids(tokenizer), trie, prompts[1:2], 3, [[0]], Mixture(0.4, sure), **search)
    assert hidden not in alone.items_BW[0]
    assert mixed.items_BW[0, 0] == hidden


def test_exclusion_is_the_enumeration_without_those_items(world: Any) -> None:
    model, tokenizer, codes_NL, trie, prompts = world
    rng = np.random.default_rng(1)
    exclude = [rng.choice(ITEMS, size=n, replace=False).tolist() for n in (0, 5, 59, 30, 1)]
    exclude[4] = np.flatnonzero(codes_NL[:, 0] == codes_NL[0, 0]).tolist()  # a whole subtree
    found = beam_search(model, sid_ids(tokenizer), trie, prompts, ITEMS, exclude, pad=tokenizer.pad_token_id, bf16=False)
    for row, gone in enumerate(exclude):
        items = found.items_BW[row]
        left = ITEMS - len(gone)
        assert set(items[:left]) == set(range(ITEMS)) - set(gone)
        assert (items[left:] == -1).all()
        assert np.isneginf(found.logprobs_BW[row, left:]).all()


def test_narrow_beams_still_return_their_full_width_when_the_best_are_excluded(world: Any) -> None:
    model, tokenizer, _, trie, prompts = world
    search = {"pad": tokenizer.pad_token_id, "bf16": False}
    best = beam_search(model, sid_ids(tokenizer), trie, prompts, 20, **search).items_BW
    again = beam_search(model, sid_ids(tokenizer), trie, prompts, 4, best, **search).items_BW
    assert (again >= 0).all()
    assert not any(set(a) & set(b) for a, b in zip(again.tolist(), best.tolist(), strict=True))


def test_narrow_beams_equal_the_beam_search_of_transformers(world: Any) -> None:
    model, tokenizer, codes_NL, trie, prompts = world
    tokens_NL, width = tokens_of(tokenizer, codes_NL), 5
    for prompt in prompts:
        ours = beam_search(model, sid_ids(tokenizer), trie, [prompt], width, pad=tokenizer.pad_token_id, bf16=False)

        def allowed(_: int, ids: torch.Tensor, start: int = len(prompt)) -> list[int]:
            prefix = ids[start:].tolist()
            return sorted({int(row[len(prefix)]) for row in tokens_NL if row[: len(prefix)].tolist() == prefix})

        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=LEVELS,
            prefix_allowed_tokens_fn=allowed,
            length_penalty=0.0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            renormalize_logits=False,
        )
        assert tokens_NL[ours.items_BW[0]].tolist() == theirs.sequences[:, len(prompt) :].tolist()
        np.testing.assert_allclose(ours.logprobs_BW[0], theirs.sequences_scores.numpy(), atol=2e-4)


def test_bf16_changes_scores_little_and_batching_changes_nothing(world: Any) -> None:
    model, tokenizer, _, trie, prompts = world
    one = beam_search(model, sid_ids(tokenizer), trie, prompts, 10, pad=tokenizer.pad_token_id, bf16=False, batch=1)
    many = beam_search(model, sid_ids(tokenizer), trie, prompts, 10, pad=tokenizer.pad_token_id, bf16=False, batch=5)
    np.testing.assert_array_equal(one.items_BW, many.items_BW)
    np.testing.assert_allclose(one.logprobs_BW, many.logprobs_BW, atol=2e-5)
    fast = beam_search(model, sid_ids(tokenizer), trie, prompts, 10, pad=tokenizer.pad_token_id, bf16=True)
    assert np.abs(fast.logprobs_BW - one.logprobs_BW).mean() < 0.3


def test_fails_closed(world: Any) -> None:
    model, tokenizer, _, trie, prompts = world
    with pytest.raises(ModelError, match="no item left"):
        beam_search(model, sid_ids(tokenizer), trie, prompts[:1], 5, [range(ITEMS)], pad=tokenizer.pad_token_id)
    with pytest.raises(ModelError, match="empty"):
        beam_search(model, sid_ids(tokenizer), trie, [[]], 5)
    with pytest.raises(ModelError, match="levels"):
        beam_search(model, sid_ids(tokenizer)[:2], trie, prompts, 5)
    weight = model.model.norm.weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(ModelError, match="not numbers"):
            beam_search(model, sid_ids(tokenizer), trie, prompts, 5, pad=tokenizer.pad_token_id)
    finally:
        weight.data.copy_(kept)
