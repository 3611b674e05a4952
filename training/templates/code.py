"""Small programming tasks, from templates: prompts to train a draft on, none of them from an evaluation set."""

# ruff: noqa: E501  templates are read best whole
from __future__ import annotations

from random import Random

# (name, parameters, result, what it does); {x} is drawn anew for every prompt
TASKS = (
    ("sum_{x}_numbers", "numbers: List[int]", "int", "Return the sum of the {x} numbers in the list."),
    ("count_{c}", "text: str", "int", "Count how many times the letter '{C}' appears in the text."),
    ("largest_below", "values: List[int]", "int", "Return the largest value that is smaller than {n}, or -1 if there is none."),
    ("reverse_words", "sentence: str", "str", "Return the sentence with its words in reverse order."),
    ("every_{o}", "items: list", "list", "Return every {o} item of the list."),
    ("is_multiple", "value: int", "bool", "Return True if the value is a multiple of {k} and not of {j}."),
    ("merge_lists", "first: List[int], second: List[int]", "List[int]", "Merge two sorted lists into one sorted list."),
    ("word_lengths", "sentence: str", "Dict[str, int]", "Map each word of the sentence to its length."),
    ("rotate_{d}", "items: list, steps: int", "list", "Rotate the list to the {d} by the given number of steps."),
    ("longest_word", "words: List[str]", "str", "Return the longest word. If several are as long, return the first."),
    ("running_total", "numbers: List[float]", "List[float]", "Return the list of running totals of the numbers."),
    ("is_sorted", "values: List[int]", "bool", "Check whether the values are sorted in {s} order."),
    ("flatten", "nested: List[List[int]]", "List[int]", "Flatten a list of lists into one list."),
    ("digits_sum", "number: int", "int", "Return the sum of the digits of the number."),
    ("factorial_of", "n: int", "int", "Return the factorial of n."),
    ("fibonacci_upto", "limit: int", "List[int]", "Return all Fibonacci numbers below the limit."),
    ("filter_longer", "words: List[str]", "List[str]", "Keep only the words that are longer than {k} characters."),
    ("average", "numbers: List[float]", "float", "Return the average of the numbers, or 0.0 for an empty list."),
    ("remove_duplicates", "items: list", "list", "Remove duplicates and keep the order of first appearance."),
    ("char_frequency", "text: str", "Dict[str, int]", "Return how often each character appears in the text."),
    ("capitalize_all", "words: List[str]", "List[str]", "Capitalize the first letter of every word."),
    ("power_of", "base: int, exponent: int", "int", "Raise the base to the exponent without using the ** operator."),
    ("binary_search", "values: List[int], target: int", "int", "Return the index of the target in the sorted list, or -1."),
    ("is_anagram", "first: str, second: str", "bool", "Check whether the two words are anagrams of each other."),
    ("celsius_to", "degrees: float", "float", "Convert degrees Celsius to Fahrenheit."),
    ("chunks", "items: list, size: int", "List[list]", "Split the list into chunks of the given size."),
    ("common_items", "first: list, second: list", "list", "Return the items that are in both lists, in {s} order."),
    ("transpose", "matrix: List[List[int]]", "List[List[int]]", "Transpose the matrix."),
    ("vowels_removed", "text: str", "str", "Remove all vowels from the text."),
    ("second_{s}", "values: List[int]", "Optional[int]", "Return the second smallest value, or None if there is none."),
    ("pairs_with_sum", "values: List[int], target: int", "List[tuple]", "Find all pairs of values whose sum is the target."),
    ("group_by_length", "words: List[str]", "Dict[int, List[str]]", "Group the words by their length."),
    ("leap_years", "start: int, end: int", "List[int]", "List the leap years from start to end."),
    ("greatest_divisor", "a: int, b: int", "int", "Return the greatest common divisor of a and b."),
    ("primes_between", "low: int, high: int", "List[int]", "Return all prime numbers between low and high."),
    ("compress", "text: str", "str", "Compress runs of the same character, so that 'aaab' becomes 'a3b1'."),
    ("to_snake_case", "name: str", "str", "Convert a camelCase name to snake_case."),
    ("matrix_sum", "matrix: List[List[int]]", "int", "Return the sum of all entries of the matrix that are greater than {n}."),
    ("only_{p}", "numbers: List[int]", "List[int]", "Return only the {p} numbers of the list."),
    ("closest_to", "values: List[float], target: float", "float", "Return the value that is closest to the target."),
)  # fmt: skip
TOPICS = (
    "a stack", "a queue", "a bank account", "a linked list", "a shopping cart", "a timer", "a to-do list", "a library catalogue",
    "a phone book", "a simple calculator", "a deck of cards", "a matrix", "a temperature sensor", "a text file reader",
    "a cache with a size limit", "a binary tree", "an inventory", "a student and their grades", "a parking lot", "a tic-tac-toe board",
)  # fmt: skip
LANGUAGES = ("Python", "Python", "Python", "JavaScript", "Java", "C++", "SQL")
ASKS = (
    "Complete the following Python function.\n\n{code}",
    "Complete this function:\n\n```python\n{code}```",
    "{code}",
    "Write a Python function `{name}({parameters})`. {what}",
    "Write a {language} function that does this: {what}",
    "Write a program in {language}: {what} Explain how it works.",
    "Write a {language} class for {topic}.",
    "How do I write {topic} in {language}? Show an example.",
)


def prompt(random: Random) -> str:
    """A task, as a function to complete or in words."""
    draw = {
        "x": random.choice(("even", "odd", "positive", "negative", "first", "last")),
        "c": random.choice("aeiou"),
        "C": random.choice("aeiourst"),
        "n": random.randrange(5, 100),
        "k": random.randrange(2, 9),
        "j": random.randrange(3, 12),
        "o": random.choice(("second", "third", "fourth")),
        "d": random.choice(("left", "right")),
        "s": random.choice(("ascending", "descending")),
        "p": random.choice(("even", "odd", "positive", "prime")),
    }
    name, parameters, result, what = (part.format(**draw) for part in random.choice(TASKS))
    return random.choice(ASKS).format(
        code=_stub(random, name, parameters, result, what),
        name=name,
        parameters=parameters,
        what=what,
        language=random.choice(LANGUAGES),
        topic=random.choice(TOPICS),
    )


def _stub(random: Random, name: str, parameters: str, result: str, what: str) -> str:
    """A function's head and docstring, sometimes with the imports that its types need."""
    imports = "from typing import Dict, List, Optional\n\n\n" if random.random() < 0.5 else ""
    quotes = random.choice(('"""', '"""', "'''"))
    return f"{imports}def {name}({parameters}) -> {result}:\n    {quotes}{what}\n    {quotes}\n"
