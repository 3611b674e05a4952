"""Prompts for the speculation benchmark: answers that repeat their prompt, and answers that do not."""

from __future__ import annotations

_CODE = (
    """def moving_average(values, window):
    if window <= 0:
        raise ValueError("window must be positive")
    result = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        if index >= window - 1:
            result.append(total / window)
    return result""",
    """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from empty stack")
        return self.items.pop()

    def peek(self):
        return self.items[-1] if self.items else None""",
    """SELECT customers.name, orders.created_at, orders.total
FROM customers
JOIN orders ON orders.customer_id = customers.id
WHERE orders.total > 100 AND orders.status = 'paid'
ORDER BY orders.created_at DESC
LIMIT 20;""",
)
_NEWS = (
    "The city council voted on Tuesday to close the old harbour bridge to cars from the first of May. "
    '"We can\'t repair it and keep it open at the same time," said the mayor, Helen Ortiz. '
    "Buses and bicycles will still be allowed to cross. The repairs are expected to take eleven months "
    "and to cost about four million euros, most of which is paid by the region.",
    "Researchers at the university have counted more than three hundred species of moth in the city's parks. "
    '"Most of them were thought to have left long ago," said Dr Adam Weiss, who led the project. '
    "The team put lamps and white sheets in twelve parks for two summers and photographed whatever came. "
    "Parks where the grass is cut only twice a year had almost twice as many species as the others.",
)

REPEATING = (
    *(f"Rename one variable in this code and print the whole code again.\n\n{code}" for code in _CODE),
    *(f"Copy the following code exactly, then say what it does.\n\n{code}" for code in _CODE),
    *(f"Summarise this article. Quote its sentences word for word where you can.\n\n{news}" for news in _NEWS),
)
ORDINARY = (
    "Write a short story about a lighthouse keeper who is afraid of the dark.",
    "Explain to a child why the sky is blue.",
    "What are the advantages and disadvantages of working from home?",
    "Describe a typical day in the life of a medieval blacksmith.",
    "Give me some advice for my first job interview.",
    "How does a refrigerator keep food cold?",
    "Write a letter to a friend about a journey through the mountains.",
    "Compare the climates of Norway and Morocco.",
)
