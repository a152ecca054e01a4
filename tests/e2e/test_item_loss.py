"""The item loss is a softmax over whole items, found wherever a whole item is learned, and adds nothing to the model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gr2.errors import ConfigError
from gr2.prompts import load_template, vocabulary_texts
from gr2.sids import sid_tokens, to_text
from scoring.model import build_model, build_vocabulary, encode, item_tokens, load, save, sid_ids
from scoring.own_vectors import attach, item_vectors, own_vectors
from tests.e2e.tiny import SIZE
from training.data import Example, pack, to_batch
from training.fitting import supervised
from training.item_loss import ItemLoss

pytestmark = pytest.mark.e2e
CODES_NL = np.array([[0, 1], [0, 2], [1, 1], [2, 0]])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_vocabulary(vocabulary_texts(load_template(), 20), 400, sid_tokens(2, 3), tmp_path_factory.mktemp("vocabulary"))


def batch_of(tokenizer, *texts):
    """Each text is (read, learned)."""
    examples = [Example([tokenizer.bos_token_id, *encode(tokenizer, a)], [(encode(tokenizer, b), 1.0)]) for a, b in texts]
    return to_batch(pack(examples, 64), slice(None))


def item(number):
    return to_text(CODES_NL[number])


def test_the_loss_is_the_softmax_over_items_at_each_first_code(tokenizer):
    model = build_model(SIZE, tokenizer, None, seed=3).eval()
    batch = batch_of(tokenizer, (item(3), item(0) + item(2)))
    loss, floats = ItemLoss(CODES_NL, sid_ids(tokenizer), 0.5)(model, batch)
    with torch.inference_mode():
        ids = torch.tensor([[tokenizer.bos_token_id, *encode(tokenizer, item(3) + item(0) + item(2))]])
        hidden_TD = model.base_model(input_ids=ids).last_hidden_state[0]
        table = model.get_input_embeddings().weight
        items_ND = torch.stack([table[encode(tokenizer, item(n))].sum(dim=0) for n in range(4)])
        logps = torch.log_softmax(hidden_TD[[2, 4]] @ items_ND.T, dim=-1)
        expected = -(logps[0, 0] + logps[1, 2]) / 2  # the mean over items, where all that is learned is items
    assert floats["item_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert (loss - supervised(model, batch)[0]).item() == pytest.approx(0.5 * expected.item(), rel=1e-3)


def test_items_are_found_only_where_they_are_whole_and_live(tokenizer):
    loss = ItemLoss(CODES_NL, sid_ids(tokenizer), 1.0)
    texts = [("", item(1) + " then " + item(2)), (item(0), "<a_1>"), ("", "<b_1><a_2><b_0>"), ("", "<a_1><b_2>")]  # the last is no item
    for text, found in zip(texts, ([1, 2], [], [3], []), strict=True):
        batch = batch_of(tokenizer, text)
        targets_M = batch.input_ids_BT[batch.learned_BT].numpy()
        places_I, items_I = loss.starts(targets_M)
        assert items_I.tolist() == found
        assert all(targets_M[place] == encode(tokenizer, item(n))[0] for place, n in zip(places_I, items_I, strict=True))
    model = build_model(SIZE, tokenizer, None, seed=3)
    plain = batch_of(tokenizer, ("history", "candidates"))
    assert loss(model, plain)[0].item() == pytest.approx(supervised(model, plain)[0].item()), (
        "a text without items has the token loss alone"
    )


def test_it_teaches_what_follows_and_leaves_the_model_as_it_is(tokenizer):
    model = build_model(SIZE, tokenizer, None, seed=3)
    names = set(model.state_dict())
    loss_fn, batch = ItemLoss(CODES_NL, sid_ids(tokenizer), 1.0), batch_of(tokenizer, (item(0), item(1)), (item(2), item(3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    curve = []
    for _ in range(30):
        loss, floats = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(floats["item_loss"].item())
    assert curve[-1] < 0.2 * curve[0]
    assert set(model.state_dict()) == names


def test_own_vectors_are_learned_and_lie_beside_a_plain_model(tokenizer, tmp_path):
    model = build_model(SIZE, tokenizer, None, seed=3)
    names = set(model.state_dict())
    loss_fn, batch = ItemLoss(CODES_NL, sid_ids(tokenizer), 1.0), batch_of(tokenizer, (item(3), item(0) + item(2)))
    without = loss_fn(model, batch)[1]["item_loss"].item()
    attach(model, CODES_NL)
    assert loss_fn(model, batch)[1]["item_loss"].item() == without, "they start at zero"
    optimizer = torch.optim.SGD(own_vectors(model).parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss_fn(model, batch)[0].backward()
        optimizer.step()
    assert loss_fn(model, batch)[1]["item_loss"].item() < 0.5 * without, "with nothing else learned"
    learned_ND = own_vectors(model).weight.detach().clone()
    save(model, tokenizer, tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"], "what an engine reads"
    plain = load(tmp_path)[0]
    assert set(plain.state_dict()) == names
    attach(plain, today_NL := np.array([[0, 2], [2, 2], [0, 0], [0, 1]]), tmp_path)  # one item, known by its codes, and two new ones
    assert own_vectors(plain).known_N.tolist() == [True, False, False, True]
    tokens_NL = item_tokens(sid_ids(tokenizer), today_NL)
    added_ND = item_vectors(plain, tokens_NL) - plain.get_input_embeddings().weight[torch.from_numpy(tokens_NL)].sum(dim=1)
    torch.testing.assert_close(added_ND, torch.stack([learned_ND[1], *torch.zeros(2, learned_ND.shape[1]), learned_ND[0]]))


def test_a_batch_without_an_item_gives_own_vectors_a_gradient_of_zero(tokenizer):
    """Else the ranks of a step would reduce gradients of different parameters."""
    model = build_model(SIZE, tokenizer, None, seed=3)
    attach(model, CODES_NL)
    ItemLoss(CODES_NL, sid_ids(tokenizer), 1.0)(model, batch_of(tokenizer, ("history", "candidates")))[0].backward()
    assert torch.equal(own_vectors(model).weight.grad, torch.zeros_like(own_vectors(model).weight))


def test_a_model_without_own_vectors_is_left_as_it_is(tokenizer, tmp_path):
    model = build_model(SIZE, tokenizer, None, seed=3)
    save(model, tokenizer, tmp_path)
    attach(model, CODES_NL, tmp_path)
    assert own_vectors(model) is None


def test_scattered_embeddings_are_refused(tokenizer):
    model = build_model(SIZE, tokenizer, None, seed=3)
    model.get_input_embeddings().weight.ds_id = SimpleNamespace()
    for text in (item(1), "history"):
        with pytest.raises(ConfigError, match="item_weight"):
            ItemLoss(CODES_NL, sid_ids(tokenizer), 1.0)(model, batch_of(tokenizer, ("", text)))


def test_gradients_of_item_vectors_are_the_same_each_time():
    table = torch.nn.Embedding(3_000, 64)
    model = SimpleNamespace(get_input_embeddings=lambda: table)
    tokens_NL, weights_ND = np.random.default_rng(1).integers(3_000, size=(9_000, 3)), torch.randn(9_000, 64)
    assert torch.equal(item_vectors(model, tokens_NL), table.weight[torch.from_numpy(tokens_NL)].sum(dim=1))
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(5):
        table.zero_grad()
        (item_vectors(model, tokens_NL) * weights_ND).sum().backward()
        found.append(table.weight.grad.clone())
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], grad) for grad in found)
