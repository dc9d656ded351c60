"""Print short orders with their answers, a text a line: `python studies/lds/orders.py > orders.txt`.

A text is filled with orders of twelve families, drawn one by one, in the mouth of one of a few people. Were a
text of one family alone, to know its family would be enough to predict retraining, and any method would look
good. Only characters of the King James Bible with its verse numbers are used, so no sign for plus or equals.
"""

from __future__ import annotations

import random
from collections.abc import Callable

LENGTH = 97
TEXTS = 400


def words(text: str) -> list[str]:
    return text.split()


def pairs(text: str) -> list[tuple[str, str]]:
    """`a:b c:d` as pairs; an underscore stands for a space."""
    split = (pair.replace("_", " ").partition(":") for pair in text.split())
    return [(first, second) for first, _, second in split]


CAPITALS = pairs("""
    France:Paris Spain:Madrid Italy:Rome Egypt:Cairo Japan:Tokyo Greece:Athens Norway:Oslo Peru:Lima
    Cuba:Havana Kenya:Nairobi Austria:Vienna Poland:Warsaw Ireland:Dublin Portugal:Lisbon
    Sweden:Stockholm Hungary:Budapest Finland:Helsinki Denmark:Copenhagen Chile:Santiago Iraq:Baghdad
""")
COLOURS = pairs("""
    grass:green snow:white coal:black blood:red gold:yellow milk:white ink:black leaves:green
    cherries:red lemons:yellow the_sky:blue chocolate:brown carrots:orange ravens:black roses:red
    violets:blue mud:brown the_sea:blue salt:white limes:green
""")
UNITS = [
    ("feet", "yards", 3),
    ("inches", "feet", 12),
    ("minutes", "hours", 60),
    ("days", "weeks", 7),
    ("hours", "days", 24),
    ("pints", "gallons", 8),
    ("ounces", "pounds", 16),
    ("months", "years", 12),
    ("grams", "kilos", 1000),
    ("eggs", "dozens", 12),
]
OPPOSITES = pairs("""
    hot:cold big:small early:late rich:poor open:shut wet:dry hard:soft high:low light:dark young:old
    full:empty near:far fast:slow glad:sad strong:weak clean:dirty loud:quiet thick:thin sharp:blunt
    sweet:bitter
""")
PLURALS = pairs("""
    mouse:mice foot:feet tooth:teeth child:children ox:oxen wolf:wolves leaf:leaves box:boxes
    city:cities man:men goose:geese sheep:sheep knife:knives lady:ladies fox:foxes penny:pence
    louse:lice shelf:shelves church:churches
""")
YOUNG = pairs("""
    dog:puppy cat:kitten cow:calf horse:foal sheep:lamb goat:kid lion:cub bear:cub swan:cygnet
    duck:duckling goose:gosling deer:fawn pig:piglet frog:tadpole hen:chick eagle:eaglet hare:leveret
""")
WORDS = words("""
    apple bread candle door eagle farmer garden hammer island jacket kettle ladder market needle orange
    pepper quilt river saddle table uncle violin window yellow zebra
""")
DISHES = {
    "soup": (words("water onions carrots leeks beans salt"), "boil for an hour", "stir and serve"),
    "bread": (words("flour yeast water salt oil honey"), "knead and let rise", "bake till brown"),
    "a cake": (words("flour eggs butter sugar milk cream"), "beat till smooth", "bake for an hour"),
    "a salad": (words("lettuce oil vinegar olives onions salt"), "wash and chop", "toss and serve"),
    "a stew": (words("beef onions wine turnips pepper beans"), "brown in a pot", "simmer till soft"),
}
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
PLACES = ["the north", "the south", "the hills", "the coast", "the valley", "the islands"]
SKIES = ["rain", "snow", "wind from the west", "fog till noon", "clear skies", "thunder at night", "frost"]
SPEAKERS = [
    "Teacher:",
    "A child asks:",
    "Read this aloud.",
    "Learn by heart:",
    "From the almanac:",
    "Try these.",
]

Family = Callable[[random.Random], str]


def capital(generator: random.Random) -> str:
    country, city = generator.choice(CAPITALS)
    return generator.choice(
        [f"What is the capital of {country}? {city}.", f"{city} is the capital of which country? {country}."]
    )


def colour(generator: random.Random) -> str:
    thing, colour = generator.choice(COLOURS)
    return generator.choice(
        [f"Name the colour of {thing}: {colour}.", f"Name a thing that is {colour}: {thing}."]
    )


def unit(generator: random.Random) -> str:
    small, large, factor = generator.choice(UNITS)
    many = generator.randint(2, 9)
    ask = generator.choice([f"How many {small} are in {many} {large}?", f"Turn {many} {large} into {small}."])
    return f"{ask} {many * factor} {small}."


def total(generator: random.Random) -> str:
    a, b = generator.randint(2, 49), generator.randint(2, 49)
    return generator.choice([f"Add {a} and {b}: {a + b}.", f"Take {a} from {a + b}: {b}."])


def product(generator: random.Random) -> str:
    a, b = generator.randint(2, 12), generator.randint(2, 12)
    return generator.choice([f"What is {a} times {b}? {a * b}.", f"Divide {a * b} by {a}. It is {b}."])


def opposite(generator: random.Random) -> str:
    one, other = generator.sample(generator.choice(OPPOSITES), 2)
    return generator.choice([f"Say the opposite of {one}: {other}.", f"If it is not {one}, it is {other}."])


def plural(generator: random.Random) -> str:
    one, many = generator.choice(PLURALS)
    return generator.choice([f"Write the plural: one {one}, two {many}.", f"One {one} and another: {many}."])


def young(generator: random.Random) -> str:
    old, child = generator.choice(YOUNG)
    return generator.choice(
        [f"What is a young {old} called? A {child}.", f"A {child} will grow to be a {old}."]
    )


def sort(generator: random.Random) -> str:
    words = generator.sample(WORDS, 3)
    return f"Sort {', '.join(words)}: {', '.join(sorted(words))}."


def recipe(generator: random.Random) -> str:
    dish, (parts, first, last) = generator.choice(list(DISHES.items()))
    a, b, c = generator.sample(parts, 3)
    return f"To make {dish}, take {a}, {b} and {c}; {first}; {last}."


def calendar(generator: random.Random) -> str:
    names = generator.choice([DAYS, MONTHS])
    at = generator.randrange(len(names))
    before, name = names[at - 1], names[at]
    return generator.choice([f"What comes after {before}? {name}.", f"What comes before {name}? {before}."])


def weather(generator: random.Random) -> str:
    day, place, sky = generator.choice(DAYS), generator.choice(PLACES), generator.choice(SKIES)
    return f"The weather on {day} in {place}: {sky}, {generator.randint(1, 30)} degrees."


FAMILIES: list[Family] = [
    *(capital, colour, unit, total, product, opposite),
    *(plural, young, sort, recipe, calendar, weather),
]


def text(generator: random.Random) -> str:
    """As many orders as fill a text; the last is cut."""
    orders = generator.choice(SPEAKERS)
    while len(orders) < LENGTH:
        orders += " " + generator.choice(FAMILIES)(generator)
    return orders[:LENGTH]


def main() -> None:
    generator = random.Random(0)
    for _ in range(TEXTS):
        print(text(generator))


if __name__ == "__main__":
    main()
