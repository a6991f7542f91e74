"""OpenMoji's names: the caption of a drawing, its class, and whether it is held out for validation.

Pure functions of names, without files or packages. `caption_of` turns the name that the package `emoji` gives (CLDR's
short name without blanks, commas and colons) back into text; `class_of` sorts captions into eight classes; `held_out`
picks those that validate: combinations whose parts are trained on separately. docs/openmoji.md holds the counts.
"""

import re
from typing import NamedTuple
from zlib import crc32

CLASSES = ("faces", "people", "animals", "food", "places", "objects", "symbols", "flags")

TONE = r"(?:medium-light|medium-dark|light|medium|dark) skin tone"
HAIR = r"(?:red|curly|white|blond) hair|bald|beard"
MEMBER = r"(?:man|woman|person|boy|girl|adult|child)"

HOLD_OUT_ONE_IN = 8  # pairs
HOLD_OUT_SALT = 30  # with this one every word, subject and property of a held-out caption is also trained on


def caption_of(emoji: str, name: str) -> str:
    """Text of one drawing: its characters `emoji` and the name that the package `emoji` has for them.

    "_" becomes a blank and "’" an apostrophe. CLDR's "flag: " and "keycap: " and the members of couples and families
    come back ("family: man, girl"), and a comma precedes skin tone and hair: "woman judge, medium-dark skin tone".
    """
    text = name.strip(":").replace("_", " ").replace("’", "'")
    if _is_flag_of_a_place(emoji):
        return f"flag: {text}"
    text = re.sub(r"^keycap ", "keycap: ", text)
    family = re.match(rf"(couple with heart|kiss|family)((?: {MEMBER}\b)+)", text)
    if family:
        text = f"{family[1]}: {', '.join(family[2].split())}{text[family.end() :]}"
    return re.sub(rf" (?=(?:{TONE}|{HAIR})(?: |$))", ", ", text)


def _is_flag_of_a_place(emoji: str) -> bool:
    """Two regional indicators (a country), or a black flag with tag characters (England, Scotland, Wales)."""
    return all("\U0001f1e6" <= char <= "\U0001f1ff" for char in emoji) or emoji.endswith("\U000e007f")


def class_of(caption: str) -> str:
    """Class of a caption, by the first of these rules that applies.

    1. flags: "flag: ..." and names that end in "flag" or "flags", but for mailboxes. 2. The class whose list below
    holds the name. 3. faces: the word "face". 4. people: skin tone or hair, or a word for a person, an occupation or a
    part of the body. 5. symbols: a word such as "button", "heart" or "square". 6. objects.
    """
    if caption.startswith("flag: ") or (re.search(r" flags?$", caption) and "mailbox" not in caption):
        return "flags"
    if caption in CLASS_OF_NAME:
        return CLASS_OF_NAME[caption]
    words = set(re.findall(r"[^\s,:()]+", caption))
    if "face" in words:
        return "faces"
    if words & PEOPLE_WORDS:
        return "people"
    return "symbols" if words & SYMBOL_WORDS else "objects"


class Factors(NamedTuple):
    """What a caption combines. Which way a drawing faces and who of two stands on the left make no difference."""

    subject: str  # "judge", "red hair", "heart"
    gender: str  # "woman", "women", or "": OpenMoji draws most neutral persons as it draws men
    tones: str  # "dark", or those of two people in alphabetical order, "dark light"; "" for none
    colour: str  # of a heart, square, circle, diamond or book, else ""


def factors(caption: str) -> Factors:
    """The parts of a caption: "woman judge, dark skin tone" -> ("judge", "woman", "dark", "")."""
    tones = sorted(re.findall(rf", ({TONE})", caption))
    words = re.sub(rf", {TONE}| facing right|[,:]", "", caption).split()
    genders = [] if ":" in caption else [word for word in words if word in GENDERS]  # not those of couples, families
    colours = [word for word in words if word in COLOURS] if SHAPES.intersection(words) else []
    subject = [word for word in words if word in SHAPES] if colours else [w for w in words if w not in UNNAMED]
    return Factors(
        subject=" ".join(subject),
        gender=genders[0] if genders in (["woman"], ["women"]) else "",
        tones=" ".join(tone.removesuffix(" skin tone") for tone in tones),
        colour="".join(colours),
    )


def pairs(caption: str) -> list[tuple[str, str]]:
    """The subject with its gender, its tones and its colour: the combinations that can be held out."""
    subject, *others = factors(caption)
    return [(subject, other) for other in others if subject and other]


