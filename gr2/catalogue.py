"""Items of the simulated marketplace: text, price, latent vectors, and which items complete which.

A product type is followed in its department's list by what people buy after it (`VOCABULARY`), and each item has a few
complements of its own among those types, rather of its own brand: co-occurrence tells more than text does, and text tells something.
"""

import datetime as dt
from typing import Any

import numpy as np

DIM = 24  # latent dimensions of tastes and items
COMPLEMENTS = 3

# department -> "category: product type, usual price" in the order of use; the list is read as a ring
VOCABULARY = {
    "Coffee & Tea": "Espresso: Espresso Machine, 320; Espresso: Burr Grinder, 120; Beans: Espresso Beans, 18; Milk: Milk Frother, 45; "
    "Cups: Cappuccino Cups, 28; Cleaning: Descaling Tablets, 12; Tea: Loose Leaf Tea, 14; Tea: Glass Teapot, 35",
    "Camping": "Shelter: Trekking Tent, 240; Sleeping: Down Sleeping Bag, 160; Sleeping: Sleeping Pad, 70; Light: Headlamp, 35; "
    "Cooking: Gas Stove, 55; Cooking: Titanium Cook Set, 60; Water: Water Filter, 40; Walking: Trekking Poles, 80",
    "Photography": "Cameras: Mirrorless Camera, 900; Lenses: Prime Lens, 420; Storage: Memory Card, 30; Bags: Camera Backpack, 95; "
    "Supports: Carbon Tripod, 150; Lenses: Polarising Filter, 45; Light: Speedlight Flash, 180; Care: Sensor Kit, 22",
    "Running": "Shoes: Road Running Shoes, 120; Clothing: Merino Socks, 16; Watches: GPS Watch, 250; Hydration: Hydration Vest, 110; "
    "Nutrition: Energy Gels, 24; Clothing: Running Cap, 25; Recovery: Foam Roller, 30; Recovery: Massage Ball, 12",
    "Home Office": "Furniture: Standing Desk, 450; Furniture: Mesh Office Chair, 280; Screens: Monitor Arm, 85; "
    "Input: Mechanical Keyboard, 110; Input: Wireless Mouse, 50; Light: Desk Lamp, 45; Video: Webcam, 75; Cables: USB Hub, 35",
    "Baby": "Travel: Folding Stroller, 330; Travel: Car Seat, 210; Travel: Diaper Bag, 65; Feeding: Bottle Set, 32; "
    "Feeding: Bottle Warmer, 38; Sleep: Baby Monitor, 120; Sleep: Muslin Swaddle, 22; Play: Play Mat, 55",
    "Skin Care": "Cleansing: Gel Cleanser, 14; Cleansing: Rose Toner, 18; Treatment: Vitamin C Serum, 32; Moisture: Day Cream, 26; "
    "Sun: Mineral Sunscreen, 20; Treatment: Clay Mask, 19; Moisture: Lip Balm, 6; Cleansing: Makeup Remover, 11",
    "Kitchen": "Knives: Chef Knife, 95; Preparation: Cutting Board, 60; Pans: Cast Iron Skillet, 48; Pans: Enamel Dutch Oven, 180; "
    "Preparation: Mixing Bowls, 34; Baking: Digital Scale, 24; Baking: Silicone Spatulas, 15; Spices: Spice Rack, 40",
}
RING = 8  # types of a department
BRANDS = (
    "Kestrel", "Norrland", "Hearth & Vine", "Solace", "Tamarack", "Orbit", "Juniper", "Ferrous", "Blue Anchor", "Maple & Pine", "Lumen",
)  # fmt: skip
STYLES = (
    "Compact", "Classic", "Premium", "Ultralight", "Everyday", "Professional", "Travel", "Eco", "Heritage", "Smart", "Soft", "Signature",
)  # fmt: skip
VARIANTS = (
    "Matte Black", "Ivory", "Forest Green", "Small", "Large", "Set of 2", "Graphite", "Sand", "Limited Edition", "Refill", "Navy",
    "Copper",
)  # fmt: skip

