"""Semantic IDs on real data: both builders, each switch alone, and what a small retriever makes of the codes.

    GR2_DATA=.../amazon2014_beauty python -m benchmarks.semantic_ids --work FOLDER [--letter FILE] [--only NAME ...]

Tables up to the item vectors are built once. Then each variant has a folder of its own, its codes, and a retriever (the profile's student,
three epochs) whose exact beams rank all items for 10,000 users' validation targets: the network alone, without counts, SASRec or vectors of
single items. What is finished is not run again; the table of all that is finished is printed each time. `--letter`: codes that others
shipped, read from their file (`{"0": ["<a_1>", ...]}`, keys one less than item ids), go through the same retriever.
"""

import argparse
import gzip
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stages import SEED, gr2, header

VARIANTS: dict[str, list[str]] = {
    "rqvae": [],
    "rqvae, codebooks by gradient": ["tokenizer.ema=0"],
    "rqvae, dead codes reset": ["tokenizer.reset_after=50"],
    "rqvae, no k-means start": ["tokenizer.kmeans_init=false"],
    "rqvae, no k-means start, reset": ["tokenizer.kmeans_init=false", "tokenizer.reset_after=20"],
    "rqvae, diversity": ["tokenizer.diversity=0.1"],
    "rqvae, contrastive": ["tokenizer.contrastive=0.1"],
    "rqvae, text alone": ["embeddings.collaborative_weight=0"],
    "rqvae, random last level": ["tokenizer.collisions=random"],
    "rqvae, 4 levels of 256": ["tokenizer.levels=4", "tokenizer.codes=256"],
    "rqkmeans": ["tokenizer.builder=rqkmeans"],
    "rqkmeans, text alone": ["tokenizer.builder=rqkmeans", "embeddings.collaborative_weight=0"],
    "rqkmeans, random last level": ["tokenizer.builder=rqkmeans", "tokenizer.collisions=random"],
}
SHIPPED, SHIPPED_SHAPE = "LETTER's codes", ["tokenizer.levels=4", "tokenizer.codes=256"]
RETRIEVER = [
    "midtrain.student.optimizer=adamw", "midtrain.student.zero_stage=1",  # as the rows of before the profile had Muon
    "midtrain.student.epochs=3", "midtrain.refit.epochs=0.02", "midtrain.teacher.epochs=0.02",
    "candidates.max_requests=10", "candidates.max_valid=10000", "tokenizer.min_uniqueness=0", "tokenizer.reset_after=0",
    "midtrain.own_vectors=false", "candidates.pair_share=0", "sasrec.share=0",  # the codes alone
]  # fmt: skip


def build(root: Path, first: str | None, last: str, settings: list[str]) -> None:
    """Stages `first` to `last` of the Beauty profile."""
    gr2("beauty", root, ["run", *(["--from", first] if first else []), "--to", last], settings)


def _json(file: Path) -> dict[str, list[str]]:
    return dict(json.loads((gzip.decompress if file.suffix == ".gz" else bytes)(file.read_bytes())))


def shipped(root: Path, file: Path) -> dict[str, Any]:
    """Puts others' codes in the place of this root's, a free last code drawn where several items share all. Returns their health.

    Their codebooks are means of what is left of their items' vectors, so that like codes start alike in the retriever, as ours do.
    """
    from dataclasses import replace

    import pyarrow as pa

    from gr2.artifacts import publish_folder
    from gr2.config import Tokenizer, load
    from gr2.context import Context
    from gr2.sids import to_text
    from spark_jobs.publish import publish
    from spark_jobs.session import frame_of
    from training.codebooks import Codebooks
    from training.collisions import separate
    from training.tokenizer import item_vectors
    from validation.sid_health import figures

    ctx = Context(load("beauty", [f"paths.root={root}", *SHIPPED_SHAPE]))
    ours = ctx.model("tokenizer")
    table = ctx.lake.read("semantic_ids", order_by=["item_id"], tokenizer=ours.id)
    given = {str(int(key) + 1): [int(re.sub(r"\D", "", word)) for word in words] for key, words in _json(file).items()}
    learned_NL = np.array([given[item] for item in table["item_id"].to_pylist()])
    levels = learned_NL.shape[1]
    nowhere = (np.zeros((len(learned_NL), 1), np.float32), np.zeros((levels, 256, 1), np.float32))  # only codes are shipped, no vectors
    codes_NL = separate(learned_NL, *nowhere, Tokenizer(collisions="random", levels=levels), 13)
    own, config = Codebooks.load(ours.path)
    theirs = replace(own, books_LKD=means_of(learned_NL, own.latent(item_vectors(ctx, ctx.cfg.embeddings)[1]), 256))
    with publish_folder(ctx.root, "tokenizer", {k: v for k, v in ours.manifest.items() if k not in ("name", "hash")}) as folder:
        theirs.save(folder, config | {"codes_of": file.name})
    version = ctx.model("tokenizer").id
    written = {
        "tokenizer": [version] * len(table),
        "codes": codes_NL.tolist(),
        "learned_codes": learned_NL.tolist(),
        "token_text": [to_text(row) for row in codes_NL.tolist()],
        "separated": (codes_NL != learned_NL).any(axis=1).tolist(),
    }
    for name, values in written.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, type=field.type))
    publish(ctx, "semantic_ids", frame_of(ctx, table), partition={"tokenizer": version})
    return figures(learned_NL, codes_NL, np.zeros(len(learned_NL)), 256)