def held_out(caption: str) -> bool:
    """Does the caption validate? So it does if one of its pairs is drawn, by a checksum of the pair's text."""
    return any(crc32(f"{HOLD_OUT_SALT} {a} | {b}".encode()) % HOLD_OUT_ONE_IN == 0 for a, b in pairs(caption))


def _names(text: str) -> frozenset[str]:
    return frozenset(" ".join(text.split()).split(", "))


GENDERS = _names("man, woman, men, women")
UNNAMED = GENDERS | _names("person, people, and")  # words that are no part of the subject
COLOURS = _names("red, orange, yellow, green, blue, purple, brown, black, white, grey, pink")
SHAPES = _names("heart, square, circle, diamond, book")

PEOPLE_WORDS = _names(
    """skin, hair, bald, man, woman, men, women, person, people, boy, girl, child, baby, family, couple, kiss, hand,
    hands, handshake, finger, fingers, fist, palms, thumbs, index, biceps, gesture, horns, bust, busts, ear, nose,
    eye, eyes, mouth, tongue, tooth, bone, leg, foot, brain, lungs, fingerprint, footprints, selfie, nail, salute,
    Claus, astronaut, artist, cook, detective, farmer, firefighter, guard, judge, mechanic, officer, pilot,
    scientist, singer, student, teacher, technologist, worker, elf, fairy, genie, mage, mermaid, merman, merperson,
    ninja, prince, princess, superhero, supervillain, troll, vampire, zombie, skier, snowboarder, creature,
    breast-feeding"""
)
SYMBOL_WORDS = _names(
    """button, heart, hearts, square, circle, diamond, triangle, symbol, sign, keycap, arrow, arrows, mark, suit,
    input, no, cross, star, loop, bubble, balloon, dollar, prohibited"""
)

