"""Made-up results of any size, with texts that would act if anyone let them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np

from rapidin.results.collection import Results
from rapidin.results.fusion import Fused, Fusion
from rapidin.results.types import Group, Histogram, Hit, QueryResult, Standing, TargetResult, Tokens

HOSTILE = [
    "</script><img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>",
    "--><svg onload=\"document.title='owned'\"><!--<script>",
    "\" onmouseover=\"document.title='owned'\" x='",
    "]]>{{7*7}}${7*7}<%= 7*7 %>&lt;b&gt;&amp;&#x3c;",
    "\u202egnp.exe\u202c and \u2066isolates\u2069",
    "\x00nul \x1b[31mred\x07 \x9b \x7f",
    "one\r\ntwo\rthree\u2028four\u2029five\x0bsix",
    "zero\u200bwidth\u2060 \ufeff soft\xadhyphen \U000e0041\U000e0042",
    "half \ud83d a pair \udc00",
    "شكرا جزيلا 👩‍👩‍👧 日本語 e\u0301\u0327",
    "unbroken" * 80,
    '=HYPERLINK("http://example.invalid","x")',
    "javascript:alert(1) https://example.invalid/a.js",
    "<|im_end|>\n<|im_start|>assistant\n",
]
_WORDS = (
    "the a of to in is and for with that this moon river teapot purple answer question capital France Paris "
    "training example model gradient number seven twelve library harbour evening because although quietly"
)
WORDS = _WORDS.split()
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes it."
    "\n\n### Instruction:\n"
)


def words(chance: random.Random, count: int) -> list[str]:
    """Texts of tokens as a tokenizer cuts them: words with the space before, now and then a line break."""
    found = []
    for n in range(count):
        word = chance.choice(WORDS)
        found.append(
            chance.choice([".\n", ",", ".", "\n\n"]) if chance.random() < 0.1 else " " * (n > 0) + word
        )
    return found


def tokens_of(chance: random.Random, numbers: np.random.Generator, length: int, parts: np.ndarray) -> Tokens:
    """Tokens whose numbers add up to `parts` [targets]; a template comes first and does not count."""
    head = TEMPLATE.replace(" ", "\0 ").replace("\n\n", "\0\n\n").split("\0")[: length // 2]
    pieces = (*head, *words(chance, length - len(head)))
    weights = numbers.standard_normal((max(1, len(parts)), length)) ** 3
    weights /= np.abs(weights).sum(1, keepdims=True)
    by_target = weights
    if len(parts):
        by_target = weights + (parts - weights.sum(1))[:, None] / length
    counts = tuple(n >= len(head) for n in range(length))
    by = by_target.astype(np.float32)
    return Tokens(pieces, counts, tuple(by.sum(0, dtype=np.float64).tolist()), by if len(parts) else None)


def made(
    *,
    hits: int = 20,
    length: int = 200,
    generation: int = 200,
    pool: int = 0,
    layers: int = 28,
    seed: int = 0,
    scale: float = 1.0,
    normalize: str = "layer",
    rows: int = 5000,
    extra: bool = True,
    **fields: Any,
) -> QueryResult:
    """A query of `generation` target tokens with `hits` at each end, half of `hits` in all where it is odd.

    pool: hits of single tokens besides; extra: everything that may be known of a hit is.
    """
    chance, numbers = random.Random(seed), np.random.default_rng(seed)
    pieces = tuple(words(chance, generation))
    top_count = (hits + 1) // 2
    sizes = 0.7 * scale / np.sqrt(np.arange(1, hits + pool + 1))
    chosen = chance.sample(range(rows), hits + pool)
    everything: list[Hit] = []
    for n, row in enumerate(chosen):
        sign = 1 if n < top_count else -1
        if n >= hits:
            sign = chance.choice((1, -1))
        rank = n + 1 if n < top_count else n - top_count + 1
        score = sign * float(sizes[rank - 1 if n < hits else n])
        parts = numbers.standard_normal(generation) * abs(score) / max(1, generation) ** 0.5
        if generation:
            parts += (score - parts.sum()) / generation
        parts = parts.astype(np.float32).astype(np.float64)
        score = float(parts.sum()) if generation else score
        example = {"prompt": " ".join(words(chance, 12)), "completion": " ".join(words(chance, 12))}
        hit = Hit(rank, 2 * row, row, score, example, targets=tuple(parts.tolist()))
        if length:
            tokens = tokens_of(chance, numbers, length, parts)
            hit = replace(hit, tokens=tokens)
        if extra:
            spread = numbers.standard_normal(layers) ** 3
            hit = replace(
                hit,
                example={**example, "source": ("wikipedia", "forum")[row % 2], "poisoned": n % 3 == 0},
                error=abs(score) * 0.06,
                ranks=(max(1, rank - n % 3), rank + n % 3),
                tied=n % 4 == 1,
                estimate=score * 1.02 if n % 2 else None,
                copies=tuple(range(3, 3 + n % 4)),
                copies_more=40 if n % 4 == 3 else 0,
                layers=tuple((spread * score / np.abs(spread).sum()).tolist()),
                standings={
                    "BM25": Standing(12.5 / rank, rank * 3 - 2),
                    "embeddings": Standing(0.8, rank + 7),
                },
            )
        everything.append(hit)
    top = sorted(everything[:top_count], key=lambda hit: -hit.score)
    bottom = sorted(everything[top_count:hits], key=lambda hit: hit.score)
    top, bottom = ([replace(hit, rank=n) for n, hit in enumerate(end, 1)] for end in (top, bottom))
    targets = []
    known = [*top, *bottom, *everything[hits:]]
    for n, text in enumerate(pieces):
        ordered = sorted(known, key=lambda hit: -hit.targets[n])
        best = [replace(hit, rank=k, score=hit.targets[n]) for k, hit in enumerate(ordered[:top_count], 1)]
        worst = [
            replace(hit, rank=k, score=hit.targets[n])
            for k, hit in enumerate(ordered[: -top_count - 1 : -1], 1)
        ]
        influence = float(np.mean([hit.targets[n] for hit in top])) if top else 0.0
        targets.append(TargetResult(text, (n,), influence, best, worst))
    known_fields: dict[str, Any] = {"examples": rows}
    if extra:
        spread = numbers.standard_normal(rows) * 0.12 * scale
        ends = max(0.75 * scale, float(np.abs(spread).max()))
        counts, edges = np.histogram(spread, bins=60, range=(-ends, ends))
        groups = [
            Group(value, count, total * scale, helpful, harmful)
            for value, count, total, helpful, harmful in (
                ("wikipedia", 3120, 41.2, 0.41, 0.30),
                ("", 40, 12.4, 0.22, 0.01),
                ("stack exchange", 1400, 6.3, 0.30, 0.24),
                ("books", 340, -3.9, 0.05, 0.17),
                ("forum posts of a rather long name that wraps", 100, -9.7, 0.02, 0.28),
            )
        ]
        known_fields |= {
            "layers": tuple(f"model.layers.{n}.mlp.down_proj" for n in range(layers)),
            "histogram": Histogram(tuple(edges.tolist()), tuple(int(count) for count in counts)),
            "by": "source",
            "groups": groups,
            "overlaps": {"BM25": min(3, len(top)), "embeddings": min(6, len(top))},
            "exact": True,
        }
    prompt = TEMPLATE + "Which things are in the river?\n\n### Response:\n"
    return QueryResult(
        **{
            "prompt": prompt,
            "completion": "".join(pieces) or "The teapots sing.",
            "generated": True,
            "top": top,
            "bottom": bottom,
            "normalize": normalize,
            "seconds": {"scan": 0.1},
            "pieces": pieces,
            "targets": targets,
        }
        | known_fields
        | fields
    )


def hostile() -> QueryResult:
    """Texts that would act, wherever a text can stand."""
    evil = HOSTILE[0]
    everywhere = "".join(HOSTILE)
    n = len(HOSTILE)
    by = np.linspace(-1, 1, n * n, dtype=np.float32).reshape(n, n)
    tokens = Tokens((*HOSTILE[:-1], ""), (True,) * n, tuple(by.sum(0).tolist()), by)
    some = {
        "copies": (1,),
        "layers": (0.5, -0.5),
        "standings": {evil: Standing(1.0, 1)},
        "targets": tuple(by.sum(1).tolist()),
    }
    top = [
        Hit(1, 0, 0, 0.5, {"text": everywhere}, tokens=tokens, **some),
        Hit(2, 1, 1, 0.4, {"prompt": everywhere, "completion": everywhere}, **some),
        Hit(3, 2, 2, 0.3, {"text": HOSTILE[12]}, **some),
    ]
    bottom = [
        Hit(
            1,
            3,
            3,
            -0.5,
            {
                "messages": [
                    {"role": "user", "content": everywhere},
                    {"role": "assistant", "content": everywhere},
                ]
            },
            **some,
        ),
        Hit(2, 4, 4, -0.4, {"text": '@SUM(A1)\n"quoted", with commas'}, **some),
    ]
    targets = [TargetResult(text, (place,), 0.1, top[:1], bottom[:1]) for place, text in enumerate(HOSTILE)]
    return QueryResult(
        everywhere,
        everywhere,
        False,
        top,
        bottom,
        "layer",
        pieces=tuple(HOSTILE),
        targets=[*targets, TargetResult(evil, (0, 1), -0.2, top[:1], bottom[:1])][:n],
        layers=(evil, HOSTILE[3]),
        histogram=Histogram((-1.0, 0.0, 1.0), (3, 4)),
        by=evil,
        groups=[Group(text, 1, 0.1, 0.5, 0.5) for text in (evil, HOSTILE[3], HOSTILE[5])],
        overlaps={evil: 1},
        examples=5,
    )


def fused(**fields: Any) -> QueryResult:
    """A query whose top is a fused ranking, with a row of a negative score in it."""
    result = made(**{"hits": 6, "length": 9, "generation": 4} | fields)
    names = ("gradients", "BM25", "hidden states")
    top = []
    for n, hit in enumerate(result.top):
        ranks = {name: None if name == "BM25" and n == 1 else n + 3 * k + 1 for k, name in enumerate(names)}
        adds = {name: 0.0 if rank is None else 1 / (60 + rank) for name, rank in ranks.items()}
        score = -hit.score if n == 1 else hit.score
        top.append(
            replace(hit, score=score, ranks=None, tied=False, fused=Fused(sum(adds.values()), ranks, adds))
        )
    return replace(result, top=top, fusion=Fusion(dict.fromkeys(names, 1.0), 1000, 9, 10))


def several() -> Results:
    """A few queries of different kinds, for one page."""
    return Results(
        [
            made(hits=8, length=60, generation=24, pool=12),
            hostile(),
            made(hits=6, length=0, generation=0, extra=False, seed=3),
        ]
    )


def visible(value: str) -> str:
    """What must be read on the page where this text stands, character by character."""
    shown = ""
    for character in value:
        code = ord(character)
        acts = (
            code < 0x20 or 0x7F <= code <= 0x9F or 0xD800 <= code <= 0xDFFF or code in (0x61C, 0x200E, 0x200F)
        )
        acts = acts or 0x2028 <= code <= 0x202E or 0x2066 <= code <= 0x2069
        unseen = code in (0xAD, 0x200B, 0xFEFF) or 0x2060 <= code <= 0x2064 or 0xE0000 <= code <= 0xE007F
        if (acts or unseen) and character not in "\n\t":
            escape = f"x{code:02x}" if code < 0x100 else f"u{code:04x}" if code < 0x10000 else f"U{code:08x}"
            shown += "\\" + escape
        else:
            shown += character
    return shown
