"""The concepts that composed scenes show (see `mmjax.data.scenes`), and their drawings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from mmjax.data import openmoji

# Names as the package `emoji` writes them, all of them countable and singular.
GROUPS = {
    "animal": """mouse, ox, cow, tiger, leopard, rabbit, cat, crocodile, dragon, whale, snail,
        snake, horse, ram, goat, ewe, monkey, rooster, chicken, dog, poodle, pig, boar, elephant,
        octopus, ant, honeybee, lady beetle, fish, tropical fish, blowfish, turtle, baby chick,
        bird, phoenix, penguin, koala, camel, dolphin, frog, hamster, wolf, bear, polar bear, panda,
        chipmunk, crab, lion, scorpion, turkey, unicorn, eagle, duck, bat, shark, owl, fox,
        butterfly, deer, gorilla, lizard, rhinoceros, shrimp, squid, giraffe, zebra, hedgehog,
        sauropod, cricket, kangaroo, llama, peacock, hippopotamus, parrot, raccoon, lobster,
        mosquito, badger, swan, mammoth, dodo, sloth, otter, orangutan, skunk, flamingo, oyster,
        beaver, bison, seal, fly, worm, beetle, cockroach, goose, orca, moose, donkey, jellyfish,
        spider, dove, bug""",
    "food": """tomato, eggplant, watermelon, tangerine, lemon, lime, banana, pineapple, pear,
        peach, strawberry, mushroom, hot pepper, bell pepper, olive, avocado, cucumber, potato,
        carrot, onion, coconut, mango, pea pod, chestnut, hamburger, pizza, hot dog, taco, burrito,
        sandwich, poultry leg, rice cracker, rice ball, fried shrimp, doughnut, cookie, candy,
        lollipop, custard, shortcake, birthday cake, cupcake, pie, pretzel, bagel, croissant,
        waffle, egg, dumpling, fortune cookie, bento box, baguette bread, cheese wedge, kiwi fruit,
        moon cake, wine glass, cocktail glass, tropical drink, beer mug, baby bottle, teapot, jar,
        honey pot, beverage box, tumbler glass, flatbread, tamale""",
    "plant": """seedling, evergreen tree, deciduous tree, palm tree, cactus, tulip, cherry blossom,
        rose, hibiscus, sunflower, maple leaf, shamrock, potted plant, lotus, hyacinth,
        leafless tree, bouquet, christmas tree, fallen leaf, feather, empty nest""",
    "place": """sun, cloud, comet, rainbow, volcano, crescent moon, star, tornado, snowflake,
        snowman, desert island, castle, house, church, mosque, hospital, bank, hotel, school,
        factory, stadium, tent, hut, fountain, ferris wheel, roller coaster, carousel horse,
        circus tent, barber pole, tokyo tower, moai, water wave, ringed planet, cityscape,
        shinto shrine, office building, department store, headstone, rock""",
    "vehicle": """airplane, helicopter, rocket, locomotive, train, tram, ambulance, fire engine,
        police car, taxi, automobile, delivery truck, pickup truck, tractor, monorail, ship,
        speedboat, sailboat, canoe, bicycle, motorcycle, racing car, motor scooter,
        kick scooter, auto rickshaw, sled, flying saucer, satellite, skateboard, parachute,
        railway car, wheel, ring buoy, anchor, fuel pump""",
    "play": """soccer ball, baseball, basketball, volleyball, american football, bullseye, game die,
        boxing glove, curling stone, goal net, flying disc, ice skate, roller skate, trophy,
        sports medal, military medal, fishing pole, kite, yo-yo, boomerang, magic wand, teddy bear,
        puzzle piece, balloon, drum, guitar, violin, trumpet, saxophone, accordion, banjo, flute,
        harp, trombone, musical keyboard, microphone, slot machine, joystick, video game,
        chess pawn, crystal ball, mirror ball, jack-o-lantern, firecracker, party popper,
        robot, ghost, alien, ogre, goblin, clown face""",
    "clothing": """crown, billed cap, graduation cap, military helmet, necktie, t-shirt,
        dress, kimono, bikini, scarf, coat, safety vest, purse, handbag, clutch bag, backpack,
        running shoe, high-heeled shoe, hiking boot, flat shoe, thong sandal, sari, lipstick, ring,
        ribbon, briefcase, gem stone, umbrella, running shirt, diving mask""",
    "device": """watch, alarm clock, stopwatch, mantelpiece clock, telephone, keyboard, laptop,
        printer, computer mouse, floppy disk, optical disk, television, radio, camera,
        movie camera, film projector, videocassette, mobile phone, pager, fax machine,
        satellite antenna, battery, electric plug, light bulb, flashlight, candle, diya lamp,
        headphone, telescope, microscope, thermometer, test tube, petri dish, alembic, syringe,
        stethoscope, compass, abacus, megaphone, postal horn, clapper board""",
    "thing": """key, bell, hammer, axe, pick, wrench, screwdriver, carpentry saw, shovel, ladder,
        hook, magnet, brick, toolbox, clamp, gear, kitchen knife, dagger, bomb,
        shield, fire extinguisher, adhesive bandage, crutch, tooth, bone, skull, chair, bed, toilet,
        bathtub, shower, door, window, mirror, broom, basket, bucket, sponge, plunger, toothbrush,
        razor, lotion bottle, mouse trap, sewing needle, safety pin, hair pick, knot, shopping cart,
        money bag, coin, package, envelope, postbox, newspaper, scroll, notebook,
        calendar, clipboard, pushpin, paperclip, straight ruler, triangular ruler, pencil, crayon,
        fountain pen, paintbrush, artist palette, framed picture, file cabinet, file folder,
        wastebasket, label, receipt, wrapped gift, wind chime, carp streamer, droplet, world map,
        balance scale, coffin, amphora, spiral shell, spider web, treasure chest, spoon, ticket,
        bus stop, eye, ear, nose, mouth, tongue, brain""",
}
_GROUP_OF = {
    " ".join(name.split()): group for group, names in GROUPS.items() for name in names.split(",")
}


# The concepts of "tiny": those that a model of a few minutes can learn by name.
TINY = """cat, dog, rabbit, elephant, frog, fish, butterfly, owl, penguin, tomato, banana,
    strawberry, carrot, pizza, egg, cactus, rose, sun, star, rainbow, house, rocket, train, bicycle,
    basketball, guitar, robot, crown, umbrella, key, bell, chair"""

# The concepts of "small": familiar things that look like nothing else here.
SMALL = """cat, dog, cow, pig, horse, monkey, rabbit, tiger, lion, elephant, bear, panda, fox, frog,
    snake, turtle, fish, whale, octopus, crab, snail, butterfly, spider, owl, duck, penguin,
    giraffe, zebra, tomato, lemon, banana, pineapple, pear, strawberry, watermelon, mushroom,
    carrot, pizza, hamburger, sandwich, egg, cookie, doughnut, cupcake, lollipop, cactus, rose,
    sunflower, sun, cloud, star, rainbow, volcano, tornado, snowflake, snowman, castle, house,
    church, tent, airplane, helicopter, rocket, train, taxi, tractor, ship, bicycle, motorcycle,
    anchor, basketball, trophy, kite, drum, guitar, trumpet, balloon, robot, ghost, crown,
    necktie, scarf, umbrella, watch, ring, telephone, camera, television, battery, candle, key,
    bell, hammer, ladder, magnet, shield, tooth, bone, chair, door, bucket, pencil, envelope,
    coin, brain"""


class Variant(NamedTuple):
    """Which concepts a data set has.

    Attributes:
      names: of the concepts.
      heldout: how many of their bases are held out.
      words: how many of `mmjax.data.scenes.WORDS` signs have.
      tiles: of each concept, in "scene_tiles".
    """

    names: frozenset[str]
    heldout: int
    words: int
    tiles: int


def _names(text: str) -> frozenset[str]:
    return frozenset(" ".join(name.split()) for name in text.split(","))


# By the name of the data set's config: "scenes/small".
VARIANTS = {
    "full": Variant(frozenset(_GROUP_OF), heldout=80, words=24, tiles=48),
    "small": Variant(_names(SMALL), heldout=21, words=24, tiles=192),
    "tiny": Variant(_names(TINY), heldout=10, words=8, tiles=192),
}


class Picture(NamedTuple):
    """A concept that scenes show: `glyph` RGBA, cropped to the drawing."""

    name: str
    group: str
    base: str
    glyph: Image.Image


def list_pictures(variant: str = "full") -> list[Picture]:
    """The concepts of a variant with their drawings, in the order of OpenMoji's.

    Raises:
      MissingPackageError: the packages of the extra `demo` are not installed.
      ValueError: a name that the installed version of `emoji` does not know.
    """
    names = VARIANTS[variant].names
    concepts = [concept for concept in openmoji.list_concepts() if concept.name in names]
    missing = names - {concept.name for concept in concepts}
    if missing:
        raise ValueError(
            f"The installed package `emoji` has no {sorted(missing)}: the scenes need the versions "
            "that `pip install -e .[demo]` installs."
        )
    painter = openmoji.GlyphPainter()
    pictures = []
    for concept in concepts:
        glyph = painter.draw(concept.emoji)
        box = glyph.getchannel("A").getbbox()
        pictures.append(
            Picture(concept.name, _GROUP_OF[concept.name], concept.base, glyph.crop(box))
        )
    return pictures


def split_pictures(
    pictures: Sequence[Picture], variant: str = "full"
) -> tuple[list[Picture], list[Picture]]:
    """(seen, held out): all concepts of a base on one side."""
    held = openmoji.heldout_bases(pictures, VARIANTS[variant].heldout)
    return (
        [picture for picture in pictures if picture.base not in held],
        [picture for picture in pictures if picture.base in held],
    )