TYPES = [
    (department, *(part.strip() for part in row.replace(":", ",").split(",")))
    for department, rows in VOCABULARY.items()
    for row in rows.split(";")
]  # department, category, product, price
_DEPARTMENT = np.array([list(VOCABULARY).index(t[0]) for t in TYPES])
_PRICE = np.array([float(t[3]) for t in TYPES])


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows scaled to length one."""
    return (x_ND / np.linalg.norm(x_ND, axis=-1, keepdims=True)).astype(np.float32)


class Catalogue:
    """All items up to a day. A day's items depend on the seed and the day only, their complements also on the items before."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = np.random.default_rng([seed, 1])
        self.departments = rng.normal(size=(len(VOCABULARY), DIM))
        self.types = rng.normal(size=(len(TYPES), DIM))
        self.brands = rng.normal(size=(len(BRANDS), DIM))
        self.styles = rng.normal(size=(len(STYLES), DIM))
        self.vectors_ND = np.zeros((0, DIM), np.float32)
        self.quality_N = np.zeros(0, np.float32)
        self.dearness_N = np.zeros(0, np.float32)  # log of the price over the type's usual price
        self.born_N = np.zeros(0, np.int32)  # day number of the item's first day
        self.complements_NC = np.zeros((0, COMPLEMENTS), np.int64)
        self._attributes = np.zeros((0, 5), np.int64)  # type, brand, style, variant, price in cents
        self._by_type: list[list[int]] = [[] for _ in TYPES]

    def __len__(self) -> int:
        return len(self.quality_N)

    def extend(self, day: int, count: int) -> None:
        """Adds `count` items that are new on day number `day`."""
        if count == 0:
            return
        rng = np.random.default_rng([self.seed, 2, day])
        kind = rng.integers(len(TYPES), size=count)
        brand = (_DEPARTMENT[kind] * 4 + rng.integers(4, size=count)) % len(BRANDS)  # a department has four brands
        style, variant = rng.integers(len(STYLES), size=count), rng.integers(len(VARIANTS), size=count)
        dearness = rng.normal(0.0, 0.3, size=count)
        price = _PRICE[kind] * np.exp(dearness)
        vectors = unit(
            0.8 * self.departments[_DEPARTMENT[kind]]
            + 0.9 * self.types[kind]
            + 0.5 * self.brands[brand]
            + 0.4 * self.styles[style]
            + 0.3 * rng.normal(size=(count, DIM))
        )
        first = len(self)
        self.vectors_ND = np.concatenate([self.vectors_ND, vectors])
        self.quality_N = np.concatenate([self.quality_N, rng.normal(0.0, 0.5, size=count).astype(np.float32)])
        self.dearness_N = np.concatenate([self.dearness_N, dearness.astype(np.float32)])
        self.born_N = np.concatenate([self.born_N, np.full(count, day, np.int32)])
        rows = np.stack([kind, brand, style, variant, np.round(price * 100).astype(np.int64)], axis=1)
        self._attributes = np.concatenate([self._attributes, rows])
        for item, k in enumerate(kind, first):
            self._by_type[k].append(item)
        new = np.array([self._complements_of(item, rng) for item in range(first, len(self))], np.int64)
        self.complements_NC = np.concatenate([self.complements_NC, new])

    def _complements_of(self, item: int, rng: np.random.Generator) -> list[int]:
        """Two items of the next type of the department and one of the type after, of the same brand where there is one."""
        kind, brand = self._attributes[item, :2]
        start = int(kind) // RING * RING
        chosen: list[int] = []
        for step in (1, 1, 2):
            pool = self._by_type[start + (int(kind) - start + step) % RING]
            pool = (
                [i for i in pool if i not in chosen and i != item]
                or [i for i in range(len(self)) if i not in chosen and i != item]
                or [item]
            )
            chosen.append(pool[int(np.argmax(rng.random(len(pool)) + 0.5 * (self._attributes[pool, 1] == brand)))])
        return chosen

    def record(self, item: int, start: dt.date) -> dict[str, Any]:
        """What a shop's export says of an item: entities in the text as exports have them; one item in two hundred has no text at all."""
        kind, brand, style, variant, cents = (int(v) for v in self._attributes[item])
        department, category, product, _ = TYPES[kind]
        since = (start + dt.timedelta(days=int(self.born_N[item]))).isoformat()
        if item % 200 == 199:
            return {"item_id": item_name(item), "title": None, "brand": None, "categories": [], "price": cents / 100, "since": since}
        name = BRANDS[brand].replace("&", "&amp;")
        return {
            "item_id": item_name(item),
            "title": f"{name} {STYLES[style]} {product}, {VARIANTS[variant]}",
            "brand": name,
            "categories": [department.replace("&", "&amp;"), category, product],
            "price": cents / 100,
            "since": since,
        }


def item_name(item: int) -> str:
    """Id of an item in the logs."""
    return f"i{item:05d}"