NAMES_OF_CLASS = {
    "faces": """grinning cat, grinning cat with smiling eyes, cat with tears of joy, smiling cat with heart-eyes,
    cat with wry smile, kissing cat, pouting cat, crying cat, weary cat, see-no-evil monkey, hear-no-evil monkey,
    speak-no-evil monkey, ogre, goblin, ghost, alien, alien monster, robot, skull, pile of poo, star-struck,
    rolling on the floor laughing, exploding head, head shaking horizontally, head shaking vertically, biting lip""",
    "people": """horse racing, speaking head, anatomical heart, mechanical arm""",
    "animals": """rat, mouse, ox, water buffalo, cow, tiger, leopard, rabbit, black cat, cat, dragon, crocodile,
    whale, snail, snake, horse, ram, goat, ewe, monkey, rooster, chicken, service dog, dog, pig, boar, elephant,
    octopus, spiral shell, bug, ant, honeybee, lady beetle, fish, tropical fish, blowfish, turtle, hatching chick,
    baby chick, front-facing baby chick, phoenix, black bird, bird, penguin, koala, poodle, camel, two-hump camel,
    dolphin, mouse face, cow face, tiger face, rabbit face, cat face, dragon face, spouting whale, horse face,
    monkey face, dog face, pig face, frog, hamster, wolf, polar bear, bear, panda, pig nose, paw prints, chipmunk,
    dove, spider, spider web, crab, lion, scorpion, turkey, unicorn, eagle, duck, bat, shark, owl, fox, butterfly,
    deer, gorilla, lizard, rhinoceros, shrimp, squid, giraffe, zebra, hedgehog, sauropod, T-Rex, cricket, kangaroo,
    llama, peacock, hippopotamus, parrot, raccoon, lobster, mosquito, microbe, badger, swan, mammoth, dodo, sloth,
    otter, orangutan, skunk, flamingo, oyster, beaver, bison, seal, guide dog, fly, worm, beetle, cockroach,
    feather, coral, empty nest, nest with eggs, jellyfish, wing, goose, orca, moose, donkey""",
    "food": """hot dog, taco, burrito, chestnut, hot pepper, ear of corn, brown mushroom, mushroom, tomato,
    eggplant, grapes, melon, watermelon, tangerine, lime, lemon, banana, pineapple, red apple, green apple, pear,
    peach, cherries, strawberry, hamburger, pizza, meat on bone, poultry leg, rice cracker, rice ball, cooked rice,
    curry rice, steaming bowl, spaghetti, bread, french fries, roasted sweet potato, dango, oden, sushi, fried
    shrimp, fish cake with swirl, soft ice cream, shaved ice, ice cream, doughnut, cookie, chocolate bar, candy,
    lollipop, custard, honey pot, shortcake, bento box, pot of food, cooking, teacup without handle, sake, wine
    glass, cocktail glass, tropical drink, beer mug, clinking beer mugs, baby bottle, bottle with popping cork,
    popcorn, birthday cake, clinking glasses, tumbler glass, croissant, avocado, cucumber, bacon, potato, carrot,
    baguette bread, green salad, shallow pan of food, stuffed flatbread, egg, glass of milk, peanuts, kiwi fruit,
    pancakes, dumpling, fortune cookie, takeout box, bowl with spoon, cup with straw, coconut, broccoli, pie,
    pretzel, cut of meat, sandwich, canned food, leafy green, mango, moon cake, bagel, cheese wedge, cupcake, salt,
    beverage box, garlic, onion, falafel, waffle, butter, mate, ice, bubble tea, blueberries, bell pepper, olive,
    flatbread, tamale, fondue, teapot, pouring liquid, beans, ginger root, pea pod, root vegetable, hot beverage""",
    "places": """cyclone, foggy, night with stars, sunrise over mountains, sunrise, cityscape at dusk, sunset,
    rainbow, bridge at night, water wave, volcano, milky way, globe showing Europe-Africa, globe showing Americas,
    globe showing Asia-Australia, globe with meridians, new moon, waxing crescent moon, first quarter moon, waxing
    gibbous moon, full moon, waning gibbous moon, last quarter moon, waning crescent moon, crescent moon, new moon
    face, first quarter moon face, last quarter moon face, full moon face, sun with face, glowing star, shooting
    star, sun behind small cloud, sun behind large cloud, sun behind rain cloud, cloud with rain, cloud with snow,
    cloud with lightning, tornado, fog, wind face, sun, cloud, comet, sun behind cloud, cloud with lightning and
    rain, star, snowflake, ringed planet, fire, droplet, landslide, seedling, evergreen tree, deciduous tree, palm
    tree, cactus, tulip, cherry blossom, rose, hibiscus, sunflower, blossom, sheaf of rice, herb, white flower,
    bouquet, four leaf clover, shamrock, maple leaf, fallen leaf, leaf fluttering in wind, wilted flower, potted
    plant, lotus, hyacinth, leafless tree, wood, rock, snow-capped mountain, camping, beach with umbrella, building
    construction, houses, cityscape, derelict house, classical building, desert, desert island, national park,
    stadium, house, house with garden, office building, Japanese post office, post office, hospital, bank, hotel,
    love hotel, convenience store, school, department store, factory, Japanese castle, castle, mount fuji, Tokyo
    tower, Statue of Liberty, moai, map of Japan, world map, wedding, station, bus stop, place of worship, hindu
    temple, hut, motorway, railway track, shinto shrine, church, mountain, fountain, tent, kaaba, mosque,
    synagogue, ferris wheel, roller coaster, circus tent, moon viewing ceremony""",
    "objects": """bow and arrow, envelope with arrow, mobile phone with arrow, balloon, diamond with a dot, artist
    palette, card index, card index dividers, folding hand fan, hair pick""",
    "symbols": """light skin tone, medium-light skin tone, medium skin tone, medium-dark skin tone, dark skin tone,
    hot springs, copyright, registered, information, circled M, infinity, warning, high voltage, om, radioactive,
    biohazard, yin yang, wheel of dharma, Aries, Taurus, Gemini, Cancer, Leo, Virgo, Libra, Scorpio, Sagittarius,
    Capricorn, Aquarius, Pisces, Ophiuchus, fleur-de-lis, multiply, plus, minus, divide, sparkles, sparkle,
    eight-spoked asterisk, wavy dash, khanda, menorah, ZZZ, collision, dizzy, sweat droplets, dashing away, hundred
    points, fight cloud, splatter, name badge, trident emblem, musical note, musical notes, antenna bars, cinema,
    vibration mode, mobile phone off, wireless, passport control, customs, baggage claim, left luggage, restroom,
    men's room, women's room, water closet, potable water, non-potable water, children crossing, currency exchange,
    eye in speech bubble, kiss mark, baby symbol, skull and crossbones, check box with check""",
}
CLASS_OF_NAME = {name: kind for kind, names in NAMES_OF_CLASS.items() for name in _names(names)}
