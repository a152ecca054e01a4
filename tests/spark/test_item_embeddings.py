"""Vectors of items: what they hold, what they must not hold, and that a rerun or a frozen projection leaves them as they were."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from item_world import TOPICS, put_items, put_pairs, topic_of

from gr2.context import Context
from spark_jobs import embedder, item_embeddings

pytestmark = pytest.mark.spark

SMALL = ["embeddings.text_dim=12", "embeddings.collaborative_dim=6"]


def vectors(ctx: Context, model: str) -> dict[str, np.ndarray]:
    table = ctx.lake.read("item_embeddings", ["item_id", "vector"], order_by=["item_id"], model=model)
    return dict(zip(table["item_id"].to_pylist(), np.array(table["vector"].to_pylist()), strict=True))


def test_vectors_know_topics_and_no_future_and_reruns_change_nothing(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx(SMALL)
    ids = put_items(ctx, 40)
    put_pairs(ctx, ids, "train", shift=0)
    result = item_embeddings.run(ctx.cfg, ctx)
    assert result.rows_out == 80
    assert result.detail == {"models": ["pairs_svd", "tfidf_svd"], "share_without_pairs": pytest.approx(1 / 40)}
    text, pairs = vectors(ctx, "tfidf_svd"), vectors(ctx, "pairs_svd")
    assert list(text) == list(pairs) == ids
    assert not pairs[ids[-1]].any()  # never bought: nothing is known
    for found in (text, {k: v for k, v in pairs.items() if k != ids[-1]}):
        items, matrix = list(found), np.stack(list(found.values()))
        assert np.allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)
        same = np.array([[topic_of(a) == topic_of(b) for b in items] for a in items])
        scores = matrix @ matrix.T
        assert scores[same].mean() > scores[~same].mean() + 0.3
    version = ctx.lake.version("item_embeddings")
    model = ctx.model("embedder").hash
    put_pairs(ctx, ids, "refit", shift=1)  # a later window that says something else
    item_embeddings.run(ctx.cfg, ctx)
    assert ctx.lake.version("item_embeddings") == version
    assert ctx.model("embedder").hash == model


def test_frozen_projection_puts_new_items_into_the_same_space(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx([*SMALL, "embeddings.frozen=true"])
    ids = put_items(ctx, 30)
    put_pairs(ctx, ids, "train", shift=0)
    item_embeddings.run(ctx.cfg, ctx)
    before = {model: vectors(ctx, model) for model in ("tfidf_svd", "pairs_svd")}
    put_items(ctx, 36)
    item_embeddings.run(ctx.cfg, ctx)
    for model, old in before.items():
        now = vectors(ctx, model)
        assert len(now) == 36
        assert all(np.array_equal(old[item], now[item]) for item in ids)
    text = vectors(ctx, "tfidf_svd")
    assert text["i033"] @ text["i030"] > text["i033"] @ text["i031"] + 0.3  # new items, topics 0, 0 and 1


def test_projection_survives_its_files(tmp_path: Path) -> None:
    from gr2.config import Embeddings

    ids, texts = ["a", "b", "c", "d"], ["red shoe", "red boot", "blue cup", "blue mug"]
    first, second, weight = ["a", "c"], ["b", "d"], np.array([2.0, 1.0])
    made = embedder.fit(Embeddings(text_dim=3, collaborative_dim=2), 1, ids, texts, first, second, weight)
    made.save(tmp_path, {})
    loaded = embedder.Embedder.load(tmp_path)
    assert np.array_equal(made.text(texts), loaded.text(texts))
    assert np.array_equal(made.pairs(ids, first, second, weight), loaded.pairs(ids, first, second, weight))
    assert loaded.text(["totally unseen 中文"]).shape == (1, 3)


def test_a_large_catalogue_of_nothing_but_ids_has_vectors() -> None:
    from gr2.config import Embeddings

    ids = [f"{97 * n:07}" for n in range(1000)]
    made = embedder.fit(Embeddings(text_dim=3, collaborative_dim=0), 1, ids, ids, [], [], np.zeros(0))
    assert np.isfinite(made.text(ids)).all()


def test_association_by_hand() -> None:
    found = embedder.association(["a", "b", "c"], ["a", "b", "c"], ["a", "a"], ["b", "c"], np.array([3.0, 1.0])).toarray()
    contexts = np.array([4.0, 3.0, 1.0]) ** embedder.CONTEXT_POWER
    expected = np.log(3.0 * contexts.sum() / (4.0 * contexts[1]))  # of a with b: weight 3, row total 4
    assert found[0, 1] == pytest.approx(max(expected, 0))
    assert found[1, 0] == pytest.approx(np.log(3.0 * contexts.sum() / (3.0 * contexts[0])))
    assert not found.diagonal().any()


def test_hugging_face_encoder_takes_the_place_of_tfidf(make_ctx: Callable[..., Context], tmp_path: Path) -> None:
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "lab" / "tiny encoder"
    folder.mkdir(parents=True)
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator([*TOPICS, "number i 0 1 2 3 4 5 6 7 8 9"], vocab_size=120)
    tokenizer = BertTokenizerFast(tokenizer_object=pieces._tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=150, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config).eval()
    model.save_pretrained(folder, safe_serialization=True)
    texts = ["red nail polish", "steel coffee grinder number 7 lavender"]
    with torch.no_grad():
        alone = [model(**tokenizer([t], return_tensors="pt")).last_hidden_state[0].mean(dim=0).numpy() for t in texts]
    assert np.allclose(embedder.encode_texts(str(folder), texts), embedder.unit(np.stack(alone)), atol=1e-5)  # padding changes nothing

    ctx = make_ctx([f"embeddings.encoder={folder}", "embeddings.collaborative_dim=0"])
    ids = put_items(ctx, 6)
    put_pairs(ctx, ids, "train", shift=0)
    result = item_embeddings.run(ctx.cfg, ctx)
    assert result.detail["models"] == ["lab--tiny--encoder"]
    assert vectors(ctx, "lab--tiny--encoder")["i000"].shape == (16,)
