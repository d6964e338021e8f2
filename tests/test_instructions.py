"""The questions and the form of an answer."""

import pytest

from osm_lightning.instructions import BOX_QUESTIONS, MASK_QUESTIONS, TEST_QUESTION, TURN, answer, prompt


def test_19_questions_of_either_kind_all_distinct() -> None:
    assert len(MASK_QUESTIONS) == len(BOX_QUESTIONS) == 19
    assert len({question.lower() for question in MASK_QUESTIONS + BOX_QUESTIONS}) == 38


@pytest.mark.parametrize("question", MASK_QUESTIONS + BOX_QUESTIONS)
def test_question_is_one_clean_line(question: str) -> None:
    assert question == " ".join(question.split())
    assert question[-1] in ".?"


def test_question_says_mask_or_box_but_never_the_other() -> None:
    assert not any("box" in question.lower() for question in MASK_QUESTIONS)
    assert not any(word in question.lower() for question in BOX_QUESTIONS for word in ("mask", "segment"))
    assert all("box" in question.lower() for question in BOX_QUESTIONS)


def test_question_at_test_time_is_the_papers_and_is_trained_on() -> None:
    assert TEST_QUESTION == "What is in the segmentation mask?"
    assert MASK_QUESTIONS[0] == TEST_QUESTION


def test_prompt_hands_the_turn_over() -> None:
    assert prompt(TEST_QUESTION) == "What is in the segmentation mask? Assistant:"
    assert prompt("x") == "x" + TURN


def test_answer_is_lower_case_after_one_space() -> None:
    assert answer("  Traffic Light\n") == " traffic light"
