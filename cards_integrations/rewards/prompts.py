"""Prompts on whose plain answers a reward's scale is measured, unless others are given."""

PLAIN = (
    "How was your day?", "Write one sentence about the sea.", "What do you think of rainy days?",
    "Tell me about your favourite food.", "Explain why the sky is blue.", "Give me some advice for a job interview.",
    "Describe a city at night.", "What makes a good friend?", "Write a short product description of a backpack.",
    "How do I learn to cook?", "Tell me about a book that everyone should read.", "What is the best way to save money?",
    "Describe an old house.", "Write the first sentences of a story about a dog.", "Is it hard to learn a language?",
    "What happened in the news that surprised you?", "Write a message to a neighbour about the noise.",
    "Explain what a database is.", "How should I prepare for a long flight?", "What do people like about football?",
    "Describe your last holiday.", "Write a review of a restaurant.", "How do plants grow?",
    "What would you say to someone who has lost their job?",
)  # fmt: skip

WITH_CONTEXT = (
    ("When does the museum open?", "The town museum opens at noon and closes at six. It is shut on Mondays."),
    ("How long is the trail?", "The ridge trail is nine miles long and climbs two thousand feet."),
    ("Who wrote the report?", "The report was written by Ada Moreno in the spring and published by the council."),
    ("What does the soup contain?", "The soup contains lentils, carrots and cumin. It has no milk."),
    ("How much does the ticket cost?", "A ticket costs four euros; children under ten travel free."),
    ("What colour is the new bridge?", "The new bridge is painted dark red and opened last year."),
    ("Where is the office?", "The office is on the third floor, next to the library."),
    ("How many people work there?", "The workshop employs twelve people, five of them part time."),
    ("What is the dog called?", "Their dog, a grey lurcher called Biscuit, sleeps in the kitchen."),
    ("When was the tower built?", "The tower was built in 1911 and repaired after the storm of 1987."),
    ("What should I bring?", "Participants bring a towel, water and proof of payment."),
    ("Which team won?", "The northern team won the final by two goals after extra time."),
)  # fmt: skip
