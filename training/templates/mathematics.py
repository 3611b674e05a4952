"""Word problems in arithmetic, from templates: prompts to train a draft on, none of them from an evaluation set."""

from __future__ import annotations

from random import Random

NAMES = (
    "Anna Ben Clara David Ella Farid Grace Hugo Iris Jonas Kira Liam Maya Noah Olga Pablo Quinn Rosa Sam Tara Umar Vera "
    "Will Xenia Yusuf Zoe Amir Bella Carlos Diana Emil Fiona George Hana Ivan Julia Karl Lena Marco Nina Oscar Paula"
).split()
THINGS = (
    "apples oranges books pencils marbles stickers cookies eggs balloons stamps shells cards cupcakes tickets coins "
    "bottles flowers candles notebooks tomatoes sandwiches photos bracelets toys chairs lamps bags boxes"
).split()
PLACES = "shop school bakery farm library garden factory museum market office warehouse bookstore".split()
WORKERS = "workers students farmers painters bakers teachers nurses drivers".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ANIMALS = "chickens cows sheep goats rabbits ducks horses dogs cats".split()

TEMPLATES = (
    "{A} has {n} {things}. {B} gives {A} {m} more {things}, and then {A} gives {k} of them to {C}. How many {things} does {A} have now?",
    "{A} buys {k} {things} for ${p} each and {j} {other} for ${q} each. How much does {A} spend in total?",
    "A {place} sells {n} {things} on {day} and twice as many on the next day. How many {things} does it sell in the two days?",
    "{A} reads {k} pages of a book every day. The book has {big} pages. How many days does {A} need to finish it?",
    "There are {n} {things} in a box. {A} takes half of them and {B} takes {k}. How many {things} are left in the box?",
    "{A} earns ${p} an hour and works {k} hours a day for {j} days. How much money does {A} earn?",
    "{A} has {k} times as many {things} as {B}. {B} has {m} {things}. How many {things} do they have together?",
    "A train travels at {speed} miles per hour for {k} hours, and then at {speed2} miles per hour for {j} hours. How far does it travel in total?",
    "A recipe needs {k} cups of flour for {m} cookies. How many cups of flour does {A} need for {mm} cookies?",
    "{A} saves ${p} every week. After {n} weeks {A} spends ${q} on {things}. How much money does {A} have left?",
    "A farm has {n} {animals} and {m} {animals2}. Each of the {animals} eats {k} pounds of food a day and each of the {animals2} eats {j} pounds. How many pounds of food does the farm need a day?",
    "{A}'s {place} has {k} shelves with {n} {things} on each. {m} of the {things} are sold. How many {things} are left?",
    "{A} is {k} years older than {B}. {B} is twice as old as {C}, who is {j} years old. How old is {A}?",
    "A class of {n} students is split into groups of {j}. Each group gets {k} {things}. How many {things} are needed?",
    "{A} runs {k} miles on {day} and {j} miles on each of the {m} days after it. How many miles does {A} run altogether?",
    "A shirt costs ${big}. It is on sale at {percent}% off. How much does {A} pay for {k} shirts?",
    "{k} {workers} can finish {m} {things} in one hour. How many {things} can they finish in {j} hours?",
    "{A} pours {n} liters of water into {k} equal bottles. Then {B} drinks {j} of the bottles. How many liters are left?",
    "{A} has ${big}. {A} spends a quarter of it on {things} and ${q} on {other}. How much money is left?",
    "A rectangle is {n} meters long and {k} meters wide. What are its area and its perimeter?",
    "In a {place} there are {n} people. {percent}% of them are children. How many adults are there?",
    "{A} bakes {n} {things} and packs them in boxes of {j}. Each box sells for ${p}. How much money does {A} get if all the boxes are sold?",
    "{A} and {B} share ${big} so that {A} gets ${q} more than {B}. How much does each of them get?",
    "On {day}, {n} people visit the {place}. On the next day there are {m} fewer, and on the third day there are {k} times as many as on the second. How many people visit in the three days?",
    "{A} needs ${big} for a bike. {A} has already saved ${q} and gets ${p} for every lawn. How many lawns does {A} have to mow?",
    "A tank holds {big} gallons. It is filled at {k} gallons a minute and leaks {one} gallon a minute. How many minutes does it take to fill?",
    "What is {n} times {m}, minus {k}?",
    "Solve for x: {k}x + {m} = {big}.",
    "What is {percent}% of {big}?",
    "The average of {k} numbers is {m}. What is their sum?",
    "{A} plants {k} rows of {things} with {n} in each row. {percent}% of them do not grow. How many grow?",
    "A car uses {k} gallons of fuel for {m} miles. Fuel costs ${p} a gallon. How much does {A} pay to drive {mm} miles?",
    "If {A} sleeps {k} hours every night, how many hours does {A} sleep in {j} weeks?",
    "{A} has {n} {things}, {B} has {m} fewer than {A}, and {C} has as many as {A} and {B} together. How many {things} do the three have in total?",
)  # fmt: skip
ENDINGS = ("", "", "", "", " Explain your answer.", " Think step by step.", " Show your work.", " Give only short steps.")


def prompt(random: Random) -> str:
    """A word problem: any template with any numbers. Nobody checks whether the answer is whole or wise."""
    first, second, third = random.sample(NAMES, 3)
    things, other = random.sample(THINGS, 2)
    animals, animals2 = random.sample(ANIMALS, 2)
    m = random.randrange(4, 40)
    text = random.choice(TEMPLATES).format(
        A=first,
        B=second,
        C=third,
        things=things,
        other=other,
        animals=animals,
        animals2=animals2,
        place=random.choice(PLACES),
        workers=random.choice(WORKERS),
        day=random.choice(DAYS),
        n=random.randrange(10, 120),
        m=m,
        mm=m * random.randrange(2, 6),
        k=random.randrange(2, 13),
        j=random.randrange(2, 10),
        one=1,
        p=random.randrange(2, 30),
        q=random.randrange(5, 60),
        big=random.randrange(5, 60) * random.choice((4, 5, 10, 12)),
        percent=random.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75)),
        speed=random.randrange(20, 80),
        speed2=random.randrange(20, 80),
    )
    return text + random.choice(ENDINGS)
