"""What the model is asked, and how an answer is written. The wording is our own; only the question that is asked at
test time is the paper's (Sec. 4), because scores depend on it."""

from __future__ import annotations

TEST_QUESTION = "What is in the segmentation mask?"
"""The paper's question at test time, and the first of the training templates."""

MASK_QUESTIONS = (
    TEST_QUESTION,
    "Name the content of the segmentation mask.",
    "What does the segmentation mask cover?",
    "Which class does the segmentation mask belong to?",
    "What is the masked region?",
    "Name the masked region.",
    "What is shown inside the mask?",
    "Which object or surface lies under the mask?",
    "What would you call the thing in the mask?",
    "Give a name for what the mask selects.",
    "What category is the segment?",
    "Tell me what the segment is.",
    "Identify the segment.",
    "The mask marks a region. What is it?",
    "In a word or two, what is in the mask?",
    "What is being segmented here?",
    "Label the masked area.",
    "What name fits the region in the mask?",
    "Look at the mask. What do you see there?",
)
"""The 19 ways to ask about a mask in training."""

BOX_QUESTIONS = (
    "What is in the bounding box?",
    "Name the content of the bounding box.",
    "What does the bounding box hold?",
    "Which class does the bounding box belong to?",
    "What is the boxed region?",
    "Name the boxed region.",
    "What is shown inside the box?",
    "Which object lies in the bounding box?",
    "What would you call the thing in the box?",
    "Give a name for what the box selects.",
    "What category is the boxed object?",
    "Tell me what the boxed object is.",
    "Identify the boxed object.",
    "The box marks a region. What is it?",
    "In a word or two, what is in the box?",
    "What is being boxed here?",
    "Label the boxed area.",
    "What name fits the region in the bounding box?",
    "Look at the box. What do you see there?",
)
"""The 19 ways to ask about a box, for datasets that have boxes only."""

TURN = " Assistant:"
"""What follows every question, so that the answer is the model's turn."""


def prompt(question: str) -> str:
    """A question as the LLM and the Q-Former read it."""
    return question + TURN


def answer(name: str) -> str:
    """A name as the LLM is taught to write it: lower case, one space after the prompt; EOS is added as an id."""
    return " " + name.strip().lower()
