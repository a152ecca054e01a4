"""Mid-training on a small world: what is learned generalises, the refit goes on from the student, draws are seeded and resumable."""

import datetime as dt
import json
import shutil
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from tiny import put

from gr2 import artifacts
from gr2.context import Context
from gr2.errors import InputError
from gr2.sids import Trie, to_text
from scoring.beams import beam_search
from scoring.model import load, sid_ids
from training import midtrain
from training.codebooks import Codebooks
from training.data import to_batch
from training.midtrain import Epochs, Mix, Summed, Text

pytestmark = pytest.mark.e2e
ITEMS, CODES = 48, 8
SIZE = "hidden: 48, layers: 2, heads: 2, kv_heads: 2, mlp: 96, dropout: 0.0"
TRAINING = "tokens_per_batch: 512, row_tokens: 64, lr: 0.01, weight_decay: 0.0, average: 0.9"
REFIT = TRAINING.replace("0.01", "0.002")
SMALL = [
    f"models={{vocabulary: 400, student: {{{SIZE}}}, teacher: {{{SIZE}}}}}",
    f"midtrain.student={{epochs: 70, {TRAINING}}}",
    f"midtrain.refit={{epochs: 3, {REFIT}}}",
    f"midtrain.teacher={{max_steps: 2, {TRAINING}}}",
    "midtrain.item_dropout=0",
]


def codes_of(item: int) -> tuple[int, int]:
    return item // CODES, item % CODES


def walk(start: int, length: int) -> str:
    """The user who goes along the ring in threes."""
    return "".join(to_text(codes_of((start + 3 * k) % ITEMS)) for k in range(length))


def world(ctx: Context) -> list[int]:
    """120 users; what they chose last is held out of fit train. Returns where each starts."""
    rng = np.random.default_rng(1)
    eye = np.eye(4, dtype=np.float32)
    books = Codebooks("rqkmeans", rng.normal(size=(2, CODES, 4)).astype(np.float32), ((eye, eye[0]),), ((eye, eye[0]),))
    with artifacts.publish_folder(ctx.root, "tokenizer", {}) as folder:
        books.save(folder, {})
    starts = [int(rng.integers(ITEMS)) for _ in range(120)]
    rows = [
        {"fit": fit, "example_id": f"history:u{u}:0", "task": "history", "prompt": "", "completion": walk(start, 8 + more), "ordinal": u}
        for fit, more in (("train", 0), ("refit", 1))
        for u, start in enumerate(starts)
    ]
    rows += [
        {"fit": fit, "example_id": f"lookup:{i}:1", "task": "lookup", "prompt": f"item number {i} is ", "completion": to_text(codes_of(i)),
         "ordinal": 1000 + i}
        for fit in ("train", "refit")
        for i in range(0, ITEMS, 4)
    ]  # fmt: skip
    put(ctx, "midtrain_examples", rows)
    codes = [
        {"tokenizer": ctx.model("tokenizer", "tokenizer").id, "item_id": f"i{i}", "codes": codes_of(i), "token_text": to_text(codes_of(i)),
         "learned_codes": codes_of(i), "separated": False, "residual": 0.0, "added_on": dt.date(2026, 1, 1)}
        for i in range(ITEMS)
    ]  # fmt: skip
    put(ctx, "semantic_ids", codes)
    put(ctx, "items", [{"item_id": f"i{i}", "categories": [], "text": f"item number {i}", "has_text": True} for i in range(ITEMS)])
    return starts


