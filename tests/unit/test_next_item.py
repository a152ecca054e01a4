"""SASRec: a state reads what came before it alone; its rows of probabilities are its softmax over live items."""

import numpy as np
import pytest
import torch

from gr2.sections import Sasrec
from scoring.sasrec import NextItem, SASRec, load, padded, save
from training.data import to_batch
from training.sasrec import next_item_loss, rows_of

pytestmark = pytest.mark.unit
NAMES = [f"i{k}" for k in range(9)]
SIZE = Sasrec(hidden=16, heads=2, layers=2, places=6)


@pytest.fixture
def model() -> SASRec:
    torch.manual_seed(1)
    made = SASRec(NAMES, SIZE).eval()
    torch.nn.init.normal_(made.items.weight, std=0.3)
    return made


def test_a_state_reads_what_came_before_it_and_no_pad(model: SASRec) -> None:
    items_BT = torch.from_numpy(padded([[1, 2, 3, 4], [5, 6]], 6))
    assert items_BT.tolist() == [[0, 0, 1, 2, 3, 4], [0, 0, 0, 0, 5, 6]]
    with torch.no_grad():
        states_BTD = model(items_BT)
        changed = items_BT.clone()
        changed[0, 4] = 9
        later_BTD = model(changed)
        alone_1TD = model(items_BT[:1, 2:])  # without pads: places count from the end
    torch.testing.assert_close(states_BTD[0, :4], later_BTD[0, :4])
    assert not torch.allclose(states_BTD[0, 4], later_BTD[0, 4])
    assert not torch.allclose(states_BTD[0, 5], later_BTD[0, 5])
    torch.testing.assert_close(states_BTD[:1, 2:], alone_1TD, atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_mean_over_what_follows(model: SASRec) -> None:
    sequences = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 1, 2, 3, 4, 5]]
    batch = to_batch(rows_of(sequences, SIZE.places), slice(None))
    loss, _ = next_item_loss(model, batch)
    nll = []
    for sequence in sequences:
        kept = sequence[-SIZE.places - 1 :]
        for back in range(1, len(kept)):  # places count from the last that is read
            with torch.no_grad():
                states_1TD = model(torch.from_numpy(padded([kept[:-1]], SIZE.places)))
                logps_M = model.logits(states_1TD[0, -back]).log_softmax(0)
            nll.append(-float(logps_M[kept[-back]]))
    assert batch.norm == len(nll) == 2 + 1 + 6
    assert float(loss) == pytest.approx(np.mean(nll), abs=1e-4)


def test_rows_are_the_softmax_over_live_items_not_excluded(model: SASRec) -> None:
    place_of = {"i3": 0, "new": 1, "i0": 2, "i1": 3, "i8": 4, "i2": 5}  # i4 to i7 are gone, `new` came later
    number = {place: NAMES.index(name) + 1 for name, place in place_of.items() if name != "new"}
    histories, exclude = [[2, 3, 1], [1], [], [0, 5, 4]], [[2, 3], [], [0], [1, 0, 5, 4]]
    found_BN = NextItem(model, place_of, 9).after(histories, exclude).toarray()
    for row, (history, gone) in enumerate(zip(histories, exclude, strict=True)):
        known = [number[p] for p in history if p in number]
        open_places = [p for p in number if p not in gone]
        expected_N = np.zeros(len(place_of))
        if known:
            logits_M = model.after([known])[0]
            expected_N[open_places] = logits_M[[number[p] for p in open_places]].softmax(0).numpy()
        np.testing.assert_allclose(found_BN[row], expected_N, atol=1e-6)
    assert found_BN[0].sum() == pytest.approx(1, abs=1e-5)
    assert not found_BN[1].any(), "whoever has no item that it knows leaves all to the others"
    assert not found_BN[2].any()
    few_BN = NextItem(model, place_of, 2).after(histories[:1], exclude[:1]).toarray()
    best = np.argsort(-found_BN[0])[:2]
    np.testing.assert_allclose(few_BN[0, best], found_BN[0, best], atol=1e-6)
    assert np.count_nonzero(few_BN) == 2


def test_files_hold_all_of_it(model: SASRec, tmp_path) -> None:
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.names == NAMES
    torch.testing.assert_close(again.after([[1, 2], [3]]), model.after([[1, 2], [3]]))
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
