"""What the sections of a profile are made of, and what every trainer is told. `gr2.config` puts them together."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_+.-]*$")]
Place = Annotated[str, Field(pattern=r"^([a-z0-9]+://([\w-]+@)?[\w.-]*(:\d+)?)?(/[\w.=/-]*)?$")]  # a folder or a URL, without a password
FEWEST_DRILLED = 3  # candidates of a list that is made up to teach: with two there is nothing to compare but one pair


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(Section):
    """Low-rank adapters in place of all weights (arXiv 2106.09685); what is exported is the merged model."""

    rank: Positive = 16
    alpha: Positive = 32  # the adapter counts alpha / rank
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # matrices, by name's end
    tables: bool = False  # the token tables are trained whole beside it, which new semantic-ID rows need (mid-training); else frozen


class Training(Section):
    """What every trainer shares. A stage's section holds one of these."""

    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(0, ge=0)  # 0: as many as the epochs give
    tokens_per_batch: Positive = 4096
    row_tokens: Positive = 512  # packed rows have this length; longer examples are refused by name
    accumulation: Positive = 1
    lr: float = Field(1e-3, gt=0)
    warmup: Share = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up: down to a tenth on a cosine or a line, or level
    weight_decay: float = Field(0.05, ge=0)
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon (training/optimizers.py): for the matrices of the layers; zero_stage 0
    beta2: float = Field(0.95, ge=0.0, lt=1.0)  # AdamW's memory of squared gradients; tables of rare rows want a longer one
    clip: float = Field(1.0, gt=0)
    lora: Lora | None = None
    average: float = Field(0.0, ge=0.0, lt=1.0)  # decay of the averaged weights that are exported; 0: the last weights
    checkpoint_every: int = Field(0, ge=0)  # steps; 0: none (an interrupted training starts again)
    precision: Literal["bf16", "fp32"] = "bf16"  # of matrix products; weights and optimizer are fp32 either way
    zero_stage: int = Field(1, ge=0, le=3)
    processes: Positive = 1
    deepspeed: str | None = None  # a file under conf/deepspeed that replaces the built-in configuration

    @model_validator(mode="after")
    def _whole_matrices(self) -> "Training":
        if self.optimizer == "muon" and (self.zero_stage or self.deepspeed):
            raise ValueError("optimizer muon needs whole matrices, which ZeRO splits: set zero_stage to 0, and no deepspeed file")
        return self

    def what(self) -> "Training":
        """These settings without how they are run, which changes a result by rounding alone: checkpoints go on at other ZeRO stages."""
        how = ("checkpoint_every", "zero_stage", "processes", "deepspeed")
        return self.model_copy(update={name: Training.model_fields[name].default for name in how})


class Sasrec(Section):
    """A model of whole items in the pre-ranker's mixture (`scoring/sasrec.py`)."""

    share: float = Field(0.5, ge=0, lt=1)  # of what the network has beside the counts; 0: no such model (catalogues beyond a softmax)
    places: Positive = 50  # latest items that it reads
    hidden: Positive = 128
    layers: Positive = 2
    heads: Positive = 2
    dropout: Share = 0.4
    keep: Positive = 256  # items of a request that have a probability; the rest has none
    # 128 users a batch; as the original is trained, whose rare items want Adam's long memory
    train: Training = Training(
        epochs=9, lr=1e-3, tokens_per_batch=6528, schedule="constant", warmup=0.0, weight_decay=0.0, beta2=0.999, clip=10.0
    )


class Files(Section):
    """Raw files of one kind, and which of their fields is which of the contract's; one that is not named is sought by its own name."""

    files: tuple[str, ...] = ()  # patterns under data.path; `day=*/` in front: a folder a day; `!` in front: leaves out
    format: Literal["jsonl", "csv", "parquet", "delta", "sequences"] = "jsonl"
    columns: dict[Name, tuple[str, ...]] = {}  # contract's field -> names it may have in the files: the first with a value counts
    constants: dict[Name, str] = {}  # contract's field -> value of every row
    time: Literal["iso", "epoch"] = "iso"  # ISO 8601 with a zone, or seconds or milliseconds since 1970
    order: Literal["time", "position"] = "time"  # position: the place in the user's sequence counts, and a time may be missing
    user_of: tuple[str, ...] = ()  # fields whose values together stand for the user, where the log names none
    clicked: str = ""  # field of an impression's row that is 1 where it was clicked: the row then tells of two events
    purchased: str = ""  # the same for a purchase
    request_of_row: bool = False  # each row is a request of its own, where the log names none
    loose_price: bool = False  # the price is a text such as "$29.99"; one that is no price counts as unknown