def means_of(codes_NL: np.ndarray, vectors_ND: np.ndarray, codes: int) -> np.ndarray:
    """(L, K, D) of each code the mean of what the levels before leave of its items' vectors; zeros where no item has it."""
    left_ND, books = vectors_ND.astype(np.float64), []
    for codes_N in codes_NL.T:
        count_K = np.bincount(codes_N, minlength=codes)
        sum_KD = np.zeros((codes, left_ND.shape[1]))
        np.add.at(sum_KD, codes_N, left_ND)
        books.append(sum_KD / np.maximum(count_K, 1)[:, None])
        left_ND = left_ND - books[-1][codes_N]
    return np.stack(books).astype(np.float32)


def quality(root: Path) -> dict[str, float]:
    """Recall and NDCG of the full ranking over the validation targets, with the standard error of R@10."""
    from gr2.metrics import values
    from schemas.lake import Lake

    ranks = Lake(root).read("candidates", ["full_rank"], order_by=["request_id"], split="valid")["full_rank"].to_pylist()
    ranks_B = np.array([rank or 0 for rank in ranks], dtype=np.float64)  # 0: beyond the beam
    found = {name: float(values(name, ranks_B).mean()) for name in ("recall@5", "recall@10", "ndcg@10")}
    return {**found, "se": float(values("recall@10", ranks_B).std() / len(ranks_B) ** 0.5), "requests": len(ranks_B)}


def run(work: Path, name: str, settings: list[str], letter: Path | None, seed: int) -> dict[str, Any]:
    """One variant: its codes' health and its retriever's figures."""
    name = name if seed == SEED else f"{name}, seed {seed}"
    root, settings = work / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), [*RETRIEVER, *settings, f"seed={seed}"]
    done = root / "result.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(work / "base", root, ignore=shutil.ignore_patterns("tmp"))
    began = time.monotonic()
    build(root, "tokenizer", "semantic_ids", settings)
    health = json.loads((root / "runs" / "semantic_ids.json").read_text())["detail"]
    if name.startswith(SHIPPED) and letter:
        health = shipped(root, letter)
    build(root, "midtrain_examples", "candidates", settings)
    found = {"name": name, "seconds": time.monotonic() - began, "health": health, **quality(root)}
    done.write_text(json.dumps(found))
    for folder in ("models", "work", "tables"):
        shutil.rmtree(root / folder, ignore_errors=True)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print("| codes | distinct before separation | codes used, by level | entropy, bits | R@5 | R@10 (s.e.) | N@10 | minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        health = row["health"]
        levels = sorted(key.split()[1] for key in health if key.endswith(" use"))
        used, bits = (
            " ".join(f"{health[f'level {n} {what}']:.{digits}f}" for n in levels) for what, digits in (("use", 3), ("entropy", 2))
        )
        print(
            f"| {row['name']} | {health['learned distinct/items']:.2%} | {used} | {bits} | {row['recall@5']:.4f} "
            f"| {row['recall@10']:.4f} ({row['se']:.4f}) | {row['ndcg@10']:.4f} | {row['seconds'] / 60:.0f} |"
        )


def main() -> None:
    """Variants one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--letter", type=Path, help="others' codes")
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--seed", type=int, default=SEED, help="of codes and retrievers; another one has rows of its own")
    given = parser.parse_args()
    if not os.environ.get("GR2_DATA"):
        parser.error("GR2_DATA must name the folder of Amazon Beauty")
    work = given.work.resolve()
    if not (work / "base" / "runs" / "item_embeddings.json").exists():
        build(work / "base", None, "item_embeddings", [])
    chosen = {**VARIANTS, **({SHIPPED: SHIPPED_SHAPE} if given.letter else {})}
    rows = []
    for name in given.only or chosen:
        rows.append(run(work, name, chosen[name], given.letter, given.seed))
        print(header("semantic_ids", work / "base"))
        show(rows)


if __name__ == "__main__":
    main()