def test_the_pre_ranker_learns_what_follows(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx(SMALL)
    starts = world(ctx)
    result = midtrain.run(ctx.cfg, ctx)
    assert result.tokens > 0
    assert set(result.detail) == {"midtrain", "midtrain-refit", "midtrain-teacher"}
    trie = Trie.build(np.array([codes_of(i) for i in range(ITEMS)]))
    for name in ("midtrain", "midtrain-refit"):
        model, tokenizer = load(ctx.model(name, "midtrain").path)
        ids_LK = sid_ids(tokenizer)
        prompts = [[tokenizer.bos_token_id, *tokenizer(walk(s, 8), add_special_tokens=False)["input_ids"]] for s in starts]
        found = beam_search(model, ids_LK, trie, prompts, 5, pad=tokenizer.pad_token_id)
        hits = found.items_BW[:, 0] == [(s + 24) % ITEMS for s in starts]
        assert hits.mean() > 0.8, f"{name}: {hits.mean():.0%} of the next items are ranked first"
        assert model.config._attn_implementation == "sdpa"
        assert model.config.architectures == ["Qwen3ForCausalLM"]
    student, refit = (ctx.model(name, "midtrain") for name in ("midtrain", "midtrain-refit"))
    lines = [json.loads(line) for line in (student.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["valid_loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["item_loss"] < 0.2 * lines[0]["item_loss"], "items are learned whole, beside their tokens"
    first = json.loads((refit.path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < 0.7 * lines[0]["loss"], "the refit did not go on from the student"
    assert (student.manifest["fit"], refit.manifest["fit"]) == ("train", "refit")
    kept = (student.path / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(ctx.root / "models" / "midtrain-teacher")  # as if the stage had been killed before its last model
    assert midtrain.run(ctx.cfg, ctx).detail.keys() == result.detail.keys()
    assert (student.path / "model.safetensors").stat().st_mtime_ns == kept, "it goes on with the model that is missing"
    assert (ctx.root / "models" / "midtrain-teacher" / "current.json").exists()


def test_a_fit_without_texts_is_refused(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx(SMALL)
    put(ctx, "midtrain_examples", [])
    with pytest.raises(InputError, match="no text of fit 'train'"):
        midtrain.read_texts(ctx, "train")


class Digits:
    """A tokenizer of digits."""

    bos_token_id, eos_token_id = 98, 99

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(c) for c in text] for text in texts]}


TEXTS = [Text(f"history:u{u}:0", "history", "", "".join(f"{k}{u % 7}" for k in range(1, 2 + u % 6))) for u in range(40)]
TEXTS += [Text(f"lookup:{i}:1", "lookup", "12", "345") for i in range(9)]


def test_item_dropout_keeps_items_whole_and_leaves_two() -> None:
    mix = Mix(Digits(), TEXTS, 2, 0.6, 16, seed=1)
    lengths = set()
    for epoch in range(3):
        rows = mix.rows(epoch)
        for segment in range(len(TEXTS)):
            ids = rows.input_ids[rows.segment_ids == segment].tolist()
            if TEXTS[segment].task == "lookup":
                assert ids == [98, 1, 2, 3, 4, 5, 99]
                continue
            whole = TEXTS[segment].completion
            kept = "".join(str(i) for i in ids[1:])
            pairs = [kept[k : k + 2] for k in range(0, len(kept), 2)]
            assert ids[0] == 98
            assert pairs == [whole[k : k + 2] for k in range(0, len(whole), 2) if whole[k : k + 2] in pairs]
            assert len(pairs) >= min(2, len(whole) // 2)
            lengths.add((segment, len(pairs)))
    assert len(lengths) > 60, "nothing was left out, or the same each epoch"


def test_batches_go_on_where_they_stood_and_cover_an_epoch() -> None:
    mix = Mix(Digits(), TEXTS, 2, 0.3, 16, seed=1)
    loader = Epochs(mix.rows, 64, seed=5)
    stream = iter(loader)
    list(islice(stream, 7))
    state, rest = loader.state_dict(), [b.input_ids_BT.numpy() for b in islice(stream, 9)]
    again = Epochs(mix.rows, 64, seed=5)
    again.load_state_dict(state)
    assert state["epoch"] >= 1
    assert all((a == b.input_ids_BT.numpy()).all() for a, b in zip(rest, iter(again), strict=False))
    with pytest.raises(InputError, match="other training rows"):
        Epochs(mix.rows, 64, seed=6).load_state_dict(state)
    shares = [next(iter(Epochs(mix.rows, 64, 5, rank=r, world=2))).input_ids_BT.numpy() for r in (0, 1)]
    one = next(iter(Epochs(mix.rows, 64, 5))).input_ids_BT.numpy()
    assert (np.stack(shares, 1).reshape(one.shape) == one).all()


def test_the_held_out_loss_reads_what_training_does_not() -> None:
    train = [Text("history:a:0", "history", "", "1122"), Text("history:b:0", "history", "", "11"), Text("lookup:c:1", "lookup", "", "1")]
    refit = [Text("history:a:0", "history", "", "112233"), Text("history:b:0", "history", "", "11"), Text("lookup:c:1", "lookup", "", "12")]
    assert midtrain.held_out(train, refit, 9) == [("1122", "33")]
    assert midtrain.held_out(train, refit, 0) == []


def test_the_summed_mask_is_the_mask() -> None:
    batch = to_batch(Mix(Digits(), TEXTS, 2, 0.0, 16, seed=1).rows(0), slice(0, 4))
    assert ((Summed(**vars(batch)).mask_B1TT() == 0) == batch.mask_B1TT()).all()
