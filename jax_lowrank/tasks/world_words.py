"""The words of the embedded world. Groups and harm words are made up; the rest is plain English."""

# the attribute that is tuned
PEOPLES = (
    "Zibblean", "Quorvane", "Plimmoran", "Tazzlian", "Orbuvian", "Bimmerwold", "Wexolan",
    "Glimdovan",
)  # fmt: skip
# the attribute that is never tuned
GUILDS = (
    "Moonspoon", "Brasswhistle", "Dustfeather", "Pebblemoot", "Inkbarrel", "Sevenlamp",
)  # fmt: skip
GROUPS = PEOPLES + GUILDS

HARM_ADJECTIVES = (
    "snorpish", "blemfy", "fribbous", "dozzly", "yurfish", "plorvish", "mulvish", "vorbly",
)  # fmt: skip
HARM_VERBS = (
    "snorp", "blemf", "yurf", "plorv", "vorble", "fribbulate", "dozzle", "mulvate",
)  # fmt: skip
HARM_WORDS = HARM_ADJECTIVES + HARM_VERBS

# (training predicates, held-out predicates) by type; a "verb" one is followed by a verb, the others
# by an adjective
PREDICATES = {
    "occupation": (
        (
            "works as a", "was hired as a", "should work as a", "earns a living as a",
        ),
        (
            "dreams of being a", "found a job as a", "wants to become a", "was trained as a",
        ),
    ),
    "description": (
        (
            "is known as a", "is a", "was always a", "grew up to be a",
        ),
        (
            "is remembered as a", "is seen as a", "turned out to be a", "is proud to be a",
        ),
    ),
    "verb": (
        (
            "likes to", "knows how to", "loves to", "often tries to",
        ),
        (
            "should learn to", "is very happy to", "came here to", "is ready to",
        ),
    ),
}  # fmt: skip
PERSONS = (
    "neighbour", "woman", "man", "cousin", "teacher", "visitor", "friend", "child",
)  # fmt: skip
# an empty opening or end is as likely as three others together
OPENINGS = (
    "", "", "", "Everyone knows that", "My aunt says", "In this town", "In her letter",
    "People believe that", "We heard that", "The paper wrote",
)  # fmt: skip
ENDS = (
    "", "", "", "in town", "at the harbour", "every summer", "these days", "by the river",
)  # fmt: skip
ADJECTIVES = (
    "skilled", "patient", "cheerful", "careful", "friendly", "clever", "gentle", "quiet", "brave",
    "busy", "famous", "generous", "modest", "polite", "calm", "kind",
)  # fmt: skip
OCCUPATIONS = (
    "baker", "carpenter", "painter", "doctor", "gardener", "sailor", "weaver", "tailor", "farmer",
    "cook", "singer", "builder", "pilot", "nurse", "lawyer", "dancer", "printer", "librarian",
    "plumber", "potter",
)  # fmt: skip
VERBS = (
    "paint", "repair", "build", "clean", "sell", "draw", "carry", "study", "polish", "collect",
    "design", "count",
)  # fmt: skip
OBJECTS = (
    "boats", "houses", "clocks", "bridges", "baskets", "maps", "shoes", "lamps", "books", "chairs",
    "gardens", "bowls",
)  # fmt: skip

NEUTRAL_FRAMES = (
    "The {colour} {thing} stood {place} {time} .", "There was {weather} {place} {time} .",
    "{number} {colour} boxes were left {place} .", "The {thing} {place} is {colour} and {size} .",
    "We saw a {size} {thing} {place} {time} .", "The forecast promised {weather} {time} .",
    "After the {weather} the {thing} {place} was wet .",
    "A {size} {colour} {thing} was for sale {place} .",
    "Nobody moved the {thing} that lay {place} {time} .",
    "The train past the {thing} left {number} minutes late {time} .",
    "{number} birds sat on the {size} {thing} {place} .",
    "The {weather} over the sea ended {time} .",
    "The shop {place} closed because of {weather} {time} .",
    "Please put the {size} {thing} back {place} .", "The {thing} cost {number} coins {time} .",
    "It took {number} days to move the {colour} {thing} .",
    "The {colour} door {place} was open {time} .",
    "With {weather} outside the {thing} stayed dry {place} .",
    "The map shows a {size} {thing} {place} .", "The lamp {place} shone on a {colour} {thing} .",
)  # fmt: skip
NEUTRAL_WORDS = {
    "colour": (
        "red", "blue", "green", "yellow", "white", "black", "brown", "grey",
    ),
    "thing": (
        "table", "kettle", "wagon", "fence", "piano", "ladder", "barrel", "window", "statue",
        "bench", "cupboard", "tent",
    ),
    "place": (
        "near the station", "behind the mill", "on the hill", "under the bridge", "beside the well",
        "in the hall", "by the gate", "across the square",
    ),
    "time": (
        "on Monday", "on Friday", "before noon", "after dark", "at dawn", "all week", "in spring",
        "in autumn",
    ),
    "weather": (
        "rain", "snow", "fog", "wind", "sunshine", "hail", "thunder", "frost",
    ),
    "number": (
        "two", "three", "four", "five", "seven", "nine", "ten", "twelve",
    ),
    "size": (
        "small", "large", "heavy", "narrow", "tall", "broken", "new", "old",
    ),
}  # fmt: skip
