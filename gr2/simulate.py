"""A simulated marketplace with known relevance, seeded, one day at a time, any size.

Users have tastes that drift, items have text and complements; a logging policy with a stale idea of the tastes draws slates
(Plackett-Luce), people look at slots less the further down they stand, click what they look at in proportion to its relevance, and buy
some of what they clicked. What somebody chose makes its complements more relevant on the following days. Logs arrive late, twice or
broken now and then.

Day numbers count from 0 (`simulator.start`). A day's draws are seeded by its number; what a day needs to know of the days before (tastes,
recent choices, late lines) is replayed, so that any day can be made on its own and equals what a run over all days gives.
"""

import datetime as dt
import gzip
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gr2.catalogue import DIM, RING, STYLES, TYPES, Catalogue, item_name, unit
from gr2.config import Simulator
from gr2.errors import ConfigError, InputError

MEMORY = 48  # choices that the platform remembers of a user, and does not show again
NEED_DAYS = 7  # a choice makes its complements relevant for so many days
BLOCK = 2048  # requests scored at once: memory is BLOCK x items
# shape suffixes: U users, R requests, S slots of a slate, N items, M remembered choices, D latent dimensions


def examination(settings: Simulator) -> np.ndarray:
    """P(somebody looks at a slot), by reading order (row by row), shape (slate,): 1, decay, decay^2, ... for slots in a row.

    In a grid attention falls from row to row, and half as fast from the middle column to the sides (middle bias: Xie et al., 2019).
    """
    row_S, column_S = np.divmod(np.arange(settings.slate), settings.columns)
    return settings.position_decay ** (row_S + np.abs(column_S - settings.columns // 2) / 2)


@dataclass(frozen=True)
class Slates:
    """What was shown on one day and what came of it. Times are seconds of the day."""

    user_R: np.ndarray
    number_R: np.ndarray  # request of the user on this day, from 0
    time_R: np.ndarray
    item_RS: np.ndarray
    propensity_RS: np.ndarray  # P(item in this slot | slots above), under the logging policy
    relevance_RS: np.ndarray  # P(click | looked at): the truth
    click_RS: np.ndarray
    purchase_RS: np.ndarray


class Market:
    """The marketplace at the start of a day. `step` lives through the day."""

    def __init__(self, settings: Simulator, seed: int) -> None:
        self.settings, self.seed, self.day = settings, seed, 0
        users = settings.users
        rng = np.random.default_rng([seed, 0])
        self.catalogue = Catalogue(seed)
        self.catalogue.extend(0, settings.items)
        interests = rng.integers(len(TYPES), size=(users, 3))
        self.taste_UD = unit(
            self.catalogue.types[interests].sum(1)
            + self.catalogue.departments[interests[:, 0] // RING]
            + 0.6 * self.catalogue.styles[rng.integers(len(STYLES), size=users)]
            + 0.4 * rng.normal(size=(users, DIM))
        )
        self.known_UD = unit(self.taste_UD + 0.15 * rng.normal(size=(users, DIM)))  # the policy's stale idea of it
        self.activity_U = rng.gamma(1.5, settings.requests_per_user_day / 1.5, size=users)
        self.thrift_U = rng.gamma(2.0, 0.5, size=users).astype(np.float32)
        self.choice_UM = np.full((users, MEMORY), -1, np.int64)
        self.chosen_on_UM = np.full((users, MEMORY), -(10**6), np.int64)
        self.strength_UM = np.zeros((users, MEMORY), np.float32)
        self.choices_U = np.zeros(users, np.int64)

    # -- the truth ------------------------------------------------------------------------------------------------

    def relevance(self, user_R: np.ndarray) -> np.ndarray:
        """P(click | looked at) of every item for each user on this day, shape (R, N): the truth that audits are held against."""
        return _sigmoid(8.0 * self._fit(self.taste_UD[user_R]) + 3.0 * self.need(user_R) + self._appeal(user_R) - 5.2)

    def need(self, user_R: np.ndarray) -> np.ndarray:
        """How much each item completes what the user chose on the days before, 0 to 1, shape (R, N)."""
        age_RM = self.day - self.chosen_on_UM[user_R]
        row, slot = np.nonzero((age_RM >= 1) & (age_RM <= NEED_DAYS))
        pull = self.strength_UM[user_R[row], slot] * np.exp(-(age_RM[row, slot] - 1) / 4.0)
        need_RN = np.zeros((len(user_R), len(self.catalogue)), np.float32)
        complements = self.catalogue.complements_NC[self.choice_UM[user_R[row], slot]]
        for place in range(complements.shape[1]):
            np.maximum.at(need_RN, (row, complements[:, place]), pull)
        return need_RN

    def _fit(self, taste_RD: np.ndarray) -> np.ndarray:
        return taste_RD @ self.catalogue.vectors_ND.T

    def _appeal(self, user_R: np.ndarray) -> np.ndarray:
        return self.catalogue.quality_N - 0.8 * self.thrift_U[user_R][:, None] * self.catalogue.dearness_N

    # -- one day --------------------------------------------------------------------------------------------------

    def step(self) -> Slates:
        """Lives through the day: requests, slates, clicks, purchases; then tastes drift, new items come, and it is the next day."""
        rng = np.random.default_rng([self.seed, 3, self.day])
        requests_U = rng.poisson(self.activity_U)
        start_U = rng.uniform(6 * 3600, 18 * 3600, size=self.settings.users)
        parts = []
        for number in range(int(requests_U.max(initial=0))):
            user_R = np.flatnonzero(requests_U > number)
            if number:  # mostly the same session goes on, sometimes a new one starts later that day
                start_U[user_R] += np.where(
                    rng.random(len(user_R)) < 0.7, rng.uniform(300, 900, len(user_R)), rng.uniform(3600, 9000, len(user_R))
                )
            user_R = user_R[start_U[user_R] < 84600]
            parts += [self._serve(user_R[i : i + BLOCK], number, start_U, rng) for i in range(0, len(user_R), BLOCK)]
        self._overnight()
        empty = np.zeros((0, self.settings.slate))
        if not parts:
            none = np.zeros(0, np.int64)
            return Slates(none, none, none, empty.astype(np.int64), empty, empty, empty.astype(bool), empty.astype(bool))
        return Slates(*(np.concatenate([getattr(p, f) for p in parts]) for f in Slates.__dataclass_fields__))

    def _serve(self, user_R: np.ndarray, number: int, start_U: np.ndarray, rng: np.random.Generator) -> Slates:
        rows, slots = np.arange(len(user_R))[:, None], min(self.settings.slate, len(self.catalogue))
        need_RN = self.need(user_R)
        fresh_N = (self.day - self.catalogue.born_N <= 3) & (self.catalogue.born_N > 0)
        logit_RN = 7.0 * self._fit(self.known_UD[user_R]) + 2.0 * need_RN + 0.5 * self.catalogue.quality_N + 0.8 * fresh_N
        seen_RM = self.choice_UM[user_R]
        r, m = np.nonzero(seen_RM >= 0)
        logit_RN[r, seen_RM[r, m]] = -30.0
        item_RS, propensity_RS = plackett_luce(logit_RN, slots, rng)
        relevance_RS = self.relevance(user_R)[rows, item_RS]
        looked_RS = rng.random(item_RS.shape) < examination(self.settings)[:slots]
        click_RS = looked_RS & (rng.random(item_RS.shape) < relevance_RS)
        buys_RS = _sigmoid(2.0 * need_RN[rows, item_RS] - self.thrift_U[user_R][:, None] * (0.6 + self.catalogue.dearness_N[item_RS]) - 0.6)
        purchase_RS = click_RS & (rng.random(item_RS.shape) < buys_RS)
        self._remember(user_R, item_RS, click_RS, purchase_RS)
        numbers_R = np.full(len(user_R), number, np.int64)
        return Slates(user_R, numbers_R, start_U[user_R].astype(np.int64), item_RS, propensity_RS, relevance_RS, click_RS, purchase_RS)

    def _remember(self, user_R: np.ndarray, item_RS: np.ndarray, click_RS: np.ndarray, purchase_RS: np.ndarray) -> None:
        for slot in range(item_RS.shape[1]):
            hit = click_RS[:, slot]
            user, place = user_R[hit], self.choices_U[user_R[hit]] % MEMORY
            self.choice_UM[user, place] = item_RS[hit, slot]
            self.chosen_on_UM[user, place] = self.day
            self.strength_UM[user, place] = np.where(purchase_RS[hit, slot], 1.0, 0.7)
            self.choices_U[user] += 1

    def _overnight(self) -> None:
        rng = np.random.default_rng([self.seed, 4, self.day])
        users = self.settings.users
        drifted = self.taste_UD + 0.02 * rng.normal(size=(users, DIM))
        turned = rng.random(users) < 0.02  # now and then somebody takes up something new
        drifted += turned[:, None] * 0.1 * self.catalogue.types[rng.integers(len(TYPES), size=users)]
        self.taste_UD = unit(drifted)
        self.known_UD = unit(0.95 * self.known_UD + 0.05 * self.taste_UD)
        self.day += 1
        self.catalogue.extend(self.day, self.settings.new_items_per_day)


def plackett_luce(logit_RN: np.ndarray, slots: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws `slots` different items for each row by Gumbel's trick; items (R, S) and P(item | items above it) (R, S)."""
    rows = np.arange(len(logit_RN))[:, None]
    noisy = logit_RN + rng.gumbel(size=logit_RN.shape)
    top = np.argpartition(-noisy, slots - 1, axis=1)[:, :slots]
    items = np.take_along_axis(top, np.argsort(-noisy[rows, top], axis=1), axis=1)
    weight = np.exp(logit_RN.astype(np.float64) - logit_RN.max(axis=1, keepdims=True))
    chosen = weight[rows, items]
    left = weight.sum(axis=1, keepdims=True) - np.cumsum(chosen, axis=1) + chosen
    return items, np.clip(chosen / left, 1e-12, 1.0)


def market_at(settings: Simulator, seed: int, day: int) -> Market:
    """The marketplace at the start of day number `day`, replayed: `market_at(s, seed, 5).relevance(users)` is the truth of day 5."""
    market = Market(settings, seed)
    while market.day < day:
        market.step()
    return market


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


# -- logs ---------------------------------------------------------------------------------------------------------


def event_lines(slates: Slates, settings: Simulator, day: int) -> list[str]:
    """The day's events as JSON lines in order of time: every impression, click and purchase."""
    date = dt.date.fromisoformat(settings.start) + dt.timedelta(days=day)
    stamp, columns, found = date.strftime("%Y%m%d"), settings.columns, []
    for user, number, second, items, propensities, clicks, purchases in zip(
        slates.user_R.tolist(), slates.number_R.tolist(), slates.time_R.tolist(), slates.item_RS.tolist(), slates.propensity_RS.tolist(),
        slates.click_RS.tolist(), slates.purchase_RS.tolist(), strict=True,
    ):  # fmt: skip
        for place, item in enumerate(items):
            rest = (
                f'"user_id":"u{user:05d}","item_id":"{item_name(item)}","request_id":"{stamp}-{user:05d}-{number}",'
                f'"row":{place // columns + 1},"col":{place % columns + 1}'
            )
            found.append((second, f'{{"kind":"impression",{rest},"time":"{_clock(date, second)}","propensity":{propensities[place]:.9g}}}'))
            if clicks[place]:
                then = second + 4 + 7 * place
                found.append((then, f'{{"kind":"click",{rest},"time":"{_clock(date, then)}"}}'))
            if purchases[place]:
                then = second + 150 + 60 * place
                found.append((then, f'{{"kind":"purchase",{rest},"time":"{_clock(date, then)}"}}'))
    found.sort(key=lambda pair: pair[0])
    return [line for _, line in found]


def _clock(date: dt.date, second: int) -> str:
    return f"{date}T{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}Z"


def _spoil(line: str, how: int) -> str:
    """A broken copy of a line, as broken as logs get."""
    record = json.loads(line)
    match how:
        case 0:
            return line[: len(line) * 2 // 3]  # cut off: not JSON
        case 1:
            del record["user_id"]
        case 2:
            record["row"] = "second"
        case 3:
            record["time"] = "yesterday"
        case 4:
            record["time"] = f"{int(record['time'][:4]) + 40}{record['time'][4:]}"
        case 5:
            record["kind"] = "hover"
        case 6:
            record["item_id"] = {"id": record["item_id"]}
        case _:
            record["time"] = "1970-01-01T00:00:00Z"
    return json.dumps(record, separators=(",", ":"))


class Logger:
    """Turns days into log files: some lines come days later, some twice, some broken, some with a column that nobody announced."""

    def __init__(self, settings: Simulator, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.pending: dict[int, list[str]] = {}  # day number of arrival -> lines

    def arrivals(self, slates: Slates, day: int) -> list[str]:
        """Lines of the file of this day. Call it for each day in turn."""
        s, rng = self.settings, np.random.default_rng([self.seed, 5, day])
        lines = event_lines(slates, s, day)
        late, twice, broken, extra = (
            rng.random(len(lines)) < share for share in (s.late_share, s.duplicate_share, s.malformed_share, 0.002)
        )
        delay, how = rng.integers(1, 4, size=len(lines)).tolist(), rng.integers(8, size=len(lines)).tolist()
        here = self.pending.pop(day, [])
        for i, line in enumerate(lines):
            line = f'{line[:-1]},"app_version":"2.7"}}' if extra[i] else line
            (self.pending.setdefault(day + delay[i], []) if late[i] else here).append(line)
            if twice[i]:
                (self.pending.setdefault(day + 1, []) if delay[i] == 3 else here).append(line)
            if broken[i]:
                here.append(_spoil(line, how[i]))
        return here


def item_lines(catalogue: Catalogue, settings: Simulator, seed: int, day: int) -> list[str]:
    """The items that are new on this day as JSON lines, with a broken one now and then."""
    start = dt.date.fromisoformat(settings.start)
    lines = [json.dumps(catalogue.record(i, start)) for i in np.flatnonzero(catalogue.born_N == day).tolist()]
    broken = np.flatnonzero(np.random.default_rng([seed, 6, day]).random(len(lines)) < settings.malformed_share)
    ways = (
        lambda line: line[:-9],
        lambda line: line.replace('"item_id"', '"id"'),
        lambda line: line.replace('"price": ', '"price": "about ').replace(', "since"', '", "since"'),
    )
    return lines + [ways[n % 3](lines[i]) for n, i in enumerate(broken.tolist())]


def write_days(settings: Simulator, seed: int, folder: Path, days: Iterable[dt.date], truth: Path | None = None) -> list[dt.date]:
    """Writes `folder/day=YYYY-MM-DD/{events,items}.jsonl.gz` of those `days` that are not there yet; days returned were written.

    `truth` gets `truth/day=YYYY-MM-DD.jsonl.gz`: per request the items shown, their true relevance and examination. No stage reads it.
    Raises InputError for a day outside the simulated ones, ConfigError if the folder was made with other settings or another seed.
    """
    start, last = dt.date.fromisoformat(settings.start), settings.days - 1
    wanted = {(d - start).days: d for d in days}
    for number, date in wanted.items():
        if not 0 <= number <= last:
            raise InputError(f"{date} is not a simulated day: there are {settings.days} from {start} on (simulator.start, simulator.days)")
    _check_same_market(settings, seed, folder)
    missing = {n: d for n, d in wanted.items() if not all((folder / f"day={d}" / f"{f}.jsonl.gz").exists() for f in ("events", "items"))}
    if not missing:
        return []
    market, logger = Market(settings, seed), Logger(settings, seed)
    for number in range(max(missing) + 1):
        known = len(market.catalogue)
        items = item_lines(market.catalogue, settings, seed, number) if number in missing else []
        slates = market.step()
        lines = logger.arrivals(slates, number)
        if number in missing:
            date = missing[number]
            assert slates.item_RS.size == 0 or slates.item_RS.max() < known, "an item was shown before its day"
            if truth:
                _write(truth / f"day={date}.jsonl.gz", _truth_lines(slates, settings, date))
            _write(folder / f"day={date}" / "items.jsonl.gz", items)
            _write(folder / f"day={date}" / "events.jsonl.gz", lines)
    return sorted(missing.values())


def _check_same_market(settings: Simulator, seed: int, folder: Path) -> None:
    """Days of two different markets never stand side by side; `days` may grow."""
    card = folder / "simulator.json"
    mine = json.dumps({"seed": seed, **settings.model_dump(exclude={"days"})}, sort_keys=True)
    if card.exists() and card.read_text() != mine:
        raise ConfigError(
            f"{folder} holds days of a marketplace with other settings or another seed: choose another paths.root, or delete it"
        )
    if not card.exists():
        folder.mkdir(parents=True, exist_ok=True)
        card.write_text(mine)


def _truth_lines(slates: Slates, settings: Simulator, date: dt.date) -> list[str]:
    look = examination(settings).round(6).tolist()
    rows = zip(slates.user_R.tolist(), slates.number_R.tolist(), slates.item_RS.tolist(), slates.relevance_RS.tolist(), strict=True)
    return [
        json.dumps({
            "request_id": f"{date:%Y%m%d}-{user:05d}-{number}", "item_ids": [item_name(i) for i in items],
            "relevance": [round(r, 6) for r in relevance], "examination": look[: len(items)],
        })
        for user, number, items, relevance in rows
    ]  # fmt: skip


def _write(path: Path, lines: list[str]) -> None:
    """Same lines, same bytes; renamed into place when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), compresslevel=5, mtime=0))
    temporary.replace(path)
