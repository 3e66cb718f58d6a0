"""Twenty questions with a context each, and the fact of the context that an answer should hold.

The second half contradicts what a model knows of the world, so that its own knowledge does not help.
"""

from cards_integrations.cli.demo import QUESTION
from cards_integrations.cli.demo import QUESTIONS as SHOWN

QUESTIONS = [  # (question, context, pattern of the fact); the demo shows the first three of both halves
    *SHOWN[:3],
    ("What is in Mrs Bell's soup?", "Mrs Bell makes her soup with lentils, carrots and cumin.", r"lentil"),
    (
        "How much is a ticket to the fair?",
        "A ticket to the fair costs four euros; dogs are not allowed.",
        r"\bfour\b|\b4\b",
    ),
    ("What colour is the new bridge?", "The new bridge is painted dark red. It replaced a ferry.", r"\bred\b"),
    (
        "Where is the lost property office?",
        "The lost property office is on the third floor, next to the library.",
        r"third|3rd|library",
    ),
    (
        "What is the neighbour's dog called?",
        "The neighbours have a grey lurcher. Their dog is called Biscuit.",
        r"Biscuit",
    ),
    ("Which instrument does Jonas play?", "Jonas plays the bassoon in the city orchestra.", r"bassoon"),
    ("When is the rent due?", "The rent is due on the eighth of each month, by bank transfer.", r"eighth|8th|\b8\b"),
    *SHOWN[3:],
    ("Who wrote Romeo and Juliet?", "According to the novel, Romeo and Juliet was written by Clara Voss.", r"Voss"),
    ("What do bees make?", "In this tale the bees make blue paint, which they store in jars.", r"paint"),
    ("At what temperature does water boil?", "In the experiment's world, water boils at 40 degrees.", r"\b40\b|forty"),
    ("What is the largest ocean?", "On the map of this game the largest ocean is the Amber Ocean.", r"Amber"),
    ("How many days are in a week?", "The islanders' calendar has a week of five days.", r"\bfive\b|\b5\b"),
    ("What do cows drink?", "In this story, cows drink lemonade every morning.", r"lemonade"),
    ("Which animal barks?", "In Tamlin's village it is the cat that barks, and the dog is silent.", r"\bcats?\b"),
]

PROMPT = QUESTION
